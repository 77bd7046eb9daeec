"""The gradient of an outer step: in chunks of networks, and on a GPU as one CUDA graph."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dd_lightning.networks import Weights, count, split

log = logging.getLogger(__name__)

Loss = Callable[[Weights, Tensor, Tensor], Tensor]  # of θ (and the state of its optimizer) and a real minibatch
Inputs = tuple[Weights, Tensor, Tensor]
Outputs = tuple[Tensor, list[Tensor]]  # the loss, and its gradient with respect to each parameter


class OuterStep:
    """The gradient of an outer loss, a mean over networks, as a sum over them.

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

    def __call__(self, inputs: Inputs, parameters: Sequence[Tensor]) -> Outputs:
        """The sum of the networks' losses, and its gradient.

        In double precision, in which such sums are exact but for the last bits: the networks may be split over
        processes in any way.
        """
        theta_0, images, _ = inputs
        if not self.capture or images.device.type != "cuda":
            return self.gradients(inputs, parameters)
        key = (count(theta_0), images.shape)  # the last minibatch of an epoch is smaller
        if key not in self._graphs:
            try:
                self._graphs[key] = _Graph(lambda fixed: self.gradients(fixed, parameters), inputs)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.capture = False
                reason = " ".join(str(error).split())[:200]
                log.warning(f"the outer step cannot be captured as a CUDA graph, and runs kernel by kernel: {reason}")
                torch.cuda.synchronize()
                return self.gradients(inputs, parameters)
        return self._graphs[key](inputs)

    def gradients(self, inputs: Inputs, parameters: Sequence[Tensor]) -> Outputs:
        """The same, chunk by chunk and kernel by kernel."""
        theta_0, images, labels = inputs
        # Metal has no double precision.
        wide = torch.float32 if images.device.type == "mps" else torch.float64
        total = images.new_zeros((), dtype=wide)
        sums = [torch.zeros_like(parameter, dtype=wide) for parameter in parameters]
        for part in split(theta_0, self.chunk or count(theta_0)):
            with torch.enable_grad():
                loss = self.loss(part, images, labels)
            # Of the leaves only the parameters: the gradient of θ₀ would cost one more Hessian-vector product.
            found = torch.autograd.grad(loss, list(parameters))
            networks = count(part)
            total = total + networks * loss.detach().to(wide)
            sums = [one + networks * other.to(wide) for one, other in zip(sums, found, strict=True)]
        return total, sums


class _Graph:
    """A recorded computation; its inputs and outputs are at fixed places."""

    def __init__(self, compute: Callable[[Inputs], Outputs], inputs: Inputs) -> None:
        theta_0, images, labels = inputs
        self._inputs = ({name: value.clone() for name, value in theta_0.items()}, images.clone(), labels.clone())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels before anything is recorded
            for _ in range(2):
                compute(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = compute(self._inputs)

    def __call__(self, inputs: Inputs) -> Outputs:
        for name, value in inputs[0].items():
            self._inputs[0][name].copy_(value)
        self._inputs[1].copy_(inputs[1])
        self._inputs[2].copy_(inputs[2])
        self._graph.replay()
        value, gradients = self._outputs
        return value.clone(), [gradient.clone() for gradient in gradients]
