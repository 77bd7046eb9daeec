"""Locks that the system takes back when their process ends, however it ends."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a file, which names this process, until the block ends.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            if fcntl is None:
                raise OSError("this system has no locks")
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            log.warning(f"{path} cannot be locked ({error}): nothing keeps two commands from writing to one folder")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def alone(folder: Path, otherwise: str = "resume=null starts another") -> Iterator[None]:
    """Refuses to work in a folder in which another process does.

    Args:
        otherwise: what can be done instead.

    Raises:
        ValueError: the run is going on already.
    """
    path = folder / ".lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError as error:
            raise ValueError(
                f"this run is going on already in {folder} (process {path.read_text(encoding='utf-8').strip()}); "
                f"{otherwise}"
            ) from error
        yield
