"""Distilled sets as other people's code leaves them: images and labels in a file, or pictures in folders.

Nothing in a file is run: no pickle is read but by torch's own reader of tensors.
"""

import csv
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import load_file
from torch import Tensor

from dd_lightning.system.archives import check_archive, check_arrays

Set = tuple[Shaped[Tensor, "n c h w"], Int[Tensor, " n"] | Float[Tensor, "n classes"]]
LABELS_FILE = "labels.csv"


def read_sets(path: Path, labels_path: Path | None = None) -> list[Set]:
    """Images and labels of one set, or of the several in a file of DC's code.

    Args:
        path: a `.pt`, `.npz` or `.safetensors` file with `images` and `labels`; a `.pt` file may also hold a pair of
            them, or under `data` a list of such pairs. Or a folder with a folder of PNG files for each class.
        labels_path: a file of the labels, where they have their own.

    Returns:
        Pictures from PNG files and other whole numbers as uint8; all else as floating-point numbers.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: naming the file, and what is wrong with it.
    """
    if path.is_dir():
        if labels_path is not None:
            raise ValueError(f"labels_path={labels_path}, but the labels of folder {path} are in its {LABELS_FILE}")
        found = [_read_folder(path)]
    else:
        content = _read(path)
        if labels_path is not None:
            content = {"images": _only(content, "images", path), "labels": _only(_read(labels_path), "labels", path)}
        found = _pairs(content, path)
    for images, labels in found:
        _check(images, labels, path)
    return [(images if images.dtype == torch.uint8 else images.float(), _labels(labels)) for images, labels in found]


def _read(path: Path) -> Any:
    """The tensors of a file."""
    readers: dict[str, Callable[[Path], Any]] = {".pt": _torch, ".pth": _torch, ".npz": _npz, ".safetensors": load_file}
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of images and labels at {path}")
    if path.suffix not in readers:
        raise ValueError(f"{path} must be a folder of PNG files by class, or end in {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except (zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is truncated or not a {path.suffix} file") from error
    except Exception as error:  # a file from elsewhere raises anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{path} is truncated, damaged or not a {path.suffix} file: {reason}") from error


def _torch(path: Path) -> Any:
    check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _npz(path: Path) -> dict[str, Tensor]:
    check_arrays(path)
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def _only(content: Any, name: str, path: Path) -> Tensor:
    """The tensor of a file that holds it alone, or by its name."""
    found = content.get(name) if isinstance(content, Mapping) else content
    if not isinstance(found, Tensor):
        raise ValueError(f"{path}: there is no tensor {name} in the file given for it")
    return found


def _pairs(content: Any, path: Path) -> list[Set]:
    several = content.get("data") if isinstance(content, Mapping) and "images" not in content else None
    pairs = several if isinstance(several, list | tuple) else [content]
    found = []
    for pair in pairs:
        if isinstance(pair, Mapping):
            pair = (pair.get("images"), pair.get("labels"))
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            raise ValueError(f"{path} holds no images and labels: two tensors of these names, or a pair of them")
        found.append((pair[0], pair[1]))
    if not found:
        raise ValueError(f"{path} holds no set")
    return found


def _check(images: Tensor, labels: Tensor, path: Path) -> None:
    """Refuses tensors that claim more than is there, or are no images and labels."""
    for name, tensor in (("images", images), ("labels", labels)):
        whole = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not whole or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} is no ordinary tensor, or claims more than the file holds")
        if tensor.is_complex() or tensor.dtype == torch.bool or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite numbers")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3] or not len(images):
        raise ValueError(f"{path}: images must be [n, channels, size, size], not {list(images.shape)}")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"{path}: images must be floating-point numbers, or uint8 from 0 to 255, not {images.dtype}")
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise ValueError(
            f"{path}: labels must be {len(images)} classes, or as many rows of a number for each class, "
            f"not {list(labels.shape)}"
        )
    if labels.ndim == 1 and (
        labels.min() < 0 or not torch.equal(labels, labels.round() if labels.is_floating_point() else labels)
    ):
        raise ValueError(f"{path}: labels must be whole numbers from 0")


def _labels(labels: Tensor) -> Tensor:
    return labels.long() if labels.ndim == 1 else labels.float()


def _read_folder(folder: Path) -> Set:
    """Pictures by class: folders named by numbers are those classes, others are classes in the order of their names.

    Where there is a `labels.csv`, as `dd-export` writes it, the labels are those in it.
    """
    from PIL import Image

    files = sorted(file for file in folder.glob("*/*.png"))
    if not files:
        raise ValueError(f"{folder} holds no folders of PNG files by class")
    names = sorted({file.parent.name for file in files})
    classes = {name: int(name) if all(n.isdecimal() for n in names) else i for i, name in enumerate(names)}
    pictures: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file, formats=["PNG"]) as picture:
                if pictures and picture.size != (pictures[0].shape[1], pictures[0].shape[0]):
                    raise ValueError(f"it is {picture.size[0]}×{picture.size[1]}, others are not")
                if max(picture.size) > 1024:
                    raise ValueError(f"it is {picture.size[0]}×{picture.size[1]}, larger than 1024×1024")
                pictures.append(np.array(picture.convert("L" if picture.mode in ("L", "1", "I;16", "I") else "RGB")))
        except Exception as error:  # a file from elsewhere raises anything
            raise ValueError(f"{file} is not a picture of this set: {str(error).partition(chr(10))[0]}") from error
    if len({picture.ndim for picture in pictures}) > 1:
        raise ValueError(f"{folder} holds grey pictures and coloured ones")
    images = torch.from_numpy(np.stack(pictures))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    labels = torch.tensor([classes[file.parent.name] for file in files])
    if (folder / LABELS_FILE).is_file():
        return _of_table(folder / LABELS_FILE, [file.relative_to(folder).as_posix() for file in files], images)
    return images.contiguous(), labels


def _of_table(path: Path, files: list[str], images: Tensor) -> Set:
    """The pictures in the order of a table, with its labels: columns file, class and, if they are soft, one a class."""
    try:
        with path.open(newline="", encoding="utf-8") as table:
            rows = list(csv.reader(table))[1:]
        places = {file: index for index, file in enumerate(files)}
        chosen = [places[row[0]] for row in rows]
        soft = torch.tensor([[float(value) for value in row[2:]] for row in rows])
        labels = soft if soft.numel() else torch.tensor([int(row[1]) for row in rows])
    except (KeyError, IndexError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} does not fit the pictures beside it: {error}") from error
    return images[chosen].contiguous(), labels
