"""What an engine does: θ₀ and distilled steps in, θ_T out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks import Weights, count, frozen, run_with, stack, training_without_dropout, unstack
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.unroll.optimizers import GradientDescent, InnerOptimizer, State, unstack_state
from dd_lightning.unroll.order import Step

Single = dict[str, Tensor]  # the weights of one network


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

    def __call__(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Weights:
        """θ_T of all J networks, differentiable with respect to every image, label and learning rate.

        Args:
            network: the template; its own weights are not used. Runs in train mode with dropout off.
            theta_0: initial weights, each with a leading axis over the J networks.
            steps: images, labels and learning rate of each GD step, in order.
        """
        return self.window(network, theta_0, self.optimizer.init(theta_0, count(theta_0)), steps)[0]

    @abstractmethod
    def window(self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]) -> tuple[Weights, State]:
        """The same from the middle of a training: weights, and the inner optimizer's state, which has no gradient.

        Args:
            theta: weights of the J networks where the window begins.
            state: of the inner optimizer there.
        """

    @abstractmethod
    def walk(
        self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]
    ) -> Iterator[tuple[Weights, State]]:
        """Yields weights and optimizer's state of all J networks after every GD step, without gradients."""

    def advance(self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]) -> tuple[Weights, State]:
        """Weights and optimizer's state after all of the steps, without gradients."""
        for after in self.walk(network, theta, state, steps):
            theta, state = after
        return theta, state

    def trajectory(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Iterator[Weights]:
        """Yields the weights of all J networks after every GD step, without gradients."""
        return (theta for theta, _ in self.walk(network, theta_0, self.optimizer.init(theta_0, count(theta_0)), steps))

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
        self, network: nn.Module, theta: Single, state: State, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[tuple[Single, State]]:
        """Yields one network's weights and state after every step; a graph leads to the data if `differentiable`."""

    def window(self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]) -> tuple[Weights, State]:
        steps, trained = list(steps), []
        with training_without_dropout(network):
            for single, own in zip(unstack(theta), unstack_state(state, count(theta)), strict=True):
                for single, own in self.unroll(network, single, own, steps, differentiable=True):  # noqa: B007, B020 - the last
                    pass
                trained.append((single, own))
        thetas, states = zip(*trained, strict=True)
        return stack(list(thetas)), {name: value.detach() for name, value in stack(list(states)).items()}

    def walk(
        self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]
    ) -> Iterator[tuple[Weights, State]]:
        steps = list(steps)
        with training_without_dropout(network):
            singles = zip(unstack(theta), unstack_state(state, count(theta)), strict=True)
            each = [self.unroll(network, single, own, steps, differentiable=False) for single, own in singles]
            for after in zip(*each, strict=True):
                thetas, states = (stack(list(part)) for part in zip(*after, strict=True))
                yield {name: value.detach() for name, value in thetas.items()}, states
