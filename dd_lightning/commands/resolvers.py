"""Functions for configuration files."""

import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dd_lightning.system.checks import check_name
from dd_lightning.system.processes import rank

RUN_FOLDER = "DD_RUN_FOLDER"  # of this run, in the environment of the processes that it starts
SWEEP_FOLDER = "DD_SWEEP_FOLDER"  # of this sweep, in the environment of its jobs
NOT_COMPUTED_FROM = ("hydra", "resume", "traceback")
WAIT = 600  # seconds for the first process to make the run's folder


def register() -> None:
    """Makes `${run_folder:…}` and the like known; every module that composes a configuration calls it."""
    OmegaConf.register_new_resolver("fraction", lambda whole, parts: max(whole // parts, 1), replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("tracked", tracked, replace=True)


def run_folder(resume: str | None, new: str, *, _root_: DictConfig) -> str:
    """The folder of a run.

    With `resume=auto` it is that of the newest unfinished run of the same configuration, if there is one; its name ends
    in the configuration's hash. With `resume=RUN` it is that run's. Else it is a new one.

    Raises:
        ValueError: `new` would lie outside `runs_dir`.
    """
    if RUN_FOLDER in os.environ:
        return os.environ[RUN_FOLDER]
    check_name(name=_root_.get("name"))
    if _root_.get("dry_run") is True:
        return str(dry_folder())
    if resume is not None and not isinstance(resume, str):
        raise ValueError(f"resume must be auto, null, or a run's folder or checkpoint, not {resume!r}")
    if resume not in ("auto", None):
        return resume if Path(resume, "checkpoints").is_dir() else new
    ending = fingerprint(_root_)
    found = unfinished(Path(new).parent, ending) if resume else []
    # Processes that something else starts cannot inherit the folder: all but the first wait until it is there.
    until = time.monotonic() + WAIT
    while rank() and not found and time.monotonic() < until:
        time.sleep(0.5)
        found = unfinished(Path(new).parent, ending)
    return str(found[-1]) if found else f"{new}_{ending}"


def dry_folder() -> Path:
    """Where a dry run of this process writes; of which nothing stays."""
    return Path(tempfile.gettempdir(), f"dd_dry_run_{os.getpid()}")


def sweep_folder(resume: str | None, new: str, *, _root_: DictConfig) -> str:
    """The folder of a sweep: that of the newest unfinished one of the same command line, if there is one.

    Else it is a new one; with `resume=null` always.
    """
    if SWEEP_FOLDER in os.environ:
        return os.environ[SWEEP_FOLDER]
    check_name(name=_root_.get("name") or "sweep")
    said = [o for o in as_said(_root_) if o.lstrip("+").partition("=")[0] not in NOT_COMPUTED_FROM]
    ending = digits([_root_.hydra.job.config_name, *said])
    found = unfinished(Path(new).parent, ending, "finished.json") if resume is not None else []
    return str(found[-1]) if found else f"{new}_{ending}"


def job_folder(overrides: str) -> str:
    """A name made of a job's overrides that needs no quotes, on a command line or in a shell."""
    name = overrides.replace("=", "-").replace(",", "_")
    typed = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:150]
    return typed if typed == name else f"{typed}_{digits(overrides)}"


def tracked(what: str, *, _root_: DictConfig) -> str:
    """How a tracker, such as W&B, files a run: the name of the `run`, and its `group`, which jobs of a sweep share."""
    name, seed, runs_dir = (_root_.get(key) for key in ("name", "seed", "runs_dir"))
    group, run = name, f"{name}_seed{seed}"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        group = os.path.relpath(HydraConfig.get().sweep.dir, runs_dir)
        run = f"{run}_job{HydraConfig.get().job.num}"
    return {"group": group, "run": run}[what][:128]  # W&B takes no more


def task_overrides() -> list[str]:
    """What the command line says of this job, as it says it."""
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[arg-type]
    assert isinstance(overrides, list)
    return overrides


def as_said(config: DictConfig) -> list[str]:
    """What the command line says of a sweep, whose interpolations are for its jobs."""
    overrides = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return overrides


def unfinished(folder: Path, ending: str, result: str = "result.json") -> list[Path]:
    """Folders of runs that have not written their result, the newest last."""
    return [run for run in sorted(folder.glob(f"*_{ending}")) if not (run / result).exists()]


def fingerprint(cfg: DictConfig) -> str:
    """Eight digits that two configurations share only if they are the same."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    kept = {key: value for key, value in plain.items() if key not in NOT_COMPUTED_FROM}
    return digits(kept)


def digits(content: object) -> str:
    """Eight hexadecimal digits of what can be written as JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
