"""Ways to obtain distilled data: noise or real images to start from, or a saved file."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_lightning.data import RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.seeding import Stream, generator


def class_labels(data: RealData, steps: int, images_per_class: int = 1) -> Int[Tensor, "step batch"]:
    """`images_per_class` images of each class in every GD step, in class order.

    Raises:
        ValueError: a count below 1.
    """
    check_count(steps=steps, images_per_class=images_per_class)
    return torch.arange(data.num_classes).repeat(images_per_class).expand(steps, -1).contiguous()


def real_images(
    data: RealData, labels: Int[Tensor, "step batch"], random: torch.Generator
) -> Float[Tensor, "step batch c h w"]:
    """Different random training images of the classes in `labels`.

    Raises:
        ValueError: fewer real images of a class than asked for.
    """
    images = torch.empty((*labels.shape, *data.preprocessing.image_shape))
    for label in range(data.num_classes):
        members = (data.train.labels == label).nonzero().flatten()
        places = labels == label
        if len(members) < places.sum():
            raise ValueError(
                f"class {label} has {len(members)} training images, but {int(places.sum())} were asked for"
            )
        chosen = members[torch.randperm(len(members), generator=random)[: int(places.sum())]]
        images[places] = data.preprocessing(data.train.images[chosen])
    return images


def noise(
    data: RealData,
    steps: int = 1,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    std: float = 1.0,
    seed: int = 0,
) -> DistilledData:
    """Images drawn from N(0, std²) in the normalised space, in class order (Algorithm 1, line 1).

    Raises:
        ValueError: a count below 1, or a learning rate or std that is not positive.
    """
    check_positive(std=std)
    labels = class_labels(data, steps, images_per_class)
    shape = (*labels.shape, *data.preprocessing.image_shape)
    images = std * torch.randn(shape, generator=generator(seed, Stream.DISTILLED))
    return DistilledData.create(images, labels, epochs, learning_rate)


def real(
    data: RealData,
    steps: int = 1,
    epochs: int = 3,
    images_per_class: int = 1,
    learning_rate: float | Sequence[float] = 0.02,
    seed: int = 0,
) -> DistilledData:
    """Random real training images of each class, in class order.

    Raises:
        ValueError: a count below 1, a learning rate that is not positive, or fewer real images of a class than asked.
    """
    labels = class_labels(data, steps, images_per_class)
    images = real_images(data, labels, generator(seed, Stream.DISTILLED))
    return DistilledData.create(images, labels, epochs, learning_rate)


def learned(data: RealData, path: str | None) -> DistilledData:
    """Distilled data saved by an earlier run.

    Args:
        path: of the run's folder or of its `distilled.safetensors`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no path was given, or the file is not distilled data of this data set's classes and image shape.
    """
    if not path:
        raise ValueError("say which distilled data: distilled.path=RUN_OR_FILE")
    distilled = DistilledData.load(path)
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
    return distilled
