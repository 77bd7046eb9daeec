"""Shards of a population: a few networks that are trained, tested and written together."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dd_lightning.data import RealData
from dd_lightning.init.population import Population
from dd_lightning.init.pretraining import Recipe, train_networks
from dd_lightning.init.random import RandomInit


@dataclass(frozen=True)
class Job:
    """What is needed to train any shard."""

    population: Population
    network: nn.Module
    inits: dict[str, RandomInit]  # of each part
    data: RealData
    recipe: Recipe
    at_once: int


def train_shard(job: Job, part: str, indices: range, on_progress: Callable[[float], None]) -> list[float]:
    """Trains and writes networks `indices` of a part of the population.

    Args:
        on_progress: told how much was trained, in networks.

    Returns:
        Each network's test accuracy in %.
    """
    weights, accuracies = train_networks(
        job.network, job.inits[part], job.data, job.recipe, indices, job.at_once, on_progress
    )
    job.population.write(part, indices.start, weights, accuracies)
    return accuracies.tolist()
