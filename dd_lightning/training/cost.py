"""What an outer step costs: time and memory, with Lightning around it and without."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
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
from dd_lightning.networks import AlexCifarNet, LeNet, Weights, split
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.training.callbacks import LastGood, ProgressBar
from dd_lightning.unroll import FunctionalUnroll, OuterStep, Unroll

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet": (LeNet, (1, 28, 28)),
    "alexcifarnet": (AlexCifarNet, (3, 32, 32)),
}
PARTS = ("init", "inner", "outer", "backward", "recorded", "update")


@dataclass
class Measured:
    """Seconds of each part of each timed step, and the peak of tensors above what was held before, in bytes."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None
    failure: str | None = None

    def median(self, part: str) -> float | None:
        """Seconds of a part, None if it is no part of these steps."""
        return statistics.median(step[part] for step in self.seconds) if part in self.seconds[0] else None

    @property
    def totals(self) -> list[float]:
        return [sum(step.values()) for step in self.seconds]

    @property
    def total(self) -> float:
        return statistics.median(self.totals)


class Engine(NamedTuple):
    """How an outer step is computed.

    Attributes:
        capture: on a GPU, as one CUDA graph.
    """

    unroll: Unroll
    outer_loss: OuterLoss
    capture: bool = False


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
        self.parameters = [start.images, start.raw_learning_rates]
        # Drawn on the CPU: the same on every device.
        pictures, classes = torch.randn(batch_size, *shape), torch.randint(10, (batch_size,))
        self.real = pictures.to(device), classes.to(device)
        self.count = 0
        self._steps: dict[Engine, OuterStep] = {}

    def run(self, engine: Engine) -> dict[str, float]:
        """Seconds of each part, of which a recorded step is one."""
        clock = Clock(self.device)
        theta_0 = self.init.sample(self.network, self.count)
        clock.lap("init")
        (self._recorded if engine.capture else self._in_parts)(engine, theta_0, clock)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("update")
        self.count += 1
        return clock.laps

    def _in_parts(self, engine: Engine, theta_0: Weights, clock: "Clock") -> None:
        # As in training, networks that are not batched are unrolled one by one, so that memory holds the graph of one.
        together = self.init.per_step if engine.unroll.batched else 1
        parts = split(theta_0, together)
        for part in parts:
            theta_T = engine.unroll(self.network, part, self.distilled.steps())
            clock.lap("inner")
            loss = engine.outer_loss(self.network, theta_T, *self.real) / len(parts)
            clock.lap("outer")
            loss.backward(inputs=self.parameters)
            clock.lap("backward")

    def _recorded(self, engine: Engine, theta_0: Weights, clock: "Clock") -> None:
        _, gradients = self.recorded(engine)((theta_0, *self.real), self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = (gradient / self.init.per_step).to(parameter.dtype)
        clock.lap("recorded")

    def recorded(self, engine: Engine) -> OuterStep:
        """The outer step as training has it, on a GPU recorded when it is first called."""

        def loss(theta_0: Weights, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            theta_T = engine.unroll(self.network, theta_0, self.distilled.steps())
            return engine.outer_loss(self.network, theta_T, pictures, labels)

        if engine not in self._steps:
            self._steps[engine] = OuterStep(loss, None if engine.unroll.batched else 1)
        return self._steps[engine]


def gradient(
    unroll: Unroll, device: torch.device, network: str = "lenet", dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Of a tiny outer step with respect to the images: the same by every engine and on every device, to rounding."""
    torch.manual_seed(0)
    step = BareStep(network, 2, 2, 4, device)
    network_64, (pictures, labels) = step.network.double(), step.real
    theta_0 = {name: weight.to(dtype) for name, weight in step.init.sample(network_64, 0).items()}
    module = network_64.to(dtype)
    images = step.distilled.images.detach().to(dtype).requires_grad_()
    rates = step.distilled.raw_learning_rates.detach().to(dtype).requires_grad_()
    distilled = replace(step.distilled, images=images, raw_learning_rates=rates)
    theta_T = unroll(module, theta_0, distilled.steps())
    loss = OuterLoss(Classification())(module, theta_T, pictures.to(dtype), labels)
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


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and its seconds, with the device's work done."""
    clock = Clock(device)
    found = work()
    clock.lap("all")
    return found, clock.laps["all"]


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


def measure(
    step: BareStep,
    engines: dict[str, Engine],
    repeats: int,
    title: str,
    others: Mapping[str, Callable[[], dict[str, float]]] = MappingProxyType({}),
) -> dict[str, Measured]:
    """The engines in turn, after two steps of each that are not timed; the second gives the peak of memory.

    Args:
        others: what else is timed, in the same turns: gives the seconds of its parts.
    """
    runs = {name: partial(step.run, engine) for name, engine in engines.items()} | dict(others)
    measured = {name: Measured() for name in runs}
    for repeat in track(range(repeats + 1), description=title, console=get_console(), transient=True):
        for name, run in runs.items():
            result = measured[name]
            if result.failure:
                continue
            try:
                if repeat == 0:
                    if name not in engines or not engines[name].capture:  # a recorded step's memory stays
                        run()  # the first makes what stays: traces, the optimizer's state
                    result.peak = peak_memory(step.device, run) if name in engines else None
                else:
                    result.seconds.append(run())
            except Exception as error:  # of this one; the others go on
                message = " ".join(str(error).split())[:200] or type(error).__name__
                result.failure = "out of memory" if is_out_of_memory(error) else message
                step.optimizer.zero_grad()
                gc.collect()
    return measured


class Ratio(NamedTuple):
    """How many times faster: the median over pairs timed one after the other, and the quartiles around it."""

    median: float
    low: float
    high: float


def ratio(m: Measured, of: Measured | None) -> Ratio | None:
    """How many times faster than `of`."""
    if of is None or of.failure or m.failure:
        return None
    pairs = [one / other for one, other in zip(of.totals, m.totals, strict=True)]
    low, median, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Ratio(median, low, high)


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
