"""The reference engine: `higher` (Grefenstette et al., 2019)."""

from collections.abc import Iterable, Iterator

import higher
import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.unroll.interface import GraphUnroll, Single, Step


class HigherUnroll(GraphUnroll):
    """Unrolls with `higher`'s differentiable optimizers; the gradients every other engine is held against."""

    def unroll(
        self, network: nn.Module, theta_0: Single, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[Single]:
        functional = higher.monkeypatch(network, track_higher_grads=differentiable)
        names = [name for name, _ in network.named_parameters()]
        optimizer = higher.get_diff_optim(
            self.optimizer.torch_optimizer(network.parameters()),  # the rate is given at every step
            network.parameters(),
            functional,
            track_higher_grads=differentiable,
        )
        theta = [theta_0[name].detach().requires_grad_() for name in names]
        for images, labels, learning_rate in steps:  # Eq. (9)
            with torch.enable_grad():
                loss = F.cross_entropy(functional(images, params=theta), labels)
                theta = list(optimizer.step(loss, params=theta, override={"lr": [learning_rate]}))
            yield dict(zip(names, theta, strict=True))
