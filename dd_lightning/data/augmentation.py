"""Augmentation of whole batches on the device that holds them."""

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor


def random_crop(
    images: UInt8[Tensor, "batch c h w"], padding: int, generator: torch.Generator
) -> UInt8[Tensor, "batch c h w"]:
    """Reflect-pads by `padding` pixels and cuts each image at its own random place."""
    batch, _, height, width = images.shape
    padded = F.pad(images.float(), [padding] * 4, mode="reflect").to(images.dtype)
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator).to(images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    index = torch.arange(batch, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: UInt8[Tensor, "batch c h w"], generator: torch.Generator) -> UInt8[Tensor, "batch c h w"]:
    """Mirrors each image with probability ½."""
    mirror = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(mirror[:, None, None, None], images.flip(3), images)
