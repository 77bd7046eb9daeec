"""Distilled sets of other people."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dd_lightning.data import RealData, read_sets
from dd_lightning.distilled import DistilledData
from dd_lightning.sources.sets import Sets
from dd_lightning.system.checks import check_choice

VALUES = ("unit", "normalised")


def tensors(
    data: RealData,
    path: str | None,
    values: str | None = None,
    labels_path: str | None = None,
    learning_rate: float = 0.01,
    soft_labels: bool = True,
) -> Sets:
    """Images and labels from a file or from folders of PNG files, as one or several sets.

    Args:
        path, labels_path: as in `read_sets`.
        values: of the images' numbers: `unit`, from 0 to 1, which are then normalised (and whitened) as the data set's
            pictures are; or `normalised` as those are already. PNG files and uint8 need none.
        learning_rate: for a use that asks the data for one.
        soft_labels: false uses the most likely classes, where labels are soft.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: values were not said or cannot be right, or what is in the file does not fit the data set.
    """
    if not path:
        raise ValueError("say which images and labels: distilled.path=FILE_OR_FOLDER")
    found = read_sets(Path(path), None if labels_path is None else Path(labels_path))
    members = []
    for images, labels in found:
        if tuple(images.shape[1:]) != data.preprocessing.image_shape:
            shapes = ["×".join(map(str, shape)) for shape in (images.shape[1:], data.preprocessing.image_shape)]
            raise ValueError(f"{path} holds images of {shapes[0]}; data set {data.dataset.name} has {shapes[1]}")
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        if classes.max() >= data.num_classes or (labels.ndim == 2 and labels.shape[1] != data.num_classes):
            raise ValueError(f"{path} has labels of other classes than the {data.num_classes} of {data.dataset.name}")
        one = DistilledData.create(network_inputs(data, images, values, path)[None], classes[None], 1, learning_rate)
        soft = labels[None] if labels.ndim == 2 and soft_labels else None
        members.append(replace(one, soft_labels=soft, card={"preprocessing": data.preprocessing.as_dict()}))
    if len({one.images.shape for one in members}) > 1:
        raise ValueError(f"{path} holds sets of different sizes")
    return Sets(members)


def network_inputs(data: RealData, images: Tensor, values: str | None, path: str) -> Tensor:
    """The images as networks take them."""
    if images.dtype == torch.uint8:
        return data.preprocessing(images)
    if values is None:
        raise ValueError("say what the images' numbers are: distilled.values=unit (0 to 1) or normalised")
    check_choice("values", values, VALUES)
    low, high = images.min().item(), images.max().item()
    if values == "normalised":
        return images
    if low < -0.05 or high > 1.05:
        raise ValueError(f"values=unit, but the images of {path} run from {low:.2f} to {high:.2f}, not from 0 to 1")
    return data.preprocessing(images * 255)
