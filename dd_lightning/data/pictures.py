"""Pictures in memory, and the form in which networks see them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dd_lightning.data.whitening import Whitening


@dataclass(frozen=True)
class Preprocessing:
    """How stored pixels become a network's input: (pixel / 255 − mean) / std, channel by channel; then whitened.

    Attributes:
        whitening: of the normalised pictures; None leaves them as they are.
    """

    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    whitening: Whitening | None = field(default=None, compare=False)

    @classmethod
    def of_card(cls, card: Mapping[str, Any], whitening: Whitening | None) -> Self:
        """That of the pictures which distilled data are like.

        Raises:
            ValueError: the card does not say it.
        """
        if "preprocessing" not in card:
            raise ValueError("the card of these data does not say how pictures were normalised (preprocessing)")
        entry = card["preprocessing"]
        return cls(**{name: entry[name] for name in ("channels", "image_size", "mean", "std")}, whitening=whitening)

    def __call__(self, images: UInt8[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
        images = self.normalised(images)
        return images if self.whitening is None else self.whitening(images)

    def normalised(self, images: UInt8[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
        """Before they are whitened."""
        mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    def inverse(self, images: Float[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
        """Intensities, 0 to 1 where the pixels are those of a picture; of whitened ones about so."""
        images = images if self.whitening is None else self.whitening.inverse(images)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return images * std + mean

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def as_dict(self) -> dict[str, Any]:
        """For a card; a whitening is stored beside it."""
        return {name: getattr(self, name) for name in ("channels", "image_size", "mean", "std")}

    def to(self, device: torch.device | str) -> "Preprocessing":
        return self if self.whitening is None else replace(self, whitening=self.whitening.to(device))


@dataclass(frozen=True)
class Pictures:
    """One part of a data set, in its final size and number of channels.

    The labels lie on the device that computes. The images do, too, unless there are too many of them.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Int[Tensor, " m"] | slice) -> "Pictures":
        """Some of them."""
        return Pictures(self.images[_at(chosen, self.images)], self.labels[_at(chosen, self.labels)])

    def to(self, device: torch.device | str) -> "Pictures":
        return Pictures(self.images.to(device), self.labels.to(device))


def _at(chosen: Any, where: Tensor) -> Any:
    return chosen.to(where.device) if isinstance(chosen, Tensor) else chosen
