"""Data sets whose pictures are files of any size."""

import json
import logging
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dd_lightning.data.building import built
from dd_lightning.data.datasets import ImageDataset
from dd_lightning.data.folders import Classes, parts_of
from dd_lightning.data.loading import usual_workers
from dd_lightning.data.pictures import Pictures, Preprocessing
from dd_lightning.data.store import Form, Source, Store, StoredPictures, kept_content, key_of
from dd_lightning.system.atomic import write_json
from dd_lightning.system.checks import check_bool, check_count, check_positive, check_whole
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.words import counted

log = logging.getLogger(__name__)

CHUNK = 256  # pictures that are measured at once


@dataclass(frozen=True)
class Listing:
    """The pictures of a data set, by class.

    Attributes:
        root: the folder that all are in.
        names: of the classes, in the order of their labels.
    """

    root: Path
    names: list[str]
    train: list[Source]
    test: list[Source]


class PictureFiles(ImageDataset):
    """Pictures in files. They are decoded once, scaled to `image_size`, and kept in `data_dir`.

    The training pictures are kept in a random order, of which the first are those for validation: each part is a piece
    of one file, and is not loaded.

    Args:
        name: of the data set.
        data_dir: the decoded pictures are kept in its folder `pictures`.
        image_size: pixels, to which pictures are scaled, whatever the ratio of their sides.
        channels: 1 or 3, into which they are converted.
        random_resized_crop: augmentation: shares of a picture's area, from and to, between which a random part of it
            is taken and scaled; None takes the whole picture.
        skip_broken: leaves files out that are no pictures, instead of refusing the data set.
        workers: processes that decode; 0 decodes in this one. None is one a core but one, eight at most.
        cache_gb: GB (10⁹ bytes) on disk for decoded pictures. Those to be cropped that do not fit are decoded anew.
        **form: as in `ImageDataset`.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    def __init__(
        self,
        name: str,
        data_dir: str,
        image_size: int = 224,
        channels: int = 3,
        random_resized_crop: Sequence[float] | None = None,
        skip_broken: bool = False,
        workers: int | None = None,
        cache_gb: float = 10,
        **form: Any,
    ) -> None:
        check_count(image_size=image_size, channels=channels)
        check_positive(cache_gb=cache_gb)
        if workers is not None:
            check_whole(workers=workers)
        check_bool(skip_broken=skip_broken)
        super().__init__(name, channels=channels, image_size=image_size, **form)
        self.random_resized_crop = None if random_resized_crop is None else _shares(random_resized_crop)
        self.skip_broken, self.workers = skip_broken, usual_workers() if workers is None else workers
        self.kept = Form(channels, image_size, self.random_resized_crop is not None, int(1e9 * cache_gb))
        self.folder = Path(data_dir).expanduser() / "pictures"
        self._store: Store | None = None

    @abstractmethod
    def listing(self) -> Listing:
        """The pictures, of which nothing was read yet."""

    def prepare(self) -> None:
        listing = self.listing()
        self._check_classes(listing.names)
        order = torch.randperm(len(listing.train), generator=generator(0, Stream.SPLIT)).tolist()
        sources = [listing.train[i] for i in order] + listing.test
        key = key_of(listing.root, sources, len(order), self.kept)
        self.class_names = listing.names
        store = built(self.name, self.folder / f"{self.name}-{key}", sources, len(order), self.kept, self.workers)
        self._check_broken(store)
        self.training = sum(row not in store.broken for row in range(len(order)))
        self._check_empty(store)
        self.content, self._store = kept_content(store, self.training), store

    def load(self) -> tuple[Pictures, Pictures, Preprocessing, int]:
        if self._store is None:
            self.prepare()
        assert self._store is not None
        assert self.class_names is not None
        train, test = (self._store.pictures(rows) for rows in (slice(self.training), slice(self.training, None)))
        self._settle_validation(train.labels)
        if self.mean is None or self.std is None:
            mean, std = self._measured(train)
        else:
            mean, std = (self._per_channel(value, self.kept.channels) for value in (self.mean, self.std))
        form = Preprocessing(self.kept.channels, self.kept.image_size, mean, std)
        return train, test, form, len(self.class_names)

    def divided(self, training: Pictures) -> tuple[Pictures, Pictures]:
        assert self.validation is not None
        return training[self.validation :], training[: self.validation]

    def _check_classes(self, names: list[str]) -> None:
        if self.num_classes not in (None, len(names)):
            raise ValueError(f"num_classes={self.num_classes}, but data set {self.name} has {len(names)} classes")

    def _check_broken(self, store: Store) -> None:
        if not store.broken:
            return
        first, count = next(iter(store.broken.values())), len(store.broken)
        if not self.skip_broken:
            more = f", and {count - 1} more" if count > 1 else ""
            raise ValueError(f"{first}{more}; remove such files, or leave them out with dataset.skip_broken=true")
        log.warning(f"{self.name}: left out {counted(count, 'file')}: {'; '.join(list(store.broken.values())[:3])}")

    def _check_empty(self, store: Store) -> None:
        assert self.class_names is not None
        for part, rows in (("training", slice(self.training)), ("test", slice(self.training, None))):
            counts = torch.bincount(store.labels[rows], minlength=len(self.class_names))
            if empty := counts.eq(0).nonzero().flatten().tolist():
                raise ValueError(f"class {self.class_names[empty[0]]} has no {part} picture that can be read")

    def _measured(self, train: StoredPictures) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training pictures, measured once."""
        path = train.store.folder / "measured.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return found["mean"], found["std"]
        total, squares = (torch.zeros(self.kept.channels, dtype=torch.float64) for _ in range(2))
        for part in train.images.split(CHUNK):
            pixels = part.transpose(0, 1).flatten(1).double() / 255
            total += pixels.sum(1)
            squares += pixels.square().sum(1)
        count = train.images.numel() / self.kept.channels
        mean = total / count
        std = ((squares / count - mean.square()) * (count / (count - 1))).clamp_min(0).sqrt().clamp_min(1e-3)
        write_json(path, {"mean": mean.tolist(), "std": std.tolist()})
        return mean.tolist(), std.tolist()


class Folder(PictureFiles):
    """A user's own pictures: `path/train/CLASS/*.jpg` and `path/test/CLASS/*.jpg`, or `path/CLASS/*.jpg`.

    Args:
        path: of the folder.
        name: None is that of the folder.
        test_share: of each class's pictures, drawn for the test where there is one tree.
        split_seed: of that draw.
        **form: as in `PictureFiles`.
    """

    def __init__(
        self, path: str | None, name: str | None = None, test_share: float = 0.2, split_seed: int = 0, **form: Any
    ) -> None:
        if not path or not isinstance(path, str):
            raise ValueError("a data set of picture files needs the path of their folder: dataset.path=FOLDER")
        check_whole(split_seed=split_seed)
        check_positive(test_share=test_share)
        if test_share >= 1:
            raise ValueError(f"test_share must be below 1, not {test_share}")
        self.path, self.test_share, self.split_seed = Path(path).expanduser(), test_share, split_seed
        own = re.sub(r"[^\w .+=-]", "_", self.path.resolve().name).lstrip(" .+=-")
        super().__init__(name or own or "folder", **form)

    def listing(self) -> Listing:
        train, test = parts_of(self.path, self._split)
        if not (self.path / "test").is_dir():
            count = sum(map(len, test.values()))
            log.info(f"{self.name}: {count:,} pictures of {len(test)} classes were drawn for the test")
        return Listing(self.path, list(train), _sources(train), _sources(test))

    def _split(self, label: int, pictures: list[Path]) -> tuple[list[Path], list[Path]]:
        """Each class's pictures alone, so that more pictures of one class move none of another."""
        order = torch.randperm(len(pictures), generator=generator(self.split_seed, Stream.SPLIT, label)).tolist()
        count = max(1, round(self.test_share * len(pictures)))
        return [pictures[i] for i in sorted(order[count:])], [pictures[i] for i in sorted(order[:count])]


def _sources(classes: Classes) -> list[Source]:
    return [Source(path, label) for label, paths in enumerate(classes.values()) for path in paths]


def _shares(value: Any) -> list[float]:
    shares = value if isinstance(value, str | int | float) else list(value)
    if not isinstance(shares, list) or len(shares) != 2 or not all(isinstance(x, int | float) for x in shares):
        raise ValueError(f"random_resized_crop must be two shares of the area, such as [0.08,1.0], not {value}")
    if not 0 < shares[0] <= shares[1] <= 1:
        raise ValueError(f"random_resized_crop must be 0 < from <= to <= 1, not {shares}")
    return [float(x) for x in shares]
