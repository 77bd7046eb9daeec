"""Held-out evaluation: train unseen networks on distilled data and test each on real pictures."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from dd_lightning.data import Preprocessing
from dd_lightning.data.datasets import Pictures
from dd_lightning.distilled import DistilledData
from dd_lightning.networks import Weights, predict, stack
from dd_lightning.unroll import Unroll


@dataclass(frozen=True)
class HeldOutResult:
    """Accuracy in % of each held-out network before training and after GD steps: only the last, or every one."""

    accuracies: Float[Tensor, "network point"]

    @property
    def before(self) -> float:
        return self.accuracies[:, 0].mean().item()

    @property
    def mean(self) -> float:
        """Mean accuracy after training."""
        return self.accuracies[:, -1].mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over networks; 0 for a single one."""
        return self.accuracies[:, -1].std().item() if len(self.accuracies) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean over networks (Student's t)."""
        count = len(self.accuracies)
        if count < 2 or self.std == 0:
            return self.mean, self.mean
        low, high = stats.t.interval(0.95, count - 1, loc=self.mean, scale=self.std / count**0.5)
        return float(low), float(high)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Numbers for a logger."""
        low, high = self.interval
        named = {"accuracy_before": self.before, "accuracy_mean": self.mean, "accuracy_std": self.std}
        named |= {"accuracy_low": low, "accuracy_high": high}
        if self.accuracies.shape[1] > 2:
            named |= {f"accuracy_step_{i:03d}": a for i, a in enumerate(self.accuracies.mean(0).tolist())}
        return {f"{prefix}/{name}": value for name, value in named.items()}

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "networks": len(self.accuracies),
            "accuracy_before": self.before,
            "accuracy_mean": self.mean,
            "accuracy_std": self.std,
            "accuracy_interval_95": [low, high],
            "accuracy_per_step": self.accuracies.mean(0).tolist() if self.accuracies.shape[1] > 2 else None,
            "accuracies": self.accuracies[:, -1].tolist(),
        }

    def __str__(self) -> str:
        spread = f" ± {self.std:.2f}" if len(self.accuracies) > 1 else ""
        return f"{self.before:.2f} % → {self.mean:.2f}{spread} %"


def accuracy(
    network: nn.Module, weights: Weights, pictures: Pictures, preprocessing: Preprocessing, batch_size: int = 500
) -> Float[Tensor, " init"]:
    """Accuracy in % of the J networks over all pictures, in batches small enough that memory is used again."""
    correct = torch.zeros(len(next(iter(weights.values()))), device=pictures.labels.device)
    with torch.no_grad():
        for images, labels in zip(pictures.images.split(batch_size), pictures.labels.split(batch_size), strict=True):
            correct += (predict(network, weights, preprocessing(images)).argmax(2) == labels).sum(1)
    return 100 * correct.double() / len(pictures)


def evaluate_held_out(
    network: nn.Module,
    initial_weights: Iterable[dict[str, Tensor]],
    distilled: DistilledData,
    pictures: Pictures,
    preprocessing: Preprocessing,
    unroll: Unroll,
    per_step: bool = False,
    chunk: int = 10,
    on_progress: Callable[[int], None] = lambda networks: None,
) -> HeldOutResult:
    """Trains every held-out network on the distilled data and tests it before and after.

    Under distributed training each process takes every n-th network, tests it on all pictures, and the results are
    gathered once.

    Args:
        network: the template.
        initial_weights: θ₀ of each held-out network.
        pictures: real pictures, on the device of the distilled data.
        unroll: the engine that trains.
        per_step: test after every GD step, not only after the last.
        chunk: networks that are trained at once.
        on_progress: told the number of networks that each chunk finished.
    """
    distilled = distilled.detach()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    accuracies = []
    for theta_0 in _chunks(islice(initial_weights, rank, None, world), chunk):
        points = [accuracy(network, theta_0, pictures, preprocessing)]
        theta = theta_0
        for theta in unroll.trajectory(network, theta_0, distilled.steps()):
            if per_step:
                points.append(accuracy(network, theta, pictures, preprocessing))
        if not per_step:
            points.append(accuracy(network, theta, pictures, preprocessing))
        accuracies.append(torch.stack(points, dim=1).cpu())
        on_progress(len(accuracies[-1]))
    mine = torch.cat(accuracies) if accuracies else None
    if world == 1:
        assert mine is not None
        return HeldOutResult(mine)
    gathered: list[Tensor | None] = [None] * world
    dist.all_gather_object(gathered, mine)
    rows = [row for part in gathered if part is not None for row in part]
    order = [i for r in range(world) if gathered[r] is not None for i in range(r, len(rows), world)]
    return HeldOutResult(
        torch.stack([row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])])
    )


def _chunks(many: Iterator[dict[str, Tensor]], size: int) -> Iterator[Weights]:
    while chunk := list(islice(many, size)):
        yield stack(chunk)
