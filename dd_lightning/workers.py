"""Shards of a population, trained by several processes."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from dd_lightning.cpu import tune_cpu
from dd_lightning.data import RealData
from dd_lightning.init import RandomInit
from dd_lightning.population import Population
from dd_lightning.pretraining import Recipe, train_networks


@dataclass(frozen=True)
class Job:
    """What every process needs to train any shard."""

    population: Population
    network: nn.Module
    inits: dict[str, RandomInit]  # of each part
    data: RealData
    recipe: Recipe
    at_once: int

    def train(self, part: str, indices: range, on_epoch: Callable[[float], None]) -> tuple[str, range, list[float]]:
        """Trains and writes one shard; returns each network's test accuracy in %."""
        weights, accuracies = train_networks(
            self.network, self.inits[part], self.data, self.recipe, indices, self.at_once, on_epoch
        )
        self.population.write(part, indices.start, weights, accuracies)
        return part, indices, accuracies.tolist()


def train_shards(
    job: Job, shards: list[tuple[str, range]], workers: int, advance: Callable[[float], None]
) -> Iterator[tuple[str, range, list[float]]]:
    """Trains the shards, in this process or in several with one thread each, and yields each as it is finished.

    Args:
        shards: parts, and the networks of each.
        workers: processes; with one there is no other than this.
        advance: told how much was trained, in networks.
    """
    if workers <= 1:
        yield from (job.train(part, indices, advance) for part, indices in shards)
        return
    context = mp.get_context("spawn")
    done = context.SimpleQueue()
    pending: set[Future[Any]] = set()
    executor = ProcessPoolExecutor(workers, context, _start, (job, done))
    try:
        pending = {executor.submit(_train, part, indices) for part, indices in shards}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            while not done.empty():
                advance(done.get())
            yield from (future.result() for future in finished)
    finally:
        executor.shutdown(wait=not pending, cancel_futures=True)
        for process in mp.active_children():  # none, unless something went wrong
            process.terminate()


# Of a worker process:
_job: Job
_done: Any  # queue of how much was trained, in networks


def _start(job: Job, done: Any) -> None:
    global _job, _done
    _job, _done = job, done
    torch.set_num_threads(1)
    tune_cpu()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """However the command ends, its workers do not go on without it."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(part: str, indices: range) -> tuple[str, range, list[float]]:
    return _job.train(part, indices, _done.put)
