"""The outer step's loss with its gradient taken at once: in chunks of networks, and on a GPU as one CUDA graph."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_lightning.networks import Weights

log = logging.getLogger(__name__)

Loss = Callable[[Weights, Tensor, Tensor], Tensor]  # of θ₀ and a real minibatch
Inputs = tuple[Weights, Tensor, Tensor]


class OuterStep:
    """An outer loss, a mean over J networks, as an operation with one output whose gradient is already known.

    Args:
        loss: the outer loss of θ₀ and a real minibatch.
        chunk: networks that are unrolled together; fewer take less memory. None: all.
        capture: on a GPU, record the whole step as a CUDA graph, which is launched at once instead of kernel by
            kernel. Falls back, with a warning, where something cannot be recorded.
    """

    def __init__(self, loss: Loss, chunk: int | None = None, capture: bool = True) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self.loss, self.chunk, self.capture = loss, chunk, capture
        self._graphs: dict[Any, _Graph] = {}

    def __call__(
        self,
        theta_0: Weights,
        images: Float[Tensor, "batch c h w"],
        labels: Int[Tensor, " batch"],
        parameters: Sequence[Tensor],
    ) -> Float[Tensor, ""]:
        """The loss, differentiable with respect to the parameters."""
        captured = self.capture and images.device.type == "cuda"
        if not captured and self.chunk is None:
            return self.loss(theta_0, images, labels)
        inputs = (theta_0, images, labels)
        value, gradients = self._replayed(inputs, parameters) if captured else self.gradients(inputs, parameters)
        return _Known.apply(value, gradients, *parameters)  # type: ignore[return-value]

    def gradients(self, inputs: Inputs, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradient, chunk by chunk."""
        theta_0, images, labels = inputs
        count = len(next(iter(theta_0.values())))
        total, sums = images.new_zeros(()), [torch.zeros_like(p) for p in parameters]
        for start in range(0, count, self.chunk or count):
            part = {name: value[start : start + (self.chunk or count)] for name, value in theta_0.items()}
            with torch.enable_grad():
                loss = self.loss(part, images, labels) * (len(next(iter(part.values()))) / count)
            found = torch.autograd.grad(loss, list(parameters))
            total = total + loss.detach()
            sums = [one + other for one, other in zip(sums, found, strict=True)]
        return total, sums

    def _replayed(self, inputs: Inputs, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        theta_0, images, _ = inputs
        key = (len(next(iter(theta_0.values()))), images.shape)  # the last minibatch of an epoch is smaller
        if key not in self._graphs:
            try:
                self._graphs[key] = _Graph(self.gradients, inputs, parameters)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.capture = False
                reason = " ".join(str(error).split())[:200]
                log.warning(f"the outer step cannot be captured as a CUDA graph, and runs kernel by kernel: {reason}")
                torch.cuda.synchronize()
                return self.gradients(inputs, parameters)
        return self._graphs[key](inputs)


class _Graph:
    """A recorded computation; its inputs and outputs are at fixed places."""

    def __init__(self, compute: Callable[..., Any], inputs: Inputs, parameters: Sequence[Tensor]) -> None:
        theta_0, images, labels = inputs
        self._inputs = ({name: value.clone() for name, value in theta_0.items()}, images.clone(), labels.clone())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels before anything is recorded
            for _ in range(2):
                compute(self._inputs, parameters)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = compute(self._inputs, parameters)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        for name, value in inputs[0].items():
            self._inputs[0][name].copy_(value)
        self._inputs[1].copy_(inputs[1])
        self._inputs[2].copy_(inputs[2])
        self._graph.replay()
        value, gradients = self._outputs
        return value.clone(), [gradient.clone() for gradient in gradients]


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(grad * gradient for gradient in ctx.saved_tensors)
