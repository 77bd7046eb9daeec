"""dry_run=true: what a run would do, and what it would take."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich import get_console
from rich.table import Table

from dd_lightning.commands.resolvers import dry_folder
from dd_lightning.data import RealData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.progress import duration
from dd_lightning.training.callbacks import HeldOutEvaluation
from dd_lightning.training.foretelling import MEASURED, Foretold, foretell


@contextmanager
def nothing_kept(cfg: DictConfig) -> Iterator[None]:
    """Of a dry run in the block nothing is kept.

    Raises:
        ValueError: it is in a sweep, or `dry_run` is neither true nor false.
    """
    if not isinstance(cfg.dry_run, bool):
        raise ValueError(f"dry_run must be true or false, not {cfg.dry_run!r}")
    if cfg.dry_run and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("dry_run=true is for one run; leave it out of a sweep")
    try:
        yield
    finally:
        if cfg.dry_run:
            shutil.rmtree(dry_folder(), ignore_errors=True)


def tell_cost(cfg: DictConfig, distiller: DatasetDistiller, data: RealData) -> float:
    """Prints the composed configuration and the cost of its run.

    Returns:
        How many seconds the run would take.
    """
    held_out = instantiate(cfg.callbacks.held_out) if cfg.callbacks and cfg.callbacks.get("held_out") else None
    assert held_out is None or isinstance(held_out, HeldOutEvaluation)
    get_console().print(composed(cfg))
    trainer = instantiate(cfg.trainer, _partial_=True)
    with tempfile.TemporaryDirectory() as folder:
        foretold = foretell(trainer, cfg.trainer.max_steps, distiller, data, held_out, Path(folder))
    get_console().print(cost(foretold, distiller.distilled.stored_numbers))
    return foretold.seconds


def composed(cfg: DictConfig) -> Table:
    """Every group with its choice and settings."""
    table = Table(title="What would run", title_justify="left")
    for heading in ("group", "choice", "settings"):
        table.add_column(heading)
    choices, resolved = HydraConfig.get().runtime.choices, OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    plain = {key: value for key, value in resolved.items() if not isinstance(value, dict)}
    for group, content in resolved.items():
        if isinstance(content, dict):
            table.add_row(str(group), choices.get(str(group)) or "", in_words(content))
    table.add_row("", choices.get("experiment") or "", in_words(plain))
    return table


def in_words(settings: dict[Any, Any]) -> str:
    """`a=1, b.c=2`, without what is not set, and Hydra's own keys."""
    return ", ".join(_said(settings, ""))


def _said(settings: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _said(value, f"{prefix}{key}.")
        elif not str(key).startswith("_") and value is not None:
            yield f"{prefix}{key}={value}"


def cost(foretold: Foretold, stored_numbers: int) -> Table:
    table = Table(title="What it would take here, now", title_justify="left", show_header=False)
    table.add_row("stored numbers", f"{stored_numbers:,}")
    table.add_row("an outer step", f"{1e3 * foretold.step:.1f} ms, mean of {MEASURED}")
    table.add_row(f"{foretold.steps} outer steps", duration(foretold.steps * foretold.step))
    table.add_row(f"{foretold.evaluations} evaluations", duration(foretold.evaluations * foretold.evaluation))
    table.add_row("the test", duration(foretold.test))
    table.add_row("in all", duration(foretold.seconds))
    table.add_row("memory", f"{foretold.memory / 2**20:.0f} MiB")
    table.add_row("disk", f"{foretold.disk / 2**20:.1f} MiB")
    return table
