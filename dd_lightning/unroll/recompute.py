"""The engine whose memory does not grow with the graph of every step (Section 3.4, back-gradient optimisation)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dd_lightning.networks import Weights, training_without_dropout
from dd_lightning.unroll.interface import Step
from dd_lightning.unroll.optimizers import InnerOptimizer
from dd_lightning.unroll.stored import StoredUnroll, leaves


class RecomputeUnroll(StoredUnroll):
    """Stores the weights of each step alone, and recomputes its graph in the reverse pass.

    Walking back from λ = ∂L/∂θ_T, each step gives one Hessian-vector product: λ ← λ − η̃ ∇²ℓ λ and
    ∂L/∂x̃ = −η̃ ∂⟨∇ℓ, λ⟩/∂x̃. Unlike Maclaurin et al. (2015) nothing is inverted, so the gradient is exact.

    Args:
        optimizer: of the inner loop.
        batched: as in `StoredUnroll`.
        offload: keep the stored weights in the CPU's memory, for long unrolls on a GPU.
    """

    def __init__(self, optimizer: InnerOptimizer | None = None, batched: bool = True, offload: bool = False) -> None:
        super().__init__(optimizer, batched)
        self.offload = offload

    def __call__(self, network: nn.Module, theta_0: Weights, steps: Iterable[Step]) -> Weights:
        images, labels, learning_rates = zip(*steps, strict=True)
        theta_T = _Recomputed.apply(self, network, list(theta_0), labels, *theta_0.values(), *images, *learning_rates)
        return dict(zip(theta_0, theta_T, strict=True))


class _Recomputed(torch.autograd.Function):
    """θ_T of all weights, images and learning rates, as one operation of the outer graph."""

    @staticmethod
    def forward(
        ctx: Any, engine: RecomputeUnroll, network: nn.Module, names: list[str], labels: Any, *tensors: Tensor
    ) -> Any:
        count = len(labels)
        theta = dict(zip(names, tensors, strict=False))
        images, rates = tensors[len(names) : len(names) + count], tensors[len(names) + count :]
        state = engine.optimizer.init(theta)
        stored = []
        with training_without_dropout(network):
            for step in zip(images, labels, rates, strict=True):
                kept = [{n: v.to("cpu") if engine.offload else v for n, v in part.items()} for part in (theta, state)]
                stored.append(kept)
                with torch.enable_grad():
                    theta, state = engine.inner_step(network, leaves(theta), state, step, differentiable=False)
                theta, state = ({n: v.detach() for n, v in part.items()} for part in (theta, state))
        ctx.engine, ctx.network, ctx.stored, ctx.labels, ctx.names = engine, network, stored, labels, names
        ctx.save_for_backward(*images, *rates)
        return tuple(theta.values())

    @staticmethod
    def backward(ctx: Any, *grad_theta: Tensor) -> Any:
        count, device = len(ctx.labels), grad_theta[0].device
        images, rates = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grad_images: list[Tensor | None] = [None] * count
        grad_rates: list[Tensor | None] = [None] * count
        adjoint: list[Tensor] = list(grad_theta)  # of the weights, then of the optimizer's state
        with training_without_dropout(ctx.network), torch.enable_grad():
            for i in reversed(range(count)):
                theta, state = (leaves({n: v.to(device) for n, v in part.items()}) for part in ctx.stored[i])
                ctx.stored[i] = None
                state_names = sorted(name for name, value in state.items() if value.ndim)
                image, rate = images[i].detach().requires_grad_(), rates[i].detach().requires_grad_()
                step = (image, ctx.labels[i], rate)
                after, state_after = ctx.engine.inner_step(ctx.network, theta, state, step, differentiable=True)
                outputs = [*after.values(), *(state_after[name] for name in state_names)]
                adjoint += [torch.zeros_like(value) for value in outputs[len(adjoint) :]]
                inputs = [*theta.values(), *(state[name] for name in state_names), image, rate]
                *adjoint, grad_images[i], grad_rates[i] = torch.autograd.grad(outputs, inputs, adjoint)
        return None, None, None, None, *([None] * len(ctx.names)), *grad_images, *grad_rates
