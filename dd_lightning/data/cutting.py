"""Minibatches of random crops, cut by worker processes ahead of the outer steps that want them."""

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from dd_lightning.data.crops import Cut
from dd_lightning.data.loading import load
from dd_lightning.data.store import Store

PIECE = 32  # crops that go from process to process at once
SHARED = Path("/dev/shm")  # what they go through


class _Crops(Dataset[Tensor | str]):
    """Crops of stored pictures; of a file that is gone or changed what is wrong with it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getitem__(self, cut: Cut) -> Tensor | str:
        try:
            return self.store.cut(cut)
        except (OSError, ValueError) as error:
            return str(error)


def cut_pictures(store: Store, cuts: list[Cut]) -> UInt8[Tensor, "n c s s"]:
    """The crops, by this process."""
    return torch.stack([store.cut(cut) for cut in cuts])


def cut_steps(
    store: Store, cuts: Callable[[int], list[Cut]], steps: range, workers: int
) -> Iterator[UInt8[Tensor, "n c s s"]]:
    """The crops of each outer step.

    Args:
        cuts: of an outer step.
        workers: processes, which together are a minibatch ahead as far as shared memory reaches.

    Raises:
        ValueError: a file is gone, or is no picture any more.
    """
    if not steps:
        return
    pieces_of: deque[int] = deque()  # of each outer step that was asked for

    def pieces() -> Iterator[list[Cut]]:
        for step in steps:
            whole = cuts(step)
            pieces_of.append(-(-len(whole) // PIECE))
            yield from (whole[i : i + PIECE] for i in range(0, len(whole), PIECE))

    ahead = _ahead(store, -(-len(cuts(steps.start)) // PIECE), workers)
    made = load(_Crops(store), pieces(), _together, workers, ahead)
    for first in made:
        parts = [first, *(next(made) for _ in range(pieces_of.popleft() - 1))]
        for part in parts:
            if isinstance(part, str):
                raise ValueError(part)
        yield torch.cat(parts)


def _together(crops: list[Tensor | str]) -> Tensor | str:
    return next((one for one in crops if isinstance(one, str)), None) or torch.stack(crops)  # type: ignore[arg-type]


def _ahead(store: Store, pieces: int, workers: int) -> int:
    """Pieces that each worker is ahead: half of the shared memory holds them."""
    wanted = -(-pieces // max(workers, 1))
    if not SHARED.is_dir():
        return max(2, wanted)
    channels, height, width = store.form.shape
    room = shutil.disk_usage(SHARED).free // (2 * PIECE * channels * height * width * max(workers, 1))
    return max(1, min(max(2, wanted), room))
