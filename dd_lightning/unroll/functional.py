"""A plain unroll: the graph of every step is kept, and autograd walks back through it."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.networks import Weights, forward_each, training_without_dropout
from dd_lightning.unroll.interface import GraphUnroll, Step, leaves


class FunctionalUnroll(GraphUnroll):
    """Unrolls with `torch.func.functional_call`, one network after the other: `higher` without its copies."""

    def unroll(
        self, network: nn.Module, theta_0: Weights, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[Weights]:
        theta = leaves(theta_0)
        state = self.optimizer.init(theta)
        with training_without_dropout(network):
            for images, labels, rate in steps:
                with torch.enable_grad():
                    logits = forward_each(network, theta, images)
                    # The sum over networks of each network's mean: no network sees another's gradient.
                    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)
                    gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=differentiable)
                    gradient = dict(zip(theta, gradients, strict=True))
                    theta, state = self.optimizer.update(theta, gradient, state, rate)  # Eq. (9)
                if not differentiable:
                    theta, state = leaves(theta), {name: value.detach() for name, value in state.items()}
                yield theta
