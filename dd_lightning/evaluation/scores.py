"""Scores of distilled data (DD-Ranking, github.com/NUS-HPC-AI-Lab/DD-Ranking), of accuracies as fractions.

There learning rates are chosen on the test set; here on validation pictures, with other networks than those tested.
With A the accuracy of networks that were trained on: all real data (whole), the distilled images with hard labels
(hard), the distilled data as they are to be used (own), and as many random real images used in the same way (random).
"""

import math


def hard_label_recovery(whole: float, hard: float) -> float:
    """HLR = A_whole − A_hard: what is lost, of all data, without labels that know more; lower is better."""
    return whole - hard


def improvement_over_random(own: float, random: float) -> float:
    """IOR = A_own − A_random: what the images bring beyond how they are used; higher is better."""
    return own - random


def label_robust_score(hlr: float, ior: float, weight: float = 0.5) -> float:
    """LRS = s(α) of α = w·IOR − (1 − w)·HLR: 1 for images that do not need their soft labels."""
    return scaled(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(
    own: float, random: float, own_unaugmented: float, random_unaugmented: float, weight: float = 0.5
) -> float:
    """ARS = s(β) of β = γ·(A_own − A_random) with augmentation + (1 − γ)·(the same) without."""
    return scaled(weight * (own - random) + (1 - weight) * (own_unaugmented - random_unaugmented))


def scaled(x: float) -> float:
    """s(x) = (eˣ − e⁻¹) / (e − e⁻¹), which takes −1 to 1 to 0 to 1."""
    return (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def scores(accuracies: dict[str, float]) -> dict[str, float]:
    """All scores that there are accuracies for.

    Args:
        accuracies: in %, by the name of what networks were trained on: own, random, hard, whole, unaugmented,
            random_unaugmented.
    """
    a = {name: value / 100 for name, value in accuracies.items()}
    found = {}
    if "random" in a:
        found["IOR"] = improvement_over_random(a["own"], a["random"])
    if {"whole", "hard"} <= set(a):
        found["HLR"] = hard_label_recovery(a["whole"], a["hard"])
    if {"IOR", "HLR"} <= set(found):
        found["LRS"] = label_robust_score(found["HLR"], found["IOR"])
    if {"random", "unaugmented", "random_unaugmented"} <= set(a):
        found["ARS"] = augmentation_robust_score(a["own"], a["random"], a["unaugmented"], a["random_unaugmented"])
    return found
