"""Baseline images as distilled data: real images, cluster centroids, class means (Section S-1)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from rich import get_console
from rich.progress import track
from torch import Tensor

from dd_lightning.data import RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.objectives import Objective
from dd_lightning.sources.starts import class_labels, learned, real_images
from dd_lightning.system.checks import check_count
from dd_lightning.system.seeding import Stream, derive_seed, generator


@dataclass(frozen=True)
class Sets:
    """Sets of distilled data that come from one method, all of one shape.

    Attributes:
        members: the sets.
        keep: how many of them an evaluation keeps, the best on training pictures; None is all.
    """

    members: list[DistilledData]
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
        return replace(self, members=[replace(one, labels=objective.wanted(one.labels)) for one in self.members])


def random_real(
    data: RealData,
    steps: int = 10,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    sets: int = 10,
    keep: int | None = None,
    seed: int = 0,
) -> Sets:
    """Sets of random real training images. With `keep` they are the candidates of "optimized real images".

    Raises:
        ValueError: a count below 1, more sets to keep than there are, a learning rate that is not positive, or fewer
            real images of a class than asked for.
    """
    check_count(sets=sets)
    if keep is not None:
        check_count(keep=keep)
        if keep > sets:
            raise ValueError(f"keep={keep}, but there are only sets={sets}")
    labels = class_labels(data, steps, images_per_class)
    images = [real_images(data, labels, generator(seed, Stream.BASELINE, index)) for index in range(sets)]
    return Sets([DistilledData.create(x, labels, epochs, learning_rate) for x in images], keep)


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
    of_class = [data.preprocessing(data.train.images[data.train.labels == k]).cpu() for k in range(data.num_classes)]
    clusters = steps * images_per_class
    for label, pictures in enumerate(of_class):
        if len(pictures) < clusters:
            name = data.name_of(label)
            raise ValueError(f"class {name} has {len(pictures)} training images, too few for {clusters} clusters")
    members = []
    for index in track(range(sets), description="k-means", console=get_console(), transient=True):
        images = torch.empty_like(start.images)
        for label, pictures in enumerate(of_class):
            images[labels == label] = _centroids(pictures, clusters, derive_seed(seed, Stream.BASELINE, index, label))
        members.append(replace(start, images=images))
    return Sets(members)


def _centroids(pictures: Float[Tensor, "n c h w"], clusters: int, seed: int) -> Float[Tensor, "clusters c h w"]:
    from sklearn.cluster import KMeans

    method: Any = KMeans(clusters, n_init=1, random_state=seed % 2**32)  # type: ignore[arg-type]
    fitted = method.fit(pictures.flatten(1).numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(pictures.dtype).unflatten(1, pictures.shape[1:])


def average_real(
    data: RealData, steps: int = 10, epochs: int = 3, learning_rate: float | Sequence[float] = 0.02
) -> Sets:
    """The mean training image of each class, reused in every GD step.

    Raises:
        ValueError: a count below 1, or a learning rate that is not positive.
    """
    labels = class_labels(data, steps)
    means = [data.preprocessing(data.train.images[data.train.labels == k]).mean(0) for k in range(data.num_classes)]
    images = torch.stack(means).cpu().expand(steps, -1, -1, -1, -1).contiguous()
    return Sets([DistilledData.create(images, labels, epochs, learning_rate)])


def no_images(data: RealData) -> Sets:
    """Nothing, for networks that are tested as they are."""
    return Sets([])
