"""dd-export: distilled data as PNG files, `.npz` and `.pt`, for other people's code."""

import logging
import os
from pathlib import Path

from omegaconf import DictConfig

from dd_lightning.commands.launch import command
from dd_lightning.distilled import DistilledData
from dd_lightning.report.export import export as write_files

log = logging.getLogger(__name__)


def export(cfg: DictConfig) -> None:
    """Writes distilled data into a folder.

    Raises:
        ValueError: a path was not said, or what `export` refuses.
    """
    if not cfg.path:
        raise ValueError("say which distilled data: path=RUN_OR_FILE")
    distilled = DistilledData.load(str(cfg.path))  # 3 is a number to Hydra, and may be a folder
    write_files(distilled, Path(str(cfg.folder)))
    log.info(
        f"{os.path.relpath(str(cfg.folder))}: distilled.npz, distilled.pt, images/; README.txt says how to use them"
    )


main = command("export")

if __name__ == "__main__":
    main()
