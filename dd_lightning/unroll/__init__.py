"""The inner loop, Eq. (9), as a differentiable function of the distilled data. One interface, several engines."""

from dd_lightning.unroll.higher import HigherUnroll
from dd_lightning.unroll.interface import Step, Unroll
from dd_lightning.unroll.optimizers import Adam, GradientDescent, InnerOptimizer, Momentum
from dd_lightning.unroll.recompute import RecomputeUnroll
from dd_lightning.unroll.stored import StoredUnroll

__all__ = [
    "Adam",
    "GradientDescent",
    "HigherUnroll",
    "InnerOptimizer",
    "Momentum",
    "RecomputeUnroll",
    "Step",
    "StoredUnroll",
    "Unroll",
]
