"""Engines that keep the graph of every step, and let autograd walk back through it."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dd_lightning.networks import Weights, forward_each, training_without_dropout
from dd_lightning.unroll.interface import Step, Unroll
from dd_lightning.unroll.optimizers import InnerOptimizer, State


class StoredUnroll(Unroll):
    """A plain unroll with `torch.func.functional_call`.

    Args:
        optimizer: of the inner loop.
        batched: all J networks at once with `vmap`, instead of one after the other. They share the distilled images,
            so that the first layer is one operation.
    """

    def __init__(self, optimizer: InnerOptimizer | None = None, batched: bool = False) -> None:
        super().__init__(optimizer)
        self.batched = batched

    def logits(
        self, network: nn.Module, theta: Weights, images: Float[Tensor, "batch c h w"]
    ) -> Float[Tensor, "init batch classes"]:
        """Logits of the J networks, in the mode the network is in."""
        if self.batched:
            return vmap(lambda single: functional_call(network, single, (images,)))(theta)
        return forward_each(network, theta, images)

    def inner_step(
        self,
        network: nn.Module,
        theta: Weights,
        state: State,
        step: Step,
        differentiable: bool,
    ) -> tuple[Weights, State]:
        """One inner step of all J networks, Eq. (9)."""
        images, labels, learning_rate = step
        logits = self.logits(network, theta, images)
        # The sum over networks of each network's mean: no network sees another's gradient.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=differentiable)
        return self.optimizer.update(theta, dict(zip(theta, gradients, strict=True)), state, learning_rate)

    def trajectory(
        self, network: nn.Module, theta_0: Weights, steps: Iterable[Step], differentiable: bool = True
    ) -> Iterator[Weights]:
        theta = leaves(theta_0)
        state = self.optimizer.init(theta)
        with training_without_dropout(network):
            for step in steps:
                with torch.enable_grad():
                    theta, state = self.inner_step(network, theta, state, step, differentiable)
                if not differentiable:
                    theta, state = leaves(theta), {name: value.detach() for name, value in state.items()}
                yield theta if differentiable else {name: value.detach() for name, value in theta.items()}

    def check(self, network: nn.Module, theta_0: Weights, images: Float[Tensor, "batch c h w"]) -> None:
        if not self.batched:
            return
        try:
            with torch.no_grad(), training_without_dropout(network):
                self.logits(network, theta_0, images)
        except (RuntimeError, NotImplementedError) as error:
            message = " ".join(str(error).split())[:200]
            raise ValueError(
                f"network {type(network).__name__} cannot be batched over initial weights ({message}); "
                "use unroll=functional, or batched=false"
            ) from error


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, cut from their history, for gradients to be taken with respect to them."""
    return {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in tensors.items()}
