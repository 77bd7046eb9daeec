"""Ways to obtain distilled data: to start from, of an earlier run, or a baseline's (Section S-1)."""

from dd_lightning.sources.foreign import tensors
from dd_lightning.sources.sets import Each, Sets, average_real, kmeans, no_images, random_real, random_subsets
from dd_lightning.sources.starts import learned, noise, real, real_images

__all__ = [
    "Each",
    "Sets",
    "average_real",
    "kmeans",
    "learned",
    "no_images",
    "noise",
    "random_real",
    "random_subsets",
    "real",
    "real_images",
    "tensors",
]
