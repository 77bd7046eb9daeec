"""Dataset distillation: learn a handful of images that train a network in a few gradient steps."""

from dd_lightning.distilled import DistilledData
from dd_lightning.networks import AlexCifarNet, LeNet

__all__ = ["AlexCifarNet", "DistilledData", "LeNet"]
