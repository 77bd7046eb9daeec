"""Sets of images scored on unseen networks, piece by piece in several processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.data import Pictures, Preprocessing, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.heldout import HeldOutResult, count_choosing, judged_along
from dd_lightning.init import Init
from dd_lightning.networks import Weights, predictions, stack
from dd_lightning.objectives import Measures, Objective
from dd_lightning.sources import Each
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.words import counted
from dd_lightning.system.workers import Result, Workers
from dd_lightning.unroll import Unroll

CHUNK = 10  # networks trained at once
SCORED = 20  # networks on which sets are compared (Section S-1)
SCORE_PICTURES = 1024  # and training pictures


@dataclass(frozen=True)
class Learner:
    """The networks that are trained on a set of images, how, and what they are judged by."""

    network: nn.Module
    init: Init
    unroll: Unroll
    preprocessing: Preprocessing
    objective: Objective

    def held_out(self, count: int, stream: Stream, part: slice) -> Any:
        """The networks of `part` among `count` unseen ones."""
        return islice(self.init.held_out(self.network, count, stream), part.start, part.stop)

    def judged(self, weights: Weights, pictures: Pictures) -> Measures:
        """What the objective measures of networks on real pictures."""
        return self.objective.measures(
            predictions(self.network, weights, pictures.images, pictures.labels, self.preprocessing)
        )


@dataclass(frozen=True)
class Schedule:
    """The learning rates of one trajectory, and where on it networks are tested.

    Attributes:
        learning_rate: one rate for all GD steps, or a name for several.
        raw_learning_rates: as in `DistilledData`.
        tested: the numbers of epochs after which networks are tested.
    """

    learning_rate: float | str
    raw_learning_rates: Float[Tensor, "epoch step"]
    tested: tuple[int, ...]

    def of(self, distilled: DistilledData, epochs: int) -> DistilledData:
        """The images with these learning rates, of the first `epochs` alone."""
        return distilled.of_epochs(epochs, self.raw_learning_rates)


@dataclass(frozen=True)
class Evaluation:
    """What every use of images is given: networks, real pictures, and workers.

    Attributes:
        networks: unseen networks that each set is tested on.
        split: test or validation, the pictures of the result.
        per_step: test after every GD step, not only after the last.
    """

    learner: Learner
    data: RealData
    workers: Workers
    networks: int = 200
    split: str = "test"
    per_step: bool = False

    @property
    def pictures(self) -> Pictures:
        return self.data.test if self.split == "test" else self.data.validation

    @property
    def stream(self) -> Stream:
        return Stream.HELD_OUT_TEST if self.split == "test" else Stream.HELD_OUT_VALIDATION

    @property
    def tested(self) -> int:
        """How many different networks the result is of."""
        return self.learner.init.num_distinct(self.networks, self.stream)

    def chunks(self, networks: int, stream: Stream, size: int = CHUNK) -> list[slice]:
        """Parts of the held-out networks that are trained at once."""
        count = self.learner.init.num_distinct(networks, stream)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def test(self, sets: Sequence[DistilledData], description: str = "testing") -> HeldOutResult:
        """Every set on every network; the accuracies of all, set after set."""
        common = (self.networks, self.stream, self.pictures, self.per_step)
        parts = self.chunks(self.networks, self.stream)
        pieces = {f"networks{part.start}": (self.learner, sets, part, *common) for part in parts}
        results = self.workers.map(description, judge_sets, pieces)
        return held_out_result({str(i): _of_set(i, results) for i in range(len(sets))})

    def best(self, sets: Sequence[DistilledData], keep: int | None) -> "Best":
        """The `keep` best sets: on 20 networks for validation and 1,024 training pictures (Section S-1)."""
        if keep is None or keep >= len(sets):
            return Best(sets)
        networks = count_choosing(self.learner.init, SCORED, "the sets")
        train, stream = self.data.train, Stream.HELD_OUT_VALIDATION
        chosen = torch.randperm(len(train), generator=generator(0, Stream.BASELINE))[:SCORE_PICTURES]
        pictures = train[chosen]
        common = (SCORED, stream, pictures, False)
        parts = self.chunks(SCORED, stream, 5)
        pieces = {f"networks{part.start}": (self.learner, sets, part, *common) for part in parts}
        results = self.workers.map("choosing sets", judge_sets, pieces)
        means = [held_out_result({"": _of_set(i, results)}).mean for i in range(len(sets))]
        kept = Each(sets.__getitem__, sorted(np.argsort(means)[::-1][:keep].tolist()))
        chose = {"of": len(sets), "networks": networks, "training_pictures": len(pictures)}
        return Best(kept, networks, {"sets_chosen": chose})


@dataclass(frozen=True)
class Best:
    """The sets that an evaluation keeps.

    Attributes:
        chose: how many networks chose them; None where all are kept.
        details: who chose them, for `result.json`.
    """

    sets: Sequence[DistilledData]
    chose: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a use of images ends with.

    Attributes:
        result: accuracy of every set with every network.
        details: how it came about, for `result.json`.
        sets: the images that were used, with the learning rates that were used.
        networks: how many different networks were tested; None where the use has none.
        networks_chose: how many chose what was tested; None where none did.
    """

    result: HeldOutResult
    details: dict[str, Any]
    sets: Sequence[DistilledData]
    networks: int | None
    networks_chose: int | None = None

    @property
    def counts(self) -> str:
        """How much the result is of, for people."""
        networks = "" if self.networks is None else f" from {counted(self.networks, 'network')}"
        chose = "" if self.networks_chose is None else f", chosen with {self.networks_chose}"
        return f"{counted(len(self.result.accuracies), 'result')}{networks}{chose}"

    def lines(self) -> list[str]:
        """What was chosen, and on what, for people."""
        found, details = [], self.details
        if "chosen" in details:
            chosen = [f"{k} {v}" for k, v in details["chosen"].items() if not k.startswith(("validation", "test"))]
            networks = f" and {counted(details['networks_chose'], 'network')}" if "networks_chose" in details else ""
            found.append(f"chosen on {details['pictures_chose']} validation pictures{networks}: {', '.join(chosen)}")
            found.append(f"choosing on the test set would have brought {details['gap']:+.2f}")
        if sets := details.get("sets_chosen"):
            on = f"{sets['training_pictures']} training pictures and {counted(sets['networks'], 'network')}"
            found.append(f"chosen on {on}: {details['sets']} of {sets['of']} sets")
        for one in details.get("controls", {}).values():
            spread = f" ± {one['accuracy_std']:.2f}" if one["accuracy_std"] else ""
            rate = f", rate {one['learning_rate']:g}" if "learning_rate" in one else ""
            numbers = f"{one['stored_numbers']:,} numbers{rate}, {counted(one['networks'], 'network')}"
            found.append(f"beside it, {one['words']}: {one['accuracy_mean']:.2f}{spread} % ({numbers})")
        if details.get("scores"):
            found.append("scores: " + ", ".join(f"{name} {value:.3f}" for name, value in details["scores"].items()))
        return found


def held_out_result(results: dict[str, Result]) -> HeldOutResult:
    """The networks of all pieces together."""
    first = next(iter(results.values()))
    measures = {name: torch.from_numpy(np.concatenate([r[name] for r in results.values()])) for name in first}
    return HeldOutResult(next(iter(measures.values())), measures)


def numpy(measures: Measures) -> Result:
    return {name: values.cpu().numpy() for name, values in measures.items()}


def judge_sets(
    learner: Learner,
    sets: Sequence[DistilledData],
    part: slice,
    networks: int,
    stream: Stream,
    pictures: Pictures,
    per_step: bool,
) -> Result:
    """Unseen networks trained on each set.

    Returns:
        Each measure in %, [set, network, point].
    """
    theta_0 = stack(list(learner.held_out(networks, stream, part)))
    before = learner.judged(theta_0, pictures)  # whatever the set
    points = []
    for one in sets:
        steps = one.to(pictures.labels.device).steps()
        trajectory = learner.unroll.trajectory(learner.network, theta_0, steps)
        points.append(judged_along(trajectory, lambda theta: learner.judged(theta, pictures), before, per_step))
    return numpy(stack(points))


def _of_set(index: int, results: dict[str, Result]) -> Result:
    """One set's measures of the networks of all pieces, [network, point]."""
    names = next(iter(results.values()))
    return {name: np.concatenate([result[name][index] for result in results.values()]) for name in names}


def measures_along(
    learner: Learner,
    schedules: Sequence[Schedule],
    sets: Sequence[DistilledData],
    part: slice,
    networks: int,
    stream: Stream,
    parts_of_pictures: Sequence[Pictures],
) -> Result:
    """Unseen networks judged after each tested number of epochs of every schedule, on several pictures.

    Args:
        sets: one, to be made by the process that uses it.

    Returns:
        Each measure in %, [combination, pictures, network].
    """
    theta_0 = stack(list(learner.held_out(networks, stream, part)))
    distilled = sets[0].to(parts_of_pictures[0].labels.device)
    steps = len(distilled.images)
    points: list[Measures] = []
    for schedule in schedules:
        after = {epochs * steps for epochs in schedule.tested}
        inner_steps = schedule.of(distilled, max(schedule.tested)).steps()
        trajectory = learner.unroll.trajectory(learner.network, theta_0, inner_steps)
        for step, theta in enumerate(trajectory, start=1):
            if step in after:
                points.append(stack([learner.judged(theta, pictures) for pictures in parts_of_pictures]))
    return numpy(stack(points))
