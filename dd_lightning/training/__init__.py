"""What Lightning brings to Algorithm 1: callbacks, loggers, runs that go on, several processes."""

from dd_lightning.training.callbacks import DistilledPictures, HeldOutEvaluation, LastGood, ProgressBar
from dd_lightning.training.clipping import AdaptiveClipping
from dd_lightning.training.debugging import OneMinibatch, Profile
from dd_lightning.training.growing import Growing
from dd_lightning.training.loggers import CSVLogger
from dd_lightning.training.progress import progress
from dd_lightning.training.pruning import Pruning
from dd_lightning.training.resuming import ResumeCheckpoint

__all__ = [
    "AdaptiveClipping",
    "CSVLogger",
    "DistilledPictures",
    "Growing",
    "HeldOutEvaluation",
    "LastGood",
    "OneMinibatch",
    "Profile",
    "ProgressBar",
    "Pruning",
    "ResumeCheckpoint",
    "progress",
]
