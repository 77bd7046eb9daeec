"""Sets that grow: every prefix is a good set for its own budget (Feng, Vedantam, Kempe, 2024, "boosting")."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.checks import check_count, check_not_negative
from dd_lightning.training.callbacks import HeldOutEvaluation, of_kind


class Growing(Callback):
    """Distils the first images of each class, then more and more, stage by stage; the stages are equally long.

    In every stage the outer optimizer and its schedule begin anew, and the images of earlier stages (and their labels,
    where they are learned) go a fraction of their step. The checkpoint that is chosen is one of the last stage.

    Args:
        stages: images of each class in every stage.
        fraction: of the step size, for images of earlier stages; 0 leaves them as they are.

    Raises:
        ValueError: stages that do not grow, or a fraction outside 0 to 1.
    """

    def __init__(self, stages: Sequence[int], fraction: float = 0.1) -> None:
        check_count(**{f"stages[{i}]": n for i, n in enumerate(stages)})
        if not stages or any(after <= before for before, after in itertools.pairwise(stages)):
            raise ValueError(f"stages must grow, such as [1,2,5,10], not {list(stages)}")
        check_not_negative(fraction=fraction)
        if fraction > 1:
            raise ValueError(f"fraction must be from 0 to 1, not {fraction}")
        self.stages, self.fraction = list(stages), fraction
        self.rates: dict[str, list[list[float]]] = {}  # before the softplus, at the end of each stage
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rates = state_dict["rates"]

    def stage(self, step: int, max_steps: int) -> int:
        """Of an outer step, from 0."""
        return min(step // self.length(max_steps), len(self.stages) - 1)

    def length(self, max_steps: int) -> int:
        """Outer steps of a stage; the last has those that are left, too.

        Raises:
            ValueError: there are fewer outer steps than stages.
        """
        if max_steps < len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need as many outer steps, but trainer.max_steps={max_steps}")
        return max_steps // len(self.stages)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        stage = self.stage(trainer.global_step, trainer.max_steps)
        pl_module.images_per_class = self.stages[stage]
        if stage and trainer.global_step == stage * self.length(trainer.max_steps):
            restart(trainer, pl_module)
            if held_out := of_kind(trainer, HeldOutEvaluation):
                held_out.best = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        self._before = [(parameter, parameter.detach().clone()) for parameter in pl_module.of_each_image]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DatasetDistiller)
        # global_step counts this outer step already.
        stage = self.stage(trainer.global_step - 1, trainer.max_steps)
        scale = self.scale(pl_module.places, stage)
        for parameter, before in self._before:
            own = scale[..., *[None] * (parameter.ndim - 2)]
            parameter.data.copy_(torch.where(own == 1, parameter.data, before + own * (parameter.data - before)))
        self._before = []
        self.rates[str(self.stages[stage])] = pl_module.raw_learning_rates.detach().tolist()

    def scale(self, places: Tensor, stage: int) -> Tensor:
        """The share of its step that each image goes.

        Args:
            places: of the images in their class, from 1.
        """
        earlier = self.stages[stage - 1] if stage else 0
        scale = torch.where(places <= earlier, self.fraction, 1.0)
        return scale * (places <= self.stages[stage])

    def grown(self, distilled: DistilledData) -> DistilledData:
        """With a card of which prefixes can be cut."""
        rates = self.rates | {str(self.stages[-1]): distilled.raw_learning_rates.tolist()}
        return distilled.with_card(stages={str(n): rates[str(n)] for n in self.stages})


def restart(trainer: pl.Trainer, module: DatasetDistiller) -> None:
    """A new beginning of the outer optimizer and its schedule: what is new has no moments yet."""
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        if module.make_schedule is not None:
            trainer.lr_scheduler_configs[0].scheduler = module.make_schedule(optimizer)
