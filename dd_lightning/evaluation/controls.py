"""What stands beside distilled data: the same training on something else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dd_lightning.data import Unchanged
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.evaluator import Evaluation
from dd_lightning.evaluation.ordinary import Examples, Protocol
from dd_lightning.sources import Sets, random_real

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
    evaluation: Evaluation, members: list[DistilledData], controls: Sequence[str], protocol: Protocol, whole: Protocol
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
    data = evaluation.data
    per_class = distilled.stored_numbers // (distilled.images[0, 0].numel() * data.num_classes)
    sets = min(RANDOM_SETS, evaluation.tested)
    made = random_real(data, steps=1, epochs=1, images_per_class=max(per_class, 1), sets=sets, seed=seed)
    return made.relabelled(evaluation.learner.objective)
