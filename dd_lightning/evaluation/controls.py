"""What stands beside distilled data: the same training on something else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dd_lightning.data import RealData, Unchanged
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.evaluator import Evaluation
from dd_lightning.evaluation.heldout import HeldOutResult
from dd_lightning.evaluation.ordinary import Examples, Protocol
from dd_lightning.parametrisation import Pixels
from dd_lightning.sources import Sets, random_real, real_images
from dd_lightning.system.seeding import Stream, generator

OWN = "own"
CONTROLS = ("random", "hard", "whole", "unaugmented")
RANDOM_SETS = 5
WHOLE_NETWORKS = 3  # that are trained on all pictures, which is costly, and varies little


@dataclass(frozen=True)
class Contender:
    """Sets of examples, over which networks are dealt, and how networks are trained on them.

    Attributes:
        words: what they are, for people.
        numbers: that are stored of one set.
    """

    words: str
    sets: list[Examples]
    protocol: Protocol
    networks: int
    numbers: int

    def unaugmented(self) -> "Contender":
        """The same without augmentation."""
        sets = [replace(one, augment=Unchanged()) for one in self.sets]
        return replace(self, words=f"{self.words}, without augmentation", sets=sets)


def contenders(
    evaluation: Evaluation,
    members: Sequence[DistilledData],
    controls: Sequence[str],
    protocol: Protocol,
    whole: Protocol,
) -> dict[str, Contender]:
    """The data and the controls asked for, by name.

    Args:
        whole: the protocol of the control `whole`.
    """
    first = members[0]
    common = (protocol, evaluation.tested)
    own = Contender("these data", [Examples.of(one) for one in members], *common, first.stored_numbers)
    found = {OWN: own}
    if "random" in controls:
        sets = random_control(evaluation, first, protocol.seed).members
        words = f"{sets[0].labels.numel()} random real images"
        examples = [Examples.of(replace(one, augment=first.augment)) for one in sets]
        found["random"] = Contender(words, examples, *common, sets[0].images.numel())
    if "hard" in controls and first.soft_labels is not None:
        hard = [replace(one, soft_labels=None) for one in members]
        words = "the same images with hard labels"
        found["hard"] = Contender(words, [Examples.of(one) for one in hard], *common, hard[0].stored_numbers)
    if "whole" in controls:
        train, objective = evaluation.data.train, evaluation.learner.objective
        labels = objective.wanted(train.labels)
        everything = Examples(train.images, labels, first.augment, evaluation.data.preprocessing)
        words = f"all {len(train):,} training pictures"
        found["whole"] = Contender(
            words, [everything], whole, min(WHOLE_NETWORKS, evaluation.tested), train.images.numel()
        )
    if "unaugmented" in controls and not isinstance(first.augment, Unchanged):
        found["unaugmented"] = own.unaugmented()
        if "random" in found:
            found["random_unaugmented"] = found["random"].unaugmented()
    return found


def random_control(evaluation: Evaluation, distilled: DistilledData, seed: int) -> Sets:
    """Sets of random real images, as many of each class as the distilled data store numbers for; one at least."""
    per_class = fitting(distilled.stored_numbers, distilled.images[0, 0].numel(), evaluation.data.num_classes)
    sets = min(RANDOM_SETS, evaluation.tested)
    made = random_real(evaluation.data, steps=1, epochs=1, images_per_class=per_class, sets=sets, seed=seed)
    return made.relabelled(evaluation.learner.objective)


def random_alike(data: RealData, one: DistilledData) -> list[DistilledData]:
    """Sets of random real images that are used as these data are; of bases, as many as have their stored numbers.

    Raises:
        ValueError: fewer real images of a class than that.
    """
    if one.raw_images is not None:
        stored = sum(tensor.numel() for tensor in one.learned_images.values())
        one = one.first(fitting(stored, one.images[:, 0].numel(), data.num_classes))
    one = replace(one, soft_labels=None, raw_images=None, parametrisation=Pixels())
    draws = [generator(data.seed, Stream.BASELINE, index) for index in range(RANDOM_SETS)]
    return [replace(one, images=real_images(data, one.labels, random)) for random in draws]


def fitting(numbers: int, pixels: int, classes: int) -> int:
    """How many pictures of each class so many numbers store; one at least."""
    return max(1, numbers // (pixels * classes))


def entry(words: str, result: HeldOutResult, sets: int, images: int, numbers: int) -> dict[str, Any]:
    """What `result.json` says of what was tested; images and stored numbers are of one set."""
    return {
        "words": words,
        "accuracy_mean": result.mean,
        "accuracy_std": result.std,
        "sets": sets,
        "images": images,
        "stored_numbers": numbers,
    }
