"""The stream of real minibatches x_t (Algorithm 1, line 3)."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dd_lightning.data.augmentation import random_crop, random_flip
from dd_lightning.data.crops import Cut, random_boxes
from dd_lightning.data.cutting import cut_pictures, cut_steps
from dd_lightning.data.datasets import ImageDataset
from dd_lightning.data.pictures import Pictures
from dd_lightning.data.store import StoredPictures
from dd_lightning.data.whitening import ZCA
from dd_lightning.system.checks import check_count
from dd_lightning.system.seeding import Stream, generator

Batch = tuple[Float[Tensor, "batch c h w"], Int[Tensor, " batch"]]


class RealData(pl.LightningDataModule):
    """Real data, held on the device as uint8 and cut there into normalised, augmented minibatches.

    Photographs are cut by worker processes, and do not lie on the device.

    A minibatch depends on `(seed, step)` alone: every device sees the same one, and a resumed run goes on with the
    batch it would have seen. Every epoch runs through all training pictures in a new order, its last batch kept.

    Args:
        dataset: the pictures and their form.
        batch_size: real images per outer step.
        seed: of the order and the augmentation.
        zca: whitens all pictures by those of the training part; None leaves them as they are.

    Attributes:
        apart: whether cut pictures wait in the CPU's memory, to go to the device in pieces.

    Attributes (after `setup`): `train`, `validation`, `test` (`Pictures`), `preprocessing`, `num_classes`,
    `class_names` (None where classes have numbers alone), and `content`, a hash of the pictures and labels.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int = 1024, seed: int = 0, zca: ZCA | None = None) -> None:
        super().__init__()
        check_count(batch_size=batch_size)
        self.dataset, self.batch_size, self.seed, self.zca = dataset, batch_size, seed, zca
        self.apart, self._ready = False, False
        self._epoch_order: tuple[int, Tensor] | None = None

    def prepare_data(self) -> None:
        self.dataset.prepare()

    def setup(self, stage: str | None = None) -> None:
        if self._ready:
            return
        training, self.test, self.preprocessing, self.num_classes = self.dataset.load()
        self.class_names = self.dataset.class_names
        self.content = self.dataset.content or digest(training, self.test)
        self.train, self.validation = self.dataset.divided(training)
        empty = torch.bincount(self.train.labels, minlength=self.num_classes).eq(0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"data set {self.dataset.name}: class {self.name_of(empty[0])} has no training picture left beside the "
                f"validation part; lower dataset.validation={self.dataset.validation} (0: the training part)"
            )
        if not self.dataset.validation:
            self.validation = self.train
        if self.zca is not None:
            normalised, settings = self.preprocessing.normalised, self.preprocessing.as_dict()
            self.preprocessing = replace(
                self.preprocessing, whitening=self.zca(self.train.images, normalised, settings)
            )
        self._ready = True

    def to(self, device: torch.device | str) -> None:
        """Moves all parts to the device on which minibatches are wanted."""
        self.train, self.validation, self.test = (p.to(device) for p in (self.train, self.validation, self.test))
        self.preprocessing = self.preprocessing.to(device)

    def keep(self, chosen: Int[Tensor, " n"]) -> None:
        """Leaves these training pictures alone."""
        self.train, self._epoch_order = self.train[chosen], None

    def name_of(self, label: int) -> str:
        """Of a class, for people."""
        return str(label) if self.class_names is None else self.class_names[label]

    def reseeded(self, seed: int) -> "RealData":
        """The same pictures, shared, in another order."""
        other = copy.copy(self)
        other.seed, other._epoch_order = seed, None
        return other

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.train) // self.batch_size)

    def minibatch(self, step: int) -> Batch:
        """x_t and its labels, for outer step t = `step`, from 0."""
        if self.dataset.random_resized_crop is not None:
            return self.finished(cut_pictures(self.stored.store, self.cuts(step)), step)
        return self.finished(self.augment(self.train[self.chosen(step)].images, step), step)

    def augmented(self, chosen: Int[Tensor, " n"], random: torch.Generator) -> UInt8[Tensor, "n c h w"]:
        """These training pictures, changed as an outer step would change them."""
        if self.dataset.random_resized_crop is not None:
            return cut_pictures(self.stored.store, self._cuts(chosen, random))
        return self._augment(self.train[chosen].images, random)

    def chosen(self, step: int) -> Int[Tensor, " batch"]:
        """The training pictures of outer step `step`."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self.order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def finished(self, images: UInt8[Tensor, "batch c h w"], step: int) -> Batch:
        """Normalised on the device (or `apart`), with their labels."""
        labels = self.train.labels
        images = self.preprocessing(images if self.apart else images.to(labels.device))
        return images, labels[self.chosen(step).to(labels.device)]

    @property
    def stored(self) -> StoredPictures:
        """The training pictures, of which random parts are cut."""
        assert isinstance(self.train, StoredPictures)
        return self.train

    def cuts(self, step: int) -> list[Cut]:
        """The random parts of training pictures that outer step `step` sees."""
        return self._cuts(self.chosen(step), generator(self.seed, Stream.AUGMENTATION, step))

    def _cuts(self, chosen: Int[Tensor, " n"], random: torch.Generator) -> list[Cut]:
        rows = self.stored.rows[chosen]
        assert self.dataset.random_resized_crop is not None
        boxes = random_boxes(self.stored.store.sizes[rows], self.dataset.random_resized_crop, random)
        mirrored = torch.rand(len(rows), generator=random).lt(0.5 if self.dataset.flip else 0)
        together = zip(rows.tolist(), boxes.tolist(), mirrored.tolist(), strict=True)
        return [Cut(row, (top, left, height, width), flip) for row, (top, left, height, width), flip in together]

    def minibatches(self, start: int, stop: int) -> Iterator[Batch]:
        """Those of outer steps `start` to `stop`, crops by worker processes."""
        steps = range(start, stop)
        if self.dataset.random_resized_crop is None:
            yield from map(self.minibatch, steps)
        else:
            made = cut_steps(self.stored.store, self.cuts, steps, self.dataset.workers)
            yield from map(self.finished, made, steps)

    def augment(self, images: UInt8[Tensor, "batch c h w"], step: int) -> UInt8[Tensor, "batch c h w"]:
        """The pictures as outer step `step` sees them."""
        return self._augment(images, generator(self.seed, Stream.AUGMENTATION, step))

    def _augment(self, images: UInt8[Tensor, "n c h w"], random: torch.Generator) -> UInt8[Tensor, "n c h w"]:
        if self.dataset.crop_padding:
            images = random_crop(images, self.dataset.crop_padding, random)
        if self.dataset.flip:
            images = random_flip(images, random)
        return images

    def order(self, epoch: int) -> Int[Tensor, " n"]:
        """In which an epoch runs through the training pictures."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = torch.randperm(len(self.train), generator=generator(self.seed, Stream.MINIBATCH, epoch))
            self._epoch_order = epoch, order
        return self._epoch_order[1]

    def train_dataloader(self) -> "Minibatches":
        assert self.trainer is not None
        self.to(self.trainer.strategy.root_device)
        return Minibatches(self, self.trainer.global_step, self.trainer.max_steps)


class OwnMinibatches:
    """The minibatches of J streams of the same pictures, cut at once: for each what its own `minibatch` gives.

    Args:
        streams: made by `RealData.reseeded`.
    """

    def __init__(self, streams: Sequence[RealData]) -> None:
        self.streams, self._data = streams, streams[0]
        self._orders: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> tuple[Float[Tensor, "init batch c h w"], Int[Tensor, "init batch"]]:
        data, train = self._data, self._data.train
        if data.dataset.random_resized_crop is not None:
            images, labels = zip(*(stream.minibatch(step) for stream in self.streams), strict=True)
            return torch.stack(images), torch.stack(labels)
        epoch, position = divmod(step, data.batches_per_epoch)
        if self._orders is None or self._orders[0] != epoch:
            orders = torch.stack([stream.order(epoch) for stream in self.streams])
            self._orders = epoch, orders.to(train.images.device)
        chosen = self._orders[1][:, position * data.batch_size : (position + 1) * data.batch_size]
        images = train.images.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
        if data.dataset.augments:
            images = torch.stack([s.augment(own, step) for s, own in zip(self.streams, images, strict=True)])
        return data.preprocessing(images.to(train.labels.device)), train.labels[chosen]


class Minibatches:
    """The minibatches of outer steps `start` to `stop`: a whole run is one Lightning epoch of `stop` batches."""

    def __init__(self, data: RealData, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[Batch]:
        return self.data.minibatches(self.start, self.stop)

    # A minibatch follows from the outer step alone, which Lightning restores itself: there is no more state, but
    # Lightning asks for these two before it trusts that a loader resumes in the middle of an epoch.
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass


def digest(*parts: Pictures) -> str:
    """A hash of pictures and labels."""
    content = hashlib.blake2b(digest_size=8)
    for part in parts:
        for tensor in (part.images, part.labels):
            content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()
