"""From a composed configuration to objects, and from objects to the card that describes them."""

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from dd_lightning.baselines import Sets
from dd_lightning.commands.launch import named
from dd_lightning.data import RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.init import Init
from dd_lightning.networks import check_network
from dd_lightning.objectives import Objective

# What distilled data are made for, and what an evaluation takes over from their card.
CARD_GROUPS = ("dataset", "network", "init", "objective", "inner")


def build_data(cfg: DictConfig) -> RealData:
    """The real data, loaded; their form is then known to the rest of the configuration (`${dataset.channels}` …)."""
    data = RealData(instantiate(cfg.dataset), cfg.batch_size, cfg.seed)
    with named("dataset"):
        data.prepare_data()
        data.setup()
    with open_dict(cfg.dataset):
        cfg.dataset.channels = data.preprocessing.channels
        cfg.dataset.image_size = data.preprocessing.image_size
        cfg.dataset.num_classes = data.num_classes
    return data


def build_network(cfg: DictConfig, data: RealData, init: Init) -> nn.Module:
    """The network template, checked against the data set and the init."""
    network = instantiate(cfg.network)
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
    if not isinstance(made, Sets):
        return Sets([made])
    return made if objective is None else made.relabelled(objective)


def build_distilled(cfg: DictConfig, data: RealData) -> DistilledData:
    """The distilled data to start from; of a baseline the first set.

    Raises:
        ValueError: there are none, or they are candidates that only an evaluation can choose from.
    """
    sets = build_sets(cfg, data)
    if sets.keep is not None or not sets.members:
        raise ValueError("these distilled data are for dd-evaluate alone; start from distilled=random_real or kmeans")
    return sets.members[0]


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
        "order": "in every epoch the steps in the order of the file, each step one minibatch",
        "preprocessing": data.preprocessing.as_dict(),
        "seed": cfg.seed,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    packages = ("dd_lightning", "torch", "torchvision", "pytorch-lightning", "higher")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def hardware() -> str:
    """The device that did the work."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{models[0] if models else platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
