"""What happens beside Algorithm 1: held-out evaluation, pictures, and what is kept when a run cannot go on."""

import logging
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

from dd_lightning.data import Pictures, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.evaluation.heldout import HeldOutResult, count_choosing, evaluate_held_out
from dd_lightning.report.picture import draw
from dd_lightning.system.checks import check_count
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.system.progress import progress_of
from dd_lightning.system.seeding import Stream
from dd_lightning.unroll import AdjointUnroll

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Callback)


def of_kind(trainer: pl.Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's callback of this kind, if there is one."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]


class HeldOutEvaluation(Callback):
    """Trains unseen networks on the distilled data; tests them on validation pictures, at the end on the test set.

    Logs `heldout/accuracy_mean`, `_std`, `_before`, and the 95 % interval `_low` to `_high`, in %: of the objective's
    first measure. Where the objective has more measures, `_before` and `_after` of each.

    Args:
        networks: unseen networks per evaluation while distilling, which choose the distilled data (one, where the init
            is fixed).
        test_networks: unseen networks for the test, other ones than for validation.
        every: outer steps between evaluations.
        per_step: evaluate after every GD step, not only after the last.
    """

    def __init__(self, networks: int = 20, test_networks: int = 200, every: int = 500, per_step: bool = False) -> None:
        check_count(networks=networks, test_networks=test_networks, every=every)
        self.networks, self.test_networks, self.every, self.per_step = networks, test_networks, every, per_step
        self.best: dict[str, Any] | None = None  # accuracy, networks and distilled data; of equals, the last

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = state_dict["best"]
        if best is not None and not (isinstance(best["accuracy"], float) and isinstance(best["distilled"], dict)):
            raise ValueError("the best distilled data so far are none")
        self.best = best

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        if trainer.is_global_zero:
            count_choosing(pl_module.init, self.networks, "the distilled data")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(pl_module, DatasetDistiller)
        data: RealData = trainer.datamodule  # type: ignore[attr-defined]
        result = self.validate(pl_module, data, self.networks)
        metrics = result.metrics("heldout")
        # Every process has the gathered result, and loggers want it now, whatever their interval.
        pl_module.log("heldout/accuracy_mean", result.mean, prog_bar=True, logger=False)
        pl_module.log_dict({k: v for k, v in metrics.items() if k != "heldout/accuracy_mean"}, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        if self.best is None or result.mean >= self.best["accuracy"]:
            distilled = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            self.best = {"accuracy": result.mean, "networks": len(result.accuracies), "distilled": distilled}
        log.info(f"step {step}: held-out accuracy {result}")
        # A whole run is one epoch, at whose end an early stop would come too late.
        for stopping in trainer.early_stopping_callbacks:
            stopping.on_train_epoch_end(trainer, pl_module)

    def validate(self, module: DatasetDistiller, data: RealData, networks: int) -> HeldOutResult:
        """Accuracy of so many networks on validation pictures, by which the distilled data are chosen."""
        return self._evaluate(module, module.distilled, data, data.validation, networks, Stream.HELD_OUT_VALIDATION)

    def test(self, module: DatasetDistiller, distilled: DistilledData, data: RealData) -> HeldOutResult:
        """Accuracy on the test set; called once, when the distilled data are final."""
        with progress_of("test", module.init.num_held_out(self.test_networks)) as advance:
            return self._evaluate(
                module, distilled, data, data.test, self.test_networks, Stream.HELD_OUT_TEST, on_progress=advance
            )

    def _evaluate(
        self,
        module: DatasetDistiller,
        distilled: DistilledData,
        data: RealData,
        pictures: Pictures,
        count: int,
        stream: Stream,
        **kwargs: Any,
    ) -> HeldOutResult:
        initial_weights = module.init.held_out(module.network, count, stream)
        unroll = AdjointUnroll(module.unroll.optimizer, batched=None)
        return evaluate_held_out(
            module.network,
            initial_weights,
            distilled,
            pictures,
            data.preprocessing,
            unroll,
            self.per_step,
            module.objective,
            **kwargs,
        )


class DistilledPictures(Callback):
    """Draws the distilled images and logs them with their learning rates, to the run folder and every logger.

    Args:
        every: outer steps between pictures.
    """

    def __init__(self, every: int = 500) -> None:
        check_count(every=every)
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (step % self.every and step != trainer.max_steps) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DatasetDistiller)
        data: RealData = trainer.datamodule  # type: ignore[attr-defined]
        distilled = pl_module.distilled.detach()
        path = Path(trainer.default_root_dir) / "pictures" / f"step_{step:06d}.png"
        draw(distilled, data.preprocessing, f"outer step {step}", path, data.class_names)
        rates = {
            f"learning_rate/epoch_{e}_step_{i}": rate
            for e, epoch in enumerate(distilled.learning_rates.tolist())
            for i, rate in enumerate(epoch)
        }
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=step)
        log_picture(trainer, path, step)


def log_picture(trainer: pl.Trainer, path: Path, step: int) -> None:
    """Shows a picture file in the loggers that can."""
    import matplotlib.image

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("distilled", [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image("distilled", matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), "pictures")


class NonFiniteLossError(FloatingPointError):
    """The outer loss became NaN or infinite."""


class LastGood(Callback):
    """Saves the last distilled data whose loss was finite when the run cannot go on: the loss is not, or memory is out.

    Raises:
        NonFiniteLossError: naming the step and the learning rates.
    """

    def __init__(self) -> None:
        self._last_good: DistilledData | None = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        loss = trainer.strategy.reduce(loss.detach(), reduce_op="sum")  # type: ignore[assignment] # all stop, or none
        if torch.isfinite(loss):
            self._last_good = pl_module.distilled.detach()
            return
        rates = ", ".join(f"{rate:.3g}" for rate in pl_module.distilled.learning_rates.flatten().tolist())
        raise NonFiniteLossError(
            f"the outer loss is {loss.item()} at outer step {trainer.global_step}, with learning rates {rates}; "
            f"{self.kept(trainer)}; try a smaller distilled.learning_rate or optimizer.lr"
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, NonFiniteLossError) or is_out_of_memory(exception)
        if stopped and self._last_good is not None and trainer.is_global_zero:
            self._last_good.save(self._path(trainer))

    def kept(self, trainer: pl.Trainer) -> str:
        """Where the last good data are."""
        if self._last_good is None:
            return "nothing was distilled yet"
        return f"the last good distilled data are at {self._path(trainer)}"

    def _path(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "last_good.safetensors"


class ProgressBar(RichProgressBar):
    """Lightning's Rich bar: outer steps, time left, loss and held-out accuracy, in a line of 80 columns.

    Where a run goes on, it begins at the outer step that was reached, and measures from there.
    """

    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.progress is not None:
            task = self._add_task(trainer.max_steps, self._get_train_description(0))
            self.progress.reset(task, completed=trainer.global_step)
            self.train_progress_bar_id = task

    # Lightning's count the batches of an epoch, which may have begun in an earlier process.
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown = {"train/loss": "loss", "heldout/accuracy_mean": "held-out %"}
        return {shown.get(name, name): value for name, value in metrics.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        return "distilling"
