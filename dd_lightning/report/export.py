"""Distilled data for other people's code: PNG files by class, `.npz`, `.pt`, and a text that says how to use them."""

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dd_lightning.data import LABELS_FILE
from dd_lightning.distilled import OTHERS, DistilledData
from dd_lightning.system.atomic import atomic_path, write_bytes
from dd_lightning.system.words import counted


def export(distilled: DistilledData, folder: Path) -> None:
    """Writes `distilled.npz`, `distilled.pt`, `images/CLASS/NUMBER.png` with a `labels.csv`, and `README.txt`.

    Images and labels in the two files are as the data have them; PNG files have 256 values, and none beyond black and
    white.

    Raises:
        ValueError: the data do not say how pictures were normalised, or the folder holds an export already.
    """
    preprocessing = distilled.preprocessing
    if (folder / "images").exists():
        raise ValueError(f"{folder} holds pictures already; name another folder")
    data = distilled.detach().dataset()
    tensors = {"images": data.images, "labels": data.labels, "classes": distilled.labels.flatten()}
    tensors |= {"learning_rates": distilled.learning_rates}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    write_bytes(folder / "distilled.npz", buffer.getvalue())
    initial = {} if distilled.initial_weights is None else {"initial_weights": distilled.initial_weights}
    buffer = io.BytesIO()
    torch.save({**tensors, **initial}, buffer)
    write_bytes(folder / "distilled.pt", buffer.getvalue())
    intensities = preprocessing.inverse(data.images)
    pixels = (255 * intensities).round().clamp(0, 255).to(torch.uint8)
    partial = folder / ".images"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
    write_pictures(pixels, tensors["classes"], distilled.soft_labels, partial)
    lost = (pixels.float() / 255 - intensities).abs()
    outside = 100 * ((intensities < 0) | (intensities > 1)).double().mean().item()
    losses = f"{outside:.1f} % of the pixels lay beyond black or white, the farthest by {lost.max().item():.2f}"
    write_bytes(folder / "README.txt", (explained(distilled, losses) + named_classes(distilled.card)).encode())
    partial.rename(folder / "images")  # last: what holds pictures is whole


def write_pictures(pixels: Tensor, classes: Tensor, soft_labels: Tensor | None, folder: Path) -> None:
    """A PNG file for each image, in a folder for its class, and a table of all in their order."""
    soft = None if soft_labels is None else soft_labels.detach().flatten(0, 1).tolist()
    rows: list[list[Any]] = []
    for index, (image, label) in enumerate(zip(pixels, classes.tolist(), strict=True)):
        name = f"{label}/{index:05d}.png"
        picture = Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
        with atomic_path(folder / name) as temporary:
            picture.save(temporary)
        rows.append([name, label, *([] if soft is None else soft[index])])
    text = io.StringIO()
    heads = ["file", "class", *([] if soft is None else [f"label_{k}" for k in range(len(soft[0]))])]
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    write_bytes(folder / LABELS_FILE, text.getvalue().encode())


TEXT = """Distilled data: {count} images of {channels}×{size}×{size} pixels in {classes} classes{dataset},
{numbers} stored numbers.

FILES
  distilled.npz, distilled.pt   images [n, c, h, w], labels ({labels}),
                                classes [n], learning_rates [epoch, step]{initial_file}
  images/CLASS/NUMBER.png       the images as pictures, with images/labels.csv; {losses}

WHAT A LOOP NEEDS
  inputs         normalised: (pixel / 255 − {mean}) / {std}{whitened}; the images in the two files are that already
  loss           mean cross entropy with the labels
  order          {order}
  optimizer      {optimizer}
  augmentation   {augment}
{initial}
MADE FOR
  network        {network}
  accuracy       {accuracy}
"""


def explained(distilled: DistilledData, losses: str) -> str:
    """What a plain training loop needs to know."""
    card, form = distilled.card, distilled.preprocessing.as_dict()
    steps, batch = distilled.labels.shape
    rates = distilled.learning_rates
    in_order = distilled.order.as_dict()  # older cards describe the paper's in words
    if in_order["choice"] == "shuffled":
        order = f"any, in {distilled.inner_steps} steps; each with {in_order['images_per_class'] or 'all'}"
        order += f" images of each class, at a rate of {rates.flatten()[0]:.4g}"
    else:
        order = f"{counted(steps, 'step')} of {counted(batch, 'image')} in the order of the file, {len(rates)} times,"
        order += " each step at its own rate (learning_rates)"
    accuracy = card.get("accuracy", {})
    tested = "not tested"
    if accuracy.get("accuracy_mean") is not None:
        networks = f", {counted(accuracy['networks'], 'network')}" if accuracy.get("networks") else ""
        tested = f"{accuracy['accuracy_mean']:.2f} % on the test set{networks}"
    return TEXT.format(
        count=steps * batch,
        channels=form["channels"],
        size=form["image_size"],
        classes=distilled.num_classes,
        dataset=f" for {card['dataset']['name']}" if "name" in card.get("dataset", {}) else "",
        numbers=f"{distilled.stored_numbers:,}",
        labels="classes [n]" if distilled.soft_labels is None else "a number for each class [n, classes]",
        initial_file="" if distilled.initial_weights is None else ",\n" + 32 * " " + "in the .pt: initial_weights",
        losses=losses,
        mean=form["mean"],
        std=form["std"],
        whitened="" if distilled.whitening is None else ", then whitened (DistilledData.preprocessing)",
        order=order,
        optimizer=settings(card.get("inner", {"choice": "gd"})),
        augment=settings(card.get("augment", {"choice": "none"})),
        initial="" if distilled.initial_weights is None else f"  weights        start from {start_of(card)}\n",
        network=settings(card.get("network", {"choice": "not known"})),
        accuracy=tested,
    )


def named_classes(card: dict[str, Any]) -> str:
    """The names of the classes, where they have names."""
    names = card.get("class_names") or []
    return "\nCLASSES\n" * bool(names) + "".join(f"  {label:<15d}{name}\n" for label, name in enumerate(names))


def start_of(card: dict[str, Any]) -> str:
    """The weights that data for one network start from."""
    if OTHERS in card:
        return f"{card[OTHERS]['of']}; of its last layer from initial_weights"
    return "initial_weights: the data are for this one network"


def settings(entry: dict[str, Any]) -> str:
    """A choice of a card with its settings, in one line."""
    rest = [f"{name} {value}" for name, value in entry.items() if name not in ("choice", "target")]
    return ", ".join([str(entry.get("choice")), *rest])
