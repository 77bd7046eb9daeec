"""Real data: packed arrays, data sets and the minibatches cut from them."""

from dd_lightning.data.datamodule import Batch, OwnMinibatches, RealData
from dd_lightning.data.datasets import Digits, ImageDataset, Packed, TorchvisionDataset
from dd_lightning.data.differentiable import Augment, FlipRotate, Siamese, Unchanged, augment_of
from dd_lightning.data.files import Folder
from dd_lightning.data.foreign import LABELS_FILE, read_sets
from dd_lightning.data.ordinary import DistilledDataset
from dd_lightning.data.pictures import Pictures, Preprocessing
from dd_lightning.data.published import Cub200, Voc2007
from dd_lightning.data.whitening import ZCA, Whitening, whitening_of

__all__ = [
    "LABELS_FILE",
    "ZCA",
    "Augment",
    "Batch",
    "Cub200",
    "Digits",
    "DistilledDataset",
    "FlipRotate",
    "Folder",
    "ImageDataset",
    "OwnMinibatches",
    "Packed",
    "Pictures",
    "Preprocessing",
    "RealData",
    "Siamese",
    "TorchvisionDataset",
    "Unchanged",
    "Voc2007",
    "Whitening",
    "augment_of",
    "read_sets",
    "whitening_of",
]
