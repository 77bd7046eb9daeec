"""Jobs of a sweep: finished ones are not run again, failed ones are listed and stop no other."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dd_lightning.commands.resolvers import NOT_COMPUTED_FROM, SWEEP_FOLDER, as_said
from dd_lightning.system.atomic import write_json
from dd_lightning.system.signals import Interrupted, interruption
from dd_lightning.system.words import counted

log = logging.getLogger(__name__)

FINISHED, FAILED = "finished.json", "failed.json"
JOBS = "DD_JOBS"  # how many a sweep has, in the environment of its jobs
_taken: list[float] = []  # seconds, by the jobs that this process ran


def run_job(task: Callable[[DictConfig], Any], cfg: DictConfig, explain: Callable[[BaseException], str]) -> Any:
    """Runs one job, unless its folder says that it finished before with the same settings.

    Args:
        explain: makes one line of an error.

    Returns:
        What `task` returned, or NaN where it failed.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = " ".join(HydraConfig.get().overrides.task)
    number, count = HydraConfig.get().job.num, int(os.environ.get(JOBS, 0))
    job = f"job {number + 1}" + (f" of {count}" if count else "")
    started = time.monotonic()
    (folder / FAILED).unlink(missing_ok=True)
    try:
        settings: Any = OmegaConf.to_container(cfg, resolve=True)
        finished = _read(folder / FINISHED)
        if finished is not None and _decisive(finished.get("settings")) == _decisive(settings):
            log.info(f"{job} finished before: {overrides}")
            return finished.get("value")
        log.info(f"{job}{_time_left(count - number)}: {overrides}")
        value = task(cfg)
    except (Interrupted, Exception) as error:
        if stop := interruption(error):
            hand_back(stop)
            raise stop from None
        log.error(f"failed: {explain(error)}", exc_info=bool(cfg.get("traceback") or os.environ.get("DD_TRACEBACK")))
        write_json(folder / FAILED, {"overrides": overrides, "error": explain(error)})
        return float("nan")
    write_json(folder / FINISHED, {"settings": settings, "value": value})
    _taken.append(time.monotonic() - started)
    return value


def hand_back(stop: Interrupted) -> None:
    """Lets submitit, whose signal ended a job that is saved now, queue the job again."""
    if "SUBMITIT_EXECUTOR" in os.environ and stop.number is not None:
        signal.raise_signal(stop.number)


def _decisive(settings: Any) -> dict[str, Any]:
    """What decides a job's result."""
    plain = settings if isinstance(settings, dict) else {}
    return {key: value for key, value in plain.items() if key not in NOT_COMPUTED_FROM}


def _time_left(jobs: int) -> str:
    """How long so many jobs take, if this process knows."""
    if not _taken or jobs < 1:
        return ""
    return f" (about {timedelta(seconds=round(jobs * fmean(_taken)))} left)"


class Failures(Callback):
    """Jobs of a multirun share a folder; it ends with an error that lists those that failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._before = _failures(config)  # of earlier multiruns in the same folder
        os.environ[SWEEP_FOLDER] = config.hydra.sweep.dir
        os.environ[JOBS] = str(number_of_jobs(config))
        _taken.clear()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        failed = [_read(path) for path, time in _failures(config).items() if self._before.get(path) != time]
        if failed:
            lines = [f"  {job.get('overrides')}: {job.get('error')}" for job in failed if job]
            head = f"{counted(len(failed), 'job')} of the sweep failed; the same command runs what failed again:"
            sys.exit("\n".join([head, *lines]))
        write_json(Path(config.hydra.sweep.dir, FINISHED), {"jobs": number_of_jobs(config)})


def number_of_jobs(config: DictConfig) -> int:
    """How many jobs a multirun has; 0 where only its sweeper knows."""
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*as_said(config), *swept])
    said = {o.key_or_group: o for o in reversed(overrides)}  # the command line before the sweeper's settings
    try:
        return prod(len(list(o.sweep_string_iterator())) for o in said.values() if o.is_sweep_override())
    except HydraException:
        return 0


def _failures(config: DictConfig) -> dict[Path, int]:
    """Where in a sweep's folder jobs failed, and when."""
    return {path: path.stat().st_mtime_ns for path in sorted(Path(config.hydra.sweep.dir).rglob(FAILED))}


def _read(path: Path) -> dict[str, Any] | None:
    """What was written there; None where that is not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
