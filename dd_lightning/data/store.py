"""Pictures of files, decoded and scaled once: kept in one folder, and read from there without loading it."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from dd_lightning.data.crops import Cut, cut_out
from dd_lightning.data.decoding import Box, decoded
from dd_lightning.data.pictures import Pictures
from dd_lightning.system.tensors import read_tensors, write_tensors

FORMAT = "dd_lightning.pictures/1"
ON_DEVICE = 2**30  # bytes of pictures that a device takes as a whole


class Source(NamedTuple):
    """A picture: a file, or a part of one."""

    path: Path
    label: int
    box: Box | None = None


@dataclass(frozen=True)
class Form:
    """What is kept of each picture.

    Attributes:
        image_size: pixels, to which each is scaled (bilinear, its sides' ratio is not kept).
        whole: whether training pictures are kept for random crops, too: their shorter side at most twice the size.
        budget: bytes on disk; whole pictures beyond it are read from their files again.
    """

    channels: int
    image_size: int
    whole: bool
    budget: int

    @property
    def least(self) -> int:
        return 2 * self.image_size

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size


@dataclass
class Index:
    """What is known of the pictures that were decoded so far, by their place among the sources.

    Attributes:
        sizes: height and width of the whole picture; 0 of a broken one.
        offsets: of the whole picture in its file; -1 where it is not kept.
        digests: of the files' content.
        broken: what is wrong with those that cannot be read.
    """

    sizes: list[tuple[int, int]]
    offsets: list[int]
    digests: list[int]
    broken: dict[int, str]

    @property
    def stored(self) -> int:
        return len(self.sizes) - len(self.broken)

    def write(self, path: Path) -> None:
        columns = {"sizes": (self.sizes, torch.int32), "offsets": (self.offsets, torch.int64)}
        columns["digests"] = (self.digests, torch.int64)
        tensors = {name: torch.tensor(values, dtype=dtype) for name, (values, dtype) in columns.items()}
        write_tensors(path, tensors, {"format": FORMAT, "broken": {str(i): why for i, why in self.broken.items()}})

    @classmethod
    def read(cls, path: Path) -> "Index":
        if not path.is_file():
            return cls([], [], [], {})
        card, tensors = read_tensors(path, FORMAT, "index of pictures")
        lists: Any = {name: tensor.tolist() for name, tensor in tensors.items()}
        return cls(**lists, broken={int(i): why for i, why in card["broken"].items()})


class Store:
    """Decoded pictures on disk, row by row; those that could not be read have none.

    Args:
        folder: `images.u8` [n, c, s, s], `whole.u8` (pictures [h, w, c], one after the other), `index.safetensors`.
        sources: of the pictures.
        index: of all of them.
        form: of what is kept.

    Attributes:
        broken: what is wrong with sources that could not be read, by their place.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], index: Index, form: Form) -> None:
        self.folder, self.form, self.broken = folder, form, index.broken
        kept = [i for i in range(len(sources)) if i not in index.broken]
        self.sources = [sources[i] for i in kept]
        self.sizes = torch.tensor(index.sizes).view(-1, 2)[kept]
        self._offsets = torch.tensor(index.offsets)[kept]
        self.labels = torch.tensor([source.label for source in self.sources])
        self.digests = torch.tensor(index.digests)[kept]

    @cached_property
    def images(self) -> UInt8[Tensor, "n c s s"]:
        shape = (len(self.sources), *self.form.shape)
        return mapped(self.folder / "images.u8", math.prod(shape)).view(shape)

    @cached_property
    def _whole(self) -> UInt8[Tensor, " bytes"]:
        path = self.folder / "whole.u8"
        return mapped(path, path.stat().st_size)

    def whole(self, row: int) -> UInt8[Tensor, "h w c"]:
        """A picture before it was scaled to a square."""
        offset, (height, width) = int(self._offsets[row]), self.sizes[row].tolist()
        if offset < 0:
            source, form = self.sources[row], self.form
            content = source.path.read_bytes()
            return torch.from_numpy(decoded(source.path, content, form.channels, form.least, source.box))
        size = height * width * self.form.channels
        return self._whole[offset : offset + size].view(height, width, self.form.channels)

    def cut(self, cut: Cut) -> UInt8[Tensor, "c s s"]:
        return cut_out(self.whole(cut.row), cut, self.form.image_size)

    def pictures(self, rows: slice) -> "StoredPictures":
        return _stored(self, torch.arange(len(self.sources))[rows], self.labels[rows])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("images", "_whole")}


@dataclass(frozen=True)
class StoredPictures(Pictures):
    """Pictures that lie on disk, in rows of a store. They go to other processes by reference."""

    store: Store
    rows: Int[Tensor, " n"]

    def __getitem__(self, chosen: Int[Tensor, " m"] | slice) -> Pictures:
        of_rows = chosen.cpu() if isinstance(chosen, Tensor) else chosen
        some = super().__getitem__(chosen)
        return StoredPictures(some.images, some.labels, self.store, self.rows[of_rows])

    def to(self, device: torch.device | str) -> Pictures:
        """Many stay where they are, but for their labels: what is needed of them is copied then."""
        if self.images.numel() > ON_DEVICE:
            return StoredPictures(self.images, self.labels.to(device), self.store, self.rows)
        return StoredPictures(self.images.to(device), self.labels.to(device), self.store, self.rows)

    def __reduce__(self) -> Any:
        return _stored, (self.store, self.rows, self.labels)


def _stored(store: Store, rows: Int[Tensor, " n"], labels: Int[Tensor, " n"]) -> StoredPictures:
    first, count = (int(rows[0]) if len(rows) else 0), len(rows)
    together = torch.equal(rows, torch.arange(first, first + count))
    images = store.images[first : first + count] if together else store.images[rows]
    return StoredPictures(images, labels, store, rows)


def mapped(path: Path, size: int) -> UInt8[Tensor, " size"]:
    """A file's bytes, which the system reads when they are looked at."""
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0).byte()


def key_of(root: Path, sources: Sequence[Source], training: int, form: Form) -> str:
    """Names the files, as far as their names, sizes and times tell, and the form.

    Args:
        training: how many of the sources are, the first.
    """
    found = hashlib.blake2b(f"{FORMAT} {form} {training}".encode(), digest_size=8)
    start = len(str(root))
    for source in sources:
        about = os.stat(source.path)
        found.update(os.fsencode(str(source.path)[start:]))
        found.update(f"\0{about.st_size} {about.st_mtime_ns} {source.box}\n".encode())
    return found.hexdigest()


def kept_content(store: Store, training: int) -> str:
    """A hash of the files' contents, their labels and their parts, which moved or touched files share."""
    found = hashlib.blake2b(f"{training}".encode(), digest_size=8)
    for tensor in (store.digests, store.labels):
        found.update(tensor.numpy().data)
    return found.hexdigest()
