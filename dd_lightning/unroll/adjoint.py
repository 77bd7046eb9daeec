"""No graph through the inner loop: its reverse is one Hessian-vector product per GD step (Section 3.4)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dd_lightning.networks import Weights
from dd_lightning.unroll.choice import batched_gradient, single_gradient
from dd_lightning.unroll.gradients import Images, StepGradient
from dd_lightning.unroll.interface import Unroll
from dd_lightning.unroll.optimizers import InnerOptimizer, State
from dd_lightning.unroll.order import Step


class AdjointUnroll(Unroll):
    """Walks back from λ = ∂L/∂θ_T: for plain GD λ ← λ − η̃ ∇²ℓ λ, with ∂L/∂x̃ = −η̃ ∂⟨∇ℓ, λ⟩/∂x̃ and ∂L/∂η̃ = −⟨∇ℓ, λ⟩.

    Args:
        optimizer: of the inner loop.
        batched: all J networks at once, instead of one after the other; None: where the network allows it.
        recompute: store the weights of every √T-th step alone, instead of what each step's reverse needs, and compute
            the rest again on the way back: memory that hardly grows with T, for less than twice the time. Unlike
            Maclaurin et al. (2015) nothing is inverted, so that the gradient is exact.
        offload: keep stored weights in the CPU's memory, for long unrolls on a GPU.
    """

    def __init__(
        self,
        optimizer: InnerOptimizer | None = None,
        batched: bool | None = True,
        recompute: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(optimizer)
        if offload and not recompute:
            raise ValueError("offload=true stores weights alone, which needs recompute=true")
        self.batched, self.recompute, self.offload = batched, recompute, offload
        self._last: tuple[nn.Module, StepGradient] | None = None  # an engine mostly meets one network

    def gradient(self, network: nn.Module, theta: Weights, images: Images) -> StepGradient:
        """∇ℓ of this network's J copies."""
        if self._last is None or self._last[0] is not network:
            self._last = network, self._choose(network, theta, images)
        return self._last[1]

    def __reduce__(self) -> Any:  # to other processes, which trace the network again
        return type(self), (self.optimizer, self.batched, self.recompute, self.offload)

    def _choose(self, network: nn.Module, theta: Weights, images: Images) -> StepGradient:
        if self.batched is not False:
            try:
                return batched_gradient(network, theta, images)
            except ValueError:
                if self.batched:
                    raise
        return single_gradient(network, theta, images)

    def walk(
        self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]
    ) -> Iterator[tuple[Weights, State]]:
        with torch.no_grad():
            for images, labels, rate in steps:
                gradient, _ = self.gradient(network, theta, images)(theta, images, labels, again=False)
                theta, state = self.optimizer.update(theta, gradient, state, rate)
                yield theta, state

    def window(self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]) -> tuple[Weights, State]:
        images, labels, rates = zip(*steps, strict=True)
        gradient = self.gradient(network, theta, images[0])
        names = list(theta), list(state)
        found = _Unrolled.apply(self, gradient, names, *theta.values(), *state.values(), *images, *labels, *rates)
        return dict(zip(theta, found, strict=False)), dict(zip(state, found[len(theta) :], strict=True))

    def check(self, network: nn.Module, theta_0: Weights, images: Images) -> None:
        self.gradient(network, theta_0, images)
        super().check(network, theta_0, images)

    def _there_and_back(self, network: nn.Module, theta: Weights, images: Images) -> None:
        super()._there_and_back(network, theta, images)
        images, rate = images.detach().requires_grad_(), images.new_ones(()).requires_grad_()
        step = images, torch.zeros(len(images), dtype=torch.long, device=images.device), rate
        ends = torch.stack([weight.sum() for weight in self(network, theta, [step]).values()])
        torch.autograd.grad(ends.sum(), [images, rate])


@dataclass
class _Loop:
    """The inner loop on fixed distilled data."""

    optimizer: InnerOptimizer
    gradient: StepGradient
    images: Sequence[Tensor]
    labels: Sequence[Tensor]
    rates: Sequence[Tensor]

    def step(self, i: int, theta: Weights, state: State, again: bool = False) -> tuple[Weights, State, Any]:
        """Weights and state after step i (Eq. 9), and if it is walked `again` what its reverse needs."""
        gradient, tape = self.gradient(theta, self.images[i], self.labels[i], again)
        after, state_after = self.optimizer.update(theta, gradient, state, self.rates[i])
        return after, state_after, (theta, state, gradient, tape)

    def reverse(
        self, i: int, taped: Any, adjoint: Weights, state_adjoint: State
    ) -> tuple[Weights, State, tuple[Tensor, Tensor | None, Tensor]]:
        """Adjoints before step i from those after it; the gradients of its images, labels and rate."""
        theta, state, gradient, tape = taped
        found = self.optimizer.reverse((theta, gradient, state), self.rates[i].detach(), adjoint, state_adjoint)
        product, grad_images, grad_labels = self.gradient.derivative(tape, found.gradient)
        adjoint = {name: torch.addcmul(value, product[name], found.scale) for name, value in found.theta.items()}
        grad_labels = None if grad_labels is None else found.scale * grad_labels
        return adjoint, found.state, (found.scale * grad_images, grad_labels, found.learning_rate)


class _Unrolled(torch.autograd.Function):
    """θ_T of all images, labels and learning rates, as one operation of the outer graph."""

    @staticmethod
    def forward(
        ctx: Any, engine: AdjointUnroll, gradient: StepGradient, names: tuple[list[str], list[str]], *tensors: Tensor
    ) -> Any:
        of_theta, of_state = (len(part) for part in names)
        theta: Weights = gradient.prepared(dict(zip(names[0], tensors, strict=False)))
        state: State = dict(zip(names[1], tensors[of_theta:], strict=False))
        data = tensors[of_theta + of_state :]
        loop = _Loop(engine.optimizer, gradient, *_thirds(data))
        stored: dict[int, Any] = {}
        segment = math.isqrt(len(loop.rates))
        for i in range(len(loop.rates)):
            if engine.recompute and i % segment == 0:
                stored[i] = tuple(
                    {n: v.cpu() if engine.offload else v for n, v in part.items()} for part in (theta, state)
                )
            theta, state, taped = loop.step(i, theta, state, again=not engine.recompute)
            if not engine.recompute:
                stored[i] = taped
        ctx.engine, ctx.gradient, ctx.names, ctx.stored = engine, gradient, names, stored
        ctx.save_for_backward(*data)
        after = [state[name] for name in names[1]]
        ctx.mark_non_differentiable(*after)
        return *theta.values(), *after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        names, device = ctx.names[0], grads[0].device
        loop = _Loop(ctx.engine.optimizer, ctx.gradient, *_thirds(ctx.saved_tensors))
        found: list[tuple[Tensor, Tensor | None, Tensor]] = []
        adjoint, state_adjoint = dict(zip(names, grads, strict=False)), {}
        stored, segment = ctx.stored, math.isqrt(len(loop.rates))
        for i in reversed(range(len(loop.rates))):
            if ctx.engine.recompute:
                for k in range(i // segment * segment, i):  # the weights of a segment, once it is entered
                    if i in stored:
                        break
                    theta, state = ({n: v.to(device) for n, v in part.items()} for part in stored[k])
                    stored[k + 1] = loop.step(k, theta, state)[:2]
                theta, state = ({n: v.to(device) for n, v in part.items()} for part in stored.pop(i))
                taped = loop.step(i, theta, state, again=True)[2]
            else:
                taped = stored.pop(i)
            adjoint, state_adjoint, of_data = loop.reverse(i, taped, adjoint, state_adjoint)
            found.append(of_data)
        images, labels, rates = zip(*reversed(found), strict=True)
        return None, None, None, *([None] * (len(names) + len(ctx.names[1]))), *images, *labels, *rates


def _thirds(data: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Images, labels and rates of the steps, which are given one after the other."""
    count = len(data) // 3
    return data[:count], data[count : 2 * count], data[2 * count :]
