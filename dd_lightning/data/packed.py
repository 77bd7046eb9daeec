"""Packed data sets: four arrays in one `.npz` file.

`train_images`, `test_images`: uint8, [N, H, W] or [N, H, W, 3]; `train_labels`, `test_labels`: whole numbers, [N].
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from dd_lightning.system.archives import check_arrays
from dd_lightning.system.atomic import write_bytes

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Arrays:
    """A data set in memory."""

    train_images: UInt8[np.ndarray, "n h w *c"]
    train_labels: Int64[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m h w *c"]
    test_labels: Int64[np.ndarray, " m"]


def save_packed(path: Path, arrays: Arrays) -> None:
    """Writes the packed file whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **{key: getattr(arrays, key) for key in KEYS})
    write_bytes(path, buffer.getvalue())


def load_packed(path: Path, num_classes: int | None = None) -> Arrays:
    """Reads and checks a packed file, without ever unpickling.

    Args:
        num_classes: the labels must be below it, and each class must have a picture; None is the largest label + 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, an array is missing or has a wrong shape or type, a label is out of range,
            or a class has no picture; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no packed data set at {path}")
    try:
        check_arrays(path)
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            arrays = {key: file[key] for key in KEYS}
    except Exception as error:  # a file from elsewhere raises anything, from the parser of its headers for instance
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is truncated or not a packed data set: {reason}") from error
    _check_images(path, arrays)
    _check_labels(path, arrays, num_classes)
    arrays = {key: a.astype(np.int64) if key.endswith("labels") else a for key, a in arrays.items()}
    return Arrays(**arrays)


def _check_images(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[3] not in (1, 3))
        ):
            raise ValueError(
                f"{path}: {split}_images must be uint8 of shape [N, H, W] or [N, H, W, 3], "
                f"not {images.dtype} {list(images.shape)}"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{path}: {split}_labels must be {len(images)} whole numbers, not {labels.dtype} {list(labels.shape)}"
            )
        if len(images) == 0:
            raise ValueError(f"{path}: {split}_images holds no pictures")
        if images.shape[1] != images.shape[2]:
            raise ValueError(f"{path}: {split}_images are {images.shape[1]}×{images.shape[2]}; they must be square")
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise ValueError(f"{path}: train_images and test_images have different sizes")


def _check_labels(path: Path, arrays: dict[str, np.ndarray], num_classes: int | None) -> None:
    classes = num_classes if num_classes is not None else int(arrays["train_labels"].max()) + 1
    for split in ("train", "test"):
        labels = arrays[f"{split}_labels"]
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"{path}: {split}_labels run from {labels.min()} to {labels.max()}, "
                f"outside 0 to {classes - 1} ({classes} classes)"
            )
    empty = np.flatnonzero(np.bincount(arrays["train_labels"].astype(np.int64), minlength=classes) == 0)
    if len(empty):
        raise ValueError(f"{path}: no training picture of class {', '.join(map(str, empty[:5]))}")
