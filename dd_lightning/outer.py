"""The outer loss: trained networks on real pictures (Algorithm 1, line 7)."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from dd_lightning.checks import check_choice
from dd_lightning.networks import Weights, evaluating, memory_format, stack, unstack

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class OuterLoss:
    """Mean objective of J trained networks on one real minibatch, in eval mode.

    Only first derivatives are needed here, so each network's gradient is taken at once, and its graph is gone before
    the next network's is made: memory does not grow with J.

    Args:
        objective: of logits [init, batch, classes] and labels [batch]; a mean over both.
        precision: of the networks' layers: float32 (what the weights are in), or bfloat16 by autocast, which moves the
            gradient by less than the choice of the minibatch does and halves the time.
    """

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], precision: str = "float32") -> None:
        check_choice("precision", precision, PRECISIONS)
        self.objective, self.dtype = objective, PRECISIONS[precision]

    def __call__(
        self, network: nn.Module, theta: Weights, images: Float[Tensor, "batch c h w"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        images = images.to(memory_format=memory_format(network, images))

        def loss(single: dict[str, Tensor]) -> Tensor:
            with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
                logits = functional_call(network, single, (images,))
            return self.objective(logits.to(images.dtype)[None], labels)

        with evaluating(network):
            return _MeanLoss.apply(loss, list(theta), *theta.values())  # type: ignore[return-value]


class _MeanLoss(torch.autograd.Function):
    """Mean of a loss over J networks, with its gradient taken on the way."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[[dict[str, Tensor]], Tensor], names: list[str], *theta: Tensor) -> Tensor:
        losses, gradients = [], []
        for single in unstack(dict(zip(names, theta, strict=True))):
            leaves = {name: value.detach().requires_grad_() for name, value in single.items()}
            with torch.enable_grad():
                losses.append(loss(leaves))
            found = torch.autograd.grad(losses[-1], list(leaves.values()), allow_unused=True, materialize_grads=True)
            gradients.append(dict(zip(names, found, strict=True)))
            losses[-1] = losses[-1].detach()
        ctx.save_for_backward(*stack(gradients).values())
        return torch.stack(losses).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(gradient * (grad / len(gradient)) for gradient in ctx.saved_tensors)
