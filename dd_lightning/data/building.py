"""Decodes pictures into a store, in several processes; a build that was interrupted goes on."""

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from dd_lightning.data.decoding import decoded
from dd_lightning.data.loading import load
from dd_lightning.data.store import Form, Index, Source, Store
from dd_lightning.system.locking import locked
from dd_lightning.system.progress import progress_of

log = logging.getLogger(__name__)

AT_ONCE = 8  # pictures that go from process to process
SAVED = 2000  # pictures after which the index is saved


class _Decoded(NamedTuple):
    image: np.ndarray | None  # [c, s, s]; None of a broken one
    whole: np.ndarray | None  # [h, w, c]
    size: tuple[int, int]
    digest: int
    reason: str


class _Files(Dataset[_Decoded]):
    """The sources, decoded."""

    def __init__(self, sources: Sequence[Source], training: int, form: Form) -> None:
        self.sources, self.training, self.form = sources, training, form

    def __getitem__(self, index: int) -> _Decoded:
        source, form = self.sources[index], self.form
        try:
            content = source.path.read_bytes()
            whole = decoded(source.path, content, form.channels, form.least, source.box)
        except (OSError, ValueError) as error:
            return _Decoded(None, None, (0, 0), 0, str(error))
        picture = torch.from_numpy(whole).permute(2, 0, 1)
        image = transforms.resize(picture, [form.image_size, form.image_size], antialias=True).contiguous().numpy()
        digest = hashlib.blake2b(content + str(source.box).encode(), digest_size=8).digest()
        kept = whole if form.whole and index < self.training else None
        return _Decoded(image, kept, whole.shape[:2], int.from_bytes(digest, "little", signed=True), "")


def built(name: str, folder: Path, sources: Sequence[Source], training: int, form: Form, workers: int) -> Store:
    """The store in `folder`, decoded as far as it is not.

    Args:
        name: of the data set, for people.
        sources: of all pictures, those of the training part first.
        training: how many those are.

    Raises:
        ValueError: the pictures do not fit into the budget.
        OSError: they do not fit on the disk.
    """
    with locked(folder.parent / f".{folder.name}.lock", wait=True):  # of several processes one decodes
        index = _found(folder, form)
        if len(index.sizes) < len(sources):
            _check_room(name, folder, len(sources), form)
            folder.mkdir(parents=True, exist_ok=True)
            _decode(name, folder, sources, training, form, index, workers)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
            log.info(f"{name}: {index.stored:,} decoded pictures are kept in {folder} ({size:.2f} GB)")
    return Store(folder, sources, index, form)


def _found(folder: Path, form: Form) -> Index:
    """What is there already; of a store that is damaged nothing."""
    with suppress(ValueError):
        index = Index.read(folder / "index.safetensors")
        sizes = {"images.u8": index.stored * math.prod(form.shape), "whole.u8": _whole_bytes(index, form.channels)}
        if all(size == 0 or (folder / name).stat().st_size >= size for name, size in sizes.items()):
            return index
    shutil.rmtree(folder)
    return Index([], [], [], {})


def _check_room(name: str, folder: Path, count: int, form: Form) -> None:
    needed = count * math.prod(form.shape)
    if needed > form.budget:
        raise ValueError(
            f"{name}: {count:,} pictures of {form.image_size}×{form.image_size} take {needed / 1e9:.3g} GB on disk, "
            f"more than dataset.cache_gb={form.budget / 1e9:g}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.glob("*.u8"))
    free = shutil.disk_usage(folder.parent).free + there
    if needed > free:
        raise OSError(
            f"{name}: {count:,} decoded pictures take {needed / 1e9:.3g} GB, but {folder.parent} has {free / 1e9:.3g} "
            "GB left; set data_dir to another disk"
        )


def _decode(
    name: str, folder: Path, sources: Sequence[Source], training: int, form: Form, index: Index, workers: int
) -> None:
    done, spare = len(index.sizes), form.budget - len(sources) * math.prod(form.shape)
    todo = range(done, len(sources))
    batches = (list(todo[i : i + AT_ONCE]) for i in range(0, len(todo), AT_ONCE))
    log.info(f"{name}: decoding {len(todo):,} pictures into {folder}, once")
    with (
        _at_end_of(folder / "images.u8", index.stored * math.prod(form.shape)) as images,
        _at_end_of(folder / "whole.u8", _whole_bytes(index, form.channels)) as whole,
        progress_of("decoding", len(sources), done, "pictures") as advance,
    ):
        try:
            for batch in load(_Files(sources, training, form), batches, list, workers):
                for one in batch:
                    _append(index, one, images, whole, spare)
                advance(len(batch))
                if len(index.sizes) // SAVED > (len(index.sizes) - len(batch)) // SAVED:
                    _save(index, folder, images, whole)
        except BaseException:
            with suppress(OSError):  # of a full disk
                _save(index, folder, images, whole)
            raise
        _save(index, folder, images, whole)


def _append(index: Index, one: _Decoded, images: BinaryIO, whole: BinaryIO, spare: int) -> None:
    offset = -1
    if one.image is None:
        index.broken[len(index.sizes)] = one.reason
    else:
        images.write(one.image.data)
        if one.whole is not None and whole.tell() + one.whole.nbytes <= spare:
            offset = whole.tell()
            whole.write(one.whole.data)
    index.sizes.append(one.size)
    index.offsets.append(offset)
    index.digests.append(one.digest)


def _save(index: Index, folder: Path, *files: BinaryIO) -> None:
    """The index last: it tells of nothing that is not on the disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    index.write(folder / "index.safetensors")


def _at_end_of(path: Path, size: int) -> Any:
    """The file, cut to that size, to be gone on with."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _whole_bytes(index: Index, channels: int) -> int:
    kept = [size for size, offset in zip(index.sizes, index.offsets, strict=True) if offset >= 0]
    return sum(height * width * channels for height, width in kept)
