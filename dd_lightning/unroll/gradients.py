"""The gradient of one GD step, and its derivative in a direction of weights: all that Eq. (9) and its reverse need."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dd_lightning.networks import Weights, forward_each, training_without_dropout

Images = Float[Tensor, "batch c h w"]

Labels = Int[Tensor, " batch"]


class StepGradient(ABC):
    """∇ℓ(x̃, θ) of J networks, ℓ each network's mean cross entropy, and its derivative."""

    def prepared(self, theta: Weights) -> Weights:
        """The weights in the memory format that is fastest here."""
        return theta

    @abstractmethod
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        """∇ℓ, and if it is wanted `again` what `derivative` needs."""

    @abstractmethod
    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images]:
        """∇²ℓ v and ∂⟨∇ℓ, v⟩/∂x̃ in the direction v."""


class AutogradGradient(StepGradient):
    """By autograd, for every network.

    Args:
        batched: all J networks at once with `vmap`, instead of one after the other.
    """

    def __init__(self, network: nn.Module, batched: bool) -> None:
        self.network, self.batched = network, batched

    def logits(self, theta: Weights, images: Images) -> Float[Tensor, "init batch classes"]:
        if self.batched:
            return vmap(lambda single: functional_call(self.network, single, (images,)))(theta)
        return forward_each(self.network, theta, images)

    @torch.enable_grad()
    def __call__(self, theta: Weights, images: Images, labels: Labels, again: bool) -> tuple[Weights, Any]:
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        images = images.detach().requires_grad_(again)
        with training_without_dropout(self.network):
            logits = self.logits(theta, images)
        # The sum over networks of each network's mean: no network sees another's gradient.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)
        gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=again, materialize_grads=True)
        found = dict(zip(theta, gradient, strict=True))
        return {name: value.detach() for name, value in found.items()}, (found, theta, images) if again else None

    def derivative(self, tape: Any, direction: Weights) -> tuple[Weights, Images]:
        found, theta, images = tape
        inputs = [*theta.values(), images]
        used = [name for name, value in found.items() if value.requires_grad]  # by the forward
        *hessian, grad_images = torch.autograd.grad(
            [found[name] for name in used], inputs, [direction[name] for name in used], materialize_grads=True
        )
        return dict(zip(theta, hessian, strict=True)), grad_images
