"""The arithmetic of an outer step, and how much of it this machine could do."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.training.cost import BareStep, Clock, Engine
from dd_lightning.unroll import HigherUnroll


class Product:
    """A large float32 product of square matrices: as fast as this machine multiplies, with the threads in use."""

    def __init__(self, device: torch.device) -> None:
        size = 2048 if device.type == "cpu" else 8192
        self.flops = 2 * size**3
        self._factors = torch.randn(2, size, size, device=device)
        self._device = device

    def run(self) -> dict[str, float]:
        """Seconds of one."""
        clock = Clock(self._device)
        torch.mm(*self._factors)
        clock.lap("product")
        return clock.laps


def operations(network: str, per_step: int, steps: int, batch_size: int) -> int:
    """Floating point operations of an outer step, as `higher` takes it; they are linear in both J and T."""
    two, three = counted(network, 1, 2, batch_size), counted(network, 1, 3, batch_size)
    return per_step * (two + (steps - 2) * (three - two))


@cache
def counted(network: str, per_step: int, steps: int, batch_size: int) -> int:
    """The same, counted on the way."""
    step = BareStep(network, per_step, steps, batch_size, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step.run(Engine(HigherUnroll(), OuterLoss(Classification())))
    return counter.get_total_flops()
