"""Folders of pictures, with a folder for each class; and a packed data set made of one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dd_lightning.data.decoding import SUFFIXES, decoded
from dd_lightning.data.packed import Arrays
from dd_lightning.system.checks import check_count

Classes = dict[str, list[Path]]  # the pictures of each class, both in the order of their names
Split = Callable[[int, list[Path]], tuple[list[Path], list[Path]]]  # a class's pictures into training and test part


def pack_folder(folder: Path, image_size: int, channels: int, test_every: int) -> tuple[Arrays, list[str]]:
    """The pictures in `folder/train/CLASS` and `folder/test/CLASS`, or in `folder/CLASS`, of which some are the test.

    Args:
        image_size: pixels, to which each picture's largest square in the middle is scaled.
        channels: 1 or 3, into which pictures are converted.
        test_every: of each class's pictures, in the order of their names, the last of so many is for the test, where
            there is no folder `test`.

    Returns:
        The arrays, and the names of the classes in the order of their labels.

    Raises:
        FileNotFoundError, ValueError: as `parts_of`, or a picture cannot be read.
    """
    check_count(image_size=image_size, test_every=test_every)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels!r}")

    def split(label: int, pictures: list[Path]) -> tuple[list[Path], list[Path]]:
        return [p for i, p in enumerate(pictures, 1) if i % test_every], pictures[test_every - 1 :: test_every]

    train, test = parts_of(folder, split)
    arrays = {}
    for part, of_part in (("train", train), ("test", test)):
        paths = [path for of_class in of_part.values() for path in of_class]
        arrays[f"{part}_images"] = np.stack([read(path, image_size, channels) for path in paths])
        arrays[f"{part}_labels"] = np.repeat(np.arange(len(of_part)), [len(of_class) for of_class in of_part.values()])
    return Arrays(**arrays), list(train)


def parts_of(folder: Path, split: Split) -> tuple[Classes, Classes]:
    """The training and the test pictures in `folder/train/CLASS` and `folder/test/CLASS`, or in `folder/CLASS`.

    Args:
        split: used where there is one tree.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no folders of pictures.
        ValueError: a class has too few pictures, the two parts have other classes, or a link leads elsewhere.
    """
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (classes_of(folder / part, folder) for part in ("train", "test"))
        for part, others, other in ((train, test, "test"), (test, train, "train")):
            if lacking := [name for name in part if name not in others]:
                raise ValueError(f"{folder / other} lacks class {lacking[0]}, which the other part has")
        parts = {"train": train, "test": test}
        for name in train:
            empty = [part for part in parts if not parts[part][name]]
            if empty:
                raise ValueError(f"class {name} is empty: {folder / empty[0] / name} holds no pictures")
        return train, test
    found = classes_of(folder, folder)
    of_both = {name: split(label, found[name]) for label, name in enumerate(found)}
    for name, (train_of_class, test_of_class) in of_both.items():
        if not found[name]:
            raise ValueError(f"class {name} is empty: {folder / name} holds no pictures")
        if not train_of_class or not test_of_class:
            numbers = f"{len(train_of_class)} to train on and {len(test_of_class)} to test on"
            raise ValueError(f"class {name} in {folder} has too few pictures ({len(found[name])}): {numbers}")
    return ({name: both[0] for name, both in of_both.items()}, {name: both[1] for name, both in of_both.items()})


def classes_of(folder: Path, root: Path) -> Classes:
    """The pictures of each class; names that begin with a dot are not looked at.

    Args:
        root: out of which no link may lead.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of pictures at {folder}")
    inside = root.resolve()
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    found = {name: sorted(_pictures(folder / name, inside), key=str) for name in classes}  # of paths it is slow
    if len(found) < 2:
        raise FileNotFoundError(f"{folder} needs a folder of pictures for each of at least two classes")
    return found


def _pictures(folder: Path, inside: Path) -> Iterator[Path]:
    if not folder.resolve().is_relative_to(inside):
        raise ValueError(f"{folder} is a link that leads out of {inside}")
    for entry in os.scandir(folder):
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and (entry.is_dir() or not path.resolve().is_relative_to(inside)):
            where = "to a folder" if entry.is_dir() else f"out of {inside}"
            raise ValueError(f"{path} is a link that leads {where}")
        if entry.is_dir():
            yield from _pictures(path, inside)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def read(path: Path, image_size: int, channels: int) -> np.ndarray:
    """The square in the middle of a picture, in that size."""
    try:
        pixels = decoded(path, path.read_bytes(), channels)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; remove it") from error
    picture = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    return np.asarray(ImageOps.fit(picture, (image_size, image_size)))
