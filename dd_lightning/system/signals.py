"""Signals that ask a run to end: Ctrl-C, a closed terminal, and what a cluster sends before it takes a machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Those that this system has; Windows lacks some.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


OVER = 124  # the exit code of timeout(1)


class Interrupted(SystemExit):
    """A signal asked the run to end, or its time is over.

    The exit code is the one that shells report: 128 + the signal's number, or that of `timeout`.

    Args:
        number: of the signal; None where the time is over.
    """

    def __init__(self, number: int | None, message: str) -> None:
        super().__init__(OVER if number is None else 128 + number)
        self.number = number
        by = "trainer.max_time" if number is None else signal.Signals(number).name
        self.message = f"interrupted by {by} {message}".strip()


def interruption(error: BaseException | None) -> Interrupted | None:
    """The interruption that an error came of: what is cleaned up after one, anywhere, may fail."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error


def handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Installs a handler for all of `SIGNALS` that are not ignored; returns the earlier handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {n: signal.signal(n, handler) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}


@contextmanager
def interrupted_at_once(message: str = "") -> Iterator[None]:
    """Until the block ends, a signal raises `Interrupted` wherever the program is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, message)

    earlier = handle(stop)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def left_to_parent(worker: int) -> None:
    """Has a worker process ignore the signals, which a terminal sends to all: the first process ends the others."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
