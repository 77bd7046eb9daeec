"""Searches for settings: how their trials came out, and how much each setting matters."""

import json
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from dd_lightning.report.figures import Figure, axes_of, save

RECORD = "search.json"


def searches(folders: Iterable[Path]) -> list[Figure]:
    """A figure for each search in or below the folders.

    Raises:
        ValueError: the record of a search is truncated; the message names it.
    """
    found: list[Figure] = []
    for path in sorted(path for folder in folders for path in folder.rglob(RECORD)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is truncated or not JSON") from error
        found.append(searched(f"search{len(found) + 1}", path.parent.name, record))
    return found


def searched(key: str, name: str, record: dict[str, Any]) -> Figure:
    """One search.

    Args:
        record: `trials` that were completed, each with number, value in % and settings; how many there are `of`, with
            those that were stopped; and the `importances` of the settings.
    """
    best = max(record["trials"], key=lambda trial: trial["value"])
    settings = ", ".join(f"{name} {value}" for name, value in best["settings"].items())
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in record["importances"].items())
    words = f"Best of {record['of']} trials: {best['value']:.2f} % on validation pictures, with {settings}."
    words += f" Share of the differences explained: {shares}." if shares else ""
    title = "Accuracy of every trial, and how much each setting matters"
    return Figure(key, f"Search {name}", title, "", words, drawing=draw(record))


def draw(record: dict[str, Any]) -> Drawing:
    """Accuracy of every trial and the best so far; and how much each setting matters."""
    drawing, (history, importance) = axes_of(2)
    numbers, values = ([trial[name] for trial in record["trials"]] for name in ("number", "value"))
    history.plot(numbers, values, "o", label="trials")
    history.step(numbers, list(accumulate(values, max)), where="post", label="best so far")
    history.set(xlabel="trial", ylabel="validation accuracy, %")
    history.legend(loc="lower right")
    shares = record["importances"]
    importance.barh(list(shares)[::-1], list(shares.values())[::-1])
    importance.set(xlabel="share of the differences explained", xlim=(0, 1))
    return drawing


def draw_search(record: dict[str, Any], path: Path) -> None:
    """Writes `draw` as a picture file."""
    save(draw(record), path)
