"""Accuracy during ordinary training, on validation pictures."""

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure as Drawing

from dd_lightning.report.architectures import short
from dd_lightning.report.budgets import place
from dd_lightning.report.figures import Figure, axes_of
from dd_lightning.report.runs import Run

Along = dict[tuple[str, str], dict[str, Any]]  # epochs and accuracies, by the set and its control
STYLES = {"": "-", ", random": "--"}  # of lines; other controls are dotted
PANELS = 8  # data sets and networks that are drawn, the newest


def training(runs: Iterable[Run]) -> Figure:
    """A panel for each data set and network, a line for each set and control."""
    title = "Accuracy during ordinary training, on validation pictures"
    claim = "what training has reached after so many epochs, and whether it would go on"
    found: dict[str, Along] = {}
    used = [run for run in runs if "along" in run.result.get("use", {})]
    for run in used:
        lines, name = found.setdefault(place(run), {}), short(run.result["set"])
        use = run.result["use"]
        lines.setdefault((name, ""), use["along"])
        for control, entry in use["controls"].items():
            lines.setdefault((name, f", {control.replace('_', ' ')}"), entry["along"])
    if not found:
        commands = ["dd-evaluate use=ordinary init=random distilled.path=RUN_OR_GALLERY"]
        return Figure("training", "Training", title, claim, "There is no run.", commands=commands)
    shown = dict(sorted(list(found.items())[:PANELS]))
    words = "Accuracy in % after none, half and all of the epochs."
    for where, lines in shown.items():
        words += f" {where}: " + "; ".join(told("".join(names), one) for names, one in lines.items()) + "."
    if len(found) > PANELS:
        words += f" The newest {PANELS} of {len(found)} data sets and networks."
    return Figure("training", "Training", title, claim, words, used, draw(shown))


def told(name: str, along: dict[str, Any]) -> str:
    accuracy = along["accuracy"]
    return f"{name} {accuracy[0]:.1f}, {accuracy[len(accuracy) // 2]:.1f}, {accuracy[-1]:.1f}"


def draw(shown: dict[str, Along]) -> Drawing:
    drawing, axes = axes_of(len(shown))
    for axis, (where, lines) in zip(axes, shown.items(), strict=True):
        sets = sorted({name for name, _ in lines})
        for (name, control), along in sorted(lines.items()):
            style: dict[str, Any] = {"color": f"C{sets.index(name)}", "linestyle": STYLES.get(control, ":")}
            axis.plot(along["epochs"], along["accuracy"], marker=".", label=name + control, **style)
        axis.set(title=where, xlabel="epochs", ylabel="validation accuracy, %")
        axis.title.set_size(9)
        axis.legend(fontsize=7, loc="lower right")
    return drawing
