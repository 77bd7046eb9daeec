"""What is learned: how many images, what they and their labels are made of, and what that costs to keep."""

import logging
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from dd_lightning.commands.errors import named
from dd_lightning.data import RealData
from dd_lightning.distilled import OTHERS, DistilledData
from dd_lightning.init import Init, OneNetwork
from dd_lightning.parametrisation import Budget, Images, Labels, Pixels
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.words import counted
from dd_lightning.training import Growing
from dd_lightning.unroll import POOL, ShuffledOrder, Window

log = logging.getLogger(__name__)


def settle_images(cfg: DictConfig, data: RealData, images: Images, labels: Labels, growing: Growing | None) -> Budget:
    """Sets how many images of each class there are, where a budget or the stages of a growing set decide that.

    Raises:
        ValueError: they do not hold an image of each class, or both are given, or there is nothing to set.
    """
    budget, distilled = Budget(cfg.budget.images_per_class, cfg.budget.numbers), cfg.distilled
    if not budget and growing is None:
        return budget
    if "images_per_class" not in distilled or "path" in distilled:
        raise ValueError("how many images there are is settled already; start from distilled=noise or distilled=real")
    if growing is not None and not isinstance(images, Pixels):
        raise ValueError("bases are shared by all images, and would move under earlier stages: images=pixels")
    if growing is not None and budget:
        raise ValueError("the stages decide how many images there are; leave budget out")
    if growing is not None:
        growing.length(cfg.trainer.max_steps)
        found = growing.stages[-1]
    else:
        classes = data.num_classes if distilled.get("classes") is None else len(distilled.classes)
        shape, counts = data.preprocessing.image_shape, (classes, data.num_classes, distilled.steps, distilled.epochs)
        found = budget.fitting(images, labels, shape, *counts)
    with open_dict(distilled):
        distilled.images_per_class = found
    return budget


def learned(
    cfg: DictConfig, data: RealData, start: DistilledData, images: Images, labels: Labels
) -> tuple[DistilledData, Tensor | None]:
    """The distilled data as they are at the start, made of what is learned, and what is learned of the labels."""
    with named("images"):
        if start.raw_images is None or start.parametrisation != images:
            raw = images.raw(start.images, generator(cfg.seed, Stream.DISTILLED, 1))
            own = None if isinstance(images, Pixels) else raw
            start = replace(start, images=images.images(raw), parametrisation=images, raw_images=own)
    with named("labels"):
        raw_labels = build_raw_labels(labels, start, data.num_classes)
    distilled = replace(start, soft_labels=None if raw_labels is None else labels.labels(raw_labels))
    parts = [f"{tensor.numel():,} of {name}" for name, tensor in distilled.learned_images.items()]
    if raw_labels is not None:
        parts.append(f"{raw_labels.numel():,} of labels")
    parts.append(counted(distilled.raw_learning_rates.numel(), "learning rate"))
    count = distilled.images.shape[0] * distilled.images.shape[1]
    log.info(f"distilling {distilled.stored_numbers:,} numbers into {count:,} images: {', '.join(parts)}")
    return distilled, raw_labels


def card_of(distilled: DistilledData, budget: Budget) -> dict[str, Any]:
    """What the card says of what is learned."""
    card = {"images": distilled.parametrisation.as_dict(), "stored_numbers": distilled.stored_numbers}
    if not budget:
        return card
    return card | {"budget": {"images_per_class": budget.images_per_class, "numbers": budget.numbers}}


def check_window(window: Window, distilled: DistilledData, per_step: int) -> None:
    """Refuses a window that the inner steps do not hold, or a pool that wants another order or has too few networks.

    Raises:
        ValueError: saying why.
    """
    window.check(distilled.inner_steps)
    if window.start == POOL and not isinstance(distilled.order, ShuffledOrder):
        raise ValueError("networks of a pool are of different ages and need data in any order: order=shuffled")
    if window.start == POOL and window.networks < per_step:
        raise ValueError(f"networks={window.networks} in the pool, but init.per_step={per_step} are taken from it")


def build_raw_labels(labels: Labels, distilled: DistilledData, num_classes: int) -> Tensor | None:
    """What is learned of the labels, at the start.

    Raises:
        ValueError: a class has no image, and labels are not learned.
    """
    raw = labels.raw(distilled.labels, num_classes, distilled.soft_labels)
    if raw is None and len(distilled.labels.unique()) < num_classes:
        raise ValueError(f"without an image of each of the {num_classes} classes, labels=learned is needed")
    return raw


def made_for(init: Init, network: nn.Module, distilled: DistilledData) -> DistilledData:
    """The data with the initial weights they are made for, where these are of one network."""
    weights, others = init.kept(network) if isinstance(init, OneNetwork) else (None, {})
    return replace(distilled, card=distilled.card | ({OTHERS: others} if others else {}), initial_weights=weights)
