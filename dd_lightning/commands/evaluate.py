"""dd-evaluate: the held-out evaluation of any distilled data."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from dd_lightning.atomic import write_json
from dd_lightning.callbacks import progress_of_networks
from dd_lightning.checks import check_choice, check_count
from dd_lightning.commands.build import CARD_GROUPS, build_data, build_distilled, build_network, hardware
from dd_lightning.commands.launch import command
from dd_lightning.distilled import DistilledData
from dd_lightning.heldout import evaluate_held_out
from dd_lightning.init import FixedInit
from dd_lightning.picture import draw
from dd_lightning.resolvers import task_overrides
from dd_lightning.seeding import Stream
from dd_lightning.unroll import StoredUnroll

log = logging.getLogger(__name__)

# Settings that a card has no say in: where files lie, and what is run.
NOT_OF_CARD = ("data_dir", "source", "weights")


def evaluate(cfg: DictConfig) -> float:
    """Tests unseen networks trained on distilled data.

    Data set, network, init and objective are those of the data's card, unless the command line says otherwise.

    Returns:
        Mean test accuracy in %.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    check_count(networks=cfg.networks)
    check_choice("split", cfg.split, ["test", "validation"])
    card = DistilledData.load(cfg.distilled.path).card if cfg.distilled.get("path") else {}
    cfg = with_card(cfg, card)
    data = build_data(cfg)
    distilled = build_distilled(cfg, data)
    init = instantiate(cfg.init)
    if isinstance(init, FixedInit) and distilled.initial_weights is not None and not _overridden("init"):
        init = FixedInit(weights=distilled.initial_weights)
    network = build_network(cfg, data, init)
    if isinstance(init, FixedInit):
        check_weights(network, init)
    device = torch.device(cfg.device if cfg.device else "cuda" if torch.cuda.is_available() else "cpu")
    data.to(device)
    network.to(device)
    pictures = data.test if cfg.split == "test" else data.validation
    stream = Stream.HELD_OUT_TEST if cfg.split == "test" else Stream.HELD_OUT_VALIDATION
    with progress_of_networks("evaluating", init.num_held_out(cfg.networks)) as advance:
        result = evaluate_held_out(
            network,
            init.held_out(network, cfg.networks, stream),
            distilled.to(device),
            pictures,
            data.preprocessing,
            StoredUnroll(instantiate(cfg.inner)),
            cfg.per_step,
            on_progress=advance,
        )
    draw(distilled, data.preprocessing, f"{cfg.split} accuracy: {result}", folder / "distilled.png")
    write_json(
        folder / "result.json",
        {
            "name": cfg.name,
            "split": cfg.split,
            cfg.split: result.as_dict(),
            "hardware": hardware(),
            "card": distilled.card,
        },
    )
    low, high = result.interval
    count = len(result.accuracies)
    log.info(f"{cfg.split} accuracy over {count} network(s): {result} (95 % interval {low:.2f} to {high:.2f})")
    for step, value in enumerate(result.as_dict()["accuracy_per_step"] or []):
        log.info(f"  after {step} GD steps: {value:.2f} %")
    return result.mean


def check_weights(network: torch.nn.Module, init: FixedInit) -> None:
    """Refuses another architecture than that of the one network the data were distilled for."""
    weights = init.weights(network)
    own = {name: p.shape for name, p in network.named_parameters()}
    if own != {name: w.shape for name, w in weights.items()}:
        raise ValueError(
            f"these data were distilled for one fixed network whose weights do not fit {type(network).__name__}; "
            "give init=random to evaluate them on unseen networks"
        )


def _overridden(group: str) -> bool:
    """Whether the command line says anything of a config group."""
    return any(re.match(rf"[+~]*{group}[.=@]", o) for o in task_overrides())


def with_card(cfg: DictConfig, card: dict[str, Any]) -> DictConfig:
    """The configuration with the card's choices and settings beneath the command line's.

    A card is data from elsewhere: of it only names of config groups' options and plain settings are taken, never a
    `_target_`.

    Raises:
        ValueError: the card names a network or data set that this configuration does not have.
    """
    task = task_overrides()
    overrides = []
    for group in CARD_GROUPS:
        entry = card.get(group)
        if not isinstance(entry, dict) or any(o.startswith(f"{group}=") for o in task):
            continue
        choice = entry.get("choice")
        if not isinstance(choice, str) or not re.fullmatch(r"[\w-]+", choice):
            continue
        overrides.append(f"{group}={choice}")
        known = compose("evaluate", overrides=[f"{group}={choice}"])[group]
        if known.get("_target_") != entry.get("target") and not any(o.startswith(f"{group}._target_") for o in task):
            raise ValueError(
                f"the data were distilled with {group} {entry.get('target')}, which {group}={choice} is not here; "
                f"name it with {group}=NAME or {group}._target_=CLASS"
            )
        overrides += [
            f"{group}.{key}={_quoted(value)}"
            for key, value in entry.items()
            if key in known and not key.startswith("_") and key not in NOT_OF_CARD and _plain(value)
        ]
    composed = compose("evaluate", overrides=overrides + task)
    with open_dict(composed):
        composed.pop("hydra", None)
    return composed


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value)


def _quoted(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


main = command("evaluate", evaluate)

if __name__ == "__main__":
    main()
