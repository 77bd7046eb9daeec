"""Beside the methods that followed the paper: test accuracy by data set and images per class."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from dd_lightning.distilled import DistilledData
from dd_lightning.report.architectures import network_of, short
from dd_lightning.report.runs import Measured, Run
from dd_lightning.report.tables import number

NETWORK = "ConvNet"
UNKNOWN = "not known"


@dataclass(frozen=True)
class Protocol:
    """How a number came about.

    Attributes:
        labels: hard, soft or learned.
        training: of the networks that were tested.
        chosen: on what, and what of.
    """

    network: str
    labels: str
    training: str
    chosen: str


@dataclass(frozen=True)
class Line:
    """One method's numbers by images per class, and how they came about.

    Attributes:
        numbers: how many are stored, of the images and of labels that are no classes.
    """

    title: str
    protocol: Protocol
    source: str
    texts: dict[int, str]
    numbers: dict[int, int]
    ours: bool = False


@dataclass(frozen=True)
class FieldTable:
    """Methods down, images per class across, of one data set."""

    key: str
    title: str
    columns: list[int]
    lines: list[Line]


def field_tables(field: dict[str, Any], runs: list[Run]) -> list[FieldTable]:
    """A table for each data set, ours first."""
    tables = []
    for key, of_set in field["sets"].items():
        methods = [method for method in field["methods"].values() if key in method["cells"]]
        lines = ours(runs, key) + [published(method, method["cells"][key], of_set, field) for method in methods]
        columns = sorted({per_class for line in lines for per_class in line.texts})
        tables.append(FieldTable(key, of_set["title"], columns, lines))
    return tables


def published(method: dict[str, Any], cells: dict[int, float], of_set: dict[str, Any], field: dict[str, Any]) -> Line:
    """A method's line of one data set."""
    protocol = {name: method.get(name, UNKNOWN) for name in ("labels", "training", "chosen")}
    labels = of_set["classes"] if protocol["labels"] in ("soft", "learned") else 0
    numbers = {per_class: per_class * of_set["classes"] * (of_set["pixels"] + labels) for per_class in cells}
    made = Protocol(method.get("network", field["network"]), **protocol)
    return Line(method["title"], made, method["source"], {n: f"{mean:.1f}" for n, mean in cells.items()}, numbers)


def ours(runs: Iterable[Run], dataset: str) -> list[Line]:
    """Lines of runs on a ConvNet: by their own training, or by ordinary training beside random real images."""
    found: dict[tuple[str, Protocol], Line] = {}
    for run in runs:
        if network_of(run) == NETWORK and run.setting("dataset.name") == dataset:
            for title, protocol, images, text, numbers in numbers_of(run):
                line = found.setdefault((title, protocol), Line(title, protocol, "here", {}, {}, ours=True))
                per_class = round(images / (run.setting("dataset.num_classes") or 10))
                if per_class not in line.texts:  # the newest run comes first
                    line.texts[per_class], line.numbers[per_class] = text, numbers
    return list(found.values())


def numbers_of(run: Run) -> Iterator[tuple[str, Protocol, int, str, int]]:
    """Title, protocol, number of images, accuracy and stored numbers of what a run tested."""
    one, use = Measured([run]), run.result.get("use", {})
    network = f"{NETWORK}, width {run.setting('network.width')}, {run.setting('network.norm')} norm"
    if use.get("choice") == "ordinary":
        p, augment = use["protocol"], (run.result.get("card", {}).get("augment") or {}).get("choice", "none")
        chosen = "validation pictures: rate" if "chosen" in use else "nothing"
        training = f"{p['optimizer']}, {p['epochs']} epochs, augmentation {augment}"
        made = Protocol(network, use["labels"], training, chosen)
        text = number(one.mean, one.std)
        yield short(run.result["set"]), made, use["images"], text, use["stored_numbers"]
        if random := use["controls"].get("random"):
            text = number(random["accuracy_mean"], random["accuracy_std"])
            made = Protocol(network, "hard", training, chosen)
            yield "Random real images", made, random["images"], text, random["stored_numbers"]
    elif "use" not in run.result and (run.folder / "distilled.safetensors").is_file():
        data = DistilledData.load(run.folder)
        inner = f"{run.setting('inner._target_')}".rpartition(".")[2]
        labels = "hard" if data.soft_labels is None else "learned"
        made = Protocol(network, labels, f"{data.inner_steps} steps of {inner}", "validation pictures: outer step")
        yield run.name, made, data.labels.numel(), number(one.mean, one.std), data.stored_numbers


def comma_separated(tables: Iterable[FieldTable]) -> str:
    """One line for each number, with how it came about."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    protocol = ("network", "labels", "training", "chosen")
    writer.writerow(["dataset", "method", "images_per_class", "accuracy", "stored_numbers", *protocol, "source"])
    for table in tables:
        for line in table.lines:
            for per_class, text in sorted(line.texts.items()):
                made = (*astuple(line.protocol), line.source)
                writer.writerow([table.key, line.title, per_class, text, line.numbers[per_class], *made])
    return buffer.getvalue()
