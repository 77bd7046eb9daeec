"""Images as the neighbours of K-nearest-neighbour classification (Table 1)."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from dd_lightning.data import Pictures, Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.evaluator import Evaluation, Outcome
from dd_lightning.evaluation.grid import choice
from dd_lightning.evaluation.heldout import HeldOutResult
from dd_lightning.sources import Sets
from dd_lightning.system.checks import check_choice, check_count
from dd_lightning.system.workers import Result

PIECE = 1024  # pictures that are real numbers at once


class KNearestNeighbours:
    """K-NN on the images, with the best K and metric.

    Both are chosen on validation pictures; the accuracy is that of all sets with them.

    Args:
        neighbours: values of K.
        metrics: of `l1` and `l2`, between normalised images.

    Raises:
        ValueError: an unknown metric, or a K below 1.
    """

    def __init__(self, neighbours: Sequence[int] = (1, 3), metrics: Sequence[str] = ("l1", "l2")) -> None:
        check_count(**{f"neighbours[{i}]": k for i, k in enumerate(neighbours)})
        for metric in metrics:
            check_choice("metric", metric, ["l1", "l2"])
        self.combinations = list(product(metrics, neighbours))

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        parts = [evaluation.data.validation, evaluation.data.test]
        pieces = {
            f"set{i}": (one, self.combinations, parts, evaluation.data.preprocessing)
            for i, one in enumerate(sets.members)
        }
        results = evaluation.workers.map("K-NN", accuracies, pieces)
        validation, test = np.stack([r["accuracy"] for r in results.values()]).transpose(2, 1, 0)  # combination, set
        names = [{"metric": metric, "neighbours": k} for metric, k in self.combinations]
        chosen, details = choice(names, {"accuracy": validation.mean(1)}, {"accuracy": test.mean(1)})
        details |= {"sets": len(sets.members), "pictures_chose": len(evaluation.data.validation)}
        result = (test if evaluation.split == "test" else validation)[chosen]
        return Outcome(HeldOutResult(torch.from_numpy(result)[:, None]), details, sets.members, networks=None)


def accuracies(
    distilled: DistilledData,
    combinations: Sequence[tuple[str, int]],
    parts: Sequence[Pictures],
    preprocessing: Preprocessing,
) -> Result:
    """Accuracy in % of K-NN with each metric and K on each part of the real pictures.

    Returns:
        `accuracy`, [combination, part].
    """
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = distilled.images.flatten(0, 1).flatten(1).cpu().numpy(), distilled.labels.flatten().cpu().numpy()
    found = []
    for metric, k in combinations:
        neighbours = KNeighborsClassifier(k, p=int(metric[1]), algorithm="brute").fit(images, labels)
        found.append([100 * _hits(neighbours, pictures, preprocessing) / len(pictures) for pictures in parts])
    return {"accuracy": np.array(found)}


def _hits(neighbours: Any, pictures: Pictures, preprocessing: Preprocessing) -> int:
    """How many pictures are classified right."""
    found = 0
    for start in range(0, len(pictures), PIECE):
        part = pictures[start : start + PIECE]
        predicted = neighbours.predict(preprocessing(part.images).flatten(1).cpu().numpy())
        found += int((predicted == part.labels.cpu().numpy()).sum())
    return found
