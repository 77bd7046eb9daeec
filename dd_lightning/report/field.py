"""Beside the methods that followed the paper: tables by data set, and sets against architectures."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from dd_lightning.distilled import DistilledData
from dd_lightning.report.figures import Figure, Series, axes_of, draw_curves
from dd_lightning.report.runs import Measured, Run, measured
from dd_lightning.report.tables import number

ARCHITECTURES = "architectures"  # the name of the sweep
NETWORK = "ConvNet"


@dataclass(frozen=True)
class Line:
    """One method's numbers by images per class, and how they came about."""

    title: str
    protocol: str
    source: str
    texts: dict[int, str]
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
    for key, title in field["sets"].items():
        published = [
            Line(m["title"], m["protocol"], m["source"], {ipc: f"{mean:.1f}" for ipc, mean in m["cells"][key].items()})
            for m in field["methods"].values()
            if key in m["cells"]
        ]
        lines = ours(runs, key) + published
        columns = sorted({ipc for line in lines for ipc in line.texts})
        tables.append(FieldTable(key, title, columns, lines))
    return tables


def ours(runs: Iterable[Run], dataset: str) -> list[Line]:
    """Lines of runs on a ConvNet: by their own training, or by ordinary training beside random real images."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for run in runs:
        if network_of(run) == NETWORK and run.setting("dataset.name") == dataset:
            for title, protocol, images, text in numbers_of(run):
                per_class = images / (run.setting("dataset.num_classes") or 10)
                found.setdefault((title, protocol), {}).setdefault(round(per_class), text)
    return [Line(title, protocol, "here", texts, ours=True) for (title, protocol), texts in found.items()]


def numbers_of(run: Run) -> Iterator[tuple[str, str, int, str]]:
    """Title, protocol, number of images and accuracy of what a run tested."""
    one, use = Measured([run]), run.result.get("use", {})
    network = f"width {run.setting('network.width')}, {run.setting('network.norm')} norm"
    if use.get("choice") == "ordinary":
        p, augment = use["protocol"], (run.result.get("card", {}).get("augment") or {}).get("choice", "none")
        chosen = "on validation pictures" if "chosen" in use else "by nobody"
        how = f"{p['optimizer']}, {p['epochs']} epochs, augmentation {augment}, rate chosen {chosen}; {network}"
        yield short(run.result["set"]), f"{use['labels']} labels; {how}", use["images"], number(one.mean, one.std)
        if random := use["controls"].get("random"):
            text = number(random["accuracy_mean"], random["accuracy_std"])
            yield "Random real images", f"hard labels; {how}", random["images"], text
    elif "use" not in run.result and (run.folder / "distilled.safetensors").is_file():
        data = DistilledData.load(run.folder)
        labels = "hard" if data.soft_labels is None else "learned"
        inner = f"{run.setting('inner._target_')}".rpartition(".")[2]
        how = f"{data.inner_steps} steps of {inner}, chosen on validation pictures; {network}"
        yield run.name, f"{labels} labels; {how}", data.labels.numel(), number(one.mean, one.std)


def network_of(run: Run) -> str:
    """The class of a run's network."""
    return run.result.get("network") or str(run.setting("network._target_")).rpartition(".")[2]


def short(name: str) -> str:
    """A set as people call it: its gallery's name, or the name of its run."""
    path = Path(name)
    folder = path.parent if path.suffix else path
    return folder.parent.name if folder.name[:4].isdecimal() else name if ":" in name else folder.name or name


@dataclass(frozen=True)
class Matrix:
    """Sets down, networks across."""

    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Measured]

    def text(self, row: str, column: str) -> str:
        cell = self.cells.get((row, column))
        return "" if cell is None else number(cell.mean, cell.std)


def matrix_of(runs: Iterable[Run]) -> Matrix:
    """The runs of `sweep=architectures`."""
    of_sweep = [run for run in runs if run.name == ARCHITECTURES and "set" in run.result]
    places = {(short(run.result["set"]), network_of(run)) for run in of_sweep}
    cells = {}
    for row, column in places:
        one = measured(r for r in of_sweep if (short(r.result["set"]), network_of(r)) == (row, column))
        assert one is not None
        cells[row, column] = one
    return Matrix(sorted({row for row, _ in places}), sorted({column for _, column in places}), cells)


def comma_separated(matrix: Matrix) -> str:
    """One line for each number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["set", "network", "mean", "std", "networks", "learning_rate", "random_real_mean"])
    for row, column in sorted(matrix.cells):
        cell = matrix.cells[row, column]
        use = cell.runs[0].result["use"]
        random = use["controls"].get("random", {}).get("accuracy_mean", "")
        writer.writerow([row, column, cell.mean, cell.std, len(cell.accuracies), use["learning_rate"], random])
    return buffer.getvalue()


def heat_map(matrix: Matrix) -> Figure:
    """The matrix as a picture."""
    title = "Sets that networks were trained on, and their architectures: test accuracy in %"
    claim = "data for any network in any order also serve networks that they were not made for"
    if not matrix.cells:
        command = "dd-evaluate -m sweep=architectures 'distilled.path=RUN,gallery:NAME'"
        return Figure(ARCHITECTURES, "Architectures", title, claim, "There is no run.", commands=[command])
    drawing, (axis,) = axes_of(1)
    values = [
        [matrix.cells[r, c].mean if (r, c) in matrix.cells else float("nan") for c in matrix.columns]
        for r in matrix.rows
    ]
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(matrix.rows):
        for x, column in enumerate(matrix.columns):
            color = "black" if values[y][x] > 60 else "white"
            axis.text(x, y, matrix.text(row, column), ha="center", va="center", color=color, fontsize=7)
    axis.set_xticks(range(len(matrix.columns)), matrix.columns, rotation=30, ha="right")
    axis.set_yticks(range(len(matrix.rows)), matrix.rows)
    words = "; ".join(
        f"{row}: " + ", ".join(f"{c} {matrix.text(row, c)}" for c in matrix.columns if (row, c) in matrix.cells)
        for row in matrix.rows
    )
    runs = [run for cell in matrix.cells.values() for run in cell.runs]
    return Figure(
        ARCHITECTURES, "Architectures", title, claim, f"Each at the best of its own rates. {words}.", runs, drawing
    )


def budget(runs: Iterable[Run]) -> Figure:
    """Accuracy of ordinary training over the numbers that are stored, beside random real images."""
    title = "Accuracy over stored numbers, ordinary training"
    claim = "distilled data are worth more than as many stored numbers of real images"
    of_use = [run for run in runs if run.result.get("use", {}).get("choice") == "ordinary"]
    series: Series = {}
    for run in of_use:
        place = f"{str(run.setting('dataset.name')).upper()}, {network_of(run)}"
        use, one = run.result["use"], Measured([run])
        series.setdefault(place, {}).setdefault(use["stored_numbers"], one)
        if random := use["controls"].get("random"):
            test = {"accuracies": [random["accuracy_mean"]]}
            control = Measured([Run(run.folder, {**run.result, "test": test})])
            series.setdefault(f"{place}, random real", {}).setdefault(random["stored_numbers"], control)
    if not series:
        command = "dd-evaluate use=ordinary init=random distilled.path=RUN_OR_GALLERY"
        return Figure("budget", "Budget", title, claim, "There is no run.", commands=[command])
    series = {name: dict(sorted(line.items())) for name, line in sorted(series.items())}
    words = "; ".join(
        f"{name}: " + ", ".join(f"{number(m.mean, m.std)} at {x:,.0f}" for x, m in line.items())
        for name, line in series.items()
    )
    drawing: Drawing = draw_curves(series, "stored numbers")
    drawing.axes[0].set(xscale="log")
    return Figure("budget", "Budget", title, claim, f"Test accuracy in %. {words}.", of_use, drawing)
