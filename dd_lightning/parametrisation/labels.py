"""Labels: fixed classes, or real numbers that are learned (Sucholutsky & Schonlau, 2019)."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dd_lightning.system.checks import check_choice, check_positive

CONSTRAINTS = ("none", "nonnegative", "softmax")


class Labels(ABC):
    """A map from what is learned to the labels of the inner loss −Σ y log p."""

    @abstractmethod
    def raw(
        self, classes: Int[Tensor, "step batch"], num_classes: int, labels: Float[Tensor, "step batch classes"] | None
    ) -> Float[Tensor, "step batch classes"] | None:
        """What is learned, at the start; None where nothing is.

        Args:
            labels: to start from, where there are some already; else the classes, one-hot.
        """

    def labels(self, raw: Float[Tensor, "step batch classes"]) -> Float[Tensor, "step batch classes"]:
        """y, differentiable in what is learned."""
        return raw

    def project_(self, raw: Float[Tensor, "step batch classes"]) -> None:  # noqa: B027
        """Brings what is learned back to where it may be, in place, after an outer step."""

    def numbers(self, num_classes: int) -> int:
        """How many are stored for each image."""
        return num_classes


class FixedLabels(Labels):
    """The paper's: the class of each image (Section 3.1)."""

    def raw(
        self, classes: Int[Tensor, "step batch"], num_classes: int, labels: Float[Tensor, "step batch classes"] | None
    ) -> None:
        return None

    def numbers(self, num_classes: int) -> int:
        return 0


class LearnedLabels(Labels):
    """Real numbers for each class, one-hot at the start.

    Args:
        constraint: none; nonnegative (negative ones become 0 after each outer step); or softmax (of what is learned).
        confidence: of the class at the start of `softmax`, which cannot be 1.

    Raises:
        ValueError: an unknown constraint, or a confidence outside 0 to 1.
    """

    def __init__(self, constraint: str = "none", confidence: float = 0.99) -> None:
        check_choice("constraint", constraint, CONSTRAINTS)
        check_positive(confidence=confidence)
        if confidence >= 1:
            raise ValueError(f"confidence must be below 1, not {confidence}")
        self.constraint, self.confidence = constraint, confidence

    def raw(
        self, classes: Int[Tensor, "step batch"], num_classes: int, labels: Float[Tensor, "step batch classes"] | None
    ) -> Float[Tensor, "step batch classes"]:
        if num_classes < 2:
            raise ValueError("labels of a single class cannot be learned: there is nothing to tell apart")
        if labels is None:
            labels = F.one_hot(classes, num_classes).float()
            if self.constraint == "softmax":
                rest = (1 - self.confidence) / (num_classes - 1)
                labels = labels * (self.confidence - rest) + rest
        return labels.clamp_min(1e-6).log() if self.constraint == "softmax" else labels.clone()

    def labels(self, raw: Float[Tensor, "step batch classes"]) -> Float[Tensor, "step batch classes"]:
        return torch.softmax(raw, dim=-1) if self.constraint == "softmax" else raw

    @torch.no_grad()
    def project_(self, raw: Float[Tensor, "step batch classes"]) -> None:
        if self.constraint == "nonnegative":
            raw.clamp_(min=0)
