"""What a run will take, measured on a few of its outer steps: time, memory and disk."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from dd_lightning.data import RealData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.report.picture import draw
from dd_lightning.system.seeding import Stream
from dd_lightning.training.callbacks import HeldOutEvaluation
from dd_lightning.training.cost import Clock, timed
from dd_lightning.training.resuming import KEPT

WARM, MEASURED = 1, 2  # outer steps; the first makes what stays


@dataclass(frozen=True)
class Foretold:
    """What a run will take.

    Attributes:
        step: seconds of an outer step.
        evaluation: seconds of a held-out evaluation.
        test: seconds of the test at the end.
        steps, evaluations: how many there will be.
        memory: bytes at the peak: of the GPU, else of the process.
        disk: bytes in the run's folder at its end, of checkpoints, pictures and data.
    """

    step: float
    evaluation: float
    test: float
    steps: int
    evaluations: int
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        return self.steps * self.step + self.evaluations * self.evaluation + self.test


class StepSeconds(Callback):
    """Seconds of every outer step, with the device's work done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._clock = Clock(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._clock.lap("step")
        self.seconds.append(self._clock.laps["step"])


def foretell(
    make: Callable[..., pl.Trainer],
    steps: int,
    distiller: DatasetDistiller,
    data: RealData,
    held_out: HeldOutEvaluation | None,
    folder: Path,
) -> Foretold:
    """Takes a few outer steps in one process, and a held-out evaluation of two networks; writes into `folder`.

    Args:
        make: Lightning's trainer, with its settings.
        steps: outer steps of the run.
        held_out: the run's evaluation.
    """
    step_seconds = StepSeconds()
    alone: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto", "default_root_dir": str(folder)}
    silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = make(max_steps=WARM + MEASURED, callbacks=[step_seconds], **alone, **silent)
    trainer.fit(distiller, datamodule=data)
    device = trainer.strategy.root_device
    checkpoint, picture, saved = _sizes(trainer, distiller, data, folder)
    evaluations, evaluation, test = 0, 0.0, 0.0
    if held_out is not None:
        evaluations = math.ceil(steps / held_out.every)
        of_one = _evaluating(held_out, distiller, data, device)
        init, pictures = distiller.init, len(data.test) / len(data.validation)
        evaluation = of_one * init.num_distinct(held_out.networks, Stream.HELD_OUT_VALIDATION)
        test = of_one * pictures * init.num_distinct(held_out.test_networks, Stream.HELD_OUT_TEST)
    return Foretold(
        step=sum(step_seconds.seconds[WARM:]) / MEASURED,
        evaluation=evaluation,
        test=test,
        steps=steps,
        evaluations=evaluations,
        memory=peak(device),
        disk=KEPT * checkpoint + (evaluations + 1) * picture + saved,
    )


def _sizes(trainer: pl.Trainer, distiller: DatasetDistiller, data: RealData, folder: Path) -> list[int]:
    """Bytes of a checkpoint, a picture and the distilled data, written into `folder`."""
    paths = [folder / name for name in ("last.ckpt", "picture.png", "distilled.safetensors")]
    distilled = distiller.distilled.detach().to("cpu")
    trainer.save_checkpoint(paths[0])
    draw(distilled, data.preprocessing, "", paths[1])
    distilled.save(paths[2])
    return [path.stat().st_size for path in paths]


def _evaluating(
    held_out: HeldOutEvaluation, distiller: DatasetDistiller, data: RealData, device: torch.device
) -> float:
    """Seconds of a held-out evaluation for each network."""
    distiller.to(device)
    data.to(device)
    count = distiller.init.num_distinct(min(held_out.networks, 2), Stream.HELD_OUT_VALIDATION)
    _, seconds = timed(device, lambda: held_out.validate(distiller, data, count))
    return seconds / count


def peak(device: torch.device) -> int:
    """The most bytes so far: of a GPU's tensors, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
