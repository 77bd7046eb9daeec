"""What an engine does: θ₀ and distilled steps in, θ_T out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.networks import Weights
from dd_lightning.unroll.optimizers import GradientDescent, InnerOptimizer

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

    def check(self, network: nn.Module, theta_0: Weights, images: Float[Tensor, "batch c h w"]) -> None:  # noqa: B027
        """Refuses a network that this engine cannot unroll.

        Raises:
            ValueError: naming the engine that can.
        """


class GraphUnroll(Unroll):
    """Keeps the graph of every step, and lets autograd walk back through it."""

    @abstractmethod
    def unroll(
        self, network: nn.Module, theta_0: Weights, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[Weights]:
        """Yields the weights after every GD step; a graph leads from them to images and rates if `differentiable`."""

    def __call__(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Weights:
        theta = theta_0
        for theta in self.unroll(network, theta_0, steps, differentiable=True):  # noqa: B007 - only the last is needed
            pass
        return theta

    def trajectory(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Iterator[Weights]:
        for theta in self.unroll(network, theta_0, steps, differentiable=False):
            yield {name: value.detach() for name, value in theta.items()}


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, cut from their history, for gradients to be taken with respect to them (but to counters)."""
    return {name: value.detach().requires_grad_(value.ndim > 0) for name, value in tensors.items()}
