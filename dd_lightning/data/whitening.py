"""ZCA whitening: pictures whose pixels are hardly correlated, as many published distilled data want them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dd_lightning.system.checks import check_positive
from dd_lightning.system.locking import locked
from dd_lightning.system.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

FORMAT = "dd_lightning.whitening/1"
CHUNK = 4096  # pictures at once
Normalise = Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n c h w"]]


@dataclass(frozen=True, eq=False)
class Whitening:
    """z = W (u − μ), u a normalised picture less its own mean and divided by its norm.

    Attributes:
        mean: μ, of the training pictures' u.
        matrix: W = (C + r)^(−½), symmetric; C is their covariance, r the ridge.
    """

    mean: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]

    def __call__(self, images: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
        mean, matrix = (one.to(images) for one in (self.mean, self.matrix))
        return ((standardised(images) - mean) @ matrix).view(images.shape)

    def inverse(self, images: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
        """The pictures less their own mean and divided by their own standard deviation, which whitening forgets."""
        u = images.flatten(-3) @ self._inverse.to(images) + self.mean.to(images)
        return (u * u.shape[-1] ** 0.5).view(images.shape)

    @cached_property
    def _inverse(self) -> Float[Tensor, "d d"]:
        return torch.linalg.inv(self.matrix.double())

    def to(self, device: torch.device | str) -> "Whitening":
        return Whitening(self.mean.to(device), self.matrix.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """To be stored."""
        return {"mean": self.mean, "matrix": self.matrix}


def standardised(images: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch d"]:
    """Each picture less its own mean and divided by its norm; one of a single colour is 0."""
    flat = images.flatten(-3)
    flat = flat - flat.mean(-1, keepdim=True)
    return flat / flat.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)


def fitted(pictures: UInt8[Tensor, "n c h w"], normalise: Normalise, ridge: float) -> Whitening:
    """The whitening of these pictures, in float64.

    Args:
        normalise: the pictures before they are whitened.
        ridge: r, as a multiple of the mean eigenvalue of C.
    """
    size = pictures[0].numel()
    total, products = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for part in pictures.split(CHUNK):
        u = standardised(normalise(part).double())
        total += u.sum(0)
        products.addmm_(u.T, u)
    mean = total / len(pictures)
    values, vectors = torch.linalg.eigh(products / len(pictures) - mean.outer(mean))
    values = values.clamp_min(0)
    scale = (values + ridge * values.mean()).rsqrt()
    return Whitening(mean, (vectors * scale) @ vectors.T)


class ZCA:
    """Fits a whitening to training pictures once, and keeps it in a folder.

    Args:
        ridge: as a multiple of the mean eigenvalue.
        folder: where whitenings are kept, by what they are of.

    Raises:
        ValueError: a ridge that is not positive.
    """

    def __init__(self, folder: str, ridge: float = 0.1) -> None:
        check_positive(ridge=ridge)
        self.folder, self.ridge = Path(folder).expanduser(), ridge

    def __call__(
        self, pictures: UInt8[Tensor, "n c h w"], normalise: Normalise, settings: Mapping[str, Any]
    ) -> Whitening:
        """The whitening of these pictures.

        Args:
            settings: of `normalise`.
        """
        key = hashlib.blake2b(pictures.contiguous().numpy().data, digest_size=8)
        key.update(json.dumps({**settings, "ridge": self.ridge}, sort_keys=True).encode())
        path, size = self.folder / f"zca_{key.hexdigest()}.safetensors", pictures[0].numel()
        if len(pictures) < size:
            log.warning(
                f"whitening: {len(pictures):,} pictures for {size:,} numbers each; where they say nothing, the ridge "
                f"of {self.ridge} decides alone"
            )
        with locked(self.folder / f".{path.stem}.lock", wait=True):  # of several processes one fits
            if not path.is_file():
                log.info(f"whitening: {size:,} eigenvectors of {len(pictures):,} training pictures, kept at {path}")
                found = fitted(pictures, normalise, self.ridge)
                write_tensors(path, {n: t.float() for n, t in found.tensors().items()}, {"format": FORMAT})
        return whitening_of(read_tensors(path, FORMAT, "whitening")[1], size)


def whitening_of(tensors: Mapping[str, Tensor], size: int) -> Whitening:
    """A whitening from what was stored.

    Args:
        size: of a picture.

    Raises:
        ValueError: the tensors are not those of a whitening of such pictures.
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"mean": [size], "matrix": [size, size]}:
        raise ValueError(f"the whitening {shapes} is not of images of {size} numbers")
    if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
        raise ValueError("the whitening holds values that are not finite numbers")
    return Whitening(tensors["mean"], tensors["matrix"])
