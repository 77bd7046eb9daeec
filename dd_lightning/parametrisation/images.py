"""Images: pixels, or combinations of bases that all images share (Deng & Russakovsky, 2022)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.system.checks import check_count, check_not_negative

Raw = Mapping[str, Tensor]


class Images(ABC):
    """A map from what is learned to the images of the inner loop.

    Attributes:
        names: of the tensors that are learned, and stored; the first, [step, batch, …], is of single images.
        weight_decay: of those that have one of their own, in the outer optimizer.
    """

    names: tuple[str, ...]
    weight_decay: Mapping[str, float] = {}

    @abstractmethod
    def raw(self, images: Float[Tensor, "step batch c h w"], random: torch.Generator) -> dict[str, Tensor]:
        """What is learned, at the start.

        Args:
            images: to start from.

        Raises:
            ValueError: images of this size cannot be made.
        """

    @abstractmethod
    def images(self, raw: Raw) -> Float[Tensor, "step batch c h w"]:
        """x̃, differentiable in what is learned.

        Raises:
            ValueError: the tensors do not fit together.
        """

    @abstractmethod
    def numbers(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """How many are stored for all images together, and for each image more.

        Args:
            shape: channels, height and width of an image.
        """

    def as_dict(self) -> dict[str, Any]:
        """For a card, which says how what is stored becomes images."""
        choice = next(name for name, kind in PARAMETRISATIONS.items() if isinstance(self, kind))
        return {"choice": choice, "target": f"dd_lightning.parametrisation.{type(self).__name__}"}


@dataclass(frozen=True)
class Pixels(Images):
    """The paper's: every pixel of every image."""

    names = ("images",)

    def raw(self, images: Float[Tensor, "step batch c h w"], random: torch.Generator) -> dict[str, Tensor]:
        return {"images": images}

    def images(self, raw: Raw) -> Float[Tensor, "step batch c h w"]:
        return raw["images"]

    def numbers(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        channels, height, width = shape
        return 0, channels * height * width


@dataclass(frozen=True)
class Bases(Images):
    """x̃ᵢ = Σₖ Aᵢₖ bₖ: a few bases bₖ that all images of all classes share, and coefficients A of each image.

    Both start Xavier-uniform, as the matrices [basis, number] and [image, basis] that they are.

    Attributes:
        count: K.
        scale: bases are stored with so many times fewer rows and columns, and enlarged bilinearly.
        coefficient_decay: weight decay of A, the L2 penalty of the coefficients.

    Raises:
        ValueError: a count or scale below 1, or a negative decay.
    """

    count: int = 16
    scale: int = 2
    coefficient_decay: float = 1e-4

    names = ("coefficients", "bases")

    def __post_init__(self) -> None:
        check_count(count=self.count, scale=self.scale)
        check_not_negative(coefficient_decay=self.coefficient_decay)

    @property
    def weight_decay(self) -> Mapping[str, float]:  # type: ignore[override]
        return {"coefficients": self.coefficient_decay}

    def raw(self, images: Float[Tensor, "step batch c h w"], random: torch.Generator) -> dict[str, Tensor]:
        steps, batch, channels, height, width = images.shape
        if height % self.scale or width % self.scale:
            raise ValueError(f"scale={self.scale} does not divide the {height}×{width} pixels of an image")
        small = (self.count, channels, height // self.scale, width // self.scale)
        coefficients, bases = (images.new_empty(shape) for shape in ((steps * batch, self.count), small))
        nn.init.xavier_uniform_(coefficients, generator=random)
        nn.init.xavier_uniform_(bases.view(self.count, -1), generator=random)
        return {"coefficients": coefficients.view(steps, batch, self.count), "bases": bases}

    def images(self, raw: Raw) -> Float[Tensor, "step batch c h w"]:
        coefficients, bases = (raw[name] for name in self.names)
        if coefficients.ndim != 3 or bases.ndim != 4 or coefficients.shape[2] != len(bases):
            raise ValueError(f"coefficients {list(coefficients.shape)} and bases {list(bases.shape)} do not fit")
        return torch.einsum("sbk,kchw->sbchw", coefficients, self.enlarged(bases))

    def enlarged(self, bases: Float[Tensor, "k c h/scale w/scale"]) -> Float[Tensor, "k c h w"]:
        """The bases in the size of the images."""
        if self.scale == 1:
            return bases
        return F.interpolate(bases, scale_factor=float(self.scale), mode="bilinear", align_corners=False)

    def numbers(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        channels, height, width = shape
        return self.count * channels * (height // self.scale) * (width // self.scale), self.count

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | asdict(self)


PARAMETRISATIONS: dict[str, type[Images]] = {"pixels": Pixels, "bases": Bases}


def images_of(card: Mapping[str, Any]) -> Images:
    """How what is stored becomes images, from the card; pixels by default.

    Raises:
        ValueError: the card names a parametrisation that is not known, or settings that it does not have.
    """
    entry = card.get("images", {"choice": "pixels"})
    try:
        kind = PARAMETRISATIONS[entry["choice"]]
        return kind(**{key: value for key, value in entry.items() if key not in ("choice", "target")})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the card names an unknown parametrisation of images: {entry}") from error
