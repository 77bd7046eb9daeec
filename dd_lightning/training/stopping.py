"""Runs that end before their last outer step."""

import math
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Timer

from dd_lightning.system.signals import Interrupted
from dd_lightning.training.callbacks import of_kind


class TimeLimit(Timer):
    """Ends this process's part of a run after a while; what goes on has its own time.

    Args:
        duration: DD:HH:MM:SS, or the arguments of a `timedelta`.

    Raises:
        ValueError: it is neither, or nothing.
    """

    def __init__(self, duration: str | timedelta | dict[str, int]) -> None:
        form = f"trainer.max_time must be days, hours, minutes and seconds, such as '00:01:30:00', not {duration!r}"
        try:
            super().__init__(timedelta(**duration) if isinstance(duration, dict) else duration, verbose=False)
        except (MisconfigurationException, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(form) from error
        if not self._duration or not 0 < self._duration < math.inf:
            raise ValueError(form)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    @property
    def over(self) -> bool:
        remaining = self.time_remaining()
        return remaining is not None and remaining <= 0


def check_whole_run(trainer: pl.Trainer) -> None:
    """Tells a run whose time was over from one that is finished, with all its outer steps or stopped by a callback.

    Raises:
        Interrupted: its time was over.
    """
    limit = of_kind(trainer, TimeLimit)
    if trainer.global_step < trainer.max_steps and limit is not None and limit.over:
        raise Interrupted(
            None, f"and saved after outer step {trainer.global_step}; the same command goes on from there"
        )
