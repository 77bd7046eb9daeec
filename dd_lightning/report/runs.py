"""Finished runs, read from their folders."""

import json
import logging
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from dd_lightning.distilled import DistilledData

log = logging.getLogger(__name__)

# Settings that do not decide what is computed, or that runs of one experiment may differ in.
TRIAL = 100  # outer steps: a run of fewer tried out whether it works
APART = ("seed", "runs_dir", "data_dir", "populations_dir", "resume", "traceback", "logger", "processes", "device")
APART += ("dry_run", "returned", "piece")


# Of what kind the parts of a `result.json` are, where it has them. Somebody may have changed it.
NUMBER, WHOLE = int | float, int | None
SPREAD = {"accuracy_mean": NUMBER, "accuracy_std": NUMBER}
ALONG = {"epochs": list, "accuracy": list}
STORED = {"images": int, "stored_numbers": WHOLE}
TEST = {"accuracy_before": NUMBER, "networks": WHOLE, "networks_chose": WHOLE, "measures": dict}
CARD = {"dataset": dict, "network": dict, "augment": dict | None, "versions": dict, "stored_numbers": WHOLE}
USE = STORED | {"choice": str, "labels": str, "protocol": dict, "controls": dict, "gap": NUMBER}
USE |= {"along": ALONG, "chosen": dict, "pictures_chose": int, "sets": int}
USE |= {"sets_chosen": {"of": int, "networks": int, "training_pictures": int}}
KINDS = {"name": str, "test": TEST, "card": CARD, "use": USE, "versions": dict, "outer_steps": int, "set": str}
KINDS |= {"prefixes": list, "settings": dict, "seconds": NUMBER, "seconds_distilling": NUMBER | None}
KINDS |= {"network": str, "stored_numbers": WHOLE, "row": str | None, "column": str | None}
OF_PREFIX = SPREAD | {"images_per_class": int, "networks": int}
OF_ORDINARY = ("images", "stored_numbers", "labels", "protocol", "controls")


@dataclass(frozen=True)
class Run:
    """A folder with a `result.json`."""

    folder: Path
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return self.result["name"]

    @property
    def place(self) -> tuple[str | None, str | None]:
        """Row and column of a table."""
        return self.result.get("row"), self.result.get("column")

    @property
    def dataset(self) -> str:
        card = self.result.get("card", {}).get("dataset", {})
        return str(card.get("name") or card.get("path") or card.get("choice") or "")

    @property
    def mean_and_std(self) -> tuple[float, float | None]:
        """Over networks; no deviation of a single value."""
        values = self.accuracies
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None

    @property
    def test(self) -> dict[str, Any]:
        return self.result["test"]

    @property
    def accuracies(self) -> list[float]:
        return self.test["accuracies"]

    @property
    def networks(self) -> int | None:
        """How many different networks were tested, where it is known: older results of sets count values."""
        known = "networks_chose" in self.test or "use" not in self.result
        return self.test.get("networks") if known else None

    @property
    def networks_chose(self) -> int | None:
        """How many networks chose what was tested, where any did and it is known."""
        return self.test.get("networks_chose")

    @property
    def is_trial(self) -> bool:
        """Whether it tried out a command, with `debug=…` or a few outer steps, and says nothing of the method."""
        return self.result.get("outer_steps", TRIAL) < TRIAL or any(o.startswith("debug=") for o in self.overrides)

    @property
    def shortened(self) -> str:
        """After how many outer steps it ended, where that is not what its experiment says; else nothing."""
        said = any(o.startswith("trainer.max_steps=") for o in self.overrides) or self.result.get("stopped_early")
        return f"{self.result['outer_steps']:,} outer steps" if said and "outer_steps" in self.result else ""

    @property
    def instead(self) -> list[str]:
        """Another data set or network than its experiment or row says, as the command line named them."""
        return [o for o in self.overrides if o.startswith(("dataset=", "network=", "network.name="))]

    @cached_property
    def time(self) -> float:
        return (self.folder / "result.json").stat().st_mtime

    @cached_property
    def overrides(self) -> list[str]:
        """What the command line said."""
        return [str(o) for o in record(self.folder / ".hydra" / "overrides.yaml", list)]

    @cached_property
    def config(self) -> dict[str, Any]:
        return record(self.folder / ".hydra" / "config.yaml", dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, but for the seed."""
        return {key: value for key, value in self.config.items() if key not in APART}

    @property
    def versions(self) -> dict[str, str]:
        return self.result.get("versions") or self.result.get("card", {}).get("versions", {})

    @cached_property
    def stored_numbers(self) -> int | None:
        """Of its data: of one set, where there are several; None where it has none, or its result is older."""
        # The card of what was evaluated may be that of a larger set.
        places = (self.result, self.result.get("use") or self.result.get("card", {}))
        told = [place["stored_numbers"] for place in places if place.get("stored_numbers") is not None]
        file = self.folder / "distilled.safetensors"
        return told[0] if told else DistilledData.load(file).stored_numbers if file.is_file() else None

    def setting(self, key: str) -> Any:
        """A setting by its dotted name, such as a card of data says it; None where there is none."""
        return OmegaConf.select(OmegaConf.create(self.config | self.result.get("settings", {})), key)


def record(path: Path, kind: type) -> Any:
    """What Hydra wrote of a run; nothing where there is no such file.

    Raises:
        ValueError: it is of another kind; the message names it.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
    except (OSError, YAMLError) as error:
        raise ValueError(f"{path} is not what a run writes") from error
    if not isinstance(content or kind(), kind):
        raise ValueError(f"{path} is not what a run writes")
    return content or kind()


def other_kinds(result: dict[str, Any]) -> list[str]:
    """The parts of a `result.json` that are of another kind than a run writes, or lack where they are read."""
    odd = of_other_kinds(result, KINDS)
    if "prefixes" not in odd and not all(has_all(entry, OF_PREFIX) for entry in result.get("prefixes", ())):
        odd.append("prefixes")
    if not odd and result.get("use", {}).get("choice") == "ordinary":
        odd += [f"use.{key}" for key in OF_ORDINARY if key not in result["use"]]
        needed = SPREAD | STORED | ({"along": ALONG} if "along" in result["use"] else {})
        controls = result["use"].get("controls", {})
        odd += [f"use.controls.{name}" for name, entry in controls.items() if not has_all(entry, needed)]
    values = result["test"].get("accuracies") if isinstance(result["test"], dict) else None
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    return odd + ([] if numbers and values else ["test.accuracies"])


def of_other_kinds(content: dict[str, Any], kinds: dict[str, Any], at: str = "") -> list[str]:
    """The dotted names of what is of another kind; what is not there is of none."""
    odd: list[str] = []
    for key, kind in kinds.items():
        value = content.get(key)
        if isinstance(kind, dict) and isinstance(value, dict):
            odd += of_other_kinds(value, kind, f"{at}{key}.")
        elif key in content and not isinstance(value, dict if isinstance(kind, dict) else kind):
            odd.append(f"{at}{key}")
    return odd


def has_all(entry: object, kinds: dict[str, Any]) -> bool:
    return isinstance(entry, dict) and kinds.keys() <= entry.keys() and not of_other_kinds(entry, kinds)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs with a test result in or below the folders, the newest first.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a `result.json` is truncated; the message names it.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder of runs at {folder}")
        for path in sorted(folder.rglob("result.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is truncated or not JSON") from error
            if not isinstance(result, dict) or "test" not in result or "name" not in result:
                continue
            if odd := other_kinds(result):
                log.warning(f"{path} is left out: {', '.join(odd)} in it are not what a run writes")
                continue
            runs.append(Run(path.parent, result))
    return sorted(runs, key=lambda run: run.time, reverse=True)


@dataclass(frozen=True)
class Measured:
    """Runs that differ in nothing but the seed, taken together; the newest first."""

    runs: list[Run]

    @cached_property
    def accuracies(self) -> list[float]:
        return [value for run in self.runs for value in run.accuracies]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Over networks (and sets, and seeds); None for a single value."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def networks_text(self) -> str:
        """How many networks each run tested, and how many chose; empty where that is not known, or there are none."""
        newest = self.runs[0]
        if newest.networks is None:
            return ""
        chose = newest.networks_chose
        return f"{newest.networks}" + ("" if chose is None else f" ({chose} chose)")

    @property
    def numbers_text(self) -> str:
        """How many numbers its data store; empty where that is not known."""
        numbers = self.runs[0].stored_numbers
        return "" if numbers is None else f"{numbers:,}"

    def measure(self, name: str) -> float | None:
        """Mean of another measure after training, where the runs have it."""
        values = [run.test.get("measures", {}).get(name, {}).get("after") for run in self.runs]
        return None if None in values else statistics.fmean(values)


def measured(runs: Iterable[Run]) -> Measured | None:
    """The newest of the runs, with those of the same settings and other seeds; of each seed the newest."""
    chosen: dict[Any, Run] = {}
    newest: Run | None = None
    for run in sorted(runs, key=lambda run: run.time, reverse=True):
        newest = newest or run
        if run.settings == newest.settings:
            chosen.setdefault(run.config.get("seed"), run)
    return Measured(list(chosen.values())) if chosen else None
