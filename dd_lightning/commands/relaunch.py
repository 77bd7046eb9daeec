"""Processes that Lightning starts beside this one: they run the same job, in the same folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from dd_lightning.commands.resolvers import RUN_FOLDER, task_overrides
from dd_lightning.system.processes import end_with, rank

PARENT = "DD_PARENT"  # process that started the others on its machine
TAKES_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p")


@contextmanager
def started_alike(folder: Path) -> Iterator[None]:
    """Processes that Lightning starts in the block run the same job, in the same folder.

    Afterwards nothing is left of them that the next job of a sweep would trip over.
    """
    environment, arguments = dict(os.environ), sys.argv
    os.environ[RUN_FOLDER] = str(folder)
    if rank() and PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
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
