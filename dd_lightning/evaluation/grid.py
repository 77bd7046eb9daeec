"""The grid of Section S-1: every learning rate with every number of epochs, and the best of them."""

import math
from collections.abc import Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dd_lightning.data import Pictures
from dd_lightning.distilled import DistilledData, softplus_inverse
from dd_lightning.evaluation.evaluator import CHUNK, SCORED, Evaluation, Outcome, Schedule, measures_along
from dd_lightning.evaluation.heldout import count_choosing
from dd_lightning.evaluation.learning_rates import learn_rates
from dd_lightning.sources import Each, Sets
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.workers import Result

LEARNED = "learned"


def check_different(**values: Sequence[Any]) -> None:
    """Each must be a list of different values.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, found in values.items():
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise ValueError(f"{name} must be a list, such as [{found}], not {found}")
        if not found or len(set(found)) < len(found):
            raise ValueError(f"{name} must be different values, at least one, not {list(found)}")


class Grid:
    """Images as training data with the best of all combinations of learning rate and epochs.

    The combinations are compared on validation pictures: with as many unseen networks as the result is of, dealt
    over the sets; where the init has fewer for validation, each is trained on several sets. Every ten networks see
    their own share of the pictures, so that all pictures count at the price of a few. The best combination is then
    tested, every set on every network. What choosing on the test set would have brought, as in the paper, is told as
    `gap`.

    Args:
        learning_rates: numbers, and `learned` for rates learned for the images (`learn_rates`).
        epochs: numbers of passes over the images; of data in shuffled order, of inner steps.
        outer_steps: of learning rates.
        step_size: of the outer optimizer of the learning rates.
        pictures: share of the validation and of the test pictures that every ten networks see.
        least_attack_share: % of the attacked class that a combination must move to the target, for poisoning.

    Raises:
        ValueError: no or repeated combinations, a rate that is not positive, or a count below 1.
    """

    def __init__(
        self,
        learning_rates: Sequence[float | str],
        epochs: Sequence[int],
        outer_steps: int = 100,
        step_size: float = 0.1,
        pictures: int = 500,
        least_attack_share: float = 10.0,
    ) -> None:
        check_different(learning_rates=learning_rates, epochs=epochs)
        check_count(outer_steps=outer_steps, pictures=pictures, **{f"epochs[{i}]": e for i, e in enumerate(epochs)})
        fixed = {f"learning_rates[{i}]": rate for i, rate in enumerate(learning_rates) if rate != LEARNED}
        check_positive(step_size=step_size, **fixed)
        self.learning_rates, self.epochs = list(learning_rates), sorted(epochs)
        self.outer_steps, self.step_size, self.pictures = outer_steps, step_size, pictures
        self.least_attack_share = least_attack_share

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        schedules = self.schedules(evaluation, sets.members)
        combinations = [(schedule, epochs) for schedule in schedules for epochs in schedule.tested]
        pairs = dealt(evaluation, len(sets.members))
        validation, test = self.compare(evaluation, sets.members, schedules, pairs)
        names = [{"learning_rate": schedule.learning_rate, "epochs": epochs} for schedule, epochs in combinations]
        chosen, details = choice(names, validation, test, self.least_attack_share)
        schedule, epochs = combinations[chosen]
        kept = evaluation.best(Each(partial(schedule.of, epochs=epochs), sets.members), sets.keep)
        result = evaluation.test(kept.sets)
        networks = max(part.stop for part, _ in pairs)
        details |= {
            "sets": len(kept.sets),
            "networks_chose": networks,
            "pictures_chose": min(len(pairs) * self.pictures, len(evaluation.data.validation)),
            "learned_rates": learned_rates(schedules),
            **kept.details,
        }
        return Outcome(result, details, kept.sets, evaluation.tested, networks)

    def schedules(self, evaluation: Evaluation, sets: Sequence[DistilledData]) -> list[Schedule]:
        """A trajectory for every learning rate; numbers of epochs are points on it. Learned rates differ for each."""
        steps = len(sets[0].images)
        result = [
            Schedule(float(rate), constant(rate, max(self.epochs), steps), tuple(self.epochs))
            for rate in self.learning_rates
            if rate != LEARNED
        ]
        if LEARNED in self.learning_rates:
            learner = evaluation.learner
            common = (learner.network, learner.init, learner.unroll, learner.objective, evaluation.data)
            pieces = {
                f"epochs{epochs}": (
                    Each(methodcaller("of_epochs", epochs), sets),
                    *common,
                    self.outer_steps,
                    self.step_size,
                )
                for epochs in reversed(self.epochs)  # the longest first
            }
            learned = evaluation.workers.map("learning rates", learn_rates, pieces)
            result += [Schedule(LEARNED, torch.from_numpy(learned[f"epochs{e}"]["raw"]), (e,)) for e in self.epochs]
        return result

    def compare(
        self,
        evaluation: Evaluation,
        sets: Sequence[DistilledData],
        schedules: Sequence[Schedule],
        pairs: Sequence[tuple[slice, int]],
    ) -> tuple[Result, Result]:
        """Mean of each measure in % for every combination, on validation and on test pictures.

        Args:
            pairs: as in `dealt`.
        """
        pieces = {}
        for i, (part, index) in enumerate(pairs):
            shares = [share(p, i, self.pictures) for p in (evaluation.data.validation, evaluation.data.test)]
            common = (part, evaluation.networks, Stream.HELD_OUT_VALIDATION, shares)
            pieces[f"networks{part.start}_set{index}"] = (
                evaluation.learner,
                schedules,
                sets[index : index + 1],
                *common,
            )
        results = evaluation.workers.map("comparing", measures_along, pieces)
        names = list(next(iter(results.values())))
        means = {name: np.concatenate([r[name] for r in results.values()], axis=2).mean(2) for name in names}
        validation, test = ({name: mean[:, part] for name, mean in means.items()} for part in (0, 1))
        return validation, test


def dealt(evaluation: Evaluation, sets: int) -> list[tuple[slice, int]]:
    """The networks that choose a combination: parts of those for validation, and the index of the set of each.

    Where there are fewer networks for validation than for the test, they are dealt again, to other sets, until as many
    are trained.
    """
    init, stream = evaluation.learner.init, Stream.HELD_OUT_VALIDATION
    count = init.num_distinct(evaluation.networks, stream)
    count_choosing(init, min(evaluation.networks, SCORED), "the combination")
    parts = evaluation.chunks(evaluation.networks, stream, max(1, min(CHUNK, math.ceil(count / sets))))
    turns = min(sets, math.ceil(init.num_held_out(evaluation.networks) / count))
    again = math.lcm(len(parts), sets)  # after so many the same pairs would come again, but for a shift
    return [(parts[n % len(parts)], (n + n // again) % sets) for n in range(turns * len(parts))]


def learned_rates(schedules: Sequence[Schedule]) -> dict[str, list[list[float]]]:
    """The learning rates that were learned for each number of epochs, [epoch][step]."""
    learned = [schedule for schedule in schedules if schedule.learning_rate == LEARNED]
    return {str(s.tested[0]): torch.nn.functional.softplus(s.raw_learning_rates).tolist() for s in learned}


def constant(learning_rate: float | str, epochs: int, steps: int) -> Float[Tensor, "epoch step"]:
    """Raw learning rates of one value."""
    return softplus_inverse(torch.full((epochs, steps), float(learning_rate), dtype=torch.float64))


def share(pictures: Pictures, index: int, size: int) -> Pictures:
    """The `index`-th share of `size` pictures, begun again after the last.

    In an order of their own: files lie class by class, and a share must hold them all.
    """
    order = torch.randperm(len(pictures), generator=generator(0, Stream.SPLIT, 1))
    return pictures[order[(index * size + torch.arange(min(size, len(pictures)))) % len(pictures)]]


def best(means: Result, least_attack_share: float = 0.0) -> int:
    """The combination with the highest mean of the first measure, the accuracy.

    For poisoning (Figure 6) it is the best of those that move at least `least_attack_share` % of the attacked class to
    the target; where none does, the one that moves most.
    """
    accuracy = next(iter(means.values()))
    if "attack_share" in means:
        share = means["attack_share"]
        moving = share >= least_attack_share
        return int(np.argmax(np.where(moving, accuracy, -1.0) if moving.any() else share))
    return int(np.argmax(accuracy))


def choice(
    names: Sequence[dict[str, Any]], validation: Result, test: Result, least_attack_share: float = 0.0
) -> tuple[int, dict[str, Any]]:
    """Which combination is the best on validation pictures, and what `result.json` says of all.

    Args:
        names: what each combination is of.
    """
    chosen, chosen_on_test = (best(means, least_attack_share) for means in (validation, test))
    table = [{**name, **row} for name, row in zip(names, rows(validation, test), strict=True)]
    gap = table[chosen_on_test]["test"] - table[chosen]["test"]
    details = {"combinations": table, "chosen": table[chosen], "chosen_on_test": table[chosen_on_test], "gap": gap}
    return chosen, details


def rows(validation: Result, test: Result) -> list[dict[str, float]]:
    """Of each combination the accuracy on validation and on test pictures, and the share of the attacked class."""
    named = {"validation": next(iter(validation.values())), "test": next(iter(test.values()))}
    if "attack_share" in validation:
        named |= {"validation_attack_share": validation["attack_share"], "test_attack_share": test["attack_share"]}
    return [dict(zip(named, values, strict=True)) for values in zip(*(v.tolist() for v in named.values()), strict=True)]
