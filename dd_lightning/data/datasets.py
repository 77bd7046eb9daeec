"""Data sets: where the pictures come from, and the form in which networks see them."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from jaxtyping import Int, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from dd_lightning.data.packed import Arrays, load_packed, save_packed
from dd_lightning.data.pictures import Pictures, Preprocessing
from dd_lightning.system.checks import check_bool, check_count, check_name, check_whole
from dd_lightning.system.locking import locked
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.words import counted


class ImageDataset(ABC):
    """A labelled set of pictures with a training and a test part.

    Args:
        name: of the data set, and of its packed file.
        num_classes: None is the largest label + 1.
        channels: 1 or 3, into which the pictures are converted; None is as stored.
        image_size: pixels, to which they are scaled; None is as stored.
        border: black pixels that are put on each side of the stored pictures, before they are scaled.
        mean, std: of each stored channel, of pixels in [0, 1]; None measures the training pictures, as is done where
            colours are turned grey.
        crop_padding: augmentation: reflect-pad by so many pixels, then crop at random; 0 is none.
        flip: augmentation: mirror every other picture at random.
        validation: number of training pictures that are held out for validation; 0 validates on those trained on. None
            is every tenth, at most 5,000, unless that would be fewer than there are classes.

    Attributes (after `load`):
        class_names: in the order of the labels, where they have names.
        content: a hash of pictures and labels, where it is known without reading them.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    class_names: list[str] | None = None
    content: str | None = None
    random_resized_crop: list[float] | None = None
    workers: int = 0

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        channels: int | None = None,
        image_size: int | None = None,
        border: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        validation: int | None = 1000,
    ) -> None:
        check_name(name=name)
        if validation is not None:
            check_whole(validation=validation)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, not {channels!r}")
        if image_size is not None:
            check_count(image_size=image_size)
        if num_classes is not None:
            check_count(num_classes=num_classes)
        check_whole(border=border, crop_padding=crop_padding)
        check_bool(flip=flip)
        if any(v is not None and (isinstance(v, str) or not isinstance(v, Sequence) or not v) for v in (mean, std)):
            raise ValueError(f"mean and std must be lists, such as [0.5], not {mean} and {std}")
        if (mean is None) != (std is None):
            raise ValueError("give both mean and std, or neither")
        self.name, self.num_classes = name, num_classes
        self.channels, self.image_size, self.border = channels, image_size, border
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in [*(mean or []), *(std or [])]):
            raise ValueError(f"mean and std must be finite numbers, not {mean} and {std}")
        self.mean, self.std = (None if v is None else [float(x) for x in v] for v in (mean, std))
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}")
        self.crop_padding, self.flip, self.validation = crop_padding, flip, validation

    @property
    def augments(self) -> bool:
        """Whether training pictures are changed at random."""
        return bool(self.crop_padding or self.flip)

    @abstractmethod
    def prepare(self) -> None:
        """Makes the pictures available on this machine (download, pack); called once, before `load`."""

    @abstractmethod
    def load(self) -> tuple[Pictures, Pictures, Preprocessing, int]:
        """Training part (validation included), test part, preprocessing and number of classes."""

    def divided(self, training: Pictures) -> tuple[Pictures, Pictures]:
        """The pictures to train on, and those held out for validation: the same for every seed, to compare runs."""
        order = torch.randperm(len(training), generator=generator(0, Stream.SPLIT))
        held_out, rest = order[: self.validation].sort().values, order[self.validation :].sort().values
        return training[rest], training[held_out]

    def _settle_validation(self, labels: Int[Tensor, " n"]) -> None:
        if self.validation is None:
            tenth = min(len(labels) // 10, 5000)
            self.validation = tenth if tenth >= len(labels.unique()) else 0
        if self.validation >= len(labels):
            raise ValueError(
                f"validation={self.validation} leaves none of the {len(labels)} training pictures of {self.name}"
            )

    def _per_channel(self, values: list[float], channels: int) -> list[float]:
        if len(values) == 1:
            return values * channels
        if len(values) != channels:
            raise ValueError(
                f"data set {self.name} has {counted(channels, 'channel')} but {len(values)} values of mean and std; "
                "set dataset.mean=null dataset.std=null to measure them"
            )
        return values


class ArrayDataset(ImageDataset):
    """A data set that fits into memory."""

    @abstractmethod
    def arrays(self) -> Arrays:
        """The stored arrays, checked."""

    def load(self) -> tuple[Pictures, Pictures, Preprocessing, int]:
        arrays = self.arrays()
        train, test = (
            Pictures(self._form(getattr(arrays, f"{s}_images")), torch.from_numpy(getattr(arrays, f"{s}_labels")))
            for s in ("train", "test")
        )
        self._settle_validation(train.labels)
        channels, image_size = train.images.shape[1], train.images.shape[2]
        if self.crop_padding >= image_size:
            raise ValueError(f"crop_padding={self.crop_padding} must be below the {image_size} pixels of a picture")
        stored = arrays.train_images.shape[3:] or (1,)
        # The mean and std of three channels say nothing of their grey.
        turned_grey = channels < stored[0] and self.mean is not None and len(self.mean) == stored[0]
        if self.mean is None or self.std is None or turned_grey:
            pixels = train.images.transpose(0, 1).flatten(1).double() / 255
            mean, std = pixels.mean(1).tolist(), pixels.std(1).clamp_min(1e-3).tolist()
        else:
            mean, std = (self._per_channel(value, channels) for value in (self.mean, self.std))
        num_classes = self.num_classes or int(train.labels.max()) + 1
        if num_classes < 2:
            raise ValueError(f"data set {self.name} has one class; there is nothing to tell apart")
        return train, test, Preprocessing(channels, image_size, mean, std), num_classes

    def _form(self, images: np.ndarray) -> UInt8[Tensor, "n c h w"]:
        pictures = torch.from_numpy(images)
        pictures = pictures[:, None] if pictures.ndim == 3 else pictures.permute(0, 3, 1, 2)
        if self.channels == 3 and pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        elif self.channels == 1 and pictures.shape[1] == 3:
            pictures = transforms.rgb_to_grayscale(pictures)
        if self.border:
            pictures = transforms.pad(pictures, [self.border])
        if self.image_size is not None and pictures.shape[-1] != self.image_size:
            pictures = transforms.resize(pictures, [self.image_size, self.image_size], antialias=True)
        return pictures.contiguous()


class Packed(ArrayDataset):
    """A user's own data set: one `.npz` file of four arrays (see `dd_lightning.data.packed`).

    Args:
        path: of the file.
        **form: as in `ImageDataset`.
    """

    def __init__(self, path: str | None, name: str | None = None, **form: Any) -> None:
        if not path or not isinstance(path, str):
            raise ValueError("a packed data set needs the path of its .npz file: dataset.path=FILE")
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            raise ValueError(
                f"{path} is a folder, not a packed file; dd-pack folder={path} path=my.npz makes one of it"
            )
        super().__init__(name or self.path.stem, **form)

    def prepare(self) -> None:
        pass

    def arrays(self) -> Arrays:
        return load_packed(self.path, self.num_classes)


class TorchvisionDataset(Packed):
    """A data set that torchvision downloads; packed once into `<data_dir>/<name>.npz`.

    Args:
        source: class with torchvision's interface, e.g. `torchvision.datasets.MNIST`.
        train, test: arguments of `source` that choose the part.
        data_dir: folder of the packed file; a file that is already there is used without a download.
        **form: as in `ImageDataset`.
    """

    def __init__(
        self, name: str, source: str, train: dict[str, Any], test: dict[str, Any], data_dir: str, **form: Any
    ) -> None:
        super().__init__(str(Path(data_dir) / f"{name}.npz"), name=name, **form)
        self.source, self.parts = source, {"train": train, "test": test}

    def prepare(self) -> None:
        if self.path.is_file():
            return
        download = self.path.parent / "download" / self.name
        try:
            with locked(download / ".lock", wait=True):  # of several processes one downloads
                if not self.path.is_file():
                    self._download(download)
        except Exception as error:  # raw files that are cut or changed raise anything, with or without words
            message = " ".join(str(error).split()) or type(error).__name__
            reached = getattr(error, "errno", None) is None and not re.search(r"ownload|urlopen", message)
            if reached and any(path.is_file() and path.name != ".lock" for path in download.rglob("*")):
                raise ValueError(
                    f"data set {self.name}: what was downloaded into {download} is incomplete or damaged ({message}); "
                    "delete that folder, and the same command downloads it again"
                ) from error
            raise FileNotFoundError(
                f"data set {self.name} is not at {self.path} and could not be downloaded ({message}); "
                "set data_dir to the folder of its packed file"
            ) from error

    def _download(self, folder: Path) -> None:
        packed = {}
        for part, arguments in self.parts.items():
            dataset = get_class(self.source)(root=str(folder), download=True, **arguments)
            pictures = [np.asarray(picture) for picture, _ in dataset]
            packed[f"{part}_images"] = np.stack(pictures).astype(np.uint8)
            packed[f"{part}_labels"] = np.array([label for _, label in dataset], dtype=np.int64)
        save_packed(self.path, Arrays(**packed))


class Digits(ArrayDataset):
    """The 1,797 real handwritten digits that scikit-learn ships (8×8 pixels): nothing to download.

    The 360 test digits are a fixed choice, stratified over the classes.
    """

    def prepare(self) -> None:
        pass

    def arrays(self) -> Arrays:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        parts: Any = train_test_split(images, digits.target, test_size=360, random_state=0, stratify=digits.target)
        train_images, test_images, train_labels, test_labels = parts
        return Arrays(train_images, train_labels.astype(np.int64), test_images, test_labels.astype(np.int64))
