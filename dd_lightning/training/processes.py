"""Several processes that distil together: what they can share, and how they end."""

from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from dd_lightning.init import Init


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


def check_processes(trainer: pl.Trainer, init: Init, pool: bool = False) -> None:
    """Refuses what cannot be split over the processes of `trainer`.

    Args:
        pool: whether networks are kept from one outer step to the next.

    Raises:
        ValueError: the strategy cannot distil, or there are fewer initial weights per outer step than processes.
    """
    if pool and trainer.world_size > 1:
        raise ValueError(f"window=pool works in one process, not in {trainer.world_size}; window=random does in any")
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        check_strategy(type(trainer.strategy).__name__)
    if init.per_step < trainer.world_size:
        why = "a fixed init has one network" if init.fixed else f"init.per_step={init.per_step}"
        raise ValueError(
            f"{why}, which cannot be split over {trainer.world_size} processes; use trainer.devices={init.per_step}"
            + ("" if init.fixed else " or a larger init.per_step")
        )


class SameSettings(Callback):
    """Refuses to go on where processes compute from other settings or data than the first.

    Args:
        settings: what decides what a process computes.

    Raises:
        ValueError: naming the first setting that differs.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        of_first = trainer.strategy.broadcast(self.settings)
        keys = of_first.keys() | self.settings.keys()
        differing = sorted(k for k in keys if of_first.get(k) != self.settings.get(k))
        everywhere: list[list[str]] = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(everywhere, differing)
        for process, found in enumerate(everywhere):
            if found:
                raise ValueError(f"process {process} computes from another {found[0]} than process 0")


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process had ended."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    )
