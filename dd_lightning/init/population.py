"""Populations of trained networks on disk: sharded safetensors, read one network at a time."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from dd_lightning.networks import Weights, class_name, differences
from dd_lightning.system.atomic import write_bytes, write_json

FORMAT = "dd_lightning.population/1"
TRAIN, HELD_OUT = PARTS = ("train", "held_out")  # networks to distil with, and networks to test on
WEIGHTS = "weights/"  # prefix of the weights in a shard
KINDS = {"class": str, "classes": int, "shapes": dict, "preprocessing.channels": int, "preprocessing.image_size": int}


class Population:
    """A folder with `card.json` and, for each part, shards of trained networks.

    A shard `<part>/00000-00004.safetensors` holds networks 0 to 3: every tensor has a leading axis over them. It is
    mapped into memory, and a network alone is read from it, so that a population may be larger than memory.

    Args:
        path: of the folder.
        card: of a new population: data set, network, recipe and, under `parts`, each part's number of networks
            and seed; None reads the one that is there.

    Raises:
        FileNotFoundError: there is no population at `path`.
        ValueError: the card is not a population's, or lacks something, or its parts share a seed.
    """

    def __init__(self, path: Path | str, card: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.card = self._read_card() if card is None else {"format": FORMAT, **card}
        seeds = {part: self.card["parts"][part]["seed"] for part in PARTS}
        if seeds[TRAIN] == seeds[HELD_OUT]:
            raise ValueError(
                f"population {self.path}: the networks to train on and the held-out networks share seed {seeds[TRAIN]}"
            )

    def _read_card(self) -> dict[str, Any]:
        path = self.path / "card.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no population at {self.path}")
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is truncated or not a card ({error})") from error
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            raise ValueError(f"{path} is not the card of a population")
        parts = {f"parts.{part}.{key}": int for part in PARTS for key in ("networks", "seed")}
        for name, kind in (KINDS | parts).items():
            value: Any = card
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{path}: {name} is missing or not what dd-pretrain writes ({value!r})")
        return card

    def write_card(self) -> None:
        write_json(self.path / "card.json", self.card)

    def count(self, part: str) -> int:
        """The number of networks that the card promises."""
        return self.card["parts"][part]["networks"]

    def shards(self, part: str) -> dict[range, Path]:
        """The finished shards, in order."""
        found = {}
        for path in sorted((self.path / part).glob("*.safetensors")):
            if name := re.fullmatch(r"(\d+)-(\d+)", path.stem):
                found[range(int(name[1]), int(name[2]))] = path
        return found

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Refuses another architecture, or other images or classes, than the networks were trained for.

        Args:
            image_shape: (channels, height, width).

        Raises:
            ValueError: naming what differs.
        """
        form = self.card["preprocessing"]
        made = (self.card["class"], form["channels"], form["image_size"], self.card["classes"])
        asked = (class_name(network), *image_shape[:2], num_classes)
        for what, there, here in zip(("network", "channels", "image size", "classes"), made, asked, strict=True):
            if there != here:
                raise ValueError(f"population {self.path} was made with {what} {there}; here {what} is {here}")
        shapes = {name: list(p.shape) for name, p in network.named_parameters()}
        if shapes != self.card["shapes"]:
            raise ValueError(
                f"population {self.path} was made with other settings of network {class_name(network)}"
                f" ({differences(network, self.card['shapes'])})"
            )

    def missing(self, part: str) -> list[int]:
        """The networks that are not trained yet."""
        finished = {index for indices in self.shards(part) for index in indices}
        return [index for index in range(self.count(part)) if index not in finished]

    def write(self, part: str, start: int, weights: Weights, accuracies: Float[Tensor, " network"]) -> None:
        """Adds networks `start`, `start + 1`, …, whole or not at all.

        Args:
            accuracies: of each network on the test set, in %.
        """
        tensors = {WEIGHTS + name: value.detach().cpu().contiguous() for name, value in weights.items()}
        tensors["accuracies"] = accuracies.cpu()
        path = self.path / part / f"{start:05d}-{start + len(accuracies):05d}.safetensors"
        write_bytes(path, save(tensors, metadata={"format": FORMAT}))

    def accuracies(self, part: str) -> list[float]:
        """Test accuracy in % of every network."""
        found: list[float] = []
        for path in self.shards(part).values():
            with _opened(path) as shard:
                found += shard.get_tensor("accuracies").tolist()
        return found[: self.count(part)]


def find_population(name: str | None, populations_dir: Path | str) -> Population:
    """The population of this name.

    Args:
        name: of its folder in `populations_dir`, or a path.

    Raises:
        FileNotFoundError: there is none; the message names the command that makes it.
        ValueError: no name was given, or as in `Population`.
    """
    if not name or not isinstance(name, str):
        raise ValueError(f"say which trained networks: init.population=NAME_OR_PATH, not {name!r}")
    path = Path(name) if Path(name, "card.json").is_file() else Path(populations_dir, name)
    try:
        return Population(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; make it with: {_command(path)}") from error


def _command(path: Path) -> str:
    return f"dd-pretrain pretrain={path.name} populations_dir={path.parent}"


class TrainedNetworks(Sequence[dict[str, Tensor]]):
    """One finished part of a population, as a sequence of the weights of single networks.

    Args:
        population: that holds it.
        part: `train` or `held_out`.

    Raises:
        ValueError: the part is not finished.
    """

    def __init__(self, population: Population, part: str) -> None:
        missing = population.missing(part)
        self._count = population.count(part)
        if missing:
            raise ValueError(
                f"population {population.path} is not finished: {len(missing)} of {self._count} {part} networks are "
                f"missing; go on with: {_command(population.path)}"
            )
        self._shapes = population.card["shapes"]
        self._rows = [(path, row) for indices, path in population.shards(part).items() for row in range(len(indices))]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # type: ignore[override]
        if index >= self._count:
            raise IndexError(index)
        path, row = self._rows[index]
        with _opened(path) as shard:
            names = [name for name in shard.keys() if name.startswith(WEIGHTS)]  # noqa: SIM118
            slices = {name.removeprefix(WEIGHTS): shard.get_slice(name) for name in names}
            if {name: one.get_shape()[1:] for name, one in slices.items()} != self._shapes:
                raise ValueError(f"{path} holds other weights than the card of the population says")
            return {name: one[row] for name, one in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as shard:
            if (shard.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} is no shard of a population")
            yield shard
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
