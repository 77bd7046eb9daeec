"""Algorithm 1: dataset distillation as a LightningModule."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dd_lightning.data import Batch
from dd_lightning.distilled import DistilledData
from dd_lightning.init import Init
from dd_lightning.networks import Weights
from dd_lightning.objectives import Objective
from dd_lightning.outer import OuterLoss
from dd_lightning.unroll import OuterStep, Unroll


class DatasetDistiller(pl.LightningModule):
    """Learns distilled images x̃ and learning rates η̃ (Algorithm 1).

    Its parameters are the distilled data alone; the network is a template.

    Args:
        distilled: the initial distilled data (line 1).
        network: the architecture to distil for.
        init: p(θ₀), the distribution of initial weights.
        unroll: the engine of the inner loop.
        objective: the outer loss, of the logits of the trained networks and the real labels.
        optimizer: makes the outer optimizer from parameter groups; its weight decay is of the images alone.
        schedule: makes the schedule of the outer step size from the optimizer, advanced every outer step.
        rate_scale: outer step size of η̃ as a multiple of that of the images.
        config: settings that a checkpoint must share before a run may go on from it.
        precision: of the pass over the real minibatch (line 7): float32 or bfloat16.
        chunk, capture: as in `OuterStep`.
    """

    def __init__(
        self,
        distilled: DistilledData,
        network: nn.Module,
        init: Init,
        unroll: Unroll,
        objective: Objective,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        rate_scale: float = 1.0,
        config: dict[str, Any] | None = None,
        precision: str = "float32",
        chunk: int | None = None,
        capture: bool = True,
    ) -> None:
        super().__init__()
        self.images = nn.Parameter(distilled.images)
        self.raw_learning_rates = nn.Parameter(distilled.raw_learning_rates)
        self.register_buffer("labels", distilled.labels)
        self._initial = distilled
        self._template = (network,)  # in a tuple, so that it is no submodule
        self.init, self.unroll, self.objective = init, unroll, objective
        self.outer_loss = OuterLoss(objective, precision)
        # Networks that are not batched are unrolled one by one, so that memory holds the graph of one.
        self._outer_step = OuterStep(self.loss, chunk if unroll.batched else 1, capture)
        self._make_optimizer, self._make_schedule, self._rate_scale = optimizer, schedule, rate_scale
        self.config = config or {}

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
        total, self._gradients = self._outer_step((theta_0, images, labels), self._learned)
        loss = (total / self.init.per_step).to(images.dtype)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, reduce_fx="sum")
        return loss  # line 9 is Lightning's: backward, then the optimizer's step

    def loss(self, theta_0: Weights, images: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """The outer loss of networks that start from θ₀, on a real minibatch."""
        theta_T = self.unroll(self.network, theta_0, self.distilled.steps())  # line 6, Eq. (9)
        return self.outer_loss(self.network, theta_T, images, labels)  # line 7

    @property
    def _learned(self) -> list[nn.Parameter]:
        return [self.images, self.raw_learning_rates]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The gradient, summed over processes in double precision: it does not depend on which unrolled what."""
        count = self.init.per_step * self.trainer.accumulate_grad_batches
        for parameter, gradient in zip(self._learned, self._gradients, strict=True):
            total = self.trainer.strategy.reduce(gradient, reduce_op="sum") / count
            before = 0 if parameter.grad is None else parameter.grad
            parameter.grad = before + total.to(parameter.dtype)

    def configure_optimizers(self) -> Any:
        # Weight decay would draw raw rates to 0, a rate of 0.69.
        rates = {"params": [self.raw_learning_rates], "weight_decay": 0.0}
        optimizer = self._make_optimizer([{"params": [self.images]}, rates])
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
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False  # `backward` does it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dd_config"] = self.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("dd_config", {})
        differing = sorted(k for k in saved.keys() | self.config.keys() if saved.get(k) != self.config.get(k))
        if differing:
            listed = ", ".join(f"{k} ({saved.get(k)} there, {self.config.get(k)} here)" for k in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ValueError(f"the checkpoint is of another config: {listed}{more}")
