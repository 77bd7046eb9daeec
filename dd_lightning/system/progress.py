"""Progress: a bar on a terminal; elsewhere, as in a log file, a plain line now and then."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dd_lightning.system.processes import rank
from dd_lightning.system.words import counted

SECONDS = 30.0  # between lines


class Lines:
    """One line every so often, such as `distilling: 1200 of 40000 outer steps, 41 minutes left, loss 0.31`.

    Args:
        description: of what goes on.
        total: how much there is to do.
        done: how much of it was done before, which says nothing about the time that is left.
        unit: of both.
        seconds: between lines.
    """

    def __init__(
        self, description: str, total: int, done: int = 0, unit: str = "networks", seconds: float = SECONDS
    ) -> None:
        self._words = f"{description}: {{}} of {total} {unit}"
        self._total, self._before, self._seconds = total, done, seconds
        self._began = self._told = time.monotonic()

    def tell(self, done: int, more: str = "") -> str | None:
        """The line to print now that so much is done; None where it is too early for one."""
        now = time.monotonic()
        if now - self._told < self._seconds:
            return None
        self._told = now
        left = (now - self._began) / max(done - self._before, 1) * (self._total - done)
        return ", ".join(part for part in (self._words.format(done), f"{duration(left)} left", more) if part)


def duration(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}" if seconds >= 10 * size else f"{seconds / size:.1f} {name}"
    return counted(round(seconds), "second")


class Messages(logging.Handler):
    """Log messages above the progress bar, not broken into lines, so that a path in them can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            get_console().print(self.format(record), soft_wrap=True, markup=False, highlight=False)
        except Exception:
            self.handleError(record)


@contextmanager
def progress_of(
    description: str, total: int, done: int = 0, unit: str = "networks"
) -> Iterator[Callable[[float], None]]:
    """Progress, of which some may be done; yields the function that advances it. The first process shows it."""
    if not get_console().is_terminal:
        yield _in_lines(Lines(description, total, done, unit), done)
        return
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


def _in_lines(lines: Lines, done: float) -> Callable[[float], None]:
    def advance(count: float) -> None:
        nonlocal done
        done += count
        if (line := lines.tell(round(done))) and not rank():
            print(line, flush=True)

    return advance
