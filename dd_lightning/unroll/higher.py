"""The reference engine: `higher` (Grefenstette et al., 2019), one network after the other."""

from collections.abc import Iterable, Iterator

import higher
import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.networks import Weights, stack, training_without_dropout, unstack
from dd_lightning.unroll.interface import GraphUnroll, Step


class HigherUnroll(GraphUnroll):
    """Unrolls with `higher`'s differentiable optimizers; the gradients every other engine is held against."""

    def unroll(
        self, network: nn.Module, theta_0: Weights, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[Weights]:
        functional = higher.monkeypatch(network, track_higher_grads=differentiable)
        names = [name for name, _ in network.named_parameters()]
        optimizer = self.optimizer.torch_optimizer(network.parameters())  # the rate is given at every step
        optimizers = [
            higher.get_diff_optim(optimizer, network.parameters(), functional, track_higher_grads=differentiable)
            for _ in unstack(theta_0)
        ]
        thetas = [[single[name].detach().requires_grad_() for name in names] for single in unstack(theta_0)]
        with training_without_dropout(functional):
            for images, labels, learning_rate in steps:  # Eq. (9)
                for j, optimizer_j in enumerate(optimizers):
                    with torch.enable_grad():
                        loss = F.cross_entropy(functional(images, params=thetas[j]), labels)
                        thetas[j] = list(optimizer_j.step(loss, params=thetas[j], override={"lr": [learning_rate]}))
                yield stack([dict(zip(names, theta, strict=True)) for theta in thetas])
