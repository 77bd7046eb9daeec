"""What is refused before a run begins."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.checks import check_choice, check_count, check_positive, check_whole, nearest
from dd_lightning.training.processes import check_strategy
from dd_lightning.training.stopping import TimeLimit

# Lightning's settings with which Algorithm 1 is still itself. Others repeat or leave out minibatches, end a run early,
# or change numbers that the engines keep themselves.
TRAINER = {"accelerator", "devices", "num_nodes", "strategy", "max_steps", "max_time", "log_every_n_steps"}
TRAINER |= {"gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark", "detect_anomaly", "profiler"}
TRAINER |= {"inference_mode", "enable_model_summary", "enable_progress_bar"}
WITHOUT_EFFECT = {
    "accumulate_grad_batches": (1,),
    "max_epochs": (-1,),
    "num_sanity_val_steps": (0,),
    "precision": (32, "32", "32-true", None),
    "use_distributed_sampler": (False,),
}
LENGTH = "trainer.max_steps alone says how long a run is"
INSTEAD = {
    "accumulate_grad_batches": "init.per_step and batch_size say how much an outer step sees",
    "callbacks": "they are given as callbacks.NAME._target_=CLASS",
    "default_root_dir": "a run's folder lies in runs_dir",
    "enable_checkpointing": "callbacks.resume saves, and ~callbacks.resume does not",
    "fast_dev_run": "debug=short is a short run",
    "logger": "loggers are chosen by logger=NAME",
    "max_epochs": LENGTH,
    "min_epochs": LENGTH,
    "min_steps": LENGTH,
    "limit_train_batches": LENGTH,
    "overfit_batches": LENGTH,
    "precision": "precision=bfloat16 is that of the pass over the real images, and all else is float32",
    "use_distributed_sampler": "all processes see the same minibatch (Algorithm 1, line 3)",
}


def check_writable(folder: Path) -> None:
    """Refuses, at the start, a folder that nothing can be written to."""
    probe = folder / ".writable"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to the output folder {folder}: {error.strerror}") from error


def check_inside(folder: Path, group: str, members: Mapping[str, Any]) -> None:
    """Refuses callbacks and loggers that would write outside the run's folder.

    Args:
        group: `callbacks` or `logger`.
        members: the settings of each, by name.

    Raises:
        ValueError: naming the setting.
    """
    for name, settings in members.items():
        if settings is not None and (not isinstance(settings, Mapping) or "_target_" not in settings):
            raise ValueError(f"{group}.{name} has no class: {group}.{name}._target_=CLASS")
        for key in ("dirpath", "save_dir", "filename", "version"):
            value = (settings or {}).get(key)
            if isinstance(value, str) and not (folder / value).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{group}.{name}.{key}={value} lies outside the run's folder {folder}")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuses settings of Lightning's trainer that Algorithm 1 does not survive, or that do nothing for it.

    Raises:
        ValueError: naming the setting, and what to use instead.
    """
    check_count(**{f"trainer.{key}": settings[key] for key in ("max_steps", "num_nodes")})
    check_whole(**{"trainer.log_every_n_steps": settings["log_every_n_steps"]})
    check_strategy(settings["strategy"])
    for key, value in settings.items():
        if key in TRAINER or key.startswith("_") or value in WITHOUT_EFFECT.get(key, ()):
            continue
        taken = inspect.signature(pl.Trainer.__init__).parameters
        reason = INSTEAD.get(key, "it would do nothing here" if key in taken else "")
        why = f": {reason}" if reason else nearest(key, TRAINER)
        raise ValueError(f"trainer.{key}={value} is not a setting of Algorithm 1{why}")
    if settings.get("deterministic") not in (None, True, False, "warn"):
        raise ValueError(f"trainer.deterministic must be true, false or warn, not {settings['deterministic']!r}")
    if settings.get("gradient_clip_val") is not None:
        check_positive(**{"trainer.gradient_clip_val": settings["gradient_clip_val"]})
    if settings.get("gradient_clip_algorithm") is not None:
        check_choice("trainer.gradient_clip_algorithm", settings["gradient_clip_algorithm"], ["norm", "value"])
    if settings.get("max_time") is not None:
        TimeLimit(settings["max_time"])


def check_outer(distiller: DatasetDistiller) -> None:
    """Takes an outer step without a gradient, so that settings which torch refuses only then are refused at once."""
    made = distiller.configure_optimizers()
    if isinstance(made, dict):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
