"""What the card of distilled data says of the settings of a command that uses them."""

import re
from typing import Any

from hydra import compose
from omegaconf import DictConfig, open_dict

from dd_lightning.commands.build import CARD_GROUPS
from dd_lightning.commands.resolvers import task_overrides

# Settings that a card has no say in: where files lie, and what is run.
NOT_OF_CARD = ("cache_gb", "data_dir", "folder", "populations_dir", "source", "workers")


def overridden(group: str) -> bool:
    """Whether the command line says anything of a config group."""
    return any(re.match(rf"[+~]*{group}[.=@]", o) for o in task_overrides())


def with_card(cfg: DictConfig, card: dict[str, Any]) -> DictConfig:
    """The configuration with the card's choices and settings beneath the command line's.

    A card is data from elsewhere: of it only names of config groups' options and plain settings are taken, never a
    `_target_`.

    Raises:
        ValueError: the card names a network or data set that this configuration does not have, or lacks its name.
    """
    task = task_overrides()
    overrides = []
    for group in CARD_GROUPS:
        entry = card.get(group)
        if not isinstance(entry, dict) or any(o.startswith(f"{group}=") for o in task):
            continue
        choice = entry.get("choice")
        if not isinstance(choice, str) or not re.fullmatch(r"[\w-]+", choice):
            raise ValueError(f"the card does not say which {group} the data were distilled with: name it, {group}=NAME")
        overrides.append(f"{group}={choice}")
        known = compose("evaluate", overrides=[f"{group}={choice}"])[group]
        if known.get("_target_") != entry.get("target") and not any(o.startswith(f"{group}._target_") for o in task):
            where = f" (in {entry['file']})" if isinstance(entry.get("file"), str) else ""
            raise ValueError(
                f"the data were distilled with {group} {entry.get('target')}{where}, which {group}={choice} is not "
                f"here; name it with {group}=NAME or {group}._target_=CLASS"
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
