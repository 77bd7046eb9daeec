"""dd-pretrain: a population of trained networks (Section 3.5)."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from dd_lightning.commands.build import build_data, build_network, settings
from dd_lightning.commands.launch import command
from dd_lightning.data import RealData
from dd_lightning.init import HELD_OUT, PARTS, TRAIN, Job, Population, RandomInit, Recipe, check_batched, train_shard
from dd_lightning.networks import class_name
from dd_lightning.system.checks import check_count
from dd_lightning.system.locking import alone
from dd_lightning.system.processor import device_of, hardware, is_out_of_memory, versions
from dd_lightning.system.progress import progress_of
from dd_lightning.system.workers import Workers

log = logging.getLogger(__name__)

UNNAMED = {"recipe.precision": "float32", "dataset.border": 0}  # what a card or a data set that does not name them has


def pretrain(cfg: DictConfig) -> None:
    """Trains the networks that the population's folder lacks, and completes its card."""
    started = time.monotonic()
    check_count(networks=cfg.networks, held_out_networks=cfg.held_out_networks)
    check_count(**{name: cfg[name] for name in ("at_once", "workers", "shard") if cfg[name] is not None})
    if cfg.seed == cfg.held_out_seed:
        raise ValueError(f"seed and held_out_seed are both {cfg.seed}: held-out networks must be other networks")
    device = device_of(cfg.device)
    workers = cfg.workers or (1 if device.type != "cpu" else torch.get_num_threads())
    if device.type == "cpu":
        torch.set_num_threads(1)  # in every process, so that their number does not change the rounding
    job = build_job(cfg, device)
    with alone(job.population.path, "wait for it, or give this one another name"):
        begin(job.population)
        size = cfg.shard or max(4, job.at_once)
        shards = [shard for part in PARTS for shard in split(part, job.population.missing(part), size)]
        missing = sum(len(indices) for _, indices in shards)
        train_missing(job, shards, missing, workers)
        if missing:
            rate = 60 * missing / (time.monotonic() - started)
            log.info(f"{missing} networks trained, {rate:.2f} a minute")
        complete(job.population)
    log.info(f"saved in {os.path.relpath(job.population.path)}")


def build_job(cfg: DictConfig, device: torch.device) -> Job:
    """The checked objects."""
    recipe: Recipe = instantiate(cfg.recipe)
    seeds = {TRAIN: cfg.seed, HELD_OUT: cfg.held_out_seed}
    inits = {part: RandomInit(cfg.scheme, cfg.gain, seed=seed) for part, seed in seeds.items()}
    data = build_data(cfg)
    network = build_network(cfg, data, inits[TRAIN])
    at_once = cfg.at_once or (100 if device.type != "cpu" else 4)
    if at_once > 1 and device.type != "cpu":
        check_batched(network, inits[TRAIN], data)
    card = make_card(cfg, data, network, seeds)
    population = Population(Path(cfg.populations_dir, card["name"]), card)
    data.to(device)
    network.to(device)
    return Job(population, network, inits, data, recipe, at_once)


def train_missing(job: Job, shards: list[tuple[str, range]], missing: int, workers: int) -> None:
    """Trains `missing` networks, shard by shard, with a progress bar over all of the population."""
    total = sum(job.population.count(part) for part in PARTS)
    if missing < total:
        log.info(f"{total - missing} of {total} networks are there")
    pieces = {f"{part} {indices.start} to {indices.stop - 1}": (job, part, indices) for part, indices in shards}
    try:
        with progress_of("training", total, total - missing) as advance, Workers(workers) as pool:
            for name, accuracies in pool.run(train_shard, pieces, advance):
                log.info(f"{name}: test accuracy {fmean(accuracies):.2f} %")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory ({' '.join(str(error).split())[:120]}); what is finished is kept; "
            "a smaller at_once, workers or batch_size takes less"
        ) from error


def make_card(cfg: DictConfig, data: RealData, network: nn.Module, seeds: dict[str, int]) -> dict[str, Any]:
    """What the networks are and how they are trained."""
    choices = HydraConfig.get().runtime.choices
    dataset = settings(cfg, "dataset")
    for key in ("data_dir", "workers", "cache_gb"):
        dataset.pop(key, None)
    counts = {TRAIN: cfg.networks, HELD_OUT: cfg.held_out_networks}
    return {
        "name": cfg.name or data.dataset.name,
        "dataset": {"choice": choices.get("dataset"), **dataset},
        "preprocessing": data.preprocessing.as_dict(),
        "classes": data.num_classes,
        "class": class_name(network),
        "network": {"choice": choices.get("network"), **settings(cfg, "network")},
        "shapes": {name: list(p.shape) for name, p in network.named_parameters()},
        "recipe": settings(cfg, "recipe"),
        "batch_size": cfg.batch_size,
        "scheme": cfg.scheme,
        "gain": cfg.gain,
        "parts": {part: {"networks": counts[part], "seed": seeds[part]} for part in PARTS},
        "versions": versions(),
        "hardware": hardware(),
    }


def begin(population: Population) -> None:
    """Makes the population's folder with its card, or goes on with the one that is there.

    Raises:
        ValueError: that was made with other settings.
    """
    path = population.path
    if (path / "card.json").is_file():
        there, here = (UNNAMED | _decisive(card) for card in (Population(path).card, population.card))
        differing = [
            f"{k}: {there.get(k)} there, {here.get(k)} here" for k in there | here if there.get(k) != here.get(k)
        ]
        if differing:
            raise ValueError(
                f"population {path} is of other settings ({'; '.join(differing)}); give this one another name"
            )
    population.write_card()


def _decisive(card: dict[str, Any]) -> dict[str, Any]:
    """What makes one population another, flat."""
    kept = {key: value for key, value in card.items() if key not in ("versions", "hardware", "shapes", "parts")}
    kept["seed"] = {part: content["seed"] for part, content in card["parts"].items()}
    return {
        f"{group}.{key}" if key else group: value
        for group, content in kept.items()
        for key, value in (content if isinstance(content, dict) else {"": content}).items()
    }


def split(part: str, missing: list[int], size: int) -> Iterator[tuple[str, range]]:
    """Runs of successive missing networks, at most `size` long."""
    while missing:
        start = missing[0]
        length = next((i for i, index in enumerate(missing) if i == size or index != start + i), len(missing))
        yield part, range(start, start + length)
        missing = missing[length:]


def complete(population: Population) -> None:
    """Writes every network's test accuracy into the card."""
    for part, content in population.card["parts"].items():
        accuracies = content["accuracies"] = population.accuracies(part)
        log.info(
            f"{part}: {len(accuracies)} networks, test accuracy {fmean(accuracies):.2f} %, lowest {min(accuracies):.2f}"
        )
    population.write_card()


main = command("pretrain")

if __name__ == "__main__":
    main()
