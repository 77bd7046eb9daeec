"""Images as training data (Section 4)."""

from dd_lightning.evaluation.evaluator import Evaluation, Outcome
from dd_lightning.sources import Sets


class Training:
    """Images as training data, with their own learning rates."""

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        kept = evaluation.best(sets.members, sets.keep)
        return Outcome(evaluation.test(kept), {"sets": len(kept)}, kept)
