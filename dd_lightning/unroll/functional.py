"""A plain unroll: the graph of every step is kept, and autograd walks back through it."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.networks import channels_last, frozen, memory_format, run_with
from dd_lightning.unroll.interface import GraphUnroll, Single
from dd_lightning.unroll.optimizers import State
from dd_lightning.unroll.order import Step


class FunctionalUnroll(GraphUnroll):
    """`higher` without its copies.

    On a CPU images and weights are in the memory format that convolutions are fastest in, where the network takes it.
    """

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
