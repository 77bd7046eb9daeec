"""Trackers of experiments, W&B and MLflow: one of their runs for a run's folder, and the distilled data in them."""

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, WandbLogger

from dd_lightning.system.atomic import write_bytes
from dd_lightning.system.processes import rank

log = logging.getLogger(__name__)

WANDB_RUN, MLFLOW_RUN = "wandb_run.txt", "mlflow_run.txt"  # a run's name there, in its folder here
KEPT = ("distilled.safetensors", "distilled.png")


def wandb_logger(make: Callable[..., WandbLogger], config: Any, folder: Path) -> WandbLogger:
    """W&B's logger with the whole configuration: one W&B run a folder, offline where W&B cannot be reached."""
    import wandb

    if rank():
        return make()
    # An agent of a W&B sweep has named the run.
    name = os.environ.get("WANDB_RUN_ID") or read(folder / WANDB_RUN) or secrets.token_hex(4)
    write_bytes(folder / WANDB_RUN, name.encode())
    logger = make(config=config, id=name, resume="allow", settings=wandb.Settings(init_timeout=30))
    try:
        _ = logger.experiment
    except (wandb.Error, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        log.warning(f"W&B cannot be reached ({reason}); going on offline: `wandb sync` uploads the run later")
        wandb.teardown()
        logger = make(config=config, id=name, mode="offline")
    return logger


def mlflow_logger(make: Callable[..., MLFlowLogger], config: Any, folder: Path) -> MLFlowLogger:
    """MLflow's logger: one MLflow run a folder, whose parameters are the whole configuration.

    Raises:
        ValueError: MLflow is not installed.
    """
    try:
        import mlflow  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        raise ValueError("MLflow is not installed: pip install -e '.[mlflow]'") from error
    if rank():
        return make()
    known = read(folder / MLFLOW_RUN)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # tells every table that it makes
    logger = make(run_id=known, artifact_location=beside_database(make.keywords["tracking_uri"]))  # type: ignore[attr-defined]
    assert logger.run_id is not None
    if known is None:
        write_bytes(folder / MLFLOW_RUN, logger.run_id.encode())
        logger.log_hyperparams(config)
    return logger


def beside_database(address: str) -> str | None:
    """Where files belong whose database is a file; a server knows its own place."""
    kind, _, path = address.partition(":///")
    return str(Path(path).absolute().parent / "mlflow") if kind == "sqlite" else None


def read(path: Path) -> str | None:
    """The line in a file, if it is there."""
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def log_distilled(loggers: Iterable[Logger], folder: Path, card: dict[str, Any]) -> None:
    """Keeps distilled data, picture and card in the trackers: in W&B as an artifact of the run.

    A run that is gone on with makes a new version of its artifact, which is the latest, and, as what is saved is always
    the best by validation, the best.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"distilled-{logger.version}", type="distilled-data", metadata=card)
            for name in KEPT:
                artifact.add_file(str(folder / name))
            with artifact.new_file("card.json", encoding="utf-8") as file:
                json.dump(card, file, indent=2)
            logger.experiment.log_artifact(artifact, aliases=["best", "latest"])
        elif isinstance(logger, MLFlowLogger):
            for name in KEPT:
                logger.experiment.log_artifact(logger.run_id, str(folder / name))
            logger.experiment.log_dict(logger.run_id, card, "card.json")
