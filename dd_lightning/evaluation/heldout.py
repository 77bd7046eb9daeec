"""Held-out evaluation: train unseen networks on distilled data and test each on real pictures."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from dd_lightning.data import Pictures, Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.init import Init
from dd_lightning.networks import Weights, count, predictions, stack, unstack
from dd_lightning.objectives import Classification, Measures, Objective
from dd_lightning.system.seeding import Stream
from dd_lightning.system.words import counted
from dd_lightning.unroll import Unroll

log = logging.getLogger(__name__)

FEW = 4  # values of which no interval is told: Student's would be wider than what an accuracy can be


@dataclass(frozen=True)
class HeldOutResult:
    """Accuracy in % of each held-out network before training and after GD steps: only the last, or every one.

    Attributes:
        accuracies: by the labels of the objective: its first measure.
        measures: all measures of the objective, by name.
    """

    accuracies: Float[Tensor, "network point"]
    measures: dict[str, Float[Tensor, "network point"]] = field(default_factory=dict)

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
        """The 95 % interval of the mean over networks (Student's t); the mean alone of fewer than `FEW` values."""
        count = len(self.accuracies)
        if count < FEW or self.std == 0:
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
        for name, measure in self._summary().items():
            named |= {f"{name}_{point}": value for point, value in measure.items()}
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
            "measures": self._summary(),
        }

    def _summary(self) -> dict[str, dict[str, float]]:
        """Mean of each measure over networks, where there are others than the accuracy."""
        if len(self.measures) < 2:
            return {}
        means = {name: values.mean(0).tolist() for name, values in self.measures.items()}
        return {name: {"before": points[0], "after": points[-1]} for name, points in means.items()}

    def lines(self) -> list[str]:
        """Each measure before and after, for people."""
        named = self._summary().items()
        return [f"{name.replace('_', ' ')}: {m['before']:.2f} % → {m['after']:.2f} %" for name, m in named]

    def __str__(self) -> str:
        spread = f" ± {self.std:.2f}" if len(self.accuracies) > 1 else ""
        before = f"{self.before:.2f} % → " if self.accuracies.shape[1] > 1 else ""
        return f"{before}{self.mean:.2f}{spread} %"


def evaluate_held_out(
    network: nn.Module,
    initial_weights: Iterable[dict[str, Tensor]],
    distilled: DistilledData,
    pictures: Pictures,
    preprocessing: Preprocessing,
    unroll: Unroll,
    per_step: bool = False,
    objective: Objective | None = None,
    chunk: int = 10,
    on_progress: Callable[[int], None] = lambda networks: None,
) -> HeldOutResult:
    """Trains every held-out network on the distilled data and tests it before and after.

    Of several processes each takes every n-th network and tests it on all pictures; the results are gathered once.

    Args:
        network: the template.
        initial_weights: θ₀ of each held-out network.
        pictures: real pictures, on the device of the distilled data.
        unroll: the engine that trains.
        per_step: test after every GD step, not only after the last.
        objective: what the networks are judged by; None is classification.
        chunk: networks that are trained at once.
        on_progress: told the number of networks that each chunk finished.
    """
    objective = objective or Classification()

    def judged(weights: Weights) -> Measures:
        return objective.measures(predictions(network, weights, pictures.images, pictures.labels, preprocessing))

    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    mine: list[Measures] = []  # of each network, at every point
    for theta_0 in _chunks(islice(initial_weights, rank, None, world), chunk):
        trajectory = unroll.trajectory(network, theta_0, distilled.detach().steps())
        mine += unstack(judged_along(trajectory, judged, judged(theta_0), per_step))
        on_progress(count(theta_0))
    measures = stack(_gathered(mine, world))
    return HeldOutResult(next(iter(measures.values())), measures)


def count_choosing(init: Init, asked: int, what: str) -> int:
    """How many unseen networks choose `what`; says so where they are fewer than asked for."""
    there = init.num_distinct(asked, Stream.HELD_OUT_VALIDATION)
    if there < asked and not init.fixed:
        found = counted(there, "network")
        choose = "chooses" if there == 1 else "choose"
        log.warning(f"{found} for validation {choose} {what}, not {asked}: the population holds out too few")
    return there


def _gathered(mine: list[Measures], world: int) -> list[Measures]:
    """The networks of all processes, in their order."""
    gathered = [mine]
    if world > 1:
        gathered = [[] for _ in range(world)]
        dist.all_gather_object(gathered, mine)
    return [gathered[index % world][index // world] for index in range(sum(map(len, gathered)))]


def judged_along(
    trajectory: Iterable[Weights], judged: Callable[[Weights], Measures], before: Measures, per_step: bool
) -> dict[str, Float[Tensor, "network point"]]:
    """Measures of networks before training and after every GD step, or the last alone."""
    points, theta = [before], None
    for theta in trajectory:
        if per_step:
            points.append(judged(theta))
    if theta is not None and not per_step:
        points.append(judged(theta))
    return {name: torch.stack([point[name] for point in points], dim=1).cpu() for name in before}


def _chunks(many: Iterator[dict[str, Tensor]], size: int) -> Iterator[Weights]:
    while chunk := list(islice(many, size)):
        yield stack(chunk)
