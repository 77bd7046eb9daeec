"""How far a run is: Lightning's bar on a terminal, plain lines elsewhere."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.callbacks import ProgressBar as LightningBar
from rich import get_console

from dd_lightning.system.checks import check_positive
from dd_lightning.system.progress import SECONDS, Lines
from dd_lightning.training.callbacks import ProgressBar


def progress(seconds: float = SECONDS) -> Callback:
    """A bar where there is a terminal, else a line every `seconds`, without control characters."""
    plain = PlainProgress(seconds)  # a wrong setting is refused on a terminal, too
    return ProgressBar() if get_console().is_terminal else plain


class PlainProgress(LightningBar):
    """Prints outer steps, time left, loss and held-out accuracy.

    Args:
        seconds: between lines.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        super().__init__()
        check_positive(seconds=seconds)
        self._seconds, self._enabled = seconds, True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.max_steps, trainer.global_step
        self._lines = Lines("distilling", *steps, unit="outer steps", seconds=self._seconds)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        shown = {"train/loss": "loss {:.4g}", "heldout/accuracy_mean": "held-out accuracy {:.2f} %"}
        metrics = trainer.progress_bar_metrics
        more = ", ".join(words.format(metrics[name]) for name, words in shown.items() if name in metrics)
        if line := self._lines.tell(trainer.global_step, more):
            print(line, flush=True)
