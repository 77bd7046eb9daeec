"""Images as training data (Section 4)."""

from dd_lightning.evaluation.evaluator import Evaluation, Outcome
from dd_lightning.sources import Sets


class Training:
    """Images as training data, with their own learning rates."""

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        best = evaluation.best(sets.members, sets.keep)
        details = {"sets": len(best.sets), **best.details}
        chose = best.chose
        if chose is None:  # but perhaps the run that distilled the data chose; a card is data from elsewhere
            accuracy = best.sets[0].card.get("accuracy")
            chose = accuracy.get("networks_chose") if isinstance(accuracy, dict) else None
        return Outcome(evaluation.test(best.sets), details, best.sets, evaluation.tested, chose)
