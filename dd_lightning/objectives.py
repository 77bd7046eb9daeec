"""What the trained networks θ_T should do on real data: the outer loss, and what a held-out network is judged by."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dd_lightning.networks import Predictions

Measures = dict[str, Float[Tensor, "*networks"]]  # in %


class Objective(ABC):
    """An outer loss, and measures of how well a network does what it asks for."""

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "init batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """The outer loss: the mean over sampled networks and real images."""

    @abstractmethod
    def measures(self, predictions: Predictions) -> Measures:
        """Of each network; the first one chooses checkpoints, and is what a command returns."""

    def wanted(self, labels: Int[Tensor, "*images"]) -> Int[Tensor, "*images"]:
        """What networks should predict for pictures of these labels."""
        return labels

    def check(self, num_classes: int) -> None:  # noqa: B027
        """Refuses a data set that lacks a class of the objective.

        Raises:
            ValueError: naming the class.
        """


class Classification(Objective):
    """Correct classification: the mean cross entropy (Algorithm 1, line 7)."""

    def __call__(self, logits: Float[Tensor, "init batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))

    def measures(self, predictions: Predictions) -> Measures:
        return {"accuracy": predictions.accuracy()}


class Poisoning(Classification):
    """Misclassify class K as class T, and all else correctly: cross entropy with K's labels modified to T (Eq. 10).

    Measures: the accuracy with respect to the modified labels and, of the true labels, the overall accuracy, the share
    of the attacked class that is predicted as the target, and the accuracy of each class.

    Args:
        attack_class: K.
        target_class: T.

    Raises:
        ValueError: K = T, or not a class.
    """

    def __init__(self, attack_class: int, target_class: int) -> None:
        for name, value in (("attack_class", attack_class), ("target_class", target_class)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a class, a whole number from 0, not {value!r}")
        if attack_class == target_class:
            raise ValueError(f"attack_class and target_class are both {attack_class}")
        self.attack_class, self.target_class = attack_class, target_class

    def check(self, num_classes: int) -> None:
        for name in ("attack_class", "target_class"):
            if getattr(self, name) >= num_classes:
                raise ValueError(
                    f"objective: there is no {name} {getattr(self, name)} among the classes 0 to {num_classes - 1}"
                )

    def wanted(self, labels: Int[Tensor, "*images"]) -> Int[Tensor, "*images"]:
        return labels.masked_fill(labels == self.attack_class, self.target_class)

    def __call__(self, logits: Float[Tensor, "init batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        return super().__call__(logits, self.wanted(labels))

    def measures(self, predictions: Predictions) -> Measures:
        of_class = predictions.accuracy_of_classes()
        return {
            "accuracy_modified_labels": predictions.accuracy(self.wanted(predictions.labels)),
            "accuracy_true_labels": predictions.accuracy(),
            "attack_share": predictions.share(self.attack_class, self.target_class),
            **{f"accuracy_class_{c}": of_class[..., c] for c in range(of_class.shape[-1])},
        }
