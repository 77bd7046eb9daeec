"""Inner optimizers as pure functions: (θ, ∇ℓ, state, η̃) in, (θ, state) out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dd_lightning.networks import Weights, unstack
from dd_lightning.system.checks import check_betas, check_positive

State = dict[str, Tensor]  # tensors of the optimizer, beside the weights; of many networks stacked as these are
COUNTER = "step"  # of the inner steps that each network took, in a state
LONG = 2**18  # products that are summed in one go: of more, as AlexNet's layers have, a sum in float32 loses digits
Before = tuple[Weights, Weights, State]  # θ, ∇ℓ and the optimizer's state before a step


class Reversed(NamedTuple):
    """Adjoints before a step, from those after it.

    Attributes:
        theta: of the weights, by the update alone.
        gradient: of ∇ℓ, divided by `scale`.
        scale: of `gradient`, for an optimizer in which it is the adjoint of the weights but for a factor.
    """

    theta: Weights
    gradient: Weights
    scale: Tensor
    state: State
    learning_rate: Tensor


class InnerOptimizer(ABC):
    """How one inner step uses the gradient."""

    def init(self, theta: Weights, networks: int | None = None) -> State:
        """The state before the first step.

        Args:
            networks: J, if the weights are of so many networks; None, of a single one without a leading axis.
        """
        return {}

    @abstractmethod
    def update(self, theta: Weights, gradient: Weights, state: State, learning_rate: Tensor) -> tuple[Weights, State]:
        """One step; differentiable in all of its arguments."""

    def reverse(self, before: Before, learning_rate: Tensor, adjoint: Weights, state_adjoint: State) -> Reversed:
        """The reverse of `update`; by autograd, which is cheap for what is elementwise."""
        theta, gradient, state = map(leaves, before)
        rate = learning_rate.detach().requires_grad_()
        moving = [name for name, value in state.items() if value.requires_grad]
        with torch.enable_grad():
            after, state_after = self.update(theta, gradient, state, rate)
        outputs = [*after.values(), *(state_after[name] for name in moving)]
        adjoints = [*adjoint.values(), *(state_adjoint.get(n, torch.zeros_like(state[n])) for n in moving)]
        inputs = [*theta.values(), *gradient.values(), *(state[name] for name in moving), rate]
        *found, of_rate = torch.autograd.grad(outputs, inputs, adjoints, materialize_grads=True)
        of_theta, of_gradient = found[: len(theta)], found[len(theta) : 2 * len(theta)]
        return Reversed(
            dict(zip(theta, of_theta, strict=True)),
            dict(zip(theta, of_gradient, strict=True)),
            torch.ones_like(rate),
            dict(zip(moving, found[2 * len(theta) :], strict=True)),
            of_rate,
        )

    @abstractmethod
    def torch_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The same optimizer of `torch.optim`, with a learning rate of 1."""

    def torch_state(self, state: State, name: str) -> dict[str, Any]:
        """What `torch_optimizer` keeps of the weight `name` of one network."""
        return {}

    def from_torch_state(self, states: dict[str, dict[str, Any]]) -> State:
        """The inverse of `torch_state`, of all weights."""
        return {}


class GradientDescent(InnerOptimizer):
    """Plain gradient descent, the paper's: θᵢ₊₁ = θᵢ − η̃ᵢ ∇ℓ(x̃ᵢ, θᵢ) (Eq. 9)."""

    def update(self, theta: Weights, gradient: Weights, state: State, learning_rate: Tensor) -> tuple[Weights, State]:
        return {name: torch.addcmul(w, gradient[name], -learning_rate) for name, w in theta.items()}, state

    def reverse(self, before: Before, learning_rate: Tensor, adjoint: Weights, state_adjoint: State) -> Reversed:
        # In closed form, because large weights are bound by memory: nothing is written here.
        _, gradient, _ = before
        pieces = (
            zip(gradient[name].flatten().split(LONG), value.flatten().split(LONG), strict=True)
            for name, value in adjoint.items()
        )
        products = [torch.dot(one, other) for of_weight in pieces for one, other in of_weight]
        return Reversed(adjoint, adjoint, -learning_rate, {}, -torch.stack(products).sum())

    def torch_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)


class Momentum(InnerOptimizer):
    """Heavy-ball momentum, as in `torch.optim.SGD`: m ← μm + ∇ℓ, θ ← θ − η̃ m.

    Raises:
        ValueError: a momentum outside 0 to 1.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        check_positive(momentum=momentum)
        if momentum >= 1:
            raise ValueError(f"momentum must be below 1, not {momentum}")
        self.momentum = momentum

    def init(self, theta: Weights, networks: int | None = None) -> State:
        return {name: torch.zeros_like(weight) for name, weight in theta.items()}

    def update(self, theta: Weights, gradient: Weights, state: State, learning_rate: Tensor) -> tuple[Weights, State]:
        state = {name: self.momentum * state[name] + gradient[name] for name in theta}
        return {name: weight - learning_rate * state[name] for name, weight in theta.items()}, state

    def torch_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0, momentum=self.momentum)

    def torch_state(self, state: State, name: str) -> dict[str, Any]:
        return {"momentum_buffer": state[name]}

    def from_torch_state(self, states: dict[str, dict[str, Any]]) -> State:
        return {name: state["momentum_buffer"] for name, state in states.items()}


class Adam(InnerOptimizer):
    """Adam (Kingma & Ba, 2015), in the form at the end of their Section 2, where ε is added before the correction.

    Raises:
        ValueError: a beta outside 0 to 1, or an eps that is not positive.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        check_betas(betas)
        check_positive(eps=eps)
        self.betas, self.eps = tuple(betas), eps

    def init(self, theta: Weights, networks: int | None = None) -> State:
        zeros = {f"{moment}/{name}": torch.zeros_like(w) for moment in "mv" for name, w in theta.items()}
        return {COUNTER: torch.zeros([] if networks is None else [networks], dtype=torch.float64), **zeros}

    def update(self, theta: Weights, gradient: Weights, state: State, learning_rate: Tensor) -> tuple[Weights, State]:
        beta1, beta2 = self.betas
        new, updated = {COUNTER: state[COUNTER] + 1}, {}
        corrections = (1 - beta2 ** new[COUNTER]) ** 0.5 / (1 - beta1 ** new[COUNTER])
        for name, weight in theta.items():
            # Networks may be of different ages, each with its own count; of a single one it is a number.
            shape = [-1, *[1] * (weight.ndim - 1)] if corrections.ndim else []
            correction = corrections.to(weight.device, weight.dtype).view(shape)
            g = gradient[name]
            m = new[f"m/{name}"] = beta1 * state[f"m/{name}"] + (1 - beta1) * g
            v = new[f"v/{name}"] = beta2 * state[f"v/{name}"] + (1 - beta2) * g * g
            # √v has no derivative where v = 0 (a weight that never had a gradient): 0 is taken, as `higher` does.
            zero = v == 0
            root = torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt())
            updated[name] = weight - learning_rate * correction * m / (root + self.eps)
        return updated, new

    def torch_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1.0, betas=self.betas, eps=self.eps)  # type: ignore[arg-type]

    def torch_state(self, state: State, name: str) -> dict[str, Any]:
        moments = {"exp_avg": state[f"m/{name}"], "exp_avg_sq": state[f"v/{name}"]}
        return {"step": int(state[COUNTER]), **moments} if state[COUNTER] else {}

    def from_torch_state(self, states: dict[str, dict[str, Any]]) -> State:
        moments = {f"m/{name}": state["exp_avg"] for name, state in states.items()}
        moments |= {f"v/{name}": state["exp_avg_sq"] for name, state in states.items()}
        step = next(iter(states.values()))["step"]
        return {COUNTER: torch.tensor(float(step), dtype=torch.float64), **moments}


def unstack_state(state: State, networks: int) -> list[State]:
    """The states of single networks in that of J; some optimizers have none."""
    return unstack(state) if state else [{} for _ in range(networks)]


def inner_optimizer(card: dict[str, Any]) -> InnerOptimizer:
    """The inner optimizer that distilled data were made for, from their card; plain gradient descent by default.

    Raises:
        ValueError: the card names one that is not known.
    """
    known = {"gd": GradientDescent, "momentum": Momentum, "adam": Adam}
    inner = card.get("inner", {"choice": "gd"})
    if not isinstance(inner, dict) or str(inner.get("choice")) not in known:
        raise ValueError(f"the card names an unknown inner optimizer: {inner}")
    try:
        return known[inner["choice"]](**{key: value for key, value in inner.items() if key not in ("choice", "target")})
    except TypeError as error:
        raise ValueError(f"the card names an unknown inner optimizer: {inner}") from error


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, cut from their history, for gradients to be taken with respect to them (but to counters)."""
    return {name: value.detach().requires_grad_(name != COUNTER) for name, value in tensors.items()}
