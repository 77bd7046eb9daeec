"""A plain unroll with `torch.func.functional_call`, one network after the other."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from dd_lightning.networks import Weights, stack, training_without_dropout, unstack
from dd_lightning.unroll.interface import Step, Unroll


class FunctionalUnroll(Unroll):
    """The same computation as `higher`'s, without its bookkeeping."""

    def trajectory(
        self, network: nn.Module, theta_0: Weights, steps: Iterable[Step], differentiable: bool = True
    ) -> Iterator[Weights]:
        thetas = [{n: w.detach().requires_grad_() for n, w in single.items()} for single in unstack(theta_0)]
        with training_without_dropout(network):
            for images, labels, learning_rate in steps:  # Eq. (9)
                for j, theta in enumerate(thetas):
                    with torch.enable_grad():
                        loss = F.cross_entropy(functional_call(network, theta, (images,)), labels)
                        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=differentiable)
                    thetas[j] = {
                        name: weight - learning_rate * gradient
                        for (name, weight), gradient in zip(theta.items(), gradients, strict=True)
                    }
                    if not differentiable:
                        thetas[j] = {n: w.detach().requires_grad_() for n, w in thetas[j].items()}
                yield stack(thetas)
