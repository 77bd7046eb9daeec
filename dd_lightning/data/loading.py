"""Pictures made by worker processes, in the order in which they are asked for."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dd_lightning.system.signals import left_to_parent

MOST_WORKERS = 8  # where a setting does not say how many


def usual_workers() -> int:
    """One worker process for every core but one, which is for the network; none where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, MOST_WORKERS)


def load(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    collate: Callable[[list[Any]], Any],
    workers: int,
    ahead: int = 2,
) -> Iterator[Any]:
    """Each batch of the data set, collated, in order.

    Args:
        batches: what the data set is asked for.
        workers: processes; 0 works in this one.
        ahead: batches that each worker makes before they are asked for.

    Raises:
        MemoryError: a process was killed, as systems do that run out of memory, shared memory included.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=left_to_parent,
        prefetch_factor=ahead if workers else None,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MemoryError(
            "a process that decodes pictures was killed, perhaps for lack of (shared) memory; dataset.workers=0 "
            "decodes in the first process"
        ) from error
