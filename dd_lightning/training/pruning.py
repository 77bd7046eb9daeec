"""A run as a trial of a search: it tells Optuna its validation accuracy, and stops where that is hopeless."""

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from dd_lightning.training.callbacks import HeldOutEvaluation, of_kind

log = logging.getLogger(__name__)


class Pruning(Callback):
    """Stops a trial that the pruner finds hopeless after a held-out evaluation; its value is its best until then.

    Args:
        storage: address of the study's database.
        study: its name.
        overrides: of this run's command line; those of the trial are among them.
        pruner: one of Optuna's.
    """

    def __init__(self, storage: str, study: str, overrides: Sequence[str], pruner: Any) -> None:
        self._place, self._overrides, self._pruner = (storage, study), set(overrides), pruner

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if of_kind(trainer, HeldOutEvaluation) is None:
            raise ValueError("a search needs the callback held_out, whose accuracy it judges by")
        self._trial = self._find() if trainer.is_global_zero else None

    def _find(self) -> Any:
        """The trial that runs with these settings."""
        import optuna  # type: ignore[import-not-found]

        optuna.logging.set_verbosity(logging.WARNING)
        storage, name = self._place
        # This process asks for no settings, whichever sampler does.
        sampler = optuna.samplers.RandomSampler()
        study = optuna.load_study(storage=storage, study_name=name, pruner=self._pruner, sampler=sampler)
        running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        mine = [t for t in running if {f"{key}={value}" for key, value in t.params.items()} <= self._overrides]
        return optuna.trial.Trial(study, mine[0]._trial_id) if mine else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        held_out = of_kind(trainer, HeldOutEvaluation)
        step = trainer.global_step
        if held_out is None or step % held_out.every or step == trainer.max_steps:
            return
        accuracy = trainer.callback_metrics["heldout/accuracy_mean"].item()
        if trainer.strategy.broadcast(self._hopeless(accuracy, step)):
            log.info(f"stopped by the search at outer step {step}: {accuracy:.2f} % is too little")
            trainer.should_stop = True

    def _hopeless(self, accuracy: float, step: int) -> bool:
        if self._trial is None:
            return False
        if step not in self._trial.study._storage.get_trial(self._trial._trial_id).intermediate_values:
            self._trial.report(accuracy, step)  # a trial that goes on may have told it before
        return self._trial.should_prune()
