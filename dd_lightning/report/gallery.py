"""The distilled data that come with the package, for the page: a picture, and how each was made."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from dd_lightning.distilled import DistilledData
from dd_lightning.report.tables import number
from dd_lightning.system.gallery import PREFIX, entries

COLUMNS, IMAGES = 10, 50


@dataclass(frozen=True)
class Entry:
    """One set of the gallery.

    Attributes:
        png: its images.
    """

    name: str
    words: str
    accuracy: str
    made: dict[str, Any]
    png: bytes


def gallery() -> list[Entry]:
    """All of them."""
    return [entry(name, DistilledData.load(PREFIX + name)) for name in entries()]


def entry(name: str, data: DistilledData) -> Entry:
    card = data.card
    test = card["accuracy"]
    labels = "hard" if data.soft_labels is None else "learned"
    dataset, network, init = (card[group]["choice"] for group in ("dataset", "network", "init"))
    words = (
        f"{data.labels.numel()} images with {labels} labels ({data.stored_numbers:,} stored numbers) for {dataset}, "
        f"network {network}, {init} initial weights"
    )
    spread = test["accuracy_std"] if test["networks"] > 1 else None
    return Entry(name, words, number(test["accuracy_mean"], spread), card["gallery"], grid(data.images.flatten(0, 1)))


def grid(images: Tensor) -> bytes:
    """The first images side by side, each stretched to three standard deviations about its mean."""
    images = images[:IMAGES]
    mean, std = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
    visible = ((images - mean) / (6 * std) + 0.5).clamp(0, 1)
    pixels = (255 * make_grid(visible, nrow=COLUMNS, padding=2, pad_value=1.0)).byte().permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
