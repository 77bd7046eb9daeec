"""Distilled data as PyTorch's ordinary data sets, for loops that know nothing of distillation."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from dd_lightning.data.pictures import Preprocessing


class DistilledDataset(Dataset[tuple[Tensor, Tensor]]):
    """Distilled images and their labels, one after the other.

    Attributes:
        images: [n, c, h, w], as networks take them.
        labels: classes [n], or real numbers [n, classes]; `F.cross_entropy` takes both.
        learning_rates: of each epoch and step; of data in shuffled order a single one, for the card's inner optimizer.
        inner_steps: how many the data were made for.
        card: all else that is known of the data.
        preprocessing: makes of real pictures (uint8, [n, c, h, w]) what networks take: normalised, and whitened where
            the data are; None where the card does not say it.
    """

    def __init__(
        self,
        images: Float[Tensor, "step batch c h w"],
        labels: Tensor,
        learning_rates: Float[Tensor, "epoch step"],
        inner_steps: int,
        card: dict[str, Any],
        preprocessing: Preprocessing | None,
    ) -> None:
        self.images, self.labels = images.flatten(0, 1), labels.flatten(0, 1)
        self.learning_rates, self.inner_steps = learning_rates, inner_steps
        self.card, self.preprocessing = card, preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
