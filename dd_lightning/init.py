"""Distributions p(θ₀) of initial weights (Section 3.5)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dd_lightning.checks import check_choice, check_count, check_positive
from dd_lightning.networks import Weights, stack
from dd_lightning.population import HELD_OUT, TRAIN, TrainedNetworks, find_population
from dd_lightning.seeding import Stream, derive_seed, generator


def _kaiming_normal(weight: Tensor, gain: float) -> None:
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    nn.init.normal_(weight, 0.0, gain / math.sqrt(fan_in))


SCHEMES: dict[str, tuple[Callable[..., Any], float]] = {  # with the gain of each
    "xavier_normal": (nn.init.xavier_normal_, 1.0),
    "xavier_uniform": (nn.init.xavier_uniform_, 1.0),
    "kaiming_normal": (_kaiming_normal, math.sqrt(2.0)),
    "orthogonal": (nn.init.orthogonal_, 1.0),
}
DEFAULT = "default"  # torch's own reset_parameters()


class Init(ABC):
    """A distribution p(θ₀)."""

    fixed = False  # whether there is one network alone, which goes with the distilled data
    per_step: int  # J, the number of initial weights per outer step

    @abstractmethod
    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        """θ₀⁽ʲ⁾ for j = 1…J at an outer step (Algorithm 1, line 4); process `rank` of `world` takes its share."""

    @abstractmethod
    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        """`count` networks that no outer step ever samples, or as many as there are."""

    @abstractmethod
    def num_held_out(self, count: int) -> int:
        """How many of `count` held-out networks are distinct."""

    @abstractmethod
    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Refuses a network for which there are no initial weights.

        Args:
            image_shape: (channels, height, width) of the data set's images.

        Raises:
            ValueError: saying why.
        """


class RandomInit(Init):
    """Initial weights drawn anew for every outer step: Xavier normal with zero biases in the paper.

    Convolutions and linear layers follow `scheme`, with zero biases; other layers (norms) their own reset.

    Args:
        scheme: a name in `SCHEMES`, or `default` for torch's own initialisation.
        gain: multiplies the scheme's standard deviation; None is the scheme's own (1, for kaiming_normal √2).
        per_step: J, the number of initial weights per outer step.
        seed: of all draws.

    Raises:
        ValueError: unknown scheme, a gain that is not positive or not used, J below 1.
    """

    def __init__(
        self, scheme: str = "xavier_normal", gain: float | None = None, per_step: int = 1, seed: int = 0
    ) -> None:
        check_choice("scheme", scheme, [*SCHEMES, DEFAULT])
        check_count(per_step=per_step)
        if gain is not None:
            check_positive(gain=gain)
            if scheme == DEFAULT:
                raise ValueError("scheme default has no gain; leave gain=null or choose another scheme")
        self.scheme, self.gain, self.per_step, self.seed = scheme, gain, per_step, seed

    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        return stack([self.draw(network, Stream.INIT, step, j) for j in range(rank, self.per_step, world)])

    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        return (self.draw(network, stream, index) for index in range(count))

    def num_held_out(self, count: int) -> int:
        return count

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        # A parameter that the scheme cannot draw is refused by its name.
        self.draw(network, Stream.INIT, 0, 0)

    def draw(self, network: nn.Module, stream: Stream, *counters: int) -> dict[str, Tensor]:
        """The weights of one network, which depend on the seed, the stream and the counters alone."""
        like = next(network.parameters())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed(self.seed, stream, *counters))
            return {
                name: value.to(like.device)
                for prefix, module in network.named_modules()
                for name, value in self._draw_module(prefix, module).items()
            }

    def _draw_module(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        own = dict(module.named_parameters(recurse=False))
        if not own:
            return {}
        # Drawn on the CPU, whatever the network's device, so that every device draws the same weights.
        drawn = {name: nn.Parameter(torch.empty_like(value, device="cpu")) for name, value in own.items()}
        if self.scheme != DEFAULT and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            draw, gain = SCHEMES[self.scheme]
            draw(drawn["weight"], gain=gain if self.gain is None else self.gain)
            if "bias" in drawn:
                drawn["bias"].zero_()
        else:
            if not hasattr(module, "reset_parameters"):
                raise ValueError(
                    f"cannot draw {'.'.join(filter(None, [prefix, next(iter(own))]))}: "
                    f"{type(module).__name__} has no reset_parameters()"
                )
            saved = module._parameters
            module._parameters = {name: drawn.get(name) for name in saved}
            try:
                module.reset_parameters()  # type: ignore[operator]
            finally:
                module._parameters = saved
        return {f"{prefix}.{name}" if prefix else name: value.detach() for name, value in drawn.items()}


def to_device_of(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` where the template is, and of its type."""
    like = next(network.parameters())
    return {name: value.to(like.device, like.dtype) for name, value in weights.items()}


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
    """

    def __init__(
        self,
        scheme: str = "xavier_normal",
        gain: float | None = None,
        per_step: int = 1,
        seed: int = 0,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(per_step)
        self._random, self._given = RandomInit(scheme, gain, seed=seed), weights

    def _make(self, network: nn.Module) -> dict[str, Tensor]:
        return self._random.draw(network, Stream.INIT) if self._given is None else self._given

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        shapes = {name: weight.shape for name, weight in self.weights(network).items()}
        if shapes != {name: p.shape for name, p in network.named_parameters()}:
            raise ValueError(
                f"these data were distilled for one fixed network whose weights do not fit {type(network).__name__}; "
                "give init=random to evaluate them on unseen networks"
            )


class RandomPretrainedInit(Init):
    """Networks sampled from a population of trained ones for every outer step (Section 3.5).

    Held-out networks are those of the population's held-out part. Those for the test are taken from its start, those
    for validation from its end: they are others where the part is large enough for both.

    Args:
        population: its name in `populations_dir`, or the path of its folder.
        populations_dir: folder of populations.
        per_step: J, the number of different networks per outer step.
        seed: of the sampling.

    Raises:
        ValueError: J below 1 or above the number of networks, or a population that is not finished.
        FileNotFoundError: there is no such population; the message names the command that makes it.
    """

    def __init__(self, population: str | None, populations_dir: str = ".", per_step: int = 4, seed: int = 0) -> None:
        check_count(per_step=per_step)
        self.per_step, self.seed = per_step, seed
        self.population = find_population(population, populations_dir)
        self._train = TrainedNetworks(self.population, TRAIN)
        self._held_out = TrainedNetworks(self.population, HELD_OUT)
        if per_step > len(self._train):
            raise ValueError(f"per_step is {per_step}, but population {population} has {len(self._train)} networks")

    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        chosen = torch.randperm(len(self._train), generator=generator(self.seed, Stream.INIT, step))[: self.per_step]
        return stack([to_device_of(network, self._train[index]) for index in chosen[rank::world].tolist()])

    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        last = len(self._held_out) - 1
        indices = range(self.num_held_out(count))
        ends = stream == Stream.HELD_OUT_VALIDATION
        return (to_device_of(network, self._held_out[last - index if ends else index]) for index in indices)

    def num_held_out(self, count: int) -> int:
        return min(count, len(self._held_out))

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        self.population.check(network, image_shape, num_classes)


class FixedPretrainedInit(OneNetwork):
    """One network of a population of trained ones (Section 3.5).

    Args:
        population: as in `RandomPretrainedInit`.
        populations_dir: as in `RandomPretrainedInit`.
        index: which network of those to train on, from 0.

    Raises:
        ValueError: no network has this index, or the population is not finished.
        FileNotFoundError: as in `RandomPretrainedInit`.
    """

    def __init__(self, population: str | None, populations_dir: str = ".", index: int = 0, per_step: int = 1) -> None:
        super().__init__(per_step)
        self.population = find_population(population, populations_dir)
        self._networks, self._index = TrainedNetworks(self.population, TRAIN), index
        if index not in range(len(self._networks)):
            last = len(self._networks) - 1
            raise ValueError(f"index is {index}, but population {population} has networks 0 to {last}")

    def _make(self, network: nn.Module) -> dict[str, Tensor]:
        return self._networks[self._index]

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        self.population.check(network, image_shape, num_classes)
