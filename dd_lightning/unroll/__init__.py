"""The inner loop, Eq. (9), as a differentiable function of the distilled data. One interface, several engines."""

from dd_lightning.unroll.adjoint import AdjointUnroll
from dd_lightning.unroll.capture import OuterStep
from dd_lightning.unroll.choice import first_gradient, real_gradient
from dd_lightning.unroll.functional import FunctionalUnroll
from dd_lightning.unroll.higher import HigherUnroll
from dd_lightning.unroll.interface import Unroll
from dd_lightning.unroll.layered import PlainGradient
from dd_lightning.unroll.optimizers import Adam, GradientDescent, InnerOptimizer, Momentum, State, inner_optimizer
from dd_lightning.unroll.order import Draws, FixedOrder, Order, ShuffledOrder, Step, Used, order_of
from dd_lightning.unroll.pool import Pool
from dd_lightning.unroll.window import POOL, Window

__all__ = [
    "POOL",
    "Adam",
    "AdjointUnroll",
    "Draws",
    "FixedOrder",
    "FunctionalUnroll",
    "GradientDescent",
    "HigherUnroll",
    "InnerOptimizer",
    "Momentum",
    "Order",
    "OuterStep",
    "PlainGradient",
    "Pool",
    "ShuffledOrder",
    "State",
    "Step",
    "Unroll",
    "Used",
    "Window",
    "first_gradient",
    "inner_optimizer",
    "order_of",
    "real_gradient",
]
