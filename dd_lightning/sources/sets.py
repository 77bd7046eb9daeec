"""Baseline images as distilled data: real images, cluster centroids, class means (Section S-1)."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from rich import get_console
from rich.progress import track
from torch import Tensor

from dd_lightning.data import Batch, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.objectives import Objective
from dd_lightning.sources.starts import check_enough, class_labels, learned, real_images
from dd_lightning.system.checks import check_bool, check_count
from dd_lightning.system.seeding import Stream, derive_seed, generator

PIECE = 256  # pictures that are real numbers at once


class Each(Sequence[DistilledData]):
    """Sets that are made when they are looked at, anew each time: memory holds one.

    Args:
        make: a set from a member; such that it can be pickled.
        members: numbers of sets, or sets that are changed.
    """

    def __init__(self, make: Callable[[Any], DistilledData], members: Sequence[Any]) -> None:
        self.make, self.members = make, members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: Any) -> Any:
        members = self.members[index]
        return Each(self.make, members) if isinstance(index, slice) else self.make(members)

    def __iter__(self) -> Iterator[DistilledData]:
        return map(self.make, self.members)


@dataclass(frozen=True)
class Sets:
    """Sets of distilled data that come from one method, all of one shape.

    Attributes:
        members: the sets.
        keep: how many of them an evaluation keeps, the best on training pictures; None is all.
    """

    members: Sequence[DistilledData]
    keep: int | None = None

    @property
    def digest(self) -> str:
        """Names the content of all sets."""
        found = hashlib.sha256()
        for one in self.members:
            for tensor in (one.images, one.labels, one.soft_labels, one.raw_learning_rates):
                found.update(b"" if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def relabelled(self, objective: Objective) -> "Sets":
        """The same images with the labels of the objective: those that poisoning modifies (Section 4.2)."""
        return replace(self, members=Each(partial(_relabelled, objective), self.members))

    def used(self, **how: Any) -> "Sets":
        """The same images with another order, augmentation or whitening."""
        return replace(self, members=Each(partial(_used, how), self.members))


def _relabelled(objective: Objective, one: DistilledData) -> DistilledData:
    return replace(one, labels=objective.wanted(one.labels))


def _used(how: dict[str, Any], one: DistilledData) -> DistilledData:
    return replace(one, **how)


def random_real(
    data: RealData,
    steps: int = 10,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    sets: int = 10,
    keep: int | None = None,
    augmented: bool = False,
    seed: int = 0,
) -> Sets:
    """Sets of random real training images. With `keep` they are the candidates of "optimized real images".

    Args:
        augmented: as they are for training.

    Raises:
        ValueError: a count below 1, more sets to keep than there are, a learning rate that is not positive, or fewer
            real images of a class than asked for.
    """
    check_count(sets=sets)
    check_bool(augmented=augmented)
    if keep is not None:
        check_count(keep=keep)
        if keep > sets:
            raise ValueError(f"keep={keep}, but there are only sets={sets}")
    labels = class_labels(data, steps, images_per_class)
    check_enough(data, labels)
    blank = torch.empty((steps, 0))
    start = DistilledData.create(blank, labels, epochs, learning_rate)  # checks the settings before the work
    return Sets(Each(partial(_random_set, data, start, augmented, seed), range(sets)), keep)


def _random_set(data: RealData, start: DistilledData, augmented: bool, seed: int, index: int) -> DistilledData:
    random = generator(seed, Stream.BASELINE, index)
    return replace(start, images=real_images(data, start.labels, random, augmented))


def random_subsets(data: RealData, path: str | None, images_per_class: int = 1, sets: int = 5, seed: int = 0) -> Sets:
    """Random images of each class from distilled data that an earlier run saved.

    Raises:
        ValueError: a count below 1, fewer images of a class than asked for, or what `learned` refuses.
    """
    check_count(images_per_class=images_per_class, sets=sets)
    whole = learned(data, path)
    if images_per_class > int(whole.places.max()):
        raise ValueError(f"images_per_class={images_per_class}, but no class has more than {int(whole.places.max())}")
    members = []
    for index in range(sets):
        order = torch.randperm(whole.labels.shape[1], generator=generator(seed, Stream.BASELINE, index))
        members.append(whole.chosen(order).first(images_per_class))
    return Sets(members)


def kmeans(
    data: RealData,
    steps: int = 10,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    sets: int = 10,
    seed: int = 0,
) -> Sets:
    """The centroids of k-means on each class's training images, one for each image of the class.

    Raises:
        ValueError: a count below 1, a learning rate that is not positive, or too few real images of a class.
    """
    check_count(sets=sets)
    labels = class_labels(data, steps, images_per_class)
    blank = torch.empty((*labels.shape, *data.preprocessing.image_shape))
    start = DistilledData.create(blank, labels, epochs, learning_rate)  # checks the settings before the work
    clusters = steps * images_per_class
    for label, count in enumerate(torch.bincount(data.train.labels, minlength=data.num_classes).tolist()):
        if count < clusters:
            name = data.name_of(label)
            raise ValueError(f"class {name} has {count} training images, too few for {clusters} clusters")
    members = [replace(start, images=torch.empty_like(start.images)) for _ in range(sets)]
    # Class by class: of all pictures, memory holds those of one as real numbers.
    for label in track(range(data.num_classes), description="k-means", console=get_console(), transient=True):
        pictures = data.preprocessing(data.train[data.train.labels == label].images).cpu()
        for index, one in enumerate(members):
            own = derive_seed(seed, Stream.BASELINE, index, label)
            one.images[labels == label] = _centroids(pictures, clusters, own)
    return Sets(members)


def _centroids(pictures: Float[Tensor, "n c h w"], clusters: int, seed: int) -> Float[Tensor, "clusters c h w"]:
    from sklearn.cluster import KMeans

    method: Any = KMeans(clusters, n_init=1, random_state=seed % 2**32)  # type: ignore[arg-type]
    fitted = method.fit(pictures.flatten(1).numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(pictures.dtype).unflatten(1, pictures.shape[1:])


def average_real(
    data: RealData,
    steps: int = 10,
    epochs: int = 3,
    learning_rate: float | Sequence[float] = 0.02,
    augmented: bool = False,
) -> Sets:
    """The mean training image of each class, reused in every GD step.

    Args:
        augmented: as they are for training, in one epoch.

    Raises:
        ValueError: a count below 1, or a learning rate that is not positive.
    """
    labels = class_labels(data, steps)
    check_bool(augmented=augmented)
    total = torch.zeros((data.num_classes, *data.preprocessing.image_shape), dtype=torch.float64)
    for pictures, of_pictures in data.minibatches(0, data.batches_per_epoch) if augmented else _in_pieces(data):
        for label in of_pictures.unique().tolist():
            total[label] += pictures[of_pictures == label].sum(0, dtype=torch.float64).cpu()
    count = torch.bincount(data.train.labels, minlength=data.num_classes).cpu()
    images = (total / count[:, None, None, None]).float().expand(steps, -1, -1, -1, -1).contiguous()
    return Sets([DistilledData.create(images, labels, epochs, learning_rate)])


def _in_pieces(data: RealData) -> Iterator[Batch]:
    """All training pictures, as they are."""
    for start in range(0, len(data.train), PIECE):
        part = data.train[start : start + PIECE]
        yield data.preprocessing(part.images.to(part.labels.device)), part.labels


def no_images(data: RealData) -> Sets:
    """Nothing, for networks that are tested as they are."""
    return Sets([])
