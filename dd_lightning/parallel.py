"""Many independent pieces of work: in several processes, with progress, each kept as soon as it is done."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from dd_lightning.atomic import write_bytes
from dd_lightning.callbacks import progress_of_networks
from dd_lightning.checks import check_count
from dd_lightning.cpu import tune_cpu

Pieces = dict[str, tuple[Any, ...]]  # the arguments of each piece of work, by name
Result = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workers:
    """Does pieces of work, and does none again whose result is kept in `folder`.

    Attributes:
        processes: 1 works in this process; None takes one process a core.
        folder: where results are kept; None keeps none.
    """

    processes: int | None = 1
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.processes is not None:
            check_count(processes=self.processes)

    def map(self, description: str, work: Callable[..., Result], pieces: Pieces) -> dict[str, Result]:
        """The result of each piece, in the order of `pieces`.

        Args:
            description: of the progress bar, and the folder of these results.
            work: an importable function, given the arguments of a piece.
        """
        done = {name: result for name in pieces if (result := self._kept(description, name)) is not None}
        rest = {name: arguments for name, arguments in pieces.items() if name not in done}
        with progress_of_networks(description, len(pieces), len(done), "pieces") as advance:
            for name, result in self._work(work, rest):
                done[name] = result
                self._keep(description, name, result)
                advance(1)
        return {name: done[name] for name in pieces}

    def _work(self, work: Callable[..., Result], pieces: Pieces) -> Iterator[tuple[str, Result]]:
        processes = min(self.processes or joblib.cpu_count(), len(pieces))
        if processes <= 1:
            yield from ((name, work(*arguments)) for name, arguments in pieces.items())
            return
        # One thread each: small networks gain little from a second one.
        with joblib.parallel_config("loky", n_jobs=processes, inner_max_num_threads=1):
            parallel: Any = joblib.Parallel(return_as="generator_unordered", pre_dispatch="n_jobs + 1")
            yield from parallel(joblib.delayed(_named)(name, work, args) for name, args in pieces.items())

    def _kept(self, description: str, name: str) -> Result | None:
        if self.folder is None or not (path := self._path(description, name)).is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    def _keep(self, description: str, name: str, result: Result) -> None:
        if self.folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **result)  # type: ignore[arg-type]
            write_bytes(self._path(description, name), buffer.getvalue())

    def _path(self, description: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / description.replace(" ", "_") / f"{name}.npz"


def _named(name: str, work: Callable[..., Result], arguments: tuple[Any, ...]) -> tuple[str, Result]:
    tune_cpu()  # a process of its own
    return name, work(*arguments)
