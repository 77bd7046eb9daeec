"""A plain unroll: the graph of every step is kept, and autograd walks back through it."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.networks import channels_last, frozen, memory_format, run_with
from dd_lightning.unroll.interface import GraphUnroll, Single, Step


class FunctionalUnroll(GraphUnroll):
    """`higher` without its copies.

    On a CPU images and weights are in the memory format that convolutions are fastest in, where the network takes it.
    """

    def unroll(
        self, network: nn.Module, theta_0: Single, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[Single]:
        steps = list(steps)
        format = memory_format(network, steps[0][0])
        if format == torch.channels_last:
            theta_0 = {name: channels_last(weight) for name, weight in theta_0.items()}
        fixed = frozen(network)
        theta = _leaves({name: weight for name, weight in theta_0.items() if name not in fixed})
        state = self.optimizer.init(theta)
        for images, labels, rate in steps:
            with torch.enable_grad():
                images = images.to(memory_format=format)
                loss = F.cross_entropy(run_with(network, theta_0 | theta, images), labels)
                gradients = torch.autograd.grad(
                    loss, list(theta.values()), create_graph=differentiable, materialize_grads=True
                )
                gradient = dict(zip(theta, gradients, strict=True))
                theta, state = self.optimizer.update(theta, gradient, state, rate)  # Eq. (9)
            if not differentiable:
                theta, state = _leaves(theta), {name: value.detach() for name, value in state.items()}
            yield theta_0 | theta


def _leaves(theta: Single) -> Single:
    return {name: weight.detach().requires_grad_() for name, weight in theta.items()}
