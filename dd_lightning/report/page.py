"""All tables and figures as one page that needs nothing else."""

import base64
import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape

from dd_lightning.report.architectures import Matrix
from dd_lightning.report.field import FieldTable
from dd_lightning.report.figures import Figure
from dd_lightning.report.gallery import gallery
from dd_lightning.report.runs import Measured, Run
from dd_lightning.report.tables import NOTE, Table, number
from dd_lightning.system.words import counted


def page(
    tables: list[Table],
    figures: list[Figure],
    field: list[FieldTable],
    matrix: Matrix,
    own: list[Run],
    count: int,
    trials: int,
) -> str:
    """HTML with every picture inside it.

    Args:
        field: published numbers of other methods, and ours beside them.
        own: runs that are not about the paper.
        count: of runs that were read.
        trials: how many more were left out.
    """
    cells = [cell for table in tables for cell in table.cells.values()]
    return template().render(
        tables=tables,
        figures=figures,
        field=field,
        matrix=matrix,
        gallery=[(one, embedded(one.png)) for one in gallery()],
        drawings={figure.key: drawn(figure) for figure in figures if figure.drawing is not None},
        pictures=pictures(tables, figures),
        filled=sum(cell.ours is not None for cell in cells),
        total=len(cells),
        chosen=chosen,
        seconds=seconds,
        networks=networks,
        note=NOTE,
        own=own,
        number=number,
        count=count,
        trials=trials,
        version=version("dd_lightning"),
    )


def template() -> Template:
    environment = Environment(
        loader=PackageLoader("dd_lightning.report", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def networks(figure: Figure) -> str:
    """How many networks were tested and how many chose, in the runs of a figure."""
    texts = {Measured([run]).networks_text for run in figure.runs} - {""}
    return f"Networks: {', '.join(sorted(texts))}." if texts else ""


def drawn(figure: Figure) -> str:
    assert figure.drawing is not None
    buffer = io.BytesIO()
    figure.drawing.savefig(buffer, format="png")
    return embedded(buffer.getvalue())


def embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def pictures(tables: list[Table], figures: list[Figure]) -> list[dict[str, str]]:
    """The images behind the numbers, but for those that are figures already."""
    shown = {run.folder for figure in figures if figure.key.startswith(("fig2", "fig3")) for run in figure.runs}
    found = []
    for table in tables:
        for cell in table.cells.values():
            path = None if cell.ours is None else cell.ours.runs[0].folder / "distilled.png"
            if path is not None and path.is_file() and path.parent not in shown:
                shown.add(path.parent)
                name = f"{table.rows[cell.row]}, {table.columns[cell.column]}: {cell.ours_text} %"
                found.append({"data": embedded(small(path)), "words": name})
    return found


def small(path: Path, width: int = 640) -> bytes:
    """A picture file, scaled down."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((width, 4 * width))
        picture.convert("RGB").quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def chosen(run: Run) -> str:
    """What was chosen and on what, and what choosing on the test set would have brought."""
    use: dict[str, Any] = run.result.get("use", {})
    found = []
    if "chosen" in use:
        found = [f"{k.replace('_', ' ')} {v}" for k, v in use["chosen"].items() if k not in MEASURED]
        found = [f"{', '.join(found)}; chosen on the test set: {use['gap']:+.1f}"]
    if "pictures_chose" in use:
        found.append(f"on {use['pictures_chose']} validation pictures")
    if sets := use.get("sets_chosen"):
        on = f"{counted(sets['networks'], 'network')} and {sets['training_pictures']} training pictures"
        found.append(f"{use['sets']} of {sets['of']} sets on {on}")
    return "; ".join(found)


MEASURED = ("validation", "test", "validation_attack_share", "test_attack_share")


def seconds(run: Run) -> str:
    """How long the run took."""
    taken = run.result.get("seconds", run.result.get("seconds_distilling"))
    return "" if taken is None else f"{taken / 60:.1f} minutes"
