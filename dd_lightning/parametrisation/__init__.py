"""Maps from what is learned to what the inner loop uses."""

from dd_lightning.parametrisation.budget import Budget
from dd_lightning.parametrisation.images import Bases, Images, Pixels, images_of
from dd_lightning.parametrisation.labels import FixedLabels, Labels, LearnedLabels
from dd_lightning.parametrisation.rates import softplus_inverse

__all__ = [
    "Bases",
    "Budget",
    "FixedLabels",
    "Images",
    "Labels",
    "LearnedLabels",
    "Pixels",
    "images_of",
    "softplus_inverse",
]
