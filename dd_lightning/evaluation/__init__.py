"""What distilled data are good for: networks trained on them, and other uses of images (Section 4)."""

from dd_lightning.evaluation.adaptation import FewShotAdaptation, NoAdaptation
from dd_lightning.evaluation.evaluator import Evaluation, Learner, Outcome
from dd_lightning.evaluation.fine_tuning import FineTuning
from dd_lightning.evaluation.fresh import Ordinary
from dd_lightning.evaluation.grid import Grid
from dd_lightning.evaluation.heldout import HeldOutResult, evaluate_held_out
from dd_lightning.evaluation.knn import KNearestNeighbours
from dd_lightning.evaluation.training import Training

__all__ = [
    "Evaluation",
    "FewShotAdaptation",
    "FineTuning",
    "Grid",
    "HeldOutResult",
    "KNearestNeighbours",
    "Learner",
    "NoAdaptation",
    "Ordinary",
    "Outcome",
    "Training",
    "evaluate_held_out",
]
