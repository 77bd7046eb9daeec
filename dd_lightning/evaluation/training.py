"""Images as training data (Section 4)."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.controls import RANDOM_SETS, entry, random_alike
from dd_lightning.evaluation.evaluator import Evaluation, Outcome
from dd_lightning.sources import Sets
from dd_lightning.system.checks import check_choice

log = logging.getLogger(__name__)

CONTROLS = ("random", "hard")


class Training:
    """Images as training data, with their own learning rates.

    Args:
        controls: which stand beside data that were distilled, with the same training: `random` (as many random real
            images, or stored numbers, in five sets, on a fifth of the networks each), `hard` (the same images with
            their classes, where labels were learned).

    Raises:
        ValueError: an unknown control.
    """

    def __init__(self, controls: Sequence[str] = ()) -> None:
        for control in controls:
            check_choice("control", control, CONTROLS)
        self.controls = list(controls)

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        best = evaluation.best(sets.members, sets.keep)
        details = {"sets": len(best.sets), **best.details}
        chose = best.chose
        if chose is None:  # but perhaps the run that distilled the data chose; a card is data from elsewhere
            accuracy = best.sets[0].card.get("accuracy")
            chose = accuracy.get("networks_chose") if isinstance(accuracy, dict) else None
        result = evaluation.test(best.sets)
        if best.sets[0].card:  # baselines have none
            details["controls"] = self.beside(evaluation, best.sets[0])
        return Outcome(result, details, best.sets, evaluation.tested, chose)

    def beside(self, evaluation: Evaluation, one: DistilledData) -> dict[str, Any]:
        """The controls of distilled data, by name."""
        found = {}
        if "random" in self.controls:
            few = replace(evaluation, networks=-(-evaluation.networks // RANDOM_SETS))
            try:
                members = random_alike(evaluation.data, one)
                found["random"] = tested(few, members, f"{members[0].labels.numel()} random real images")
            except ValueError as reason:  # a control that cannot be had is no reason to have no result
                log.warning(f"No random real images stand beside these data: {reason}.")
        if "hard" in self.controls and one.soft_labels is not None:
            hard = [replace(one, soft_labels=None)]
            found["hard"] = tested(evaluation, hard, "the same images with hard labels")
        return found


def tested(evaluation: Evaluation, members: list[DistilledData], words: str) -> dict[str, Any]:
    """What `result.json` says of a control."""
    result = evaluation.test(members, f"testing {words.rpartition('random ')[2]}")
    counts = (len(members), members[0].labels.numel(), members[0].stored_numbers)
    return entry(words, result, *counts) | {"networks": evaluation.tested}
