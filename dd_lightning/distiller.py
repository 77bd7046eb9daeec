"""Algorithm 1: dataset distillation as a LightningModule."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dd_lightning.data import Batch, Unchanged
from dd_lightning.distilled import DistilledData
from dd_lightning.init import Init
from dd_lightning.networks import Weights, concatenated, count
from dd_lightning.objectives import Objective
from dd_lightning.outer import OuterLoss
from dd_lightning.parametrisation import FixedLabels, Labels
from dd_lightning.unroll import POOL, Draws, FixedOrder, OuterStep, Pool, State, Unroll, Window

STATE = "state/"  # prefix of the inner optimizer's state beside the weights


class DatasetDistiller(pl.LightningModule):
    """Learns distilled images x̃ and learning rates η̃ (Algorithm 1), and labels where they are to be learned.

    Its parameters are the distilled data alone; the network is a template.

    Args:
        distilled: the initial distilled data (line 1), with the map from what is learned of the images to images.
        network: the architecture to distil for.
        init: p(θ₀), the distribution of initial weights.
        unroll: the engine of the inner loop.
        objective: the outer loss, of the logits of the trained networks and the real labels.
        optimizer: makes the outer optimizer from parameter groups; its weight decay is of the images alone.
        schedule: makes the schedule of the outer step size from the optimizer, advanced every outer step.
        rate_scale: outer step size of η̃ as a multiple of that of the images; 0 leaves them as they are.
        config: settings that a checkpoint must share before a run may go on from it.
        precision: of the pass over the real minibatch (line 7): float32 or bfloat16.
        chunk, capture: as in `OuterStep`.
        piece: as in `OuterLoss`.
        labels: the map from what is learned to labels.
        raw_labels: what is learned of the labels, at the start; None where they are fixed.
        window: which inner steps are differentiated.
        seed: of the window's place, the order and the augmentation.

    Attributes:
        images_per_class: that are in use; None is all. The others have no gradient.
    """

    images_per_class: int | None

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
        labels: Labels | None = None,
        raw_labels: Float[Tensor, "step batch classes"] | None = None,
        window: Window | None = None,
        seed: int = 0,
        piece: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in distilled.learned_images.items():
            self.register_parameter(name, nn.Parameter(value))
        self.raw_learning_rates = nn.Parameter(distilled.raw_learning_rates)
        self.register_buffer("labels", distilled.labels)
        self.raw_labels = None if raw_labels is None else nn.Parameter(raw_labels)
        self._initial, self._labels, self.images_per_class = distilled, labels or FixedLabels(), None
        self._template = (network,)  # in a tuple, so that it is no submodule
        self.init, self.unroll, self.objective = init, unroll, objective
        self.outer_loss = OuterLoss(objective, precision, piece)
        self._window, self._seed = window or Window(), seed
        self.pool = None
        if self._window.start == POOL:
            self.pool = Pool(self._window.networks, len(self._place(0)), distilled.inner_steps, seed)
        # Networks that are not batched are unrolled one by one, so that memory holds the graph of one.
        alike = self._window.full and piece is None and used_alike(distilled)
        self._outer_step = OuterStep(self.loss, chunk if unroll.batched else 1, capture and alike)
        self._make_optimizer, self.make_schedule, self._rate_scale = optimizer, schedule, rate_scale
        self.config = config or {}

    @property
    def network(self) -> nn.Module:
        return self._template[0]

    @property
    def distilled(self) -> DistilledData:
        """The distilled data as they are now, sharing the parameters."""
        raw = self.learned_images
        now = replace(
            self._initial,
            images=self._initial.parametrisation.images(raw),
            labels=self.labels,
            raw_learning_rates=self.raw_learning_rates,
            soft_labels=None if self.raw_labels is None else self._labels.labels(self.raw_labels),
            raw_images=None if self._initial.raw_images is None else dict(raw),
        )
        return now if self.images_per_class is None else now.first(self.images_per_class)

    @property
    def places(self) -> Int[Tensor, "step batch"]:
        """Of each image among those of its class, from 1."""
        return self._initial.places

    @property
    def learned_images(self) -> dict[str, nn.Parameter]:
        """What is learned of the images."""
        return {name: self.get_parameter(name) for name in self._initial.parametrisation.names}

    @property
    def of_each_image(self) -> list[nn.Parameter]:
        """What is learned of single images, [step, batch, …]: not what they share, nor learning rates."""
        labels = [] if self.raw_labels is None else [self.raw_labels]
        return [self.learned_images[self._initial.parametrisation.names[0]], *labels]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # Pieces go there one at a time.
        return batch if self.outer_loss.piece else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        images, labels = batch  # x_t, line 3
        images = self._initial.augment(images, self._draws.augment_real())
        theta_0 = self.init.sample(self.network, self.global_step, self.global_rank, self.trainer.world_size)  # line 4
        self._ended: list[tuple[Weights, State]] = []
        start = self._begun(theta_0)
        total, self._gradients = self._outer_step((start, images, labels), self._learned)
        if self.pool is not None:
            thetas, states = zip(*self._ended, strict=True)
            self.pool.put(concatenated(thetas), concatenated(states))
        loss = (total / self.init.per_step).to(images.dtype)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, reduce_fx="sum")
        return loss  # line 9 is Lightning's: backward, then the optimizer's step

    @property
    def _draws(self) -> Draws:
        return Draws(self._seed, (self.global_step,), self._initial.augment.siamese)

    def _place(self, outer_step: int) -> range:
        """The inner steps that are differentiated."""
        return self._window.place(self._initial.inner_steps, self._seed, outer_step)

    def _begun(self, theta_0: Weights) -> Weights:
        """Weights, and the inner optimizer's state beside them, where the window begins."""
        theta, state = theta_0, self.unroll.optimizer.init(theta_0, count(theta_0))
        if self.pool is not None:
            theta, state = self.pool.take(self.global_step, theta, state)
        elif before := self._place(self.global_step).start:
            steps = self.distilled.detach().steps(self._draws, 0, before)
            theta, state = self.unroll.advance(self.network, theta, state, steps)
        return theta | {STATE + name: value for name, value in state.items()}

    def loss(self, start: Weights, images: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        """The outer loss, on a real minibatch, of networks that go through the window from `start`."""
        theta = {name: value for name, value in start.items() if not name.startswith(STATE)}
        state = {name.removeprefix(STATE): value for name, value in start.items() if name.startswith(STATE)}
        place = self._place(self.global_step)
        steps = self.distilled.steps(self._draws, place.start, place.stop)
        theta_T, state_T = self.unroll.window(self.network, theta, state, steps)  # line 6, Eq. (9)
        if self.pool is not None:
            self._ended.append((theta_T, state_T))
        return self.outer_loss(self.network, theta_T, images, labels)  # line 7

    @property
    def _learned(self) -> list[nn.Parameter]:
        labels = [] if self.raw_labels is None else [self.raw_labels]
        return [*self.learned_images.values(), self.raw_learning_rates, *labels]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The gradient, summed over processes in double precision: it does not depend on which unrolled what."""
        for parameter, gradient in zip(self._learned, self._gradients, strict=True):
            total = self.trainer.strategy.reduce(gradient, reduce_op="sum") / self.init.per_step
            parameter.grad = total.to(parameter.dtype)

    def configure_optimizers(self) -> Any:
        # Weight decay would draw raw rates to 0, a rate of 0.69.
        images, own = self.learned_images, self._initial.parametrisation.weight_decay
        groups: list[dict[str, Any]] = [{"params": [value]} for value in images.values()]
        for name, group in zip(images, groups, strict=True):
            group |= {"weight_decay": own[name]} if name in own else {}
        groups += [{"params": [other], "weight_decay": 0.0} for other in self._learned[len(images) :]]
        optimizer = self._make_optimizer(groups)
        optimizer.param_groups[len(images)]["lr"] = optimizer.param_groups[0]["lr"] * self._rate_scale
        if self.make_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.raw_labels is not None:
            self._labels.project_(self.raw_labels)

    def on_fit_start(self) -> None:
        self.network.to(self.device)
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False  # `backward` does it

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dd_config"] = self.config
        if self.pool is not None:
            checkpoint["dd_pool"] = self.pool.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("dd_config", {})
        content = saved.get("dataset.content"), self.config.get("dataset.content")
        moved = {"dataset.path"} if content[0] == content[1] is not None else set()  # the same pictures elsewhere
        compared = (saved.keys() | self.config.keys()) - moved
        differing = sorted(k for k in compared if saved.get(k) != self.config.get(k))
        if differing:
            listed = ", ".join(f"{k} ({saved.get(k)} there, {self.config.get(k)} here)" for k in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ValueError(f"the checkpoint is of another config: {listed}{more}")
        if self.pool is not None:
            self.pool.load_state_dict(checkpoint["dd_pool"])


def used_alike(distilled: DistilledData) -> bool:
    """Whether every outer step uses the data alike: what is drawn anew cannot be recorded."""
    return isinstance(distilled.order, FixedOrder) and isinstance(distilled.augment, Unchanged)
