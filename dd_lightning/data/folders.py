"""A packed data set from a folder of pictures, with a folder for each class."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dd_lightning.data.packed import Arrays
from dd_lightning.system.checks import check_count

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}


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
        FileNotFoundError: there is no such folder, or it holds no folders of pictures.
        ValueError: a class has too few pictures, the two parts have other classes, or a picture cannot be read.
    """
    check_count(image_size=image_size, test_every=test_every)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels!r}")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (classes_of(folder / part) for part in ("train", "test"))
    else:
        found = classes_of(folder)
        train = {name: [p for i, p in enumerate(of_class, 1) if i % test_every] for name, of_class in found.items()}
        test = {name: of_class[test_every - 1 :: test_every] for name, of_class in found.items()}
    if train.keys() != test.keys():
        raise ValueError(f"{folder}: class {min(train.keys() ^ test.keys())} is in one of train and test alone")
    for name in train:
        if not train[name] or not test[name]:
            raise ValueError(f"{folder}: class {name} has too few pictures: {len(train[name])} and {len(test[name])}")
    arrays = {}
    for part, of_part in (("train", train), ("test", test)):
        paths = [path for of_class in of_part.values() for path in of_class]
        arrays[f"{part}_images"] = np.stack([read(path, image_size, channels) for path in paths])
        arrays[f"{part}_labels"] = np.repeat(np.arange(len(of_part)), [len(of_class) for of_class in of_part.values()])
    return Arrays(**arrays), list(train)


def classes_of(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, both in the order of their names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of pictures at {folder}")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = {one.name: sorted(p for p in one.rglob("*") if p.suffix.lower() in SUFFIXES) for one in classes}
    if len(found) < 2:
        raise FileNotFoundError(f"{folder} needs a folder of pictures for each of at least two classes")
    return found


def read(path: Path, image_size: int, channels: int) -> np.ndarray:
    """A picture file as an array."""
    try:
        with Image.open(path) as picture:
            turned = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
            return np.asarray(ImageOps.fit(turned, (image_size, image_size)))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read ({error}); remove it") from error
