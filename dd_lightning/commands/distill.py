"""dd-distill: Algorithm 1 on a composed configuration."""

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger

from dd_lightning.atomic import write_json
from dd_lightning.callbacks import HeldOutEvaluation, LastGood, is_out_of_memory, log_picture
from dd_lightning.checks import check_count, check_positive
from dd_lightning.commands.build import (
    build_data,
    build_distilled,
    build_network,
    build_objective,
    hardware,
    make_card,
    settings,
)
from dd_lightning.commands.launch import command
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import OneNetwork
from dd_lightning.picture import draw

log = logging.getLogger(__name__)

# A run may go on from a checkpoint only if these agree: they decide what is computed.
COMPUTED_FROM = ("dataset", "network", "init", "objective", "inner", "distilled", "optimizer", "schedule")


def distill(cfg: DictConfig) -> float:
    """Distils, tests on unseen networks, and saves data, picture and result in the run's folder.

    Returns:
        Mean held-out test accuracy in %.
    """
    started = time.monotonic()
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_writable(folder)
    check_count(**{"trainer.max_steps": cfg.trainer.max_steps})
    check_positive(**{"optimizer.lr": cfg.optimizer.lr, "rate_scale": cfg.rate_scale})
    pl.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg)
    objective = build_objective(cfg, data)
    init = instantiate(cfg.init)
    network = build_network(cfg, data, init)
    distilled = build_distilled(cfg, data)
    unroll = instantiate(cfg.unroll)
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
        computed_from(cfg),
    )
    checkpoint = find_checkpoint(cfg.resume)
    loggers = build_loggers(cfg)
    callbacks = [instantiate(callback) for callback in (cfg.callbacks or {}).values() if callback]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False, default_root_dir=str(folder))
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return finish(cfg, trainer, distiller, data, folder, time.monotonic() - started)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kept = next((c.kept(trainer) for c in callbacks if isinstance(c, LastGood)), "nothing was kept")
        raise MemoryError(
            f"out of memory at outer step {trainer.global_step} ({' '.join(str(error).split())[:120]}); {kept}; "
            "unroll=recompute, a smaller init.per_step or a smaller batch_size takes less"
        ) from error
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()


def build_loggers(cfg: DictConfig) -> list[Any]:
    """The configured loggers; W&B gets the whole configuration with its constructor."""
    composed = OmegaConf.to_container(cfg, resolve=True)
    loggers = [instantiate(logger, _partial_=True) for logger in (cfg.logger or {}).values()]
    return [logger(config=composed) if logger.func is WandbLogger else logger() for logger in loggers]


def finish(
    cfg: DictConfig, trainer: pl.Trainer, distiller: DatasetDistiller, data: Any, folder: Path, fitted: float
) -> float:
    """Chooses the best distilled data by validation, tests them once, and writes the results."""
    device = trainer.strategy.root_device
    validation = load_best(trainer, distiller)
    distiller.to(device)
    distiller.network.to(device)
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
            "seconds_distilling": fitted,
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
    """Leaves in the module whichever is best in held-out validation accuracy: the checkpoint or what it holds.

    Returns:
        That accuracy in %, if there was an evaluation.
    """
    last = trainer.callback_metrics.get("heldout/accuracy_mean")
    last = None if last is None else float(last)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path and callback.best_model_score is not None:
            best = float(callback.best_model_score)
            if last is None or best > last:
                saved = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
                distiller.load_state_dict(saved["state_dict"])
                return best
    return last


def computed_from(cfg: DictConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, flat."""
    flat: dict[str, Any] = {"seed": cfg.seed, "batch_size": cfg.batch_size, "rate_scale": cfg.rate_scale}
    for group in COMPUTED_FROM:
        if cfg[group] is not None:
            flat |= {f"{group}.{key}": value for key, value in settings(cfg, group).items()}
            flat[f"{group}._target_"] = cfg[group].get("_target_")
    for place in ("dataset.data_dir", "init.populations_dir"):
        flat.pop(place, None)
    return flat


def find_checkpoint(resume: str | None) -> str | None:
    """The checkpoint to go on from: a file, or the last one of a run's folder."""
    if resume is None:
        return None
    path = Path(resume)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"resume={resume}: there is no checkpoint at {path}")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"resume={resume}: {path} is truncated or not a checkpoint") from error
    return str(path)


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
