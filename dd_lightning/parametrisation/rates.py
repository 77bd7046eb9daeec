"""Learning rates η̃ > 0, of which the raw value is learned: η̃ = softplus (Section S-1)."""

import torch
from torch import Tensor


def softplus_inverse(x: Tensor) -> Tensor:
    """The raw value whose softplus is `x` > 0: log(eˣ − 1) = x + log(1 − e⁻ˣ)."""
    return x + torch.log(-torch.expm1(-x))
