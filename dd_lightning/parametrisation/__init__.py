"""Maps from what is learned to what the inner loop uses."""

from dd_lightning.parametrisation.labels import FixedLabels, Labels, LearnedLabels

__all__ = ["FixedLabels", "Labels", "LearnedLabels"]
