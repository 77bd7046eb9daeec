"""Norms that need no statistics of a training set, by name, with affine weights."""

from collections.abc import Callable

from torch import nn

from dd_lightning.system.checks import check_choice, check_count

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda width: nn.GroupNorm(width, width),
    "group": lambda width: nn.GroupNorm(4, width),
    "layer": lambda width: nn.GroupNorm(1, width),
    "none": lambda width: nn.Identity(),
}


def check_normed(width: int, norm: str) -> None:
    """Refuses an unknown norm, or a width of which four groups cannot be made.

    Raises:
        ValueError: saying which.
    """
    check_count(width=width)
    check_choice("norm", norm, NORMS)
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, not {width}")
