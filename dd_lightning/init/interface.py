"""A distribution p(θ₀) of initial weights (Section 3.5)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from dd_lightning.networks import Weights
from dd_lightning.system.seeding import Stream


class Init(ABC):
    """A distribution p(θ₀)."""

    fixed = False  # whether there is one network alone, which goes with the distilled data
    per_step: int  # J, the number of initial weights per outer step

    @abstractmethod
    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        """θ₀⁽ʲ⁾ for j = 1…J at an outer step (Algorithm 1, line 4); process `rank` of `world` takes its share."""

    @abstractmethod
    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        """`count` networks that no outer step ever samples, or as many as there are.

        Args:
            stream: those for validation, which choose, or those for the test; where there is more than one network,
                they are never the same.
        """

    @abstractmethod
    def num_held_out(self, count: int) -> int:
        """How many of `count` held-out networks for the test are distinct."""

    def num_distinct(self, count: int, stream: Stream) -> int:
        """How many of `count` held-out networks of a stream are distinct."""
        return self.num_held_out(count)

    @abstractmethod
    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Refuses a network for which there are no initial weights.

        Args:
            image_shape: (channels, height, width) of the data set's images.

        Raises:
            ValueError: saying why.
        """


def to_device_of(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` where the template is, and of its type."""
    like = next(network.parameters())
    return {name: value.to(like.device, like.dtype) for name, value in weights.items()}
