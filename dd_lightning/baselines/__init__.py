"""What learned images are held against (Section 4): other images, and other uses of images."""

from dd_lightning.baselines.adaptation import FewShotAdaptation, NoAdaptation
from dd_lightning.baselines.evaluation import Evaluation, Learner
from dd_lightning.baselines.grid import Grid, Outcome, Training
from dd_lightning.baselines.knn import KNearestNeighbours
from dd_lightning.baselines.sets import Sets, average_real, kmeans, no_images, random_real

__all__ = [
    "Evaluation",
    "FewShotAdaptation",
    "Grid",
    "KNearestNeighbours",
    "Learner",
    "NoAdaptation",
    "Outcome",
    "Sets",
    "Training",
    "average_real",
    "kmeans",
    "no_images",
    "random_real",
]
