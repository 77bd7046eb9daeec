"""Progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dd_lightning.system.processes import rank


@contextmanager
def progress_of(
    description: str, total: int, done: int = 0, unit: str = "networks"
) -> Iterator[Callable[[float], None]]:
    """A progress bar, of which some may be done; yields the function that advances it. The first process shows it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=get_console(), transient=True, disable=rank() > 0) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda count: progress.advance(task, count)
