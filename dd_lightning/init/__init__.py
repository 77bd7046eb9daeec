"""Initial weights θ₀: their distributions p(θ₀), and populations of trained networks (Section 3.5)."""

from dd_lightning.init.fixed import FixedInit, OneNetwork
from dd_lightning.init.interface import Init
from dd_lightning.init.population import HELD_OUT, PARTS, TRAIN, Population, TrainedNetworks
from dd_lightning.init.pretrained import FixedPretrainedInit, RandomPretrainedInit
from dd_lightning.init.pretraining import Recipe, check_batched
from dd_lightning.init.random import RandomInit
from dd_lightning.init.shards import Job, train_shard

__all__ = [
    "HELD_OUT",
    "PARTS",
    "TRAIN",
    "FixedInit",
    "FixedPretrainedInit",
    "Init",
    "Job",
    "OneNetwork",
    "Population",
    "RandomInit",
    "RandomPretrainedInit",
    "Recipe",
    "TrainedNetworks",
    "check_batched",
    "train_shard",
]
