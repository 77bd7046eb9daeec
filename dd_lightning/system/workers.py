"""Many independent pieces of work: in several processes, with progress, each kept as soon as it is done."""

import io
import multiprocessing
import os
import pickle
import signal
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from dd_lightning.system.atomic import write_bytes
from dd_lightning.system.checks import check_count
from dd_lightning.system.processes import end_with
from dd_lightning.system.processor import tune_cpu
from dd_lightning.system.progress import progress_of

Pieces = dict[str, tuple[Any, ...]]  # the arguments of each piece of work, by name
Result = dict[str, np.ndarray]


class Workers:
    """Does pieces of work, and does none again whose result is kept in `folder`.

    Processes are started when they are first needed, with one thread each, and end with the `with` block.

    Args:
        processes: 1 works in this process; None takes one process a core.
        folder: where results are kept; None keeps none.
    """

    def __init__(self, processes: int | None = 1, folder: Path | None = None) -> None:
        if processes is not None:
            check_count(processes=processes)
        self.processes, self.folder = processes or torch.get_num_threads(), folder
        self._executor: ProcessPoolExecutor | None = None
        self._done: Any = None  # queue of how much of a piece was done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if error is not None:  # what they still do is not waited for
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def map(self, description: str, work: Callable[..., Result], pieces: Pieces) -> dict[str, Result]:
        """The result of each piece, in the order of `pieces`.

        Args:
            description: of the progress bar, and the folder of these results.
            work: an importable function, given the arguments of a piece.
        """
        done = {name: result for name in pieces if (result := self._kept(description, name)) is not None}
        rest = {name: arguments for name, arguments in pieces.items() if name not in done}
        with progress_of(description, len(pieces), len(done), "pieces") as advance:
            for name, result in self.run(work, rest):
                done[name] = result
                self._keep(description, name, result)
                advance(1)
        return {name: done[name] for name in pieces}

    def run(
        self, work: Callable[..., Any], pieces: Pieces, advance: Callable[[float], None] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yields each piece's name and result when it is finished; keeps nothing.

        Args:
            advance: told how much was done, as `work` tells it by the keyword `on_progress`, which it then gets.

        Raises:
            MemoryError: a process was killed, as systems do that run out of memory.
        """
        if min(self.processes, len(pieces)) <= 1:
            progress = {} if advance is None else {"on_progress": advance}
            yield from ((name, work(*arguments, **progress)) for name, arguments in pieces.items())
            return
        executor = self._started()
        names: dict[Future[Any], str] = {
            executor.submit(_do, _Piece(work, arguments), advance is not None): name
            for name, arguments in pieces.items()
        }
        pending = set(names)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                while not self._done.empty():
                    advance(self._done.get())  # type: ignore[misc]
                yield from ((names.pop(future), future.result()) for future in finished)
        except BrokenProcessPool as error:
            raise MemoryError("a worker process was killed, perhaps for lack of memory") from error

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._done = context.SimpleQueue()
            self._executor = ProcessPoolExecutor(self.processes, context, _start, (self._done, os.getpid()))
        return self._executor

    def _kept(self, description: str, name: str) -> Result | None:
        if self.folder is None or not (path := self._path(description, name)).is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (ValueError, EOFError, zipfile.BadZipFile):
            return None  # changed or cut since it was written: it is done again

    def _keep(self, description: str, name: str, result: Result) -> None:
        if self.folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **result)  # type: ignore[arg-type]
            write_bytes(self._path(description, name), buffer.getvalue())

    def _path(self, description: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / description.replace(" ", "_") / f"{name}.npz"


class _Piece:
    """A piece of work on its way to a process, its tensors by value: containers have little shared memory."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.work, self.arguments = work, arguments

    def __reduce__(self) -> Any:
        return _unpacked, (pickle.dumps((self.work, self.arguments)),)


def _unpacked(content: bytes) -> _Piece:
    return _Piece(*pickle.loads(content))


# Of a worker process:
_done: Any


def _start(done: Any, parent: int) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the first process ends the others
    torch.set_num_threads(1)  # small networks gain little from a second one
    tune_cpu()
    end_with(parent)


def _do(piece: _Piece, tells: bool) -> Any:
    return piece.work(*piece.arguments, **({"on_progress": _done.put} if tells else {}))
