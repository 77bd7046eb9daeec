"""dd-evaluate: distilled data, learned or a baseline's, tested on unseen networks or in another use."""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dd_lightning.commands.build import (
    build_data,
    build_network,
    build_objective,
    build_sets,
)
from dd_lightning.commands.cards import overridden, with_card
from dd_lightning.commands.launch import command
from dd_lightning.data import Whitening
from dd_lightning.distilled import OTHERS, DistilledData
from dd_lightning.evaluation import Evaluation, Learner, Outcome
from dd_lightning.evaluation.heldout import FEW
from dd_lightning.init import FixedInit
from dd_lightning.report.picture import draw
from dd_lightning.sources import Sets
from dd_lightning.system.atomic import write_json
from dd_lightning.system.checks import check_choice, check_count
from dd_lightning.system.locking import alone
from dd_lightning.system.processor import device_of, hardware, versions
from dd_lightning.system.workers import Workers
from dd_lightning.unroll import AdjointUnroll

FOREIGN = "dd_lightning.sources.tensors"  # data of others have no card

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> float:
    """Tests distilled data on unseen networks, or in another use.

    Data set, network, init and objective are those of the data's card, unless the command line says otherwise.

    Returns:
        Mean accuracy in %.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_count(networks=cfg.networks)
    if not isinstance(cfg.per_step, bool):
        raise ValueError(f"per_step must be true or false, not {cfg.per_step!r}")
    check_choice("split", cfg.split, ["test", "validation"])
    with alone(folder):
        return run(cfg, folder)


def run(cfg: DictConfig, folder: Path) -> float:
    """One evaluation, new or going on, in `folder`."""
    started, whitening = time.monotonic(), None
    if cfg.distilled.get("path") and cfg.distilled._target_ != FOREIGN:
        brought = DistilledData.load(cfg.distilled.path)
        cfg, whitening = with_card(cfg, brought.card), brought.whitening
    use = instantiate(cfg.use)
    pieces = folder / "pieces" / digest(cfg)
    with Workers(cfg.processes if device_of(cfg.device).type == "cpu" else 1, pieces) as workers:
        evaluation, sets = build_evaluation(cfg, workers, whitening)
        workers.folder = pieces / sets.digest  # what lies at a path may have changed
        outcome = use(evaluation, sets)
    if outcome.sets:
        title = f"{cfg.split} accuracy: {outcome.result}"
        data = evaluation.data
        draw(outcome.sets[0], data.preprocessing, title, folder / "distilled.png", data.class_names)
    write_result(cfg, outcome, time.monotonic() - started, folder)
    shutil.rmtree(pieces.parent, ignore_errors=True)
    tell(cfg.split, outcome)
    log.info(f"saved in {os.path.relpath(folder)}: result.json" + (", distilled.png" if outcome.sets else ""))
    return outcome.result.mean


def build_evaluation(cfg: DictConfig, workers: Workers, whitening: Whitening | None = None) -> tuple[Evaluation, Sets]:
    """The networks and pictures of an evaluation, and what it evaluates.

    Args:
        whitening: that the distilled data bring.
    """
    device = device_of(cfg.device)
    data = build_data(cfg, whitening)
    objective = build_objective(cfg, data)
    sets = build_sets(cfg, data, objective)
    brought = sets.members[0].initial_weights if sets.members and not overridden("init") else None
    if brought is None:
        init = instantiate(cfg.init)
    else:
        init = FixedInit(weights=brought, others=sets.members[0].card.get(OTHERS))
    network = build_network(cfg, data, init)
    buffers = dict(network.named_buffers())
    network.load_state_dict({name: v for name, v in (brought or {}).items() if name in buffers}, strict=False)
    data.to(device)
    network.to(device)
    learner = Learner(network, init, AdjointUnroll(instantiate(cfg.inner), batched=None), data.preprocessing, objective)
    return Evaluation(learner, data, workers, cfg.networks, cfg.split, cfg.per_step), sets


def write_result(cfg: DictConfig, outcome: Outcome, seconds: float, folder: Path) -> None:
    choices = HydraConfig.get().runtime.choices
    counts = {"networks": outcome.networks, "networks_chose": outcome.networks_chose}
    content = {
        "name": cfg.name,
        "row": choices.get("row"),
        "column": choices.get("column"),
        "stored_numbers": outcome.sets[0].stored_numbers if outcome.sets else None,
        "set": cfg.distilled.get("path") or choices.get("distilled"),
        "network": cfg.network.get("name") or cfg.network._target_.rpartition(".")[2],
        "settings": {group: OmegaConf.to_container(cfg[group], resolve=True) for group in ("dataset", "network")},
        "split": cfg.split,
        cfg.split: outcome.result.as_dict() | counts,
        "use": {"choice": choices.get("use"), **outcome.details},
        "seconds": seconds,
        "hardware": hardware(),
        "versions": versions(),
        "card": outcome.sets[0].card if outcome.sets else {},
    }
    write_json(folder / "result.json", content)


def tell(split: str, outcome: Outcome) -> None:
    """Says what came out."""
    result = outcome.result
    for line in outcome.lines():
        log.info(line)
    low, high = result.interval
    few = " (too few for an interval)" if 1 < len(result.accuracies) < FEW else ""
    interval = f" (95 % interval {low:.2f} to {high:.2f})" if high > low else few
    log.info(f"{split} accuracy over {outcome.counts}: {result}{interval}")
    for line in result.lines():
        log.info(f"  {line}")
    for step, value in enumerate(result.as_dict()["accuracy_per_step"] or []):
        log.info(f"  after {step} GD steps: {value:.2f} %")


def digest(cfg: DictConfig) -> str:
    """Names the settings that decide what is computed."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in ("processes", "device", "runs_dir", "traceback"):
        settings.pop(key)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


main = command("evaluate")

if __name__ == "__main__":
    main()
