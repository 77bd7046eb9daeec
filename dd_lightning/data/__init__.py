"""Real data: packed arrays, data sets and the minibatches cut from them."""

from dd_lightning.data.datamodule import OwnMinibatches, RealData
from dd_lightning.data.datasets import Digits, ImageDataset, Packed, Preprocessing, TorchvisionDataset

__all__ = ["Digits", "ImageDataset", "OwnMinibatches", "Packed", "Preprocessing", "RealData", "TorchvisionDataset"]
