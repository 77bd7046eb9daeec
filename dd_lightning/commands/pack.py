"""dd-pack: a packed data set from a folder of pictures."""

import logging
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from dd_lightning.commands.launch import command
from dd_lightning.data.folders import pack_folder
from dd_lightning.data.packed import save_packed

log = logging.getLogger(__name__)


def pack(cfg: DictConfig) -> None:
    """Writes the packed file, and says what is in it."""
    path, folder = (Path(str(one)).expanduser() for one in (cfg.path, cfg.folder))  # 3 is a number to Hydra
    if path.exists():
        raise ValueError(f"path: {path} exists; remove it, or give another")
    if path.suffix != ".npz":
        raise ValueError(f"path must end in .npz, not {path}")
    arrays, names = pack_folder(folder, cfg.image_size, cfg.channels, cfg.test_every)
    save_packed(path, arrays)
    counts = [np.bincount(labels, minlength=len(names)) for labels in (arrays.train_labels, arrays.test_labels)]
    for label, name in enumerate(names):
        log.info(f"class {label}, {name}: {counts[0][label]} training and {counts[1][label]} test pictures")
    total = f"{len(arrays.train_labels)} training and {len(arrays.test_labels)} test pictures"
    log.info(f"{path}: {total} of {len(names)} classes; dd-distill dataset=packed dataset.path={path}")


main = command("pack")

if __name__ == "__main__":
    main()
