"""What a run's folder says of the run: kept where a command is refused, and where a run is finished."""

import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

RECORD = ".hydra"
_before: dict[Path, bytes] = {}  # what the run's folder said before this command


class Kept(Callback):
    """Refuses to write into the folder of a finished run, unless that is what `resume` says."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            folder, resume = Path(config.hydra.run.dir).absolute(), config.get("resume")
        except OmegaConfBaseException:  # which the run then tells
            return
        _before.clear()
        _before.update({path: path.read_bytes() for path in (folder / RECORD).glob("*.yaml")})
        asked = isinstance(resume, str) and Path(resume).resolve().is_relative_to(folder.resolve())
        if (folder / "result.json").is_file() and not asked:
            # An exception would be caught, and the run started.
            name, where = config.hydra.job.name, config.hydra.run.dir
            sys.exit(f"{name}: error: {where} holds a finished run; give another hydra.run.dir")


def leave(folder: Path) -> None:
    """Leaves a folder as it was before a command that was refused: with the record of its run, or not there."""
    before = {path: content for path, content in _before.items() if path.parent.parent == folder}
    for path, content in before.items():
        path.write_bytes(content)
    files = [path for path in folder.rglob("*") if path.is_file()]
    said = {folder / ".lock", *folder.glob("*.log"), *(folder / RECORD).glob("*")}
    if not before and said.issuperset(files):
        shutil.rmtree(folder, ignore_errors=True)
