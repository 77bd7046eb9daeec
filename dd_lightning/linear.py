"""The linear case of Section 3.3: how few distilled data suffice for linear regression in one GD step.

Real data are d [N, D] and t [N], distilled data d̃ [M, D] and t̃ [M]; θ is a vector of D weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Matrix = Float[Tensor, "m d"]
Vector = Float[Tensor, " m"]
Theta = Float[Tensor, " d"]


@dataclass(frozen=True)
class LinearData:
    """Inputs and targets, distilled or real."""

    inputs: Matrix
    targets: Vector

    def loss(self, theta: Theta) -> Float[Tensor, ""]:
        """ℓ = ‖dθ − t‖² / 2N (Eq. 5)."""
        return (self.inputs @ theta - self.targets).square().sum() / (2 * len(self.targets))


def random_data(count: int, dimension: int, seed: int = 0) -> LinearData:
    """Real data with independent feature columns of decreasing size, and noisy targets, in double precision."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, dimension, generator=random, dtype=torch.float64)
    inputs = inputs * torch.linspace(2, 0.5, dimension, dtype=torch.float64)
    theta = torch.randn(dimension, generator=random, dtype=torch.float64)
    noise = torch.randn(count, generator=random, dtype=torch.float64)
    return LinearData(inputs, inputs @ theta + 0.5 * noise)


def unrolled_step(theta_0: Theta, distilled: LinearData, learning_rate: float) -> Theta:
    """θ₁ = θ₀ − η̃ ∇ℓ(x̃, θ₀), by automatic differentiation."""
    theta = theta_0.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(distilled.loss(theta), theta)
    return theta_0 - learning_rate * gradient


def closed_step(theta_0: Theta, distilled: LinearData, learning_rate: float) -> Theta:
    """θ₁ = (I − η̃/M d̃ᵀd̃) θ₀ + η̃/M d̃ᵀt̃ (Eq. 6)."""
    contraction, shift = _affine(distilled, learning_rate)
    return contraction @ theta_0 + shift


def _affine(distilled: LinearData, learning_rate: float) -> tuple[Matrix, Theta]:
    scale = learning_rate / len(distilled.targets)
    d = distilled.inputs
    identity = torch.eye(d.shape[1], dtype=d.dtype)
    return identity - scale * d.T @ d, scale * d.T @ distilled.targets


def minimiser(real: LinearData) -> Theta:
    """θ*, the global minimum: dᵀdθ* = dᵀt."""
    return torch.linalg.lstsq(real.inputs, real.targets).solution


def exact(real: LinearData) -> tuple[LinearData, float]:
    """M = D distilled data and their learning rate that reach θ* from any θ₀: d̃ = N·I, t̃ = N·θ*, η̃ = D/N²."""
    count, dimension = real.inputs.shape
    inputs = count * torch.eye(dimension, dtype=real.inputs.dtype)
    return LinearData(inputs, count * minimiser(real)), dimension / count**2


def expected_excess(real: LinearData, distilled: LinearData, learning_rate: float) -> Float[Tensor, ""]:
    """E ℓ(x, θ₁) − ℓ(x, θ*) over θ₀ ~ N(0, I) (Eq. 4), in closed form.

    θ₁ − θ* = Aθ₀ + c with A = I − η̃/M d̃ᵀd̃ and c = η̃/M d̃ᵀt̃ − θ*, so that it is ½ (tr AᵀHA + cᵀHc) with H = dᵀd/N.
    """
    contraction, shift = _affine(distilled, learning_rate)
    hessian = real.inputs.T @ real.inputs / len(real.targets)
    offset = shift - minimiser(real)
    return 0.5 * (torch.trace(contraction.T @ hessian @ contraction) + offset @ hessian @ offset)


def lower_bound(real: LinearData, distilled_count: int) -> float:
    """What no M distilled data can fall below: half the sum of all but the M largest eigenvalues of H.

    H^½d̃ᵀd̃ has rank M at most, and tr AᵀHA is its squared distance from H^½, up to a factor (Eckart and Young, 1936).
    """
    hessian = real.inputs.T @ real.inputs / len(real.targets)
    eigenvalues = torch.linalg.eigvalsh(hessian).flip(0)
    return 0.5 * eigenvalues[distilled_count:].sum().item()


def distil(real: LinearData, distilled_count: int, iterations: int, seed: int = 0) -> LinearData:
    """The M distilled data with the lowest expected loss that L-BFGS finds, for a learning rate of M."""
    random = torch.Generator().manual_seed(seed)
    dimension = real.inputs.shape[1]
    inputs = torch.randn(distilled_count, dimension, generator=random, dtype=torch.float64) / dimension**0.5
    inputs.requires_grad_()
    targets = torch.zeros(distilled_count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [inputs, targets], max_iter=iterations, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        excess = expected_excess(real, LinearData(inputs, targets), distilled_count)
        excess.backward()
        return float(excess.detach())

    optimizer.step(closure)
    return LinearData(inputs.detach(), targets.detach())


@dataclass(frozen=True)
class Reached:
    """What M distilled data reach: expected loss above the global minimum, by optimisation, and its lower bound."""

    distilled_count: int
    excess: float
    lower_bound: float


def reach(real: LinearData, counts: range, iterations: int, restarts: int, seed: int = 0) -> Iterator[Reached]:
    """The best of several optimisations for every M."""
    for count in counts:
        found = [
            expected_excess(real, distil(real, count, iterations, seed + i), count).item() for i in range(restarts)
        ]
        yield Reached(count, min(found), lower_bound(real, count))
