"""From a composed configuration to objects, and from objects to the card that describes them."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.loggers import Logger
from torch import nn

from dd_lightning.commands.errors import named
from dd_lightning.commands.learned import card_of, check_window, learned, made_for, settle_images
from dd_lightning.data import RealData, Whitening
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import FixedPretrainedInit, Init, RandomPretrainedInit
from dd_lightning.networks import TorchvisionNetwork, check_network, origin_of
from dd_lightning.objectives import Objective
from dd_lightning.sources import Sets
from dd_lightning.system.processor import versions
from dd_lightning.training.loggers import make_logger
from dd_lightning.unroll import InnerOptimizer

log = logging.getLogger(__name__)

TRIED = 100  # images of a step on which an engine is tried: more take longer, and tell no more

# What distilled data are made for, and what an evaluation takes over from their card.
CARD_GROUPS = ("dataset", "whitening", "network", "init", "objective", "inner", "order", "augment")

# A run may go on from a checkpoint only if these agree: they decide what is computed.
COMPUTED_FROM = (*CARD_GROUPS, "distilled", "optimizer", "schedule", "images", "labels", "window", "grow")

# But where files lie, and who reads them.
NOT_COMPUTED_FROM = (
    *(f"dataset.{key}" for key in ("data_dir", "workers", "cache_gb")),
    "whitening.folder",
    "init.populations_dir",
)


def build_data(cfg: DictConfig, whitening: Whitening | None = None) -> RealData:
    """The real data, loaded; their form is then known to the rest of the configuration (`${dataset.channels}` …).

    Args:
        whitening: that distilled data bring, used where the configuration asks for one instead of fitting it again.
    """
    zca = instantiate(cfg.whitening) if cfg.get("whitening") else None
    data = RealData(instantiate(cfg.dataset), cfg.batch_size, cfg.seed, zca if whitening is None else None)
    with named("dataset"):
        data.prepare_data()
        data.setup()
    if zca is not None and whitening is not None:
        data.preprocessing = replace(data.preprocessing, whitening=whitening)
    with open_dict(cfg.dataset):
        cfg.dataset.channels = data.preprocessing.channels
        cfg.dataset.image_size = data.preprocessing.image_size
        cfg.dataset.num_classes = data.num_classes
    return data


def build_network(cfg: DictConfig, data: RealData, init: Init) -> nn.Module:
    """The network template, checked against the data set and the init."""
    if data.preprocessing.whitening is not None and isinstance(init, RandomPretrainedInit | FixedPretrainedInit):
        raise ValueError("networks of a population were trained on pictures that are not whitened: whitening=none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of buffers: every command has the same ones
        network = instantiate(cfg.network)
    if not isinstance(network, nn.Module):
        raise ValueError(f"network must be a torch.nn.Module, not {type(network).__name__}")
    check_network(network, data.preprocessing.image_shape, data.num_classes)
    init.check(network, data.preprocessing.image_shape, data.num_classes)
    return network


def build_objective(cfg: DictConfig, data: RealData) -> Objective:
    objective = instantiate(cfg.objective)
    objective.check(data.num_classes)
    return objective


def build_sets(cfg: DictConfig, data: RealData, objective: Objective | None = None) -> Sets:
    """The distilled data, of which a baseline has several sets, with the labels that the objective asks for."""
    made = instantiate(cfg.distilled, data=data)
    sets = made if isinstance(made, Sets) else Sets([made])
    order, augment = instantiate(cfg.order), instantiate(cfg.augment)
    if cfg.distilled.get("path") and cfg.distilled.get("images_per_class"):  # of a larger set
        order = order.of_fewer(cfg.distilled.images_per_class)
    used = {"order": order, "augment": augment, "whitening": data.preprocessing.whitening}
    sets = sets.used(**used)
    for one in sets.members[:1]:
        order.check(one.images, one.labels, len(one.raw_learning_rates))
    return sets if objective is None or not isinstance(made, Sets) else sets.relabelled(objective)


def build_distilled(cfg: DictConfig, data: RealData) -> DistilledData:
    """The distilled data to start from; of a baseline the first set.

    Raises:
        ValueError: there are none, or they are candidates that only an evaluation can choose from.
    """
    sets = build_sets(cfg, data)
    if sets.keep is not None or not sets.members:
        raise ValueError("these distilled data are for dd-evaluate alone; start from distilled=random_real or kmeans")
    return sets.members[0]


def build_distiller(cfg: DictConfig, data: RealData) -> DatasetDistiller:
    """Algorithm 1, with its parts checked against each other."""
    objective = build_objective(cfg, data)
    init = instantiate(cfg.init)
    network = build_network(cfg, data, init)
    unroll, window, labels, images = (instantiate(cfg[group]) for group in ("unroll", "window", "labels", "images"))
    growing = instantiate(cfg.grow) if cfg.grow else None
    with named("grow" if growing else "budget"):
        budget = settle_images(cfg, data, images, labels, growing)
    distilled = build_distilled(cfg, data)
    with named("unroll"):
        if not isinstance(unroll.optimizer, InnerOptimizer):
            raise ValueError(f"optimizer must be one of group inner, not {unroll.optimizer!r}")
        unroll.check(network, init.sample(network, step=0), distilled.images[0, :TRIED])
    with named("window"):
        check_window(window, distilled, init.per_step)
    distilled, raw_labels = learned(cfg, data, distilled, images, labels)
    card = make_card(cfg, data)
    card |= card_of(distilled, budget) | {"network": card["network"] | origin_of(network)}
    return DatasetDistiller(
        made_for(init, network, replace(distilled, card=card)),
        network,
        init,
        unroll,
        objective,
        instantiate(cfg.optimizer),
        instantiate(cfg.schedule),
        cfg.rate_scale,
        computed_from(cfg, data, network),
        cfg.precision,
        cfg.chunk,
        # A set that grows cannot be recorded, and a recorded step is not looked into.
        cfg.capture and growing is None and not cfg.trainer.get("detect_anomaly"),
        labels,
        raw_labels,
        window,
        cfg.seed,
        cfg.piece,
    )


def build_loggers(cfg: DictConfig, folder: Path, step: int) -> list[Logger]:
    """The configured loggers, which go on after outer step `step`."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    loggers = []
    for name, settings_of in (cfg.logger or {}).items():
        with named(f"logger.{name}"):
            loggers.append(make_logger(instantiate(settings_of, _partial_=True), config, folder, step))
    return loggers


def settings(cfg: DictConfig, group: str) -> dict[str, Any]:
    """A group's resolved settings, without Hydra's own keys."""
    resolved: Any = OmegaConf.to_container(cfg[group], resolve=True)
    return {key: value for key, value in resolved.items() if not key.startswith("_")}


def make_card(cfg: DictConfig, data: RealData) -> dict[str, Any]:
    """What the distilled data are made for."""
    choices = HydraConfig.get().runtime.choices
    card: dict[str, Any] = {
        group: {"choice": choices.get(group), "target": cfg[group].get("_target_"), **settings(cfg, group)}
        for group in CARD_GROUPS
    }
    return card | {
        "classes": data.num_classes,
        **({} if data.class_names is None else {"class_names": data.class_names}),
        "preprocessing": data.preprocessing.as_dict(),
        "seed": cfg.seed,
        "versions": versions(),
    }


def computed_from(cfg: DictConfig, data: RealData, network: nn.Module) -> dict[str, Any]:
    """The settings that decide what a run computes, flat, the real data, and weights that a network brings."""
    flat: dict[str, Any] = {"seed": cfg.seed, "batch_size": cfg.batch_size, "rate_scale": cfg.rate_scale}
    flat["precision"] = cfg.precision
    for group in COMPUTED_FROM:
        if cfg[group] is not None:
            flat |= {f"{group}.{key}": value for key, value in settings(cfg, group).items()}
            flat[f"{group}._target_"] = cfg[group].get("_target_")
    for apart in NOT_COMPUTED_FROM:
        flat.pop(apart, None)
    if isinstance(network, TorchvisionNetwork):
        flat["network.weights"] = network.content
    if "head" in cfg.init and cfg.init.population is not None:  # which has no use for them
        flat = {key: value for key, value in flat.items() if key not in ("init.head", "init.seed")}
    return flat | {"dataset.content": data.content}
