"""Jobs of a sweep: finished ones are not run again, failed ones are listed and stop no other."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dd_lightning.system.atomic import write_json

log = logging.getLogger(__name__)

FINISHED, FAILED = "finished.json", "failed.json"


def run_job(task: Callable[[DictConfig], Any], cfg: DictConfig, explain: Callable[[BaseException], str]) -> Any:
    """Runs one job, unless its folder says that it finished before with the same settings.

    Args:
        explain: makes one line of an error.

    Returns:
        What `task` returned, or NaN where it failed.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = " ".join(HydraConfig.get().overrides.task)
    settings = OmegaConf.to_container(cfg, resolve=True)
    finished = _read(folder / FINISHED)
    if finished is not None and finished["settings"] == settings:
        log.info(f"finished before: {overrides}")
        return finished["value"]
    (folder / FAILED).unlink(missing_ok=True)
    try:
        value = task(cfg)
    except Exception as error:
        log.error(f"failed: {explain(error)}", exc_info=bool(cfg.get("traceback") or os.environ.get("DD_TRACEBACK")))
        write_json(folder / FAILED, {"overrides": overrides, "error": explain(error)})
        return float("nan")
    write_json(folder / FINISHED, {"settings": settings, "value": value})
    return value


class Failures(Callback):
    """Ends a multirun with an error that lists its jobs that failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._before = _failures(config)  # of earlier multiruns in the same folder

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        failed = [_read(path) for path, time in _failures(config).items() if self._before.get(path) != time]
        if failed:
            lines = [f"  {job['overrides']}: {job['error']}" for job in failed if job]
            sys.exit(
                "\n".join([f"{len(failed)} job(s) of the sweep failed; the same command runs them again:", *lines])
            )


def _failures(config: DictConfig) -> dict[Path, int]:
    """Where in a sweep's folder jobs failed, and when."""
    return {path: path.stat().st_mtime_ns for path in sorted(Path(config.hydra.sweep.dir).rglob(FAILED))}


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
