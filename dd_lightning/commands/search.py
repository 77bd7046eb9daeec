"""A search with Optuna: a study in the sweep's folder that goes on where it was stopped; its best as an experiment."""

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from dd_lightning.commands.launch import CONF
from dd_lightning.commands.resolvers import as_said
from dd_lightning.system.atomic import write_bytes, write_json
from dd_lightning.system.locking import locked

# What the command line may say otherwise when a search goes on.
APART = ("sweep", "hydra", "runs_dir", "data_dir", "populations_dir", "traceback", "threads", "logger")
GIVEN = "command line"


class Search(Callback):
    """Before an Optuna sweep, leaves it the trials that are missing; after it, writes what was found.

    A trial that was stopped in the middle is run first, in its folder, where it goes on.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        import optuna  # type: ignore[import-not-found]
        from optuna.trial import TrialState  # type: ignore[import-not-found]

        optuna.logging.set_verbosity(logging.WARNING)
        folder, sweeper = Path(config.hydra.sweep.dir), config.hydra.sweeper
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        try:
            self._lock.enter_context(locked(folder / ".lock"))
        except BlockingIOError:
            refuse(f"this search is going on already in {folder}")
        study = optuna.create_study(
            storage=sweeper.storage, study_name=sweeper.study_name, direction="maximize", load_if_exists=True
        )
        given = sorted(o for o in as_said(config) if key(o) not in APART)
        if (there := study.user_attrs.get(GIVEN, given)) != given:
            refuse(
                f"the search in {folder} is of other settings: {' '.join(there)}; give it a name of its own, name=NAME"
            )
        study.set_user_attr(GIVEN, given)
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study._storage.set_trial_state(trial._trial_id, TrialState.WAITING)
        finished = sum(trial.state.is_finished() for trial in study.trials)
        with open_dict(config):
            sweeper.n_trials = max(sweeper.n_trials - finished, 0)
            if sweeper.sampler.get("seed") is not None:
                sweeper.sampler.seed += len(study.trials)  # or the same settings would be drawn again
        print(f"{finished} of {finished + sweeper.n_trials} trials are finished", flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        import optuna  # type: ignore[import-not-found]

        from dd_lightning.report.searches import RECORD, draw_search

        folder, sweeper = Path(config.hydra.sweep.dir), config.hydra.sweeper
        study = optuna.load_study(storage=sweeper.storage, study_name=sweeper.study_name)
        done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        self._lock.close()
        if not done:
            return
        choices = config.hydra.runtime.choices
        about = f"Best of {len(study.trials)} trials of {config.name}: {study.best_value:.2f} % on validation pictures."
        given = [o for o in as_said(config) if key(o) not in (*APART, "experiment", "name")]
        text = experiment(
            choices.get("experiment"), [*given, *(f"{k}={v}" for k, v in study.best_params.items())], about
        )
        write_bytes(folder / "experiment" / "best.yaml", text.encode())
        write_json(folder / RECORD, found := record(study))
        draw_search(found, folder / "search.png")
        where = os.path.relpath(folder)
        print(
            f"{about}\ndd-distill --config-dir {where} experiment=best    # {where}/search.png: all trials", flush=True
        )


def refuse(message: str) -> None:
    """Ends the command: an exception of a callback would be caught, and the sweep started."""
    sys.exit(f"dd-distill: error: {message}")


def key(override: str) -> str:
    """The group of settings that an override is of."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("/")[0]


def experiment(base: str | None, overrides: list[str], about: str) -> str:
    """An experiment's file: `base` with what the overrides say."""
    defaults: list[Any] = [] if base is None else [base]
    settings = OmegaConf.create()
    for one in OverridesParser.create().parse_overrides(overrides):
        if (CONF / one.key_or_group).is_dir():
            defaults.append({f"override /{one.key_or_group}": one.value()})
        else:
            OmegaConf.update(settings, one.key_or_group, one.value())
    settings.name = f"{base or 'search'}_best"
    content = {"defaults": [*defaults, "_self_"], **OmegaConf.to_container(settings)}  # type: ignore[dict-item]
    return f"# @package _global_\n# {about}\n{yaml.safe_dump(content, sort_keys=False)}"


def record(study: Any) -> dict[str, Any]:
    """What a report tells of a search: trials that were completed, and how much each setting matters."""
    import optuna  # type: ignore[import-not-found]

    trials = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    importances: dict[str, float] = {}
    if len({trial.value for trial in trials}) > 1:
        evaluator = optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
        importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    done = [{"number": trial.number, "value": trial.value, "settings": trial.params} for trial in trials]
    return {"trials": done, "of": len(study.trials), "importances": importances}
