"""What networks predict for real pictures, counted."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dd_lightning.networks.weights import Weights, predict

BATCH = 500  # pictures that are tested at a time

Confusion = Int[Tensor, "*networks true predicted"]  # pictures of each true class that are predicted as each class


def confusion(
    network: nn.Module,
    weights: Weights,
    images: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    preprocessing: Callable[[Tensor], Tensor],
    batch_size: int = BATCH,
) -> Int[Tensor, "init true predicted"]:
    """Predictions of the J networks for all pictures, in batches small enough that memory is used again.

    They are made where the labels are, to which pictures are moved batch by batch.
    """
    counts = []
    with torch.no_grad():
        for pictures, of_class in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = predict(network, weights, preprocessing(pictures.to(of_class.device)))
            networks, _, classes = logits.shape
            cells = of_class * classes + logits.argmax(2)
            cells += torch.arange(networks, device=cells.device)[:, None] * classes**2
            counts.append(torch.bincount(cells.flatten(), minlength=networks * classes**2))
    return torch.stack(counts).sum(0).view(networks, classes, classes)


def accuracy(confusion: Confusion) -> Float[Tensor, "*networks"]:
    """The share of all pictures that is predicted as its true class, in %."""
    return percent(confusion.diagonal(dim1=-2, dim2=-1).sum(-1), confusion.sum((-2, -1)))


def percent(part: Int[Tensor, "*networks"], whole: Int[Tensor, "*networks"]) -> Float[Tensor, "*networks"]:
    """`part` of `whole`, in %; 0 of nothing."""
    return 100 * part.double() / whole.clamp_min(1)
