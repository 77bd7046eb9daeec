"""dd-distill: Algorithm 1 on a composed configuration."""

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ProgressBar

from dd_lightning.commands.build import build_data, build_distiller, build_loggers
from dd_lightning.commands.dry_run import nothing_kept, tell_cost
from dd_lightning.commands.errors import check_resolved, named
from dd_lightning.commands.launch import command
from dd_lightning.commands.relaunch import started_alike
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.checks import check_choice, check_count, check_positive, check_seed, check_threads
from dd_lightning.system.locking import alone
from dd_lightning.system.processes import rank
from dd_lightning.system.signals import interrupted_at_once
from dd_lightning.training.checks import check_inside, check_outer, check_trainer, check_writable
from dd_lightning.training.errors import explained
from dd_lightning.training.finishing import Finished, finish, tell, write_results
from dd_lightning.training.processes import SameSettings, check_processes
from dd_lightning.training.resuming import AtomicCheckpointIO, Restored, find_checkpoint, load_checkpoint
from dd_lightning.training.stopping import TimeLimit, check_whole_run

log = logging.getLogger(__name__)


def distill(cfg: DictConfig) -> float:
    """Distils, tests on unseen networks, and saves data, picture and result in the run's folder.

    Returns:
        Mean held-out accuracy in %: on the test set, or as `returned` says.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_writable(folder)
    with nothing_kept(cfg), nullcontext() if rank() else alone(folder), started_alike(folder):
        return run(cfg, folder)


def run(cfg: DictConfig, folder: Path) -> float:
    """One run, new or going on, in `folder`."""
    check(cfg, folder)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    pl.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg)
    data.apart = cfg.piece is not None
    distiller = build_distiller(cfg, data)
    with named("optimizer, schedule"):
        check_outer(distiller)
    if cfg.dry_run:
        return tell_cost(cfg, distiller, data)
    checkpoint = find_checkpoint(cfg.resume, folder)
    trainer = build_trainer(cfg, folder, distiller, checkpoint)
    try:
        with explained(trainer), interrupted_at_once("outside of an outer step; the same command goes on"):
            trainer.fit(distiller, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            check_whole_run(trainer)
            finished = finish(trainer, distiller, data)
            if trainer.is_global_zero:
                about = {"name": cfg.name, "seed": cfg.seed, "expected": cfg.get("expected")}
                write_results(finished, trainer, data, folder, about)
                tell(finished, trainer, distiller.init.fixed, folder)
            return returned(finished, cfg.returned)
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()


def returned(finished: Finished, what: str) -> float:
    """The accuracy in % that a sweeper is told.

    Raises:
        ValueError: it is that of validation, and there was no evaluation.
    """
    if what == "test":
        return finished.test.mean
    if finished.validation is None:
        raise ValueError("returned=validation, but there was no held-out evaluation")
    return finished.validation


def check(cfg: DictConfig, folder: Path) -> None:
    """Refuses, before the data are read, what would end the run later.

    Raises:
        ValueError: naming the setting.
    """
    check_seed(cfg.seed)
    check_choice("returned", cfg.returned, ["test", "validation"])
    if not isinstance(cfg.capture, bool):
        raise ValueError(f"capture must be true or false, not {cfg.capture!r}")
    if cfg.threads is not None:
        check_threads(cfg.threads)
    check_resolved(cfg)
    check_positive(**{"optimizer.lr": cfg.optimizer.lr})
    if cfg.rate_scale != 0:
        check_positive(rate_scale=cfg.rate_scale)
    check_count(**{name: cfg[name] for name in ("chunk", "piece") if cfg[name] is not None})
    schedule = cfg.schedule or {}
    for key, check_one in (("gamma", check_positive), ("step_size", check_count), ("T_max", check_count)):
        if key in schedule:
            check_one(**{f"schedule.{key}": schedule[key]})
    betas = cfg.optimizer.get("betas")
    if betas is not None and (isinstance(betas, str) or len(betas) != 2):
        raise ValueError(f"optimizer.betas must be two numbers, such as [0.5,0.999], not {betas}")
    settings: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    check_trainer(settings)
    for group in ("callbacks", "logger"):
        check_inside(folder, group, cfg[group] or {})
    targets = [str(callback.get("_target_")) for callback in (cfg.callbacks or {}).values() if callback]
    if cfg.returned == "validation" and not any("HeldOut" in target for target in targets):
        raise ValueError("returned=validation, but there is no held-out evaluation: the callback held_out")


def build_trainer(cfg: DictConfig, folder: Path, distiller: DatasetDistiller, checkpoint: Path | None) -> pl.Trainer:
    """Lightning's trainer, whose callbacks and loggers go on from the checkpoint."""
    step = load_checkpoint(checkpoint)["global_step"] if checkpoint else 0
    if step > cfg.trainer.max_steps:
        raise ValueError(f"trainer.max_steps={cfg.trainer.max_steps}, but the checkpoint is of outer step {step}")
    # Growing comes first: what others see after an outer step is what it has left of it.
    callbacks = [instantiate(callback) for callback in (cfg.grow, *(cfg.callbacks or {}).values()) if callback]
    if cfg.trainer.get("max_time"):
        settings: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
        callbacks.append(TimeLimit(settings["max_time"]))
    own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    trainer = instantiate(
        cfg.trainer,
        max_time=None,
        **({} if own_bar else {"enable_progress_bar": False}),  # Lightning's bar knows no run that goes on
        callbacks=[Restored(checkpoint), SameSettings(distiller.config), *callbacks],
        logger=build_loggers(cfg, folder, step) or False,
        default_root_dir=str(folder),
        plugins=[AtomicCheckpointIO()],
    )
    check_processes(trainer, distiller.init, distiller.pool is not None)
    if checkpoint and rank() == 0:
        log.info(f"going on from outer step {step} of {os.path.relpath(folder)} (resume=null starts a new run)")
    return trainer


main = command("distill")

if __name__ == "__main__":
    main()
