"""Random crops of pictures of any size, each scaled to a square, as networks for photographs are trained on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
ATTEMPTS = 10  # to find one that lies in the picture


class Cut(NamedTuple):
    """A part of a stored picture."""

    row: int
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool


def random_boxes(sizes: Int[Tensor, "n 2"], scale: Sequence[float], random: torch.Generator) -> Int[Tensor, "n 4"]:
    """Top, left, height and width of a random part of each picture, by torchvision's `RandomResizedCrop`.

    The area is a uniform share of the picture's, the logarithm of the ratio of width to height uniform, the place
    uniform among those in the picture. Where ten draws do not fit, it is the largest part in the middle of a ratio
    that is allowed.

    Args:
        sizes: height and width of each picture.
        scale: of the area, from and to.
    """
    n, low, high = len(sizes), math.log(RATIO[0]), math.log(RATIO[1])
    draws = torch.rand((n, 2 * ATTEMPTS + 2), generator=random, dtype=torch.float64)
    height, width = sizes.double().unbind(1)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :ATTEMPTS])
    ratio = (low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS]).exp()
    found_height, found_width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (found_width <= width[:, None]) & (found_height <= height[:, None])
    fits &= (found_width >= 1) & (found_height >= 1)
    first = fits.long().argmax(1, keepdim=True)
    middle_height = torch.minimum(height, (width / RATIO[0]).round())
    middle_width = torch.minimum(width, (height * RATIO[1]).round())
    any_fits = fits.any(1)
    box_height = torch.where(any_fits, found_height.gather(1, first)[:, 0], middle_height)
    box_width = torch.where(any_fits, found_width.gather(1, first)[:, 0], middle_width)
    place = torch.where(any_fits[:, None], draws[:, -2:], 0.5)
    top = torch.where(any_fits, (place[:, 0] * (height - box_height + 1)).floor(), ((height - box_height) / 2).floor())
    left = torch.where(any_fits, (place[:, 1] * (width - box_width + 1)).floor(), ((width - box_width) / 2).floor())
    return torch.stack([top, left, box_height, box_width], 1).long()


def cut_out(picture: UInt8[Tensor, "h w c"], cut: Cut, image_size: int) -> UInt8[Tensor, "c s s"]:
    """The part of the picture, scaled (bicubic) and mirrored."""
    top, left, height, width = cut.box
    part = picture[top : top + height, left : left + width].permute(2, 0, 1)
    size = [image_size, image_size]
    scaled = transforms.resize(part, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return scaled.flip(2) if cut.flip else scaled
