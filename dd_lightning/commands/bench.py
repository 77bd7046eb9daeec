"""dd-bench: what an outer step costs, engine by engine."""

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from rich import get_console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.autograd.profiler import profile

from dd_lightning.atomic import write_json
from dd_lightning.callbacks import LastGood, ProgressBar, is_out_of_memory
from dd_lightning.checks import check_choice, check_count
from dd_lightning.commands.build import hardware, versions
from dd_lightning.commands.launch import command
from dd_lightning.data import Digits, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import RandomInit
from dd_lightning.networks import AlexCifarNet, LeNet, split
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
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


class OuterStep:
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


def bench(cfg: DictConfig) -> None:
    """Times every engine in every setting, in turn; prints a table and writes `bench.json`."""
    check_count(repeats=cfg.repeats, batch_size=cfg.batch_size)
    for name in cfg.networks:
        check_choice("network", name, NETWORKS)
    check_count(**{f"steps[{i}]": t for i, t in enumerate(cfg.steps)})
    device = torch.device(cfg.device if cfg.device else "cuda" if torch.cuda.is_available() else "cpu")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if device.type == "cpu":
        limit_memory(cfg.gigabytes)
    torch.manual_seed(cfg.seed)
    engines = {
        name: Engine(instantiate(engine.unroll), OuterLoss(Classification(), engine.precision))
        for name, engine in cfg.engines.items()
    }
    settings = [(n, j, t) for n in cfg.networks for j in cfg.per_step[n] for t in cfg.steps]
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(),
        "batch_size": cfg.batch_size,
        "rows": rows,
    }
    folder = Path(HydraConfig.get().runtime.output_dir)
    for network, per_step, steps in settings:
        title = f"{network}, J = {per_step}, T = {steps}"
        measured = measure(OuterStep(network, per_step, steps, cfg.batch_size, device), engines, cfg.repeats, title)
        get_console().print(table(measured, f"{title}, B = {cfg.batch_size}"))
        rows += [as_row(network, per_step, steps, name, m, measured) for name, m in measured.items()]
        write_json(folder / "bench.json", content)
    if cfg.framework:
        seconds = framework(cfg, device, folder)
        write_json(folder / "bench.json", content | {"framework": seconds})
        step, added = seconds["step"], seconds["data"] + seconds["rest"]
        get_console().print(
            f"Lightning, data, callbacks and logging add {1e3 * added:.2f} ms to {1e3 * step:.1f} ms of an outer step "
            f"({100 * added / step:.1f} %; LeNet on digits, J = 1, T = 3, B = {cfg.batch_size})"
        )


def framework(cfg: DictConfig, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds of an outer step in a Lightning run: of the step itself, of the data, and of all else."""
    data = RealData(Digits("digits", image_size=28, validation=200), cfg.batch_size, cfg.seed)
    data.setup()
    labels = torch.arange(10).expand(1, -1)
    distilled = DistilledData.create(torch.randn(1, 10, 1, 28, 28), labels, 3, 0.02)
    adam = partial(torch.optim.Adam, lr=1e-3)
    distiller = DatasetDistiller(distilled, LeNet(), RandomInit(), FunctionalUnroll(), Classification(), adam)
    profiler = _Quiet()
    trainer = pl.Trainer(
        max_steps=20 * cfg.repeats,
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


def measure(step: OuterStep, engines: dict[str, Engine], repeats: int, title: str) -> dict[str, Measured]:
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


def as_row(
    network: str, per_step: int, steps: int, name: str, m: Measured, measured: dict[str, Measured]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "network": network,
        "per_step": per_step,
        "steps": steps,
        "engine": name,
        "failure": m.failure,
    }
    if m.failure is None:
        row |= {"seconds": m.total, "ratio": ratio(m, measured), "peak_bytes": m.peak}
        row |= {f"seconds_{part}": m.median(part) for part in PARTS}
    return row


def ratio(m: Measured, measured: dict[str, Measured]) -> float | None:
    """How many times faster than the first engine; the median over pairs timed one after the other."""
    first = next(iter(measured.values()))
    if first.failure or m.failure:
        return None
    pairs = zip(first.seconds, m.seconds, strict=True)
    return statistics.median(sum(one.values()) / sum(other.values()) for one, other in pairs)


def table(measured: dict[str, Measured], title: str) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("engine")
    for heading in ("ms / outer step", *PARTS, "peak MiB", "times faster"):
        result.add_column(heading, justify="right")
    for name, m in measured.items():
        if m.failure:
            result.add_row(name, m.failure)
            continue
        times = [f"{1e3 * m.total:.1f}", *(f"{1e3 * m.median(part):.1f}" for part in PARTS)]
        faster = ratio(m, measured)
        result.add_row(name, *times, f"{m.peak / 2**20:.0f}", "" if faster is None else f"{faster:.2f}")
    return result


def limit_memory(gigabytes: float | None) -> None:
    """Makes an allocation fail instead of the whole process being killed."""
    if gigabytes is None:
        free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        gigabytes = 0.9 * int(free.split()[1]) / 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30), hard))


main = command("bench", bench)

if __name__ == "__main__":
    main()
