"""What debug presets look at: whether one minibatch can be learned, and where an outer step's time goes."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich import get_console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from dd_lightning.data import RealData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.atomic import atomic_path, write_bytes
from dd_lightning.system.checks import check_count
from dd_lightning.system.words import counted

log = logging.getLogger(__name__)


class OneMinibatch(Callback):
    """Makes all outer steps see the same real pictures, and tells by how much their loss falls."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: RealData = trainer.datamodule  # type: ignore[attr-defined]
        data.keep(data.order(0)[: data.batch_size])
        self._losses: list[float] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        loss = trainer.strategy.reduce(loss.detach(), reduce_op="sum")  # type: ignore[assignment]
        self._losses.append(loss.item())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._losses and trainer.is_global_zero:
            steps = counted(len(self._losses), "outer step")
            log.info(f"outer loss of one minibatch over {steps}: {self._losses[0]:.3g} → {self._losses[-1]:.3g}")


class Profile(Callback):
    """Where an outer step's time goes: a table of its parts, one of torch's operations, and a trace of both.

    The parts are timed first, and torch's operations in the outer steps after: recording them takes time itself.

    Args:
        dirpath: of `operations.txt` and `trace.json` (for chrome://tracing or ui.perfetto.dev).
        after: outer steps before.
        steps: outer steps that are timed.
        traced: outer steps that are recorded.

    Attributes (once they are timed): `parts`, the seconds of each part of an outer step.
    """

    def __init__(self, dirpath: str, after: int = 5, steps: int = 10, traced: int = 3) -> None:
        check_count(after=after, steps=steps, traced=traced)
        self.dirpath, self.after, self.steps, self.traced = Path(dirpath), after, steps, traced
        self._seconds: dict[str, float] = {}
        self._count = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        last = self.after + self.steps + self.traced
        if trainer.max_steps < last:
            raise ValueError(f"trainer.max_steps={trainer.max_steps}, but the profile ends with outer step {last}")
        self._device = trainer.strategy.root_device
        # On the instances, so that all other runs are as they are.
        for owner, name, part in (
            (pl_module.init, "sample", "initial weights"),
            (pl_module.unroll, "advance", "inner loop before the window"),
            (pl_module.unroll, "window", "inner loop"),
            (pl_module, "outer_loss", "outer loss and its gradient"),
            (pl_module, "training_step", "in all"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._count += 1
        if self._count == self.after + 1:
            self._seconds = {}
            self._started = self._now()
        if self._count == self.after + self.steps + 1:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * (self._device.type == "cuda"))]
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells when it starts and stops
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._count == self.after + self.steps:
            self.parts = self._parts(self._now() - self._started)
        if self._count == self.after + self.steps + self.traced:
            self._profiler.stop()
            if trainer.is_global_zero:
                self._write()

    def _parts(self, whole: float) -> dict[str, float]:
        known = {part: total / self.steps for part, total in self._seconds.items()}
        step = known.pop("in all")
        known["gradient through the inner loop"] = step - sum(known.values())
        return known | {"minibatch, outer optimizer, Lightning, callbacks": whole / self.steps - step}

    def _write(self) -> None:
        whole = sum(self.parts.values())
        table = Table(title=f"An outer step: {1e3 * whole:.1f} ms, mean of {self.steps}", title_justify="left")
        table.add_column("part")
        for heading in ("ms", "%"):
            table.add_column(heading, justify="right")
        for part, seconds in self.parts.items():
            table.add_row(part, f"{1e3 * seconds:.2f}", f"{100 * seconds / whole:.1f}")
        get_console().print(table)
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        operations = self._profiler.key_averages().table(sort_by=order, row_limit=30)
        write_bytes(self.dirpath / "operations.txt", operations.encode())
        with atomic_path(self.dirpath / "trace.json") as temporary:
            self._profiler.export_chrome_trace(str(temporary))
        log.info(f"torch's operations are in {self.dirpath}: operations.txt, trace.json")

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._lap(part):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def _lap(self, part: str) -> Iterator[None]:
        began = self._now()
        with record_function(part):
            yield
        self._seconds[part] = self._seconds.get(part, 0.0) + self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
