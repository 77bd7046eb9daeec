"""Accuracy against what data cost to keep: images of each class, and stored numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import EngFormatter, LogLocator

from dd_lightning.distilled import DistilledData
from dd_lightning.report.architectures import ARCHITECTURES, network_of, short
from dd_lightning.report.figures import Figure, axes_of, save
from dd_lightning.report.runs import Measured, Run
from dd_lightning.report.tables import number

RANDOM = ", random real"  # how the name of a control ends


@dataclass(frozen=True)
class Point:
    """One set of data: what it costs, and test accuracy in %."""

    per_class: float
    numbers: int
    mean: float
    std: float | None


Lines = dict[str, list[Point]]


def budget(runs: Iterable[Run]) -> Figure:
    """Ordinary training on distilled data, beside random real images."""
    title = "Accuracy over images per class and stored numbers, ordinary training"
    claim = "distilled data are worth more than as many stored numbers of real images"
    # In a sweep of architectures different sets of one size stand side by side.
    others = (run for run in runs if run.name != ARCHITECTURES)
    of_use = [run for run in others if run.result.get("use", {}).get("choice") == "ordinary"]
    lines: Lines = {}
    for run in of_use:
        use, classes, one = run.result["use"], run.setting("dataset.num_classes") or 10, Measured([run])
        add(lines, place(run), Point(use["images"] / classes, use["stored_numbers"], one.mean, one.std))
        if random := use["controls"].get("random"):
            cost = (random["images"] / classes, random["stored_numbers"])
            point = Point(*cost, random["accuracy_mean"], random["accuracy_std"])
            add(lines, place(run) + RANDOM, point)
    command = "dd-evaluate use=ordinary init=random distilled.path=RUN_OR_GALLERY"
    return figure_of("budget", "Budget", title, claim, lines, of_use, [command])


def growth(runs: Iterable[Run]) -> Figure:
    """Prefixes of sets that were grown, beside random images of a set, and sets that were made for their budget."""
    title = "Prefixes of a set that was grown"
    claim = "every prefix is nearly as good as a set that was made for its budget, and better than random images of one"
    runs, lines = list(runs), Lines()
    grown = [run for run in runs if run.result.get("prefixes")]
    used = list(grown)
    for run in grown:
        name = f"{place(run)}: prefixes of {run.name}"
        for point in () if name in lines else prefixes_of(run):
            add(lines, name, point)
    for run in runs:
        numbers, one = run.stored_numbers, Measured([run])
        if numbers and place(run) in {place(one) for one in grown} and (name := beside(run)):
            images = run.setting("distilled.images_per_class")
            add(lines, f"{place(run)}: {name}", Point(images, numbers, one.mean, one.std))
            used.append(run)
    commands = ["dd-distill experiment=grow_mnist"]
    commands += ["dd-evaluate distilled=random_subsets distilled.path=RUN distilled.images_per_class=1"]
    return figure_of("growth", "Growing sets", title, claim, lines, used, commands)


def beside(run: Run) -> str:
    """What a run is beside prefixes; nothing where it does not belong there."""
    kind = str(run.setting("distilled._target_")).rpartition(".")[2]
    if kind == "random_subsets" and run.result.get("use", {}).get("choice") == "training":
        return f"random images of {short(run.result['set'])}"
    ordered = str(run.setting("order._target_")).endswith("ShuffledOrder")
    made = "use" not in run.result and not run.result.get("prefixes") and ordered
    return "made for each budget" if made and run.setting("distilled.images_per_class") else ""


def prefixes_of(run: Run) -> list[Point]:
    """Of a set that was grown."""
    data, points = None, []
    for one in run.result["prefixes"]:
        n, numbers = one["images_per_class"], one.get("stored_numbers")
        if numbers is None:  # an older run
            data = data or DistilledData.load(run.folder)
            numbers = data.prefix(n).stored_numbers
        spread = one["accuracy_std"] if one["networks"] > 1 else None
        points.append(Point(n, numbers, one["accuracy_mean"], spread))
    return points


def place(run: Run) -> str:
    """Data set and network."""
    name = run.setting("dataset.name") or Path(str(run.setting("dataset.path"))).stem
    return f"{str(name).upper()}, {network_of(run)}"


def add(lines: Lines, name: str, point: Point) -> None:
    """A point of a line, unless a newer run is there already."""
    line = lines.setdefault(name, [])
    if point.numbers not in {other.numbers for other in line}:
        line.append(point)


def figure_of(
    key: str, number_of: str, title: str, claim: str, lines: Lines, runs: list[Run], commands: list[str]
) -> Figure:
    """Lines as a figure; where there are none, how to make them."""
    if not lines:
        return Figure(key, number_of, title, claim, "There is no run.", commands=commands)
    lines = {name: sorted(line, key=lambda point: point.numbers) for name, line in sorted(lines.items())}
    words = "; ".join(f"{name}: " + ", ".join(map(told, line)) for name, line in lines.items())
    words = f"Test accuracy in %, at images of each class (stored numbers). {words}."
    return Figure(key, number_of, title, claim, words, runs, draw(lines))


def told(point: Point) -> str:
    return f"{number(point.mean, point.std)} at {point.per_class:g} ({point.numbers:,})"


def draw(lines: Lines, title: str = "") -> Drawing:
    """The lines over images of each class, and over stored numbers; with standard deviations as bars."""
    drawing, axes = axes_of(2)
    colors: dict[str, str] = {}
    for name, line in lines.items():
        means, stds = [point.mean for point in line], [point.std or 0.0 for point in line]
        color = colors.setdefault(name.removesuffix(RANDOM), f"C{len(colors)}")
        form = "s--" if name.endswith(RANDOM) else "o-"
        style: dict[str, Any] = {"fmt": form, "color": color, "capsize": 3, "label": name}
        axes[0].errorbar([point.per_class for point in line], means, stds, **style)
        axes[1].errorbar([point.numbers for point in line], means, stds, **style)
    counts = sorted({point.per_class for line in lines.values() for point in line})
    axes[0].set(xlabel="images of each class", ylabel="test accuracy, %", xscale="log")
    axes[0].set_xticks(counts, [f"{count:g}" for count in counts])
    axes[0].minorticks_off()
    axes[1].set(xlabel="stored numbers", xscale="log")
    axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1].minorticks_off()
    if len(lines) > 1:
        handles = axes[0].get_legend_handles_labels()
        drawing.legend(*handles, loc="outside lower center", ncols=1 if len(lines) < 4 else 2, fontsize=8)
    drawing.suptitle(title, fontsize=11)
    return drawing


def draw_prefixes(points: Sequence[Point], title: str, path: Path) -> None:
    """A picture file of the prefixes of a set that was grown."""
    save(draw({"prefixes": list(points)}, title), path)
