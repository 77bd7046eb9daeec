"""What an outer step costs: time and memory, with Lightning around it and without."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from rich import get_console
from rich.progress import track
from torch import nn
from torch.autograd.profiler import profile

from dd_lightning.data import Digits, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import RandomInit
from dd_lightning.networks import AlexCifarNet, LeNet, split
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.training.callbacks import LastGood, ProgressBar
from dd_lightning.unroll import FunctionalUnroll, Unroll

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet": (LeNet, (1, 28, 28)),
    "alexcifarnet": (AlexCifarNet, (3, 32, 32)),
}
PARTS = ("init", "inner", "outer", "backward", "update")


@dataclass
class Measured:
    """Seconds of each part of each timed step, and the peak of tensors above what was held before, in bytes."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0
    failure: str | None = None

    def median(self, part: str) -> float:
        return statistics.median(step[part] for step in self.seconds)

    @property
    def total(self) -> float:
        return statistics.median(sum(step.values()) for step in self.seconds)


class Engine(NamedTuple):
    """How an outer step is computed."""

    unroll: Unroll
    outer_loss: OuterLoss


class BareStep:
    """One bare outer step of Algorithm 1 on random pictures, without Lightning.

    Args:
        network: a name in `NETWORKS`.
        per_step: J, initial weights.
        steps: T, GD steps on ten images each.
        batch_size: real images.
    """

    def __init__(self, network: str, per_step: int, steps: int, batch_size: int, device: torch.device) -> None:
        make, shape = NETWORKS[network]
        self.network, self.device = make().to(device), device
        self.init = RandomInit(per_step=per_step)
        labels = torch.arange(10).expand(steps, -1)
        start = DistilledData.create(0.3 * torch.randn(steps, 10, *shape), labels, 1, 0.02).to(device)
        self.distilled = start
        start.images.requires_grad_()
        start.raw_learning_rates.requires_grad_()
        self.optimizer = torch.optim.Adam([start.images, start.raw_learning_rates], lr=1e-6)
        self.real = torch.randn(batch_size, *shape, device=device), torch.randint(10, (batch_size,), device=device)
        self.count = 0

    def run(self, engine: Engine) -> dict[str, float]:
        """Seconds of each part."""
        clock = Clock(self.device)
        theta_0 = self.init.sample(self.network, self.count)
        clock.lap("init")
        # As in training, networks that are not batched are unrolled one by one, so that memory holds the graph of one.
        together = self.init.per_step if engine.unroll.batched else 1
        parts = split(theta_0, together)
        for part in parts:
            theta_T = engine.unroll(self.network, part, self.distilled.steps())
            clock.lap("inner")
            loss = engine.outer_loss(self.network, theta_T, *self.real) / len(parts)
            clock.lap("outer")
            loss.backward(inputs=[self.distilled.images, self.distilled.raw_learning_rates])
            clock.lap("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("update")
        self.count += 1
        return clock.laps


def gradient(unroll: Unroll, device: torch.device) -> torch.Tensor:
    """Of a tiny outer step in double precision, with respect to the images: the same by every engine, to rounding."""
    torch.manual_seed(0)
    step = BareStep("lenet", 2, 2, 4, device)
    network, (pictures, labels) = step.network.double(), step.real
    theta_0 = {name: weight.double() for name, weight in step.init.sample(network, 0).items()}
    images = step.distilled.images.detach().double().requires_grad_()
    rates = step.distilled.raw_learning_rates.detach().double().requires_grad_()
    distilled = replace(step.distilled, images=images, raw_learning_rates=rates)
    theta_T = unroll(network, theta_0, distilled.steps())
    loss = OuterLoss(Classification())(network, theta_T, pictures.double(), labels)
    return torch.autograd.grad(loss, images)[0]


class Clock:
    """Seconds of each part, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, part: str) -> None:
        now = self._now()
        self.laps[part], self._last = self.laps.get(part, 0.0) + now - self._last, now


def peak_memory(device: torch.device, work: Callable[[], Any]) -> int:
    """Bytes of tensors that `work` holds at its peak above what was held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells when it starts and stops
    with profile(profile_memory=True, acc_events=False) as profiler:
        work()
    events: list[Any] = profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def measure(step: BareStep, engines: dict[str, Engine], repeats: int, title: str) -> dict[str, Measured]:
    """The engines in turn, after two steps of each that are not timed; the second gives the peak of memory."""
    measured = {name: Measured() for name in engines}
    for repeat in track(range(repeats + 1), description=title, console=get_console(), transient=True):
        for name, engine in engines.items():
            result = measured[name]
            if result.failure:
                continue
            try:
                if repeat == 0:
                    step.run(engine)  # the first makes what stays: traces, the optimizer's state
                    result.peak = peak_memory(step.device, lambda engine=engine: step.run(engine))
                else:
                    result.seconds.append(step.run(engine))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                result.failure = "out of memory"
                step.optimizer.zero_grad()
                gc.collect()
    return measured


def ratio(m: Measured, measured: dict[str, Measured]) -> float | None:
    """How many times faster than the first engine; the median over pairs timed one after the other."""
    first = next(iter(measured.values()))
    if first.failure or m.failure:
        return None
    pairs = zip(first.seconds, m.seconds, strict=True)
    return statistics.median(sum(one.values()) / sum(other.values()) for one, other in pairs)


def framework(batch_size: int, outer_steps: int, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds of an outer step in a Lightning run: of the step itself, of the data, and of all else."""
    data = RealData(Digits("digits", image_size=28, validation=200), batch_size)
    data.setup()
    labels = torch.arange(10).expand(1, -1)
    distilled = DistilledData.create(torch.randn(1, 10, 1, 28, 28), labels, 3, 0.02)
    adam = partial(torch.optim.Adam, lr=1e-3)
    distiller = DatasetDistiller(distilled, LeNet(), RandomInit(), FunctionalUnroll(), Classification(), adam)
    profiler = _Quiet()
    trainer = pl.Trainer(
        max_steps=outer_steps,
        max_epochs=-1,
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1,
        profiler=profiler,
        logger=CSVLogger(folder, name="framework"),
        callbacks=[LastGood(), ProgressBar()],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(distiller, datamodule=data)

    def per_step(*actions: str) -> float:
        found = profiler.recorded_durations.items()
        return sum(sum(s) for name, s in found if name.endswith(actions)) / trainer.max_steps

    hooks = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
    step = per_step("DatasetDistiller.optimizer_step") - per_step(*(f"LastGood.{hook}" for hook in hooks))
    fetch = per_step("train_dataloader_next")
    return {"step": step, "data": fetch, "rest": per_step("run_training_epoch") - step - fetch}


class _Quiet(SimpleProfiler):
    """Prints no table of its own."""

    def describe(self) -> None:
        pass
