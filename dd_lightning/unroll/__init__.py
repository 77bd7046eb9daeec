"""The inner loop, Eq. (9), as a differentiable function of the distilled data. One interface, several engines."""

from dd_lightning.unroll.functional import FunctionalUnroll
from dd_lightning.unroll.higher import HigherUnroll
from dd_lightning.unroll.interface import Step, Unroll

__all__ = ["FunctionalUnroll", "HigherUnroll", "Step", "Unroll"]
