"""What a device is to prove: the CPU's gradients, recorded as well, memory that hardly grows, two processes on it.

Each proof is a mark, what was found in words, and the numbers.
"""

import logging
import multiprocessing
import os
import socket
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from dd_lightning.data import Digits, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import RandomInit
from dd_lightning.networks import LeNet
from dd_lightning.objectives import Classification
from dd_lightning.system.atomic import write_json
from dd_lightning.system.installation import BROKEN, NOTE, OK
from dd_lightning.training.cost import BareStep, Engine, gradient, peak_memory, timed
from dd_lightning.training.foretelling import StepSeconds
from dd_lightning.unroll import FunctionalUnroll, HigherUnroll, Unroll

Numbers = dict[str, Any]
Proof = tuple[str, str, Numbers]

# Relative errors that two ways to one gradient may have: in float64, and in float32, where a GPU rounds factors (TF32).
ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-2}
RECORDED = 1e-4  # and in float32 the same kernels
SECONDS = "seconds.json"
GROWTH = 1.2  # of the memory of `recompute`, from 30 GD steps to 300


class Size(NamedTuple):
    """Of an outer step: J, T and B."""

    per_step: int
    steps: int
    batch_size: int


@cache
def expected(network: str) -> torch.Tensor:
    """The reference: the gradient by `higher` on the CPU in float64."""
    return gradient(HigherUnroll(), torch.device("cpu"), network)


def same_gradient(unroll: Unroll, device: torch.device, network: str, dtype: torch.dtype) -> Proof:
    """Near that of the CPU."""
    error = relative(gradient(unroll, device, network, dtype).double().cpu(), expected(network))
    said = f"{error:.1e} from the CPU's gradient in float64, which `higher` gives"
    wrong = BROKEN if dtype == torch.float64 else NOTE  # a rounded ReLU may be at its other side
    return OK if error <= ALLOWED[dtype] else wrong, said, {"error": error}


def same_recorded(engine: Engine, device: torch.device, size: Size) -> Proof:
    """Recorded outer steps against the same kernel by kernel: gradients of several, and the time."""
    torch.manual_seed(0)
    step = BareStep("lenet", *size, device)
    outer_step, parameters, errors, seconds = step.recorded(engine), step.parameters, [], []
    with heard("dd_lightning.unroll.capture") as reasons:
        for repeat in range(4):
            inputs = step.init.sample(step.network, repeat), step.real[0] + repeat, step.real[1]
            (_, found), one = timed(device, partial(outer_step, inputs, parameters))
            (_, plain), other = timed(device, partial(outer_step.gradients, inputs, parameters))
            errors += [relative(a, b) for a, b in zip(found, plain, strict=True)]
            seconds.append((one, other))
    recorded, kernels = map(statistics.median, zip(*seconds[1:], strict=True))  # the first records
    said = f"{1e3 * recorded:.1f} ms, kernel by kernel {1e3 * kernels:.1f} ms; gradients {max(errors):.1e} apart"
    numbers = {"error": max(errors), "seconds": recorded, "seconds_kernel_by_kernel": kernels}
    if device.type != "cuda":
        return NOTE, f"skipped: nothing is recorded on {device.type}; {said}", numbers
    if not outer_step.capture:
        return NOTE, f"not recorded: {'; '.join(reasons)}", numbers
    return OK if max(errors) <= RECORDED else BROKEN, said, numbers


def memory_growth(engine: Engine, device: torch.device, size: Size) -> Proof:
    """At the peak of an outer step of T GD steps, and of ten times as many."""
    peaks = []
    for steps in (size.steps, 10 * size.steps):
        step = BareStep("lenet", size.per_step, steps, size.batch_size, device)
        step.run(engine)
        peaks.append(peak_memory(device, partial(step.run, engine)))
    growth = peaks[1] / peaks[0]
    said = " and ".join(f"{p / 2**20:.0f} MiB" for p in peaks)
    said += f" with {size.steps} and {10 * size.steps} GD steps, {growth:.2f} times as much"
    much = getattr(engine.unroll, "recompute", False) and growth > GROWTH
    return NOTE if much else OK, said, {"peaks": peaks, "growth": growth}


def two_processes(device: torch.device, outer_steps: int) -> Proof:
    """Two processes on one device, which talk by gloo, distil what one process distils."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        paths = [Path(folder, name) for name in ("one", "two")]
        distil(device, outer_steps, paths[0])
        spawned = multiprocessing.get_context("spawn")
        ranks = [
            spawned.Process(
                target=distil, args=(device, outer_steps, paths[1], shared | {"NODE_RANK": rank, "LOCAL_RANK": "0"})
            )
            for rank in "01"
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            codes = " and ".join(str(process.exitcode) for process in ranks)
            return BROKEN, f"two processes ended with {codes}; processes.txt says why", {}
        one, two = (torch.load(path, weights_only=True) for path in paths)
    error = (one - two).abs().max().item()
    said = f"after {outer_steps} outer steps the images of two processes are {error:.1e} from those of one"
    return OK if error <= RECORDED else BROKEN, said, {"error": error}


def distil(device: torch.device, outer_steps: int, path: Path, environment: dict[str, str] | None = None) -> None:
    """A short run, whose images are written to `path`.

    Args:
        environment: where the others are, if this process is one of two.
    """
    os.environ.update(environment or {})
    data = RealData(Digits("digits", image_size=28, validation=200), 128)
    data.setup()
    images = torch.randn(3, 10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    start = DistilledData.create(images, torch.arange(10).repeat(3, 1), 2, 0.02)  # labels that can be broadcast
    adam = partial(torch.optim.Adam, lr=1e-2)
    distiller = DatasetDistiller(start, LeNet(), RandomInit(per_step=4), FunctionalUnroll(), Classification(), adam)
    together: dict[str, Any] = {"num_nodes": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = pl.Trainer(
        max_steps=outer_steps,
        max_epochs=-1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **(together if environment else {}),
    )
    trainer.fit(distiller, datamodule=data)
    if trainer.is_global_zero:
        torch.save(distiller.distilled.images.detach().cpu(), path)


class KeptSeconds(StepSeconds):
    """Keeps them in the run's `seconds.json`."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        write_json(Path(trainer.default_root_dir) / SECONDS, self.seconds)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """What is logged under that name in the block."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
