"""A picture of distilled data like the paper's Figures 2 and 3."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dd_lightning.data import Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.system.atomic import atomic_path

COLUMNS, IMAGES = 20, 200  # more would take minutes to draw, and could not be seen
LETTERS = 14  # of a class's name above its image


def figure(
    distilled: DistilledData, preprocessing: Preprocessing, title: str = "", names: Sequence[str] | None = None
) -> Figure:
    """A row per GD step (and image per class), a column per class; at left the learning rates of all epochs.

    Many classes take several rows a step. Of many images the first few hundred are drawn. Learned labels stand above
    their images: the two classes with the largest numbers.

    Args:
        names: of the classes; None numbers them.
    """
    called = [str(k) if names is None else _short(names[k]) for k in range(distilled.num_classes)]
    steps, batch = distilled.images.shape[:2]
    drawn = distilled.images.detach()[: max(IMAGES // batch, 1), :IMAGES]
    if drawn.shape[:2] != (steps, batch):
        title = f"{title} (the first {drawn.shape[0] * drawn.shape[1]} of {steps * batch} images)".lstrip()
    images = preprocessing.inverse(drawn.cpu().float()).permute(0, 1, 3, 4, 2).numpy()
    rates, soft = distilled.learning_rates.detach().cpu(), distilled.soft_labels
    steps, batch = images.shape[:2]
    columns = min(batch, distilled.num_classes, COLUMNS)
    rows_per_step = -(-batch // columns)
    rows = steps * rows_per_step
    fig = Figure(figsize=(1.6 + 0.9 * columns, 0.6 + 0.95 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(fig)
    axes: Any = fig.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.axis("off")
    for step in range(steps):
        for index in range(batch):
            axis = axes[step * rows_per_step + index // columns, index % columns]
            axis.imshow(_visible(images[step, index]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if soft is not None:
                axis.set_title(_label(soft[step, index], called), fontsize=6, parse_math=False)
            elif (step == 0 and index < columns) or distilled.num_classes > columns:
                label, size = int(distilled.labels[step, index]), 10 if names is None else 7
                axis.set_title(called[label], fontsize=size, parse_math=False)
        _tell_rates(axes[step * rows_per_step, 0], rates[:, step].tolist(), f"step {step + 1}\n" * (steps > 1))
    fig.suptitle(title, fontsize=11)
    return fig


def bases_figure(bases: Float[Tensor, "k c h w"], preprocessing: Preprocessing, title: str = "") -> Figure:
    """What images are combined of, in the size of the images."""
    images = preprocessing.inverse(bases.detach().cpu().float()).permute(0, 2, 3, 1).numpy()
    columns = min(len(images), COLUMNS // 2)
    rows = -(-len(images) // columns)
    fig = Figure(figsize=(0.4 + 0.9 * columns, 0.6 + 0.95 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(fig)
    axes: Any = fig.subplots(rows, columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        axis.axis("off")
        if index < len(images):
            axis.imshow(_visible(images[index]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    fig.suptitle(title, fontsize=11)
    return fig


def draw_bases(bases: Float[Tensor, "k c h w"], preprocessing: Preprocessing, title: str, path: Path) -> None:
    """Writes `bases_figure` as a picture file."""
    with atomic_path(path) as temporary:
        bases_figure(bases, preprocessing, title).savefig(temporary)


def draw(
    distilled: DistilledData,
    preprocessing: Preprocessing,
    title: str,
    path: Path,
    names: Sequence[str] | None = None,
) -> None:
    """Writes `figure` as a picture file."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that the font lacks
        figure(distilled, preprocessing, title, names).savefig(temporary)


def _tell_rates(left: Any, rates: Sequence[float], title: str) -> None:
    text = title + "\n".join(f"η = {rate:.3g}" for rate in rates)
    left.text(-0.15, 0.5, text, transform=left.transAxes, ha="right", va="center", fontsize=8)


def _label(label: Tensor, called: Sequence[str]) -> str:
    values, classes = label.detach().topk(2)
    return "  ".join(f"{called[k]}: {value:.2f}" for k, value in zip(classes.tolist(), values.tolist(), strict=True))


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def _visible(image: np.ndarray) -> np.ndarray:
    # Pixels are not clipped while they are learned: stretch each image to three standard deviations about its mean.
    spread = max(3 * float(image.std()), 1e-6)
    return np.clip((image - image.mean()) / (2 * spread) + 0.5, 0, 1)
