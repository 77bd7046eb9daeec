"""One particular network (Section 3.1)."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dd_lightning.init.interface import Init, to_device_of
from dd_lightning.init.random import RandomInit
from dd_lightning.networks import Weights, completed, differences, stack
from dd_lightning.system.checks import check_count
from dd_lightning.system.seeding import Stream


class OneNetwork(Init):
    """One particular network; the distilled data are for it alone."""

    fixed = True
    per_step = 1

    def __init__(self, per_step: int) -> None:
        check_count(per_step=per_step)
        if per_step != 1:
            raise ValueError(
                f"init.per_step is {per_step}, but a fixed init has one network; use per_step=1 or another init"
            )
        self._weights: dict[str, Tensor] | None = None

    @abstractmethod
    def _make(self, network: nn.Module) -> dict[str, Tensor]:
        """θ₀; called once."""

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """θ₀ of the one network."""
        if self._weights is None:
            self._weights = self._make(network)
        self._weights = to_device_of(network, self._weights)
        return self._weights

    def kept(self, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What goes with distilled data: weights and buffers of the network; and, where these are the last layer's
        alone, what the others are `of` and a hash of their `content`."""
        return self.weights(network) | dict(network.named_buffers()), {}

    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        return stack([self.weights(network)])

    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        return iter([self.weights(network)])

    def num_held_out(self, count: int) -> int:
        return 1


class FixedInit(OneNetwork):
    """One network, drawn once.

    Args:
        scheme: as in `RandomInit`.
        gain: as in `RandomInit`.
        seed: chooses the network.
        weights: the network's weights, instead of drawing them (as saved with distilled data).
        others: of weights that are the last layer's alone, the `content` that the network's others must have.
    """

    def __init__(
        self,
        scheme: str = "xavier_normal",
        gain: float | None = None,
        per_step: int = 1,
        seed: int = 0,
        weights: dict[str, Tensor] | None = None,
        others: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(per_step)
        self._random, self._given, self._others = RandomInit(scheme, gain, seed=seed), weights, others

    def _make(self, network: nn.Module) -> dict[str, Tensor]:
        if self._given is None:
            return self._random.draw(network, Stream.INIT)
        given = completed(network, self._given, self._others) if self._others else self._given
        buffers = dict(network.named_buffers())  # which come with the weights, and are the template's
        return {name: weight for name, weight in given.items() if name not in buffers}

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        try:
            shapes = {name: weight.shape for name, weight in self.weights(network).items()}
        except ValueError as error:
            raise ValueError(f"these data were distilled for one fixed network; {error}") from error
        if shapes != {name: p.shape for name, p in network.named_parameters()}:
            raise ValueError(
                f"these data were distilled for one fixed network, whose weights do not fit {type(network).__name__} "
                f"({differences(network, shapes)}); give init=random to evaluate them on unseen networks"
            )
