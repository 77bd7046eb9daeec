"""Distilled data that come with the package: files in its folder `gallery`, images and labels in 16 bits."""

from pathlib import Path

import torch
from torch import Tensor

GALLERY = Path(__file__).parents[1] / "gallery"
PREFIX = "gallery:"
NARROW = ("images", "soft_labels")  # the tensors that are stored in 16 bits


def entries() -> list[str]:
    """The names of all data in the gallery."""
    return sorted(path.stem for path in GALLERY.glob("*.safetensors"))


def located(path: Path | str) -> Path:
    """A path, or that of a gallery's entry.

    Raises:
        FileNotFoundError: there is no such entry; naming those that are.
    """
    if not str(path).startswith(PREFIX):
        return Path(path)
    name = str(path).removeprefix(PREFIX)
    if name not in entries():
        raise FileNotFoundError(f"the gallery has no {name!r}; it has {', '.join(entries())}")
    return GALLERY / f"{name}.safetensors"


def narrowed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with images and labels in 16 bits."""
    return {name: value.half() if name in NARROW else value for name, value in tensors.items()}


def widened(tensor: Tensor) -> Tensor:
    """In 32 bits, where it was stored in 16."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def whole(classes: Tensor) -> Tensor:
    """In 64 bits, in however many whole numbers were stored."""
    return classes.long() if classes.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else classes
