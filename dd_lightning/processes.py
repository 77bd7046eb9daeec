"""Several processes that distil together: how they are started, and how they end."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_only

from dd_lightning.init import Init
from dd_lightning.resolvers import RUN_FOLDER, task_overrides

PARENT = "DD_PARENT"  # process that started the others on its machine
TAKES_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p")


def rank() -> int:
    """The index of this process among those that distil together."""
    return rank_zero_only.rank or 0


@contextmanager
def started_alike(folder: Path) -> Iterator[None]:
    """Processes that Lightning starts in the block run the same job, in the same folder.

    Afterwards nothing is left of them that the next job of a sweep would trip over.
    """
    environment, arguments = dict(os.environ), sys.argv
    os.environ[RUN_FOLDER] = str(folder)
    if rank() and PARENT in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    else:
        os.environ[PARENT] = str(os.getpid())
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        sys.argv = [arguments[0], *one_job(arguments[1:])]
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)


def one_job(arguments: list[str]) -> list[str]:
    """The command line of this job of a sweep alone."""
    options, values = [], iter(arguments)
    for argument in values:
        if argument.startswith("-") and argument not in ("-m", "--multirun"):
            options.append(argument)
            if argument in TAKES_VALUE:
                options.append(next(values))
    return [*options, *task_overrides()]


def _end_with(parent: int) -> None:
    # A process that waits for others inside a collective notices their end late, or never.
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def check_strategy(strategy: object) -> None:
    """Refuses, by name, strategies that cannot distil.

    Raises:
        ValueError: saying why.
    """
    if strategy in ("auto", "ddp"):
        return
    if not isinstance(strategy, str):
        raise ValueError(f"trainer.strategy must be auto or ddp, not {strategy!r}")
    if strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        reason = "splits the parameters of large models, but here they are a few images; init.per_step is split instead"
    elif strategy.startswith("ddp"):
        reason = "differs from ddp in what distillation does not need"
    else:
        reason = "is not known to distil the same data as one process"
    raise ValueError(f"trainer.strategy={strategy} {reason}; use trainer=ddp")


def check_processes(trainer: pl.Trainer, init: Init) -> None:
    """Refuses what cannot be split over the processes of `trainer`.

    Raises:
        ValueError: the strategy cannot distil, or there are fewer initial weights per outer step than processes.
    """
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        check_strategy(type(trainer.strategy).__name__)
    if init.per_step < trainer.world_size:
        why = "a fixed init has one network" if init.fixed else f"init.per_step={init.per_step}"
        raise ValueError(
            f"{why}, which cannot be split over {trainer.world_size} processes; use trainer.devices={init.per_step}"
            + ("" if init.fixed else " or a larger init.per_step")
        )


def check_same(trainer: pl.Trainer, settings: dict[str, object]) -> None:
    """Refuses to go on where processes compute from other settings or data than the first.

    Raises:
        ValueError: naming the first such setting.
    """
    if trainer.world_size == 1:
        return
    of_first = trainer.strategy.broadcast(settings)
    differing = sorted(k for k in of_first.keys() | settings.keys() if of_first.get(k) != settings.get(k))
    everywhere: list[list[str]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(everywhere, differing)
    for process, keys in enumerate(everywhere):
        if keys:
            raise ValueError(f"process {process} computes from another {keys[0]} than process 0")


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process had ended."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    )
