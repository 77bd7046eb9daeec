"""Functions for configuration files."""

from pathlib import Path

from omegaconf import OmegaConf


def register() -> None:
    """Makes `${fraction:…}` and `${run_folder:…}` known; every module that composes a configuration calls it."""
    OmegaConf.register_new_resolver("fraction", lambda whole, parts: max(whole // parts, 1), replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)


def run_folder(resume: str | None, new: str) -> str:
    """A run that goes on from a run's folder stays in it."""
    return resume if resume is not None and Path(resume, "checkpoints").is_dir() else new
