"""The reference engine: `higher` (Grefenstette et al., 2019)."""

from collections.abc import Iterable, Iterator
from typing import Any

import higher
import torch
import torch.nn.functional as F
from torch import nn

from dd_lightning.networks import Weights, forward_each, frozen, training_without_dropout
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.unroll.gradients import Images
from dd_lightning.unroll.interface import GraphUnroll, Single
from dd_lightning.unroll.optimizers import State
from dd_lightning.unroll.order import Step


class HigherUnroll(GraphUnroll):
    """Unrolls with `higher`'s differentiable optimizers; the gradients every other engine is held against."""

    def check(self, network: nn.Module, theta_0: Weights, images: Images) -> None:
        with torch.no_grad(), training_without_dropout(network):
            theta = {name: weight[:1] for name, weight in theta_0.items()}
            expected = forward_each(network, theta, images)[0]
            try:
                patched: Any = higher.monkeypatch(network, track_higher_grads=False)
                patched.update_params([theta[name][0] for name, _ in network.named_parameters()])
                found = patched(images)
                reason = "" if torch.allclose(found, expected, rtol=1e-3, atol=1e-4) else "it loses some of the weights"
            except Exception as error:  # whatever a copy that was not made by the network's own class runs into
                if is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
        if reason:
            name = type(network).__name__
            raise ValueError(f"network {name} cannot be patched by higher ({reason}); use unroll=functional")
        super().check(network, theta_0, images)

    def unroll(
        self, network: nn.Module, theta: Single, state: State, steps: Iterable[Step], differentiable: bool
    ) -> Iterator[tuple[Single, State]]:
        functional: Any = higher.monkeypatch(network, track_higher_grads=differentiable)
        names, fixed = [name for name, _ in network.named_parameters()], frozen(network)
        trained = [name for name in names if name not in fixed]
        optimizer = higher.get_diff_optim(
            # The rate is given at every step.
            self.optimizer.torch_optimizer([p for p in network.parameters() if p.requires_grad]),
            network.parameters(),
            functional,
            track_higher_grads=differentiable,
        )
        for index, name in enumerate(trained):
            optimizer.state[0][index].update(self.optimizer.torch_state(state, name))
        weights = [theta[name].detach().requires_grad_(name not in fixed) for name in names]
        functional.update_params(weights)  # also those of modules whose forward is not called, as in attention
        for images, labels, learning_rate in steps:  # Eq. (9)
            with torch.enable_grad():
                loss = F.cross_entropy(functional(images, params=weights), labels)
                weights = list(optimizer.step(loss, params=weights, override={"lr": [learning_rate]}))
            states = {name: optimizer.state[0][index] for index, name in enumerate(trained)}
            yield dict(zip(names, weights, strict=True)), state | self.optimizer.from_torch_state(states)
