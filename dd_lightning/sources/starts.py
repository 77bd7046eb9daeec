"""Ways to obtain distilled data: noise or real images to start from, or a saved file."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_lightning.data import Preprocessing, RealData
from dd_lightning.distilled import DistilledData, softplus_inverse
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.seeding import Stream, generator


def class_labels(
    data: RealData, steps: int, images_per_class: int = 1, classes: Sequence[int] | None = None
) -> Int[Tensor, "step batch"]:
    """`images_per_class` images of each class in every GD step, in class order.

    Args:
        classes: those that have images; None is all.

    Raises:
        ValueError: a count below 1, or classes that are not different ones of the data set.
    """
    check_count(steps=steps, images_per_class=images_per_class)
    chosen = list(range(data.num_classes) if classes is None else classes)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(data.num_classes)):
        raise ValueError(f"classes must be different ones of 0 to {data.num_classes - 1}, not {chosen}")
    return torch.tensor(chosen).repeat(images_per_class).expand(steps, -1).contiguous()


def check_enough(data: RealData, labels: Int[Tensor, "step batch"]) -> None:
    """Raises a ValueError where there are fewer training images of a class than in `labels`."""
    there, asked = (torch.bincount(x.flatten().cpu(), minlength=data.num_classes) for x in (data.train.labels, labels))
    if lacking := (there < asked).nonzero().flatten().tolist():
        label = lacking[0]
        raise ValueError(
            f"class {data.name_of(label)} has {there[label]} training images, but {asked[label]} were asked for"
        )


def real_images(
    data: RealData, labels: Int[Tensor, "step batch"], random: torch.Generator, augmented: bool = False
) -> Float[Tensor, "step batch c h w"]:
    """Different random training images of the classes in `labels`.

    Args:
        augmented: as for training.

    Raises:
        ValueError: fewer real images of a class than asked for.
    """
    check_enough(data, labels)
    images = torch.empty((*labels.shape, *data.preprocessing.image_shape))
    for label in range(data.num_classes):
        members = (data.train.labels == label).nonzero().flatten().cpu()
        places = labels == label
        chosen = members[torch.randperm(len(members), generator=random)[: int(places.sum())]]
        pictures = data.augmented(chosen, random) if augmented else data.train[chosen].images
        images[places] = data.preprocessing(pictures).cpu()
    return images


def noise(
    data: RealData,
    steps: int = 1,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    std: float | None = 1.0,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> DistilledData:
    """Images drawn from N(0, std²) in the normalised space, in class order (Algorithm 1, line 1).

    Args:
        std: None divides each image by its L2 norm instead.
        classes: those that have images; None is all.

    Raises:
        ValueError: a count below 1, a learning rate or std that is not positive, or unknown classes.
    """
    if std is not None:
        check_positive(std=std)
    labels = class_labels(data, steps, images_per_class, classes)
    shape = (*labels.shape, *data.preprocessing.image_shape)
    images = torch.randn(shape, generator=generator(seed, Stream.DISTILLED))
    images = images / images.flatten(2).norm(dim=2)[..., None, None, None] if std is None else std * images
    return DistilledData.create(images, labels, epochs, learning_rate)


def real(
    data: RealData,
    steps: int = 1,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> DistilledData:
    """Random real training images of each class, in class order.

    Args:
        classes: those that have images; None is all.

    Raises:
        ValueError: a count below 1, a learning rate that is not positive, fewer real images of a class than asked, or
            unknown classes.
    """
    labels = class_labels(data, steps, images_per_class, classes)
    images = real_images(data, labels, generator(seed, Stream.DISTILLED))
    return DistilledData.create(images, labels, epochs, learning_rate)


def learned(
    data: RealData,
    path: str | None,
    learning_rate: float | None = None,
    soft_labels: bool = True,
    images_per_class: int | None = None,
) -> DistilledData:
    """Distilled data saved by an earlier run.

    Args:
        path: of the run's folder or of its `distilled.safetensors`.
        learning_rate: instead of those that were learned, such as for another inner optimizer.
        soft_labels: false uses the classes of the images, where labels were learned.
        images_per_class: of a set that was grown, the prefix of a stage.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no path was given, a rate that is not positive, a prefix that was never a stage, or the file is not
            distilled data of this data set's classes, image shape and whitening.
    """
    if not path:
        raise ValueError("say which distilled data: distilled.path=RUN_OR_FILE")
    distilled = DistilledData.load(path)
    _check_form(distilled, data, path)
    _check_whitening(distilled, data.preprocessing, path)
    if images_per_class is not None:
        distilled = distilled.prefix(images_per_class)
    if learning_rate is not None:
        check_positive(learning_rate=learning_rate)
        rates = torch.full_like(distilled.raw_learning_rates, learning_rate)
        distilled = replace(distilled, raw_learning_rates=softplus_inverse(rates))
    return distilled if soft_labels else replace(distilled, soft_labels=None)


def _check_form(distilled: DistilledData, data: RealData, path: str) -> None:
    """Refuses distilled data of other classes, or of images of another shape.

    Raises:
        ValueError: saying which.
    """
    if distilled.num_classes != data.num_classes:
        raise ValueError(
            f"{path} was distilled for {distilled.num_classes} classes; "
            f"data set {data.dataset.name} has {data.num_classes}"
        )
    found, wanted = (tuple(distilled.images.shape[2:]), data.preprocessing.image_shape)
    if found != wanted:
        raise ValueError(
            f"{path} holds images of {'×'.join(map(str, found))}; "
            f"data set {data.dataset.name} has {'×'.join(map(str, wanted))}"
        )


def _check_whitening(distilled: DistilledData, used: Preprocessing, path: str) -> None:
    """Refuses pictures that are whitened where the images are not, otherwise than they are, or not at all.

    Raises:
        ValueError: saying which.
    """
    if distilled.whitening is None and used.whitening is None:
        return
    if used.whitening is None:
        raise ValueError(f"{path} was distilled from whitened pictures, and is of no use on others; use whitening=zca")
    if distilled.whitening is None:
        raise ValueError(f"{path} was distilled from pictures that were not whitened; use whitening=none")
    normalised = {name: distilled.card.get("preprocessing", {}).get(name) for name in ("mean", "std")}
    if normalised != {"mean": used.mean, "std": used.std}:
        raise ValueError(
            f"{path} has a whitening for pictures normalised by mean {normalised['mean']} and std {normalised['std']}, "
            f"not by {used.mean} and {used.std}"
        )
    own, given = (w.matrix.cpu() for w in (distilled.whitening, used.whitening))
    if not torch.allclose(own, given, rtol=1e-2, atol=1e-3 * float(own.abs().max())):
        raise ValueError(f"{path} was distilled from pictures with another whitening than this data set's")
