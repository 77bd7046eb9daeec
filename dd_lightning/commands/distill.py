"""dd-distill: Algorithm 1 on a composed configuration."""

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from dd_lightning.atomic import write_json
from dd_lightning.callbacks import HeldOutEvaluation, LastGood, is_out_of_memory, log_picture
from dd_lightning.checks import check_count, check_positive, check_whole
from dd_lightning.commands.build import (
    build_data,
    build_distilled,
    build_network,
    build_objective,
    hardware,
    make_card,
    settings,
)
from dd_lightning.commands.launch import check_resolved, command, named
from dd_lightning.data import RealData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import OneNetwork
from dd_lightning.interruption import interrupted_at_once
from dd_lightning.locking import locked
from dd_lightning.loggers import CSVLogger, wandb_logger
from dd_lightning.picture import draw
from dd_lightning.processes import check_processes, check_strategy, is_lost_process, rank, started_alike
from dd_lightning.resuming import AtomicCheckpointIO, ResumeCheckpoint, load_checkpoint, newest_checkpoint
from dd_lightning.unroll import InnerOptimizer

log = logging.getLogger(__name__)

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# A run may go on from a checkpoint only if these agree: they decide what is computed.
COMPUTED_FROM = ("dataset", "network", "init", "objective", "inner", "distilled", "optimizer", "schedule")


def distill(cfg: DictConfig) -> float:
    """Distils, tests on unseen networks, and saves data, picture and result in the run's folder.

    Returns:
        Mean held-out test accuracy in %.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_writable(folder)
    with alone(folder), started_alike(folder):
        return run(cfg, folder)


def run(cfg: DictConfig, folder: Path) -> float:
    """One run, new or going on, in `folder`."""
    check_whole(seed=cfg.seed)
    check_count(**{"trainer.max_steps": cfg.trainer.max_steps, "trainer.num_nodes": cfg.trainer.num_nodes})
    check_resolved(cfg)
    check_positive(**{"optimizer.lr": cfg.optimizer.lr, "rate_scale": cfg.rate_scale})
    check_strategy(cfg.trainer.strategy)
    check_inside(folder, cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg)
    objective = build_objective(cfg, data)
    init = instantiate(cfg.init)
    network = build_network(cfg, data, init)
    distilled = build_distilled(cfg, data)
    unroll = instantiate(cfg.unroll)
    with named("unroll"):
        if not isinstance(unroll.optimizer, InnerOptimizer):
            raise ValueError(f"optimizer must be one of group inner, not {unroll.optimizer!r}")
        unroll.check(network, init.sample(network, step=0), distilled.images[0])
    weights = init.weights(network) if isinstance(init, OneNetwork) else None
    distiller = DatasetDistiller(
        replace(distilled, card=make_card(cfg, data), initial_weights=weights),
        network,
        init,
        unroll,
        objective,
        instantiate(cfg.optimizer),
        instantiate(cfg.schedule),
        cfg.rate_scale,
        computed_from(cfg, data),
        cfg.precision,
        cfg.chunk,
        cfg.capture,
    )
    check_outer(distiller)
    checkpoint = find_checkpoint(cfg.resume, folder)
    step = load_checkpoint(checkpoint)["global_step"] if checkpoint else 0
    callbacks = [instantiate(callback) for callback in (cfg.callbacks or {}).values() if callback]
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=build_loggers(cfg, folder, step) or False,
        default_root_dir=str(folder),
        plugins=[AtomicCheckpointIO()],
    )
    check_processes(trainer, init)
    if checkpoint and rank() == 0:
        log.info(f"going on from outer step {step} of {os.path.relpath(folder)} (resume=null starts a new run)")
    try:
        with interrupted_at_once("outside of an outer step; the same command goes on"):
            trainer.fit(distiller, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            return finish(cfg, trainer, distiller, data, folder)
    except Exception as error:
        told = explained(error, trainer)
        if told is None:
            raise
        raise told from error
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()


def explained(error: Exception, trainer: pl.Trainer) -> Exception | None:
    """What a user can do about an error from around the run; None for other errors."""
    at = f"at outer step {trainer.global_step}"
    if is_lost_process(error):
        return ConnectionError("another process of this run ended; the same command goes on")
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return OSError(
            f"cannot write to {trainer.default_root_dir} ({error.strerror}) {at}; "
            "once there is room, the same command goes on from the last checkpoint"
        )
    if is_out_of_memory(error):
        kept = next((c.kept(trainer) for c in trainer.callbacks if isinstance(c, LastGood)), "nothing was kept")  # type: ignore[attr-defined]
        return MemoryError(
            f"out of memory {at} ({' '.join(str(error).split())[:120]}); {kept}; "
            "a chunk of networks, unroll=recompute, a smaller init.per_step or a smaller batch_size takes less"
        )
    return None


def build_loggers(cfg: DictConfig, folder: Path, step: int) -> list[Any]:
    """The configured loggers, which go on after outer step `step`."""
    loggers = []
    for name, settings_of in (cfg.logger or {}).items():
        make = instantiate(settings_of, _partial_=True)
        with named(f"logger.{name}"):
            if make.func is WandbLogger:
                logger = wandb_logger(make, OmegaConf.to_container(cfg, resolve=True), folder)
            elif make.func is TensorBoardLogger and step:
                logger = make(purge_step=step + 1)
            else:
                logger = make()
        if isinstance(logger, CSVLogger) and rank() == 0:
            logger.rewind(step)
        loggers.append(logger)
    return loggers


def finish(cfg: DictConfig, trainer: pl.Trainer, distiller: DatasetDistiller, data: Any, folder: Path) -> float:
    """Chooses the best distilled data by validation, tests them once, and writes the results."""
    device = trainer.strategy.root_device
    validation = load_best(trainer, distiller)
    distiller.to(device)
    distiller.network.to(device)
    data.to(device)
    held_out = next((c for c in trainer.callbacks if isinstance(c, HeldOutEvaluation)), HeldOutEvaluation())  # type: ignore[attr-defined]
    result = held_out.test(distiller, distiller.distilled.detach(), data)
    distilled = replace(
        distiller.distilled.detach().to("cpu"), card=distiller.distilled.card | {"accuracy": result.as_dict()}
    )
    if not trainer.is_global_zero:
        return result.mean
    distilled.save(folder / "distilled.safetensors")
    draw(distilled, data.preprocessing, f"{cfg.name}: {result}", folder / "distilled.png")
    write_json(
        folder / "result.json",
        {
            "name": cfg.name,
            "seed": cfg.seed,
            "test": result.as_dict(),
            "validation_accuracy_mean": validation,
            "learning_rates": distilled.learning_rates.tolist(),
            "outer_steps": trainer.global_step,
            "seconds_distilling": next((c.seconds for c in trainer.callbacks if isinstance(c, ResumeCheckpoint)), None),  # type: ignore[attr-defined]
            "hardware": hardware(),
            "expected": cfg.get("expected"),
            "card": distilled.card,
        },
    )
    for logger in trainer.loggers:
        logger.log_metrics(result.metrics("test"), step=trainer.global_step)
    log_picture(trainer, folder / "distilled.png", trainer.global_step)
    networks = f"{len(result.accuracies)} unseen network{'s' if len(result.accuracies) > 1 else ''}"
    if distiller.init.fixed:
        networks = "the fixed network"
    images = distilled.images.shape[0] * distilled.images.shape[1]
    log.info(f"test accuracy of {networks}, trained on {images} distilled images: {result}")
    for line in result.lines():
        log.info(f"  {line}")
    log.info(f"saved in {os.path.relpath(folder)}: distilled.safetensors, distilled.png, result.json")
    return result.mean


def load_best(trainer: pl.Trainer, distiller: DatasetDistiller) -> float | None:
    """Leaves in the module the distilled data of the best held-out validation accuracy.

    Returns:
        That accuracy in %, if there was an evaluation.
    """
    best = next((c.best for c in trainer.callbacks if isinstance(c, HeldOutEvaluation)), None)  # type: ignore[attr-defined]
    if best is None:
        return None
    distiller.load_state_dict(best["distilled"])
    return best["accuracy"]


def computed_from(cfg: DictConfig, data: RealData) -> dict[str, Any]:
    """The settings that decide what a run computes, flat, and the real data."""
    flat: dict[str, Any] = {"seed": cfg.seed, "batch_size": cfg.batch_size, "rate_scale": cfg.rate_scale}
    flat["precision"] = cfg.precision
    for group in COMPUTED_FROM:
        if cfg[group] is not None:
            flat |= {f"{group}.{key}": value for key, value in settings(cfg, group).items()}
            flat[f"{group}._target_"] = cfg[group].get("_target_")
    for place in ("dataset.data_dir", "init.populations_dir"):
        flat.pop(place, None)
    return flat | {"dataset.content": data.content}


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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses to work in a folder in which another process does.

    Raises:
        ValueError: the run is going on already.
    """
    with ExitStack() as stack:
        if rank() == 0:
            try:
                stack.enter_context(locked(folder / ".lock"))
            except BlockingIOError as error:
                holder = (folder / ".lock").read_text().strip()
                raise ValueError(
                    f"this run is going on already in {folder} (process {holder}); resume=null starts another"
                ) from error
        yield


def check_inside(folder: Path, cfg: DictConfig) -> None:
    """Refuses callbacks and loggers that would write outside the run's folder.

    Raises:
        ValueError: naming the setting.
    """
    for group in ("callbacks", "logger"):
        for name, settings_of in (cfg[group] or {}).items():
            for key in ("dirpath", "save_dir", "filename", "version"):
                value = (settings_of or {}).get(key)
                if isinstance(value, str) and not (folder / value).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{group}.{name}.{key}={value} lies outside the run's folder {folder}")


def check_outer(distiller: DatasetDistiller) -> None:
    """Takes an outer step without a gradient, so that settings which torch refuses only then are refused at once.

    Raises:
        ValueError: naming the group.
    """
    with named("optimizer, schedule"):
        made = distiller.configure_optimizers()
        if isinstance(made, dict):
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()


def check_writable(folder: Path) -> None:
    """Refuses, at the start, a folder that nothing can be written to."""
    probe = folder / ".writable"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to the output folder {folder}: {error.strerror}") from error


main = command("distill", distill)

if __name__ == "__main__":
    main()
