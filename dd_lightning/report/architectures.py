"""Sets of distilled data against architectures, as a table and as a heat map."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dd_lightning.report.figures import Figure, axes_of
from dd_lightning.report.runs import Measured, Run, measured
from dd_lightning.report.tables import number

ARCHITECTURES = "architectures"  # the name of the sweep


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

    def numbers_text(self, row: str) -> str:
        """How many numbers a set stores."""
        return next((cell.numbers_text for (of, _), cell in self.cells.items() if of == row), "")

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
    writer.writerow(
        ["set", "stored_numbers", "network", "mean", "std", "networks", "learning_rate", "random_real_mean"]
    )
    for row, column in sorted(matrix.cells):
        cell = matrix.cells[row, column]
        use = cell.runs[0].result["use"]
        random = use["controls"].get("random", {}).get("accuracy_mean", "")
        numbers, count = cell.runs[0].stored_numbers, len(cell.accuracies)
        writer.writerow([row, numbers, column, cell.mean, cell.std, count, use["learning_rate"], random])
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
