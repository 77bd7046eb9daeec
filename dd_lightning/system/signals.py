"""Signals that ask a run to end: Ctrl-C, and what a cluster sends before it takes a machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(SystemExit):
    """A signal asked the run to end. The exit code is the one that shells report, 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = f"interrupted by {signal.Signals(number).name} {message}".strip()


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
