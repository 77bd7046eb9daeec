"""What is refused before a run begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dd_lightning.distiller import DatasetDistiller


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
        for key in ("dirpath", "save_dir", "filename", "version"):
            value = (settings or {}).get(key)
            if isinstance(value, str) and not (folder / value).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{group}.{name}.{key}={value} lies outside the run's folder {folder}")


def check_outer(distiller: DatasetDistiller) -> None:
    """Takes an outer step without a gradient, so that settings which torch refuses only then are refused at once."""
    made = distiller.configure_optimizers()
    if isinstance(made, dict):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
