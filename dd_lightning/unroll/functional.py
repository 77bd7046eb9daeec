"""A plain unroll: the graph of every step is kept, and autograd walks back through it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.networks import Weights, channels_last, frozen, memory_format, run_with
from dd_lightning.unroll.choice import narrow_gradient
from dd_lightning.unroll.gradients import StepGradient
from dd_lightning.unroll.interface import GraphUnroll, Single
from dd_lightning.unroll.optimizers import State
from dd_lightning.unroll.order import Step


class FunctionalUnroll(GraphUnroll):
    """`higher` without its copies.

    On a CPU images and weights are in the memory format that convolutions are fastest in, where the network takes it.
    Steps without gradients take all J at once, where convolutions are so narrow that this is faster.
    """

    _known: tuple[nn.Module, StepGradient | None] | None = None  # an engine mostly meets one network

    def walk(
        self, network: nn.Module, theta: Weights, state: State, steps: Iterable[Step]
    ) -> Iterator[tuple[Weights, State]]:
        steps = list(steps)
        if steps and (self._known is None or self._known[0] is not network):
            self._known = network, narrow_gradient(network, theta, steps[0][0])
        if self._known is None or self._known[1] is None:
            yield from super().walk(network, theta, state, steps)
            return
        with torch.no_grad():
            for images, labels, rate in steps:
                gradient, _ = self._known[1](theta, images, labels, again=False)
                theta, state = self.optimizer.update(theta, gradient, state, rate)
                yield theta, state

    def __reduce__(self) -> Any:  # to other processes, which trace the network again
        return type(self), (self.optimizer,)

    def unroll(
        self, network: nn.Module, theta: Single, state: State, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[tuple[Single, State]]:
        steps = list(steps)
        if not steps:
            return
        format = memory_format(network, steps[0][0])
        if format == torch.channels_last:
            theta = {name: channels_last(weight) for name, weight in theta.items()}
        names, before, fixed = list(theta), state, frozen(network)
        of_fixed = {name: weight for name, weight in theta.items() if name in fixed}
        theta = _leaves({name: weight for name, weight in theta.items() if name not in fixed})
        for images, labels, rate in steps:
            with torch.enable_grad():
                images = images.to(memory_format=format)
                loss = F.cross_entropy(run_with(network, of_fixed | theta, images), labels)
                gradients = torch.autograd.grad(
                    loss, list(theta.values()), create_graph=differentiable, materialize_grads=True
                )
                gradient = dict(zip(theta, gradients, strict=True))
                theta, state = self.optimizer.update(theta, gradient, state, rate)  # Eq. (9)
            if not differentiable:
                theta, state = _leaves(theta), {name: value.detach() for name, value in state.items()}
            after = of_fixed | theta
            yield {name: after[name] for name in names}, before | state


def _leaves(theta: Single) -> Single:
    return {name: weight.detach().requires_grad_() for name, weight in theta.items()}
