"""Real data: packed arrays, data sets and the minibatches cut from them."""

from dd_lightning.data.datamodule import Batch, OwnMinibatches, RealData
from dd_lightning.data.datasets import Digits, ImageDataset, Packed, Pictures, Preprocessing, TorchvisionDataset

__all__ = [
    "Batch",
    "Digits",
    "ImageDataset",
    "OwnMinibatches",
    "Packed",
    "Pictures",
    "Preprocessing",
    "RealData",
    "TorchvisionDataset",
]
