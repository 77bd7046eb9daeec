"""Tables 1 to 3 with our numbers beside the paper's."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from dd_lightning.report.runs import Measured, Run, measured


@dataclass(frozen=True)
class Cell:
    """One number of the paper, and ours where there is a run."""

    row: str
    column: str
    paper_mean: float
    paper_std: float | None
    command: str
    ours: Measured | None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours.mean - self.paper_mean

    @property
    def paper_text(self) -> str:
        return number(self.paper_mean, self.paper_std)

    @property
    def ours_text(self) -> str:
        if self.ours is None:
            return ""
        newest = self.ours.runs[0]
        notes = ", ".join([*([newest.shortened] if newest.shortened else []), *newest.instead])
        return number(self.ours.mean, self.ours.std) + (f" ({notes})" if notes else "")

    @property
    def difference_text(self) -> str:
        return "" if self.difference is None else f"{self.difference:+.1f}".replace("-", "−")

    @property
    def networks_text(self) -> str:
        return "" if self.ours is None else self.ours.networks_text

    @property
    def numbers_text(self) -> str:
        return "" if self.ours is None else self.ours.numbers_text

    @property
    def texts(self) -> tuple[str, ...]:
        """Its part of a table's line, as `HEADS` says."""
        return self.ours_text, self.paper_text, self.difference_text, self.networks_text, self.numbers_text


HEADS = ("here", "paper", "difference", "networks", "numbers")
NOTE = (
    "Networks: how many were tested, and in brackets how many others chose what was tested (learning rates, epochs, "
    "image sets, or the distilled images along a run); one fixed network chooses for itself, and K-NN has none. "
    "Numbers: how many one set stores, pixels, learned labels and learning rates."
)


@dataclass(frozen=True)
class Table:
    """Methods down, data sets across."""

    key: str
    number: str
    title: str
    rows: dict[str, str]  # the paper's rows, by key: data sets
    columns: dict[str, str]  # and its columns: methods
    cells: dict[tuple[str, str], Cell]

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.ours is None]


def number(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")


def make_table(key: str, paper: dict[str, Any], runs: list[Run]) -> Table:
    """The table `key` of the paper's data, filled from runs."""
    cells = {}
    for row, of_row in paper["rows"].items():
        for column, cell in of_row["cells"].items():
            if "experiment" in cell:
                command = f"dd-distill experiment={cell['experiment']}"
                ours = measured(run for run in runs if run.name == cell["experiment"])
            else:
                command = f"dd-evaluate sweep={paper['sweep']} row={row} column={column}"
                ours = measured(run for run in runs if run.place == (row, column))
            cells[row, column] = Cell(row, column, cell["mean"], cell.get("std"), command, ours)
    rows = {row: of_row["title"] for row, of_row in paper["rows"].items()}
    return Table(key, paper["number"], paper["title"], rows, paper["columns"], cells)


def markdown(table: Table) -> str:
    """A GitHub table; a missing number names the command that makes it."""
    heads = [f"{title}: {part}" for title in table.rows.values() for part in HEADS]
    lines = [
        f"**{table.number}.** {table.title}",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for column, title in table.columns.items():
        of_column = [table.cells[row, column] for row in table.rows]
        texts = [(c.ours_text or f"`{c.command}`", *c.texts[1:]) for c in of_column]
        lines.append("| " + " | ".join([title, *(part for text in texts for part in text)]) + " |")
    return "\n".join([*lines, "", NOTE]) + "\n"


def latex(table: Table) -> str:
    """A `tabular` for `booktabs`; a missing number is empty, and a comment names the command that makes it."""
    lines = [f"% {NOTE}"]
    lines += [f"% {cell.row}, {cell.column} is missing: {cell.command}" for cell in table.missing]
    lines += [r"\begin{tabular}{l" + "r" * len(HEADS) * len(table.rows) + "}", r"\toprule"]
    lines.append(
        " & ".join(["", *(rf"\multicolumn{{{len(HEADS)}}}{{c}}{{{_tex(t)}}}" for t in table.rows.values())]) + r" \\"
    )
    lines.append(" & ".join(["", *(HEADS * len(table.rows))]) + r" \\")
    lines.append(r"\midrule")
    for column, title in table.columns.items():
        of_column = [table.cells[row, column] for row in table.rows]
        parts = [_tex(part) for c in of_column for part in c.texts]
        lines.append(" & ".join([_tex(title), *parts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    return text.replace("±", r"$\pm$").replace("→", r"$\to$").replace("−", "$-$").replace("×", r"$\times$")


def comma_separated(table: Table) -> str:
    """One line for each number, in full precision, with what it was made from."""
    buffer = io.StringIO()
    names = ["row", "column", "mean", "std", "values", "networks", "networks_chose", "stored_numbers"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "paper_mean", "paper_std", "difference", "seeds", "overrides", "hardware", "command"])
    for cell in table.cells.values():
        ours: list[Any] = [""] * 6
        made: list[Any] = [""] * 3
        if cell.ours is not None:
            newest = cell.ours.runs[0]
            ours = [cell.ours.mean, cell.ours.std, len(cell.ours.accuracies)]
            ours += [newest.networks, newest.networks_chose, newest.stored_numbers]
            seeds = " ".join(str(run.config.get("seed", "")) for run in cell.ours.runs)
            made = [seeds, " ".join(newest.overrides), newest.result.get("hardware", "")]
        writer.writerow(
            [cell.row, cell.column, *ours, cell.paper_mean, cell.paper_std, cell.difference, *made, cell.command]
        )
    return buffer.getvalue()
