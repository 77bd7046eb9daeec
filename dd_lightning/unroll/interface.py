"""What an engine does: θ₀ and distilled steps in, θ_T out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.networks import Weights, frozen, run_with, stack, training_without_dropout, unstack
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.unroll.optimizers import GradientDescent, InnerOptimizer

Single = dict[str, Tensor]  # the weights of one network
Step = tuple[Float[Tensor, "batch c h w"], Int[Tensor, " batch"], Float[Tensor, ""]]  # images, labels, η̃


class Unroll(ABC):
    """Trains J networks on distilled data.

    Args:
        optimizer: of the inner loop; plain gradient descent (Eq. 9) by default.

    Attributes:
        batched: whether J networks are trained all at once; None: where the network allows it.
    """

    batched: bool | None = False

    def __init__(self, optimizer: InnerOptimizer | None = None) -> None:
        self.optimizer = optimizer or GradientDescent()

    @abstractmethod
    def __call__(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Weights:
        """θ_T of all J networks, differentiable with respect to every image and learning rate.

        Args:
            network: the template; its own weights are not used. Runs in train mode with dropout off.
            theta_0: initial weights, each with a leading axis over the J networks.
            steps: images, labels and learning rate of each GD step, in order.
        """

    @abstractmethod
    def trajectory(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Iterator[Weights]:
        """Yields the weights of all J networks after every GD step, without gradients."""

    def check(self, network: nn.Module, theta_0: Weights, images: Float[Tensor, "batch c h w"]) -> None:
        """Refuses a network that this engine cannot unroll, by one step of one network there and back.

        Raises:
            ValueError: saying why.
        """
        try:
            self._there_and_back(network, {name: weight[:1] for name, weight in theta_0.items()}, images)
        except Exception as error:  # whatever a user's forward raises
            if is_out_of_memory(error):
                raise
            message = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"network {type(network).__name__} cannot be unrolled ({message}); its forward must be differentiable "
                "twice, in train mode"
            ) from error

    def _there_and_back(self, network: nn.Module, theta: Weights, images: Float[Tensor, "batch c h w"]) -> None:
        labels, fixed = torch.zeros(len(images), dtype=torch.long, device=images.device), frozen(network)
        leaves = {name: weight[0].detach().requires_grad_() for name, weight in theta.items() if name not in fixed}
        images = images.detach().requires_grad_()
        with training_without_dropout(network):
            loss = F.cross_entropy(run_with(network, unstack(theta)[0] | leaves, images), labels)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        # All the way back: a function of a user that refuses second derivatives does so where no input is.
        torch.stack([one.sum() for one in found if one.requires_grad]).sum().backward()


class GraphUnroll(Unroll):
    """One network after the other: keeps the graph of every step, and lets autograd walk back through it."""

    @abstractmethod
    def unroll(
        self, network: nn.Module, theta_0: Single, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[Single]:
        """Yields one network's weights after every step; a graph leads from them to the data if `differentiable`."""

    def __call__(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Weights:
        steps, trained = list(steps), []
        with training_without_dropout(network):
            for theta in unstack(theta_0):
                for theta in self.unroll(network, theta, steps, differentiable=True):  # noqa: B007, B020 - the last
                    pass
                trained.append(theta)
        return stack(trained)

    def trajectory(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Iterator[Weights]:
        steps = list(steps)
        with training_without_dropout(network):
            each = [self.unroll(network, single, steps, differentiable=False) for single in unstack(theta_0)]
            for thetas in zip(*each, strict=True):
                yield {name: value.detach() for name, value in stack(list(thetas)).items()}
