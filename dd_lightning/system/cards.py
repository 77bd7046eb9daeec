"""Cards: what a file of distilled data says of itself; data from elsewhere, until they are checked."""

import math
from collections.abc import Mapping
from typing import Any

# Parts of a card that are read, each a group of entries.
GROUPS = ("dataset", "network", "init", "objective", "inner", "augment", "accuracy", "preprocessing", "stages")
NUMBERS = ("accuracy.accuracy_mean", "accuracy.accuracy_std", "accuracy.networks", "accuracy.networks_chose")
WHOLE = ("preprocessing.channels", "preprocessing.image_size")
LISTS = ("preprocessing.mean", "preprocessing.std")


def check_card(card: Mapping[str, Any]) -> None:
    """Refuses a card whose parts are of another kind than is written.

    Raises:
        ValueError: naming the part.
    """
    for group in GROUPS:
        if not isinstance(card.get(group, {}), dict):
            raise ValueError(f"the card's {group} is {card[group]!r}, not a group of entries")
    for name in (*NUMBERS, *WHOLE, *LISTS):
        group, _, key = name.partition(".")
        if key not in (of_group := card.get(group, {})) or (name in NUMBERS and of_group[key] is None):
            if name in (*WHOLE, *LISTS) and group in card:
                raise ValueError(f"the card lacks {name}")
            continue
        value = of_group[key]
        fits = bool(value) and all(map(number, value)) if isinstance(value, list) else number(value)
        if isinstance(value, list) != (name in LISTS) or not fits or (name in WHOLE and not isinstance(value, int)):
            raise ValueError(f"the card's {name} is {value!r}")
    names = card.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the card's class_names are {names!r}, not names")
    of_others = card.get("other_initial_weights", {"of": ""})
    if not isinstance(of_others, dict) or not isinstance(of_others.get("of"), str):
        raise ValueError(f"the card's other_initial_weights are {of_others!r}, which names no weights")
    for count, rates in card.get("stages", {}).items():
        rows = isinstance(rates, list) and bool(rates) and all(isinstance(row, list) for row in rates)
        if not count.isdecimal() or not rows or not all(number(rate) for row in rates for rate in row):
            raise ValueError(f"the card's stages.{count} is {rates!r}, not learning rates")


def number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
