"""The gradient of one GD step, and its derivative in a direction of weights: all that Eq. (9) and its reverse need."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap

from dd_lightning.networks import Weights, forward_each, frozen, run_with, training_without_dropout

Images = Float[Tensor, "batch c h w"]

Labels = Int[Tensor, " batch"] | Float[Tensor, "batch classes"]


class StepGradient(ABC):
    """∇ℓ(x̃, θ) of J networks, ℓ each network's mean cross entropy, and its derivative.

    Of weights that are frozen both are 0, and no direction moves them: every inner optimizer leaves them as they are.
    """

    def prepared(self, theta: Weights) -> Weights:
        """The weights in the memory format that is fastest here."""
        return theta

    @abstractmethod
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        """∇ℓ, and if it is wanted `again` what `derivative` needs."""

    @abstractmethod
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images, Tensor | None]:
        """∇²ℓ v, ∂⟨∇ℓ, v⟩/∂x̃ and, of labels that are real numbers, ∂⟨∇ℓ, v⟩/∂ỹ in the direction v."""


class AutogradGradient(StepGradient):
    """By autograd, for every network.

    Args:
        batched: all J networks at once with `vmap`, instead of one after the other.
    """

    def __init__(self, network: nn.Module, batched: bool) -> None:
        self.network, self.batched = network, batched

    def logits(self, theta: Weights, images: Images) -> Float[Tensor, "init batch classes"]:
        if self.batched:
            return vmap(lambda single: run_with(self.network, single, images))(theta)
        return forward_each(self.network, theta, images)

    @torch.enable_grad()
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        fixed = frozen(self.network)
        theta = {name: value.detach().requires_grad_(name not in fixed) for name, value in theta.items()}
        images = images.detach().requires_grad_(again)
        labels = labels.detach().requires_grad_(again and labels.is_floating_point())
        with training_without_dropout(self.network):
            logits = self.logits(theta, images)
        # The sum over networks of each network's mean: no network sees another's gradient.
        of_each = labels.repeat(len(logits), *[1] * (labels.ndim - 1))
        loss = F.cross_entropy(logits.flatten(0, 1), of_each) * len(logits)
        leaves = {name: value for name, value in theta.items() if value.requires_grad}
        gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=again, materialize_grads=True)
        found = dict(zip(leaves, gradient, strict=True))
        detached = {name: value.detach() for name, value in found.items()}
        return of_all(theta, detached), (found, leaves, images, labels) if again else None

    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images, Tensor | None]:
        found, leaves, images, labels = tape
        inputs = [*leaves.values(), images, *([labels] if labels.requires_grad else [])]
        used = [name for name, value in found.items() if value.requires_grad]  # by the forward
        gradients = torch.autograd.grad(
            [found[name] for name in used], inputs, [direction[name] for name in used], materialize_grads=True
        )
        hessian, (grad_images, *grad_labels) = gradients[: len(leaves)], gradients[len(leaves) :]
        product = of_all(direction, dict(zip(leaves, hessian, strict=True)))
        return product, grad_images, grad_labels[0] if grad_labels else None


def of_all(theta: Weights, found: Weights, fixed: frozenset[str] = frozenset()) -> Weights:
    """In the order of the weights, with zeros for those that are fixed or that the forward does not use."""
    return {
        name: found[name] if name in found and name not in fixed else torch.zeros_like(value)
        for name, value in theta.items()
    }
