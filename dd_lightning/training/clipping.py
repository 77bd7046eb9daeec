"""Clipping of the outer gradient to what it usually is (Feng, Vedantam, Kempe, 2024)."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.checks import check_positive


class AdaptiveClipping(Callback):
    """Clips the gradient of the images to `factor` times the moving average of its norm, of the norms before clipping.

    Where images are made of other things that are learned, it is the gradient of those.

    Args:
        factor: of the average, at most.
        decay: of the average: how much of it stays at every outer step.

    Raises:
        ValueError: a factor that is not positive, or a decay outside 0 to 1.
    """

    def __init__(self, factor: float = 2.0, decay: float = 0.9) -> None:
        check_positive(factor=factor, decay=decay)
        if decay >= 1:
            raise ValueError(f"decay must be below 1, not {decay}")
        self.factor, self.decay = factor, decay
        self.average: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        learned = list(pl_module.learned_images.values())
        norm = float(torch.cat([one.grad.flatten() for one in learned if one.grad is not None]).norm())
        self.average = norm if self.average is None else self.decay * self.average + (1 - self.decay) * norm
        nn.utils.clip_grad_norm_(learned, self.factor * self.average)
