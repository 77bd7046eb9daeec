"""What networks predict for real pictures."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dd_lightning.networks.weights import Weights, predict

BATCH = 500  # pictures that are tested at a time


@dataclass(frozen=True)
class Predictions:
    """The classes that networks predict for real pictures; a table of true and predicted ones grows with their square.

    Attributes:
        labels: the true classes.
        classes: how many there are.
    """

    predicted: Int[Tensor, "*networks n"]
    labels: Int[Tensor, " n"]
    classes: int

    def accuracy(self, wanted: Int[Tensor, " n"] | None = None) -> Float[Tensor, "*networks"]:
        """The share of all pictures that is predicted as its class, or as the one that is `wanted`, in %."""
        right = self.predicted == (self.labels if wanted is None else wanted)
        return percent(right.sum(-1), right.new_tensor(len(self.labels), dtype=torch.long))

    def share(self, source: int, target: int) -> Float[Tensor, "*networks"]:
        """The share of the pictures of one class that is predicted as another, in %."""
        of_source = self.labels == source
        return percent(((self.predicted == target) & of_source).sum(-1), of_source.sum())

    def accuracy_of_classes(self) -> Float[Tensor, "*networks classes"]:
        """The share of each class's pictures that is predicted as that class, in %."""
        right = (self.predicted == self.labels).long()
        of_class = right.new_zeros(*right.shape[:-1], self.classes).index_add(-1, self.labels, right)
        return percent(of_class, torch.bincount(self.labels, minlength=self.classes))


def predictions(
    network: nn.Module,
    weights: Weights,
    images: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    preprocessing: Callable[[Tensor], Tensor],
    batch_size: int = BATCH,
) -> Predictions:
    """Predictions of the J networks for all pictures, in batches small enough that memory is used again.

    They are made where the labels are, to which pictures are moved batch by batch.
    """
    predicted, classes = [], 0
    with torch.no_grad():
        for pictures in images.split(batch_size):
            logits = predict(network, weights, preprocessing(pictures.to(labels.device)))
            predicted.append(logits.argmax(2))
            classes = logits.shape[2]
    return Predictions(torch.cat(predicted, dim=1), labels, classes)


def percent(part: Int[Tensor, "*networks"], whole: Int[Tensor, "*networks"]) -> Float[Tensor, "*networks"]:
    """`part` of `whole`, in %; 0 of nothing."""
    return 100 * part.double() / whole.clamp_min(1)
