"""Algorithm 1: dataset distillation as a LightningModule."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dd_lightning.data.datamodule import Batch
from dd_lightning.distilled import DistilledData
from dd_lightning.init import RandomInit
from dd_lightning.networks import predict, stack, unstack
from dd_lightning.objectives import Classification
from dd_lightning.processes import check_same
from dd_lightning.unroll import Unroll


class DatasetDistiller(pl.LightningModule):
    """Learns distilled images x̃ and learning rates η̃ (Algorithm 1).

    Its parameters are the distilled data alone; the network is a template.

    Args:
        distilled: the initial distilled data (line 1).
        network: the architecture to distil for.
        init: p(θ₀), the distribution of initial weights.
        unroll: the engine of the inner loop.
        objective: the outer loss, of the logits of the trained networks and the real labels.
        optimizer: makes the outer optimizer from parameter groups.
        schedule: makes the schedule of the outer step size from the optimizer, advanced every outer step.
        rate_scale: outer step size of η̃ as a multiple of that of the images.
        config: settings that a checkpoint must share before a run may go on from it.
    """

    def __init__(
        self,
        distilled: DistilledData,
        network: nn.Module,
        init: RandomInit,
        unroll: Unroll,
        objective: Classification,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        rate_scale: float = 1.0,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.images = nn.Parameter(distilled.images)
        self.raw_learning_rates = nn.Parameter(distilled.raw_learning_rates)
        self.register_buffer("labels", distilled.labels)
        self._initial = distilled
        self._template = (network,)  # in a tuple, so that it is no submodule
        self.init, self.unroll, self.objective = init, unroll, objective
        self._make_optimizer, self._make_schedule, self._rate_scale = optimizer, schedule, rate_scale
        self._config = config or {}

    @property
    def network(self) -> nn.Module:
        return self._template[0]

    @property
    def distilled(self) -> DistilledData:
        """The distilled data as they are now, sharing the parameters."""
        return replace(
            self._initial, images=self.images, labels=self.labels, raw_learning_rates=self.raw_learning_rates
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        images, labels = batch  # x_t, line 3
        theta_0 = self.init.sample(self.network, self.global_step, self.global_rank, self.trainer.world_size)  # line 4
        parts = [theta_0] if getattr(self.unroll, "batched", False) else [stack([one]) for one in unstack(theta_0)]
        self._copies = [self._copy() for _ in parts]
        loss = torch.zeros((), device=self.device)
        for part, distilled in zip(parts, self._copies, strict=True):
            theta_T = self.unroll(self.network, part, distilled.steps())  # line 6, Eq. (9)
            share = len(next(iter(part.values()))) / self.init.per_step
            loss = loss + share * self.objective(predict(self.network, theta_T, images), labels)  # line 7
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, reduce_fx="sum")
        return loss  # line 9 is Lightning's: backward, then the optimizer's step

    def _copy(self) -> DistilledData:
        copy = self.distilled.detach()
        copy.images.requires_grad_()
        copy.raw_learning_rates.requires_grad_()
        return copy

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The gradient with respect to the distilled data, of all processes together.

        Networks that are unrolled one by one have a copy of the data each, whose gradients are added in double
        precision: then the sum does not depend on which process unrolled which, not even in its last bit.
        """
        # Of the leaves only the distilled data: the gradient of θ₀ would cost one more Hessian-vector product.
        loss.backward(inputs=[leaf for copy in self._copies for leaf in (copy.images, copy.raw_learning_rates)])
        for name, parameter in self.named_parameters():
            gradients = [getattr(copy, name).grad for copy in self._copies]
            wide = parameter.dtype if parameter.device.type == "mps" else torch.float64
            total = torch.stack(gradients).sum(0, dtype=wide)
            gradient = self.trainer.strategy.reduce(total, reduce_op="sum").to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer([{"params": [self.images]}, {"params": [self.raw_learning_rates]}])
        images, rates = optimizer.param_groups
        rates["lr"] = images["lr"] * self._rate_scale
        if self._make_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._make_schedule(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        self.network.to(self.device)
        check_same(self.trainer, self._config)
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False  # `backward` does it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dd_config"] = self._config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("dd_config", {})
        differing = sorted(k for k in saved.keys() | self._config.keys() if saved.get(k) != self._config.get(k))
        if differing:
            listed = ", ".join(f"{k} ({saved.get(k)} there, {self._config.get(k)} here)" for k in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ValueError(f"the checkpoint is of another config: {listed}{more}")
