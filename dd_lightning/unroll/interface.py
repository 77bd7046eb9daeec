"""What an engine does: θ₀ and distilled steps in, θ_T out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.networks import Weights

Step = tuple[Float[Tensor, "batch c h w"], Int[Tensor, " batch"], Float[Tensor, ""]]  # images, labels, η̃


class Unroll(ABC):
    """Trains J networks on distilled data by plain GD, θᵢ₊₁ = θᵢ − η̃ᵢ ∇ℓ(x̃ᵢ, θᵢ) (Eq. 9)."""

    @abstractmethod
    def trajectory(
        self, network: nn.Module, theta_0: Weights, steps: Iterable[Step], differentiable: bool = True
    ) -> Iterator[Weights]:
        """Yields the weights of all J networks after every GD step.

        Args:
            network: the template; its own weights are not used. Runs in train mode with dropout off.
            theta_0: initial weights, each with a leading axis over the J networks.
            steps: images, labels and learning rate of each GD step, in order.
            differentiable: whether gradients flow from the weights to images and learning rates.
        """

    def __call__(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Weights:
        """θ_T, differentiable with respect to every image and learning rate."""
        theta = theta_0
        for theta in self.trajectory(network, theta_0, steps):  # noqa: B007 - only the last is needed
            pass
        return theta
