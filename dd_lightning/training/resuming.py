"""What a run leaves behind to go on from, and how it goes on."""

import io
import logging
import time
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from dd_lightning.system.archives import check_archive
from dd_lightning.system.atomic import write_bytes
from dd_lightning.system.checks import check_count, check_not_negative, check_positive
from dd_lightning.system.signals import Interrupted, handle

log = logging.getLogger(__name__)

KEPT = 2  # the newest, and one to fall back on
KINDS = {"global_step": int, "state_dict": dict, "loops": dict, "callbacks": dict}  # of what a run reads
KINDS |= {"optimizer_states": list, "lr_schedulers": list, "dd_config": dict}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(path, buffer.getvalue())


class Restored(Callback):
    """Refuses to go on from half of a checkpoint: what Lightning does not find in it, it begins anew.

    Args:
        checkpoint: from which the run goes on, if it does.

    Attributes:
        begun: whether all of the checkpoint is read.

    Raises:
        ValueError: its loops are at another outer step than it says, or it lacks the optimizer's state or the schedule.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint, self.begun = checkpoint, False
        self._content: dict[str, Any] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._content = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.checkpoint:
            self._check(trainer, self._content)
        self._content, self.begun = {}, True

    def _check(self, trainer: pl.Trainer, content: dict[str, Any]) -> None:
        step, batches = content["global_step"], trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if not trainer.global_step == batches == step:
            raise ValueError(f"outer step {step}, but {batches} minibatches and {trainer.global_step} updates")
        used = {"optimizer_states": trainer.optimizers, "lr_schedulers": trainer.lr_scheduler_configs}
        for key, there in used.items():
            if len(content[key]) != len(there) or not all(content[key]):
                raise ValueError(f"it lacks {key}")


class ResumeCheckpoint(Checkpoint):
    """Saves all that a run needs to go on: now and then, after the last outer step, and when a signal asks it to end.

    A signal lets the outer step in progress (and its held-out evaluation) end first; a second one stops at once. With
    several processes all of them save and stop after the same outer step, whichever of them got the signal.

    Args:
        dirpath: folder of the checkpoints; the newest two are kept.
        every: outer steps between checkpoints.
        minutes: at most so long between checkpoints.

    Raises:
        Interrupted: a signal asked the run to end, and it is saved.
    """

    def __init__(self, dirpath: str, every: int = 500, minutes: float = 5.0) -> None:
        check_count(every=every)
        check_positive(minutes=minutes)
        self.dirpath, self.every, self.minutes = Path(dirpath), every, minutes
        self._asked = 0  # number of the signal that this process got
        self._stopping = 0  # of the one that all processes know of
        self.seconds = 0.0  # spent distilling, in this and all earlier processes of the run
        self._now = self._saved = time.monotonic()
        self._unpublished: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_not_negative(seconds=state_dict["seconds"])
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        handle(self._ask)  # Lightning puts the earlier handlers back when the fit ends
        self._now = self._saved = time.monotonic()
        if trainer.is_global_zero:
            for leftover in self.dirpath.glob(".*.ckpt"):  # half written when a process was killed
                leftover.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._now = self._now, time.monotonic()
        self.seconds += self._now - before
        late = self._now - self._saved >= 60 * self.minutes
        self._stopping, late = agreed(trainer, self._asked, late)
        step = trainer.global_step
        if self._stopping or late or trainer.should_stop or step % self.every == 0 or step == trainer.max_steps:
            self._save(trainer)

    # Only after the end of an outer step does Lightning log its metrics, which must be on the disk before a run goes on
    # from there.
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._publish(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (self._stopping,) = agreed(trainer, self._asked)  # perhaps after the last outer step was saved
        self._publish(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._unpublished = self.dirpath / f".last-{trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(self._unpublished)
        self._saved = self._now

    def _publish(self, trainer: pl.Trainer) -> None:
        if self._unpublished and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            self._unpublished.replace(self.dirpath / self._unpublished.name.removeprefix("."))
            for old in checkpoints(self.dirpath)[KEPT:]:
                old.unlink(missing_ok=True)
        self._unpublished = None
        if self._stopping:
            raise Interrupted(
                self._stopping, f"and saved after outer step {trainer.global_step}; the same command goes on from there"
            )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise Interrupted(number, "again, and stopped at once; the same command goes on from the last checkpoint")
        self._asked = number


def agreed(trainer: pl.Trainer, *values: int) -> list[int]:
    """Each value's largest over all processes."""
    if trainer.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(tensor, reduce_op="max").tolist()  # type: ignore[union-attr]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that it could go on from, the newest first."""
    return sorted(folder.glob("last-*.ckpt"), key=lambda path: int(path.stem.partition("-")[2]), reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    Raises:
        OSError: none of those there can be read.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            load_checkpoint(path)
        except ValueError as error:
            log.warning(f"{error}; trying the one before")
        else:
            return path
    if found:
        raise OSError(f"no checkpoint in {folder} can be read; resume=null starts a new run")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, without running any code in it.

    Raises:
        ValueError: it is truncated, damaged, or not a checkpoint.
    """
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has changed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or not a checkpoint") from error
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} is truncated, damaged or not a checkpoint: {reason}") from error
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise ValueError(f"{path} is not a checkpoint of a run")
    odd = [key for key, kind in KINDS.items() if not isinstance(content.get(key), kind)]
    if odd or content["global_step"] < 0:
        raise ValueError(f"{path} is not what a run writes: {', '.join(odd or ['global_step'])}")
    return content


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to go on from.

    Args:
        resume: a file, a run's folder, `auto` for the run in `folder`, or None.

    Raises:
        FileNotFoundError, ValueError: there is none where `resume` says, or it cannot be read.
    """
    if resume is None:
        return None
    path = folder if resume == "auto" else Path(resume)
    if path.is_file():
        load_checkpoint(path)
        return path
    found = newest_checkpoint(path / "checkpoints")
    if found is None and resume != "auto":
        raise FileNotFoundError(f"resume={resume}: there is no checkpoint at {path}")
    return found
