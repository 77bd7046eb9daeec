"""Augmentation that gradients go through, of distilled and of real minibatches, in the normalised space.

Every function takes a generator, and the same draw gives the same result: an engine that computes a step again, or a
run that goes on, sees the same images.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dd_lightning.system.checks import check_choice, check_positive

Images = Float[Tensor, "batch c h w"]


class Augment(ABC):
    """A random function of images, differentiable in them.

    Attributes:
        siamese: whether distilled and real images of an outer step share one draw.
    """

    siamese = False

    @abstractmethod
    def __call__(self, images: Images, random: torch.Generator) -> Images: ...


class Unchanged(Augment):
    """No augmentation."""

    def __call__(self, images: Images, random: torch.Generator) -> Images:
        return images


class FlipRotate(Augment):
    """Of a whole minibatch one of two: each image mirrored with probability ½, or each rotated at random.

    Args:
        degrees: at most so far, either way.

    Raises:
        ValueError: degrees that are not positive.
    """

    def __init__(self, degrees: float = 15.0) -> None:
        check_positive(degrees=degrees)
        self.degrees = degrees

    def __call__(self, images: Images, random: torch.Generator) -> Images:
        flips = torch.rand((), generator=random) < 0.5
        draw = torch.rand(len(images), generator=random)
        return mirrored(images, draw < 0.5) if flips else rotated(images, (2 * draw - 1) * self.degrees)


class Siamese(Augment):
    """Differentiable siamese augmentation (Zhao & Bilen, 2021): one of several strategies, the same for all images.

    Args:
        strategies: of `STRATEGIES`.

    Raises:
        ValueError: an unknown strategy, or none.
    """

    siamese = True

    def __init__(self, strategies: Sequence[str]) -> None:
        for strategy in strategies:
            check_choice("strategy", strategy, STRATEGIES)
        if not strategies:
            raise ValueError(f"strategies must name at least one of {', '.join(STRATEGIES)}")
        self.strategies = list(strategies)

    def __call__(self, images: Images, random: torch.Generator) -> Images:
        strategy = self.strategies[int(torch.randint(len(self.strategies), (), generator=random))]
        return STRATEGIES[strategy](images, random)


def mirrored(images: Images, which: Tensor) -> Images:
    """The images of which `which` says so, mirrored."""
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(3), images)


def rotated(images: Images, degrees: Float[Tensor, " batch"]) -> Images:
    """Each image about its centre; what comes from outside is 0, the mean."""
    angles = degrees * (math.pi / 180)
    cos, sin = angles.cos(), angles.sin()
    rows = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return _warped(images, rows)


def _warped(images: Images, matrices: Float[Tensor, "batch 2 2"]) -> Images:
    """Each output pixel is read, bilinearly, where its matrix sends it; coordinates run from −1 to 1."""
    affine = F.pad(matrices.to(images.device, images.dtype), (0, 1))
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _uniform(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))


def _color(images: Images, random: torch.Generator) -> Images:
    images = images + _uniform(-0.5, 0.5, random)  # brightness
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * _uniform(0.0, 2.0, random)  # saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(0.5, 1.5, random)  # contrast


def _crop(images: Images, random: torch.Generator) -> Images:
    """Moved by up to an eighth of the picture, either way."""
    _, _, height, width = images.shape
    reach = [round(side / 8) for side in (height, width)]
    top, left = (int(torch.randint(2 * r + 1, (), generator=random)) for r in reach)
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    return padded[:, :, top : top + height, left : left + width]


def _cutout(images: Images, random: torch.Generator) -> Images:
    """Without a square of half the picture's side, whose centre is anywhere."""
    _, _, height, width = images.shape
    mask = torch.ones(height, width)
    row, column = (int(torch.randint(side + 1, (), generator=random)) for side in (height, width))
    top, left = max(row - height // 4, 0), max(column - width // 4, 0)
    mask[top : row + height // 4, left : column + width // 4] = 0
    return images * mask.to(images.device, images.dtype)


def _flip(images: Images, random: torch.Generator) -> Images:
    return images.flip(3) if torch.rand((), generator=random) < 0.5 else images


def _scale(images: Images, random: torch.Generator) -> Images:
    """Height and width each by 1/1.2 to 1.2."""
    factors = torch.tensor([_uniform(1 / 1.2, 1.2, random) for _ in range(2)])
    return _warped(images, torch.diag(factors).expand(len(images), -1, -1))


def _rotate(images: Images, random: torch.Generator) -> Images:
    return rotated(images, torch.full((len(images),), _uniform(-15.0, 15.0, random)))


STRATEGIES: dict[str, Callable[[Images, torch.Generator], Images]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


def augment_of(card: dict[str, Any]) -> Augment:
    """The augmentation that distilled data are to be used with, from their card; none by default.

    Raises:
        ValueError: the card names one that is not known, or settings that it does not have.
    """
    known: dict[str, type[Augment]] = {"none": Unchanged, "flip_rotate": FlipRotate, "dsa": Siamese}
    entry = card.get("augment", {"choice": "none"})
    try:
        return known[entry["choice"]](**{key: value for key, value in entry.items() if key not in ("choice", "target")})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the card names an unknown augmentation: {entry}") from error
