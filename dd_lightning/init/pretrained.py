"""Networks of a population of trained ones (Section 3.5)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dd_lightning.init.fixed import OneNetwork
from dd_lightning.init.interface import Init, to_device_of
from dd_lightning.init.population import HELD_OUT, TRAIN, TrainedNetworks, find_population
from dd_lightning.networks import TorchvisionNetwork, Weights, stack
from dd_lightning.system.checks import check_choice, check_count
from dd_lightning.system.seeding import Stream, generator

CHOOSING = 20  # networks held out to choose, at most
HEADS = ("zeros", "random")


class RandomPretrainedInit(Init):
    """Networks sampled from a population of trained ones for every outer step (Section 3.5).

    Held-out networks are those of the population's held-out part: its last networks choose, on validation pictures,
    and its others are tested, so that no network is tested by which something was chosen. A third of them choose, at
    least 1 and at most 20 (Section S-1).

    Args:
        population: its name in `populations_dir`, or the path of its folder.
        populations_dir: folder of populations.
        per_step: J, the number of different networks per outer step.
        seed: of the sampling.

    Raises:
        ValueError: J below 1 or above the number of networks, a population that is not finished, or one that holds out
            too few networks to choose and to test.
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
        if len(self._held_out) < 2:
            raise ValueError(
                f"population {population} holds out {len(self._held_out)} network, but one chooses and another is "
                "tested; make at least two with dd-pretrain held_out_networks=2"
            )
        self._choosing = min(CHOOSING, max(1, len(self._held_out) // 3))

    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        chosen = torch.randperm(len(self._train), generator=generator(self.seed, Stream.INIT, step))[: self.per_step]
        return stack([to_device_of(network, self._train[index]) for index in chosen[rank::world].tolist()])

    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        last = len(self._held_out) - 1
        indices = range(self.num_distinct(count, stream))
        ends = stream == Stream.HELD_OUT_VALIDATION
        return (to_device_of(network, self._held_out[last - index if ends else index]) for index in indices)

    def num_held_out(self, count: int) -> int:
        return min(count, len(self._held_out) - self._choosing)

    def num_distinct(self, count: int, stream: Stream) -> int:
        return min(count, self._choosing) if stream == Stream.HELD_OUT_VALIDATION else self.num_held_out(count)

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        self.population.check(network, image_shape, num_classes)


class FixedPretrainedInit(OneNetwork):
    """One trained network: of a population (Section 3.5), or the one whose weights the network itself brings.

    Args:
        population: as in `RandomPretrainedInit`; None takes the network's own weights, as those of ImageNet.
        populations_dir: as in `RandomPretrainedInit`.
        index: which network of those of a population to train on, from 0.
        head: of own weights, the last layer's: `zeros` (Section S-1), or `random`, Xavier normal.
        seed: of a random last layer.

    Raises:
        ValueError: no network has this index, the population is not finished, or an unknown or unused `head`.
        FileNotFoundError: as in `RandomPretrainedInit`.
    """

    def __init__(
        self,
        population: str | None,
        populations_dir: str = ".",
        index: int = 0,
        per_step: int = 1,
        head: str = "zeros",
        seed: int = 0,
    ) -> None:
        super().__init__(per_step)
        check_choice("head", head, HEADS)
        self.head, self.seed = head, seed
        self.population = None if population is None else find_population(population, populations_dir)
        if self.population is None:
            return
        if head != "zeros":
            raise ValueError(f"head={head} is of a network's own weights; those of a population have a last layer")
        self._networks, self._index = TrainedNetworks(self.population, TRAIN), index
        if index not in range(len(self._networks)):
            last = len(self._networks) - 1
            raise ValueError(f"index is {index}, but population {population} has networks 0 to {last}")

    def _make(self, network: nn.Module) -> dict[str, Tensor]:
        if self.population is not None:
            return self._networks[self._index]
        assert isinstance(network, TorchvisionNetwork)
        own = {name: parameter.detach() for name, parameter in network.named_parameters()}
        if self.head == "random":
            weight = own[f"{network.head}.weight"]
            drawn = nn.init.xavier_normal_(torch.empty(weight.shape), generator=generator(self.seed, Stream.INIT))
            own[f"{network.head}.weight"] = drawn.to(weight)
        return own

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        if self.population is not None:
            self.population.check(network, image_shape, num_classes)
        elif not isinstance(network, TorchvisionNetwork):
            find_population(None, ".")  # says how to name one
        elif network.content is None:
            raise ValueError("network.weights=null brings no weights to start from; init=fixed draws them")

    def kept(self, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(network, TorchvisionNetwork) or self.population is not None:
            return super().kept(network)
        weights = self.weights(network)
        return {name: weights[name] for name in network.of_head}, {"of": network.source, "content": network.content}
