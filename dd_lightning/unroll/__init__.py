"""The inner loop, Eq. (9), as a differentiable function of the distilled data. One interface, several engines."""

from dd_lightning.unroll.adjoint import AdjointUnroll
from dd_lightning.unroll.capture import OuterStep
from dd_lightning.unroll.choice import first_gradient
from dd_lightning.unroll.functional import FunctionalUnroll
from dd_lightning.unroll.higher import HigherUnroll
from dd_lightning.unroll.interface import Step, Unroll
from dd_lightning.unroll.optimizers import Adam, GradientDescent, InnerOptimizer, Momentum, inner_optimizer

__all__ = [
    "Adam",
    "AdjointUnroll",
    "FunctionalUnroll",
    "GradientDescent",
    "HigherUnroll",
    "InnerOptimizer",
    "Momentum",
    "OuterStep",
    "Step",
    "Unroll",
    "first_gradient",
    "inner_optimizer",
]
