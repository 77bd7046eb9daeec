"""Figures 2 to 6 from runs, and whether the paper's claims hold in them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from dd_lightning.distilled import DistilledData
from dd_lightning.report.picture import figure as picture
from dd_lightning.report.runs import Measured, Run, measured
from dd_lightning.report.tables import number
from dd_lightning.system.words import counted

Series = dict[str, dict[float, Measured]]  # what was measured at each x, by the name of its line


@dataclass(frozen=True)
class Figure:
    """A figure of the paper, or one of ours, with what our runs show in it.

    Attributes:
        words: what is to be seen, for those who do not see it.
        runs: what it was drawn from.
        drawing: None where there is no run.
        commands: that make what is missing.
    """

    key: str
    number: str
    title: str
    claim: str
    words: str
    runs: list[Run] = field(default_factory=list)
    drawing: Drawing | None = None
    commands: list[str] = field(default_factory=list)

    @property
    def published(self) -> bool:
        """Whether the paper has it."""
        return self.number.startswith("Figure")


def make_figures(paper: dict[str, Any], runs: list[Run]) -> list[Figure]:
    """Figures 2 to 6."""
    images = [distilled_images(key, entry, runs) for key, entry in paper["images"].items()]
    curves = [curve(key, entry, runs) for key, entry in paper["curves"].items()]
    return images + curves + [attack(key, entry, runs) for key, entry in paper["attacks"].items()]


def distilled_images(key: str, entry: dict[str, Any], runs: list[Run]) -> Figure:
    """Figures 2 and 3: the distilled images of the newest run."""
    claim = f"the paper: {entry['paper']}"
    of_name = [r for r in runs if r.name == entry["experiment"] and (r.folder / "distilled.safetensors").is_file()]
    if not of_name:
        command = f"dd-distill experiment={entry['experiment']}"
        return Figure(key, entry["number"], entry["title"], claim, "There is no run.", commands=[command])
    run = of_name[0]
    distilled = DistilledData.load(run.folder)
    after = Measured([run])
    reached = f"{run.test['accuracy_before']:.1f} → {number(after.mean, after.std)} %"
    drawing = picture(distilled, distilled.preprocessing, reached)
    steps, batch = distilled.labels.shape
    words = (
        f"{steps * batch} distilled images, a column for each class and a row for each of {counted(steps, 'GD step')}, "
        f"with the learning rates of {counted(len(distilled.learning_rates), 'epoch')} at left; "
        f"{distilled.stored_numbers:,} stored numbers. Test accuracy {reached}; {claim}."
    )
    return Figure(key, entry["number"], entry["title"], claim, words, [run], drawing)


def curve(key: str, entry: dict[str, Any], runs: list[Run]) -> Figure:
    """Figures 4 and 5: accuracy over a setting, a line for each data set (and arrangement of the images)."""
    of_sweep = [run for run in runs if run.name == entry["sweep"]]
    series = collect(of_sweep, lambda run: _line(run, key == "fig5"), lambda run: run.setting(entry["x"]))
    if not series:
        command = f"dd-distill sweep={entry['sweep']}"
        return Figure(key, entry["number"], entry["title"], entry["claim"], "There is no run.", commands=[command])
    test = {"fig4a": rises, "fig4b": rises_and_levels_off, "fig5": many_beat_one}[key]
    held = "; ".join(f"{name}: {verdict}" for name, verdict in test(series).items())
    numbers = "; ".join(
        f"{name}: " + ", ".join(f"{number(m.mean, m.std)} at {x:g}" for x, m in line.items())
        for name, line in series.items()
    )
    words = f"The paper's claim: {entry['claim']}. Here: {held}. Test accuracy in %, by {entry['label']}: {numbers}."
    used = [run for line in series.values() for m in line.values() for run in m.runs]
    return Figure(
        key, entry["number"], entry["title"], entry["claim"], words, used, draw_curves(series, entry["label"])
    )


def collect(runs: list[Run], line: Callable[[Run], str], x: Callable[[Run], Any]) -> Series:
    """Runs by line and x, in order."""
    places: dict[str, set[float]] = {}
    for run in runs:
        places.setdefault(line(run), set()).add(x(run))
    series: Series = {}
    for name in sorted(places):
        for value in sorted(places[name]):
            found = measured(run for run in runs if line(run) == name and x(run) == value)
            assert found is not None
            series.setdefault(name, {})[value] = found
    return series


def _line(run: Run, with_arrangement: bool) -> str:
    dataset = str(run.setting("dataset.name")).upper()
    if not with_arrangement:
        return dataset
    return f"{dataset}, {ONE if run.setting('distilled.steps') == 1 else MANY}"


ONE, MANY = "one step", "many steps"
LEAST = 1.0  # points of accuracy that count as a difference


def rises(series: Series) -> dict[str, str]:
    """Figure 4a: from the fewest to the most steps."""
    return {name: _compared(*_ends(line), "it rises", "it does not rise") for name, line in series.items()}


def rises_and_levels_off(series: Series) -> dict[str, str]:
    """Figure 4b: it rises, and the second half of the epochs gives less of it than the first."""
    verdicts = {}
    for name, line in series.items():
        first, last = _ends(line)
        middle = list(line.values())[len(line) // 2].mean
        if last - first < LEAST:
            verdicts[name] = _compared(first, last, "", "it does not rise")
        else:
            levels = "levels off" if last - middle < middle - first else "does not level off"
            verdicts[name] = f"it rises and {levels} ({first:.1f}, in the middle {middle:.1f}, {last:.1f})"
    return verdicts


def many_beat_one(series: Series) -> dict[str, str]:
    """Figure 5: at every number of images."""
    verdicts = {}
    for name in sorted({name.removesuffix(f", {ONE}").removesuffix(f", {MANY}") for name in series}):
        one, many = series.get(f"{name}, {ONE}", {}), series.get(f"{name}, {MANY}", {})
        both = [x for x in one if x in many]
        wins = sum(many[x].mean > one[x].mean + LEAST for x in both)
        verdicts[name] = f"many steps beat one at {wins} of {len(both)} numbers of images"
    return verdicts


def _ends(line: dict[float, Measured]) -> tuple[float, float]:
    values = list(line.values())
    return values[0].mean, values[-1].mean


def _compared(first: float, last: float, yes: str, no: str) -> str:
    return f"{yes if last - first >= LEAST else no} ({first:.1f} to {last:.1f})"


def draw_curves(series: Series, label: str) -> Drawing:
    """Lines of means, with the standard deviations as bars."""
    drawing, axis = axes_of(1)
    for index, (name, line) in enumerate(series.items()):
        means, stds = [m.mean for m in line.values()], [m.std or 0.0 for m in line.values()]
        style = ("o-", "s--", "^-", "D--")[index % 4]
        axis[0].errorbar(list(line), means, yerr=stds, fmt=style, capsize=3, label=name)
    axis[0].set(xlabel=label, ylabel="test accuracy, %", xticks=sorted({x for line in series.values() for x in line}))
    axis[0].legend()
    return drawing


def attack(key: str, entry: dict[str, Any], runs: list[Run]) -> Figure:
    """Figure 6: accuracy w.r.t. the modified labels, and the share of the attacked class predicted as the target."""
    found: dict[tuple[str, str], Measured] = {}
    commands = []
    for row, of_row in entry["rows"].items():
        for column in entry["columns"]:
            ours = column == "ours"
            wanted = [r for r in runs if (r.name == of_row["experiment"] if ours else r.place == (row, column))]
            if (one := measured(wanted)) is not None:
                found[row, column] = one
            elif ours:
                commands.append(f"dd-distill experiment={of_row['experiment']}")
            else:
                commands.append(f"dd-evaluate sweep={entry['sweep']} row={row} column={column}")
    if not found:
        words = "There is no run."
        return Figure(key, entry["number"], entry["title"], entry["claim"], words, commands=commands)
    words = f"The paper's claim: {entry['claim']}. " + " ".join(_attack_words(entry, found))
    used = [run for one in found.values() for run in one.runs]
    drawing = draw_attack(entry, found)
    return Figure(key, entry["number"], entry["title"], entry["claim"], words, used, drawing, commands)


MEASURES = {"accuracy_modified_labels": "accuracy w.r.t. modified labels, %", "attack_share": "attacked → target, %"}


def _attack_words(entry: dict[str, Any], found: dict[tuple[str, str], Measured]) -> list[str]:
    words = []
    for row, of_row in entry["rows"].items():
        of_found = {column: one for (r, column), one in found.items() if r == row}
        if not of_found:
            continue
        texts = [
            f"{entry['columns'][column]} {one.mean:.1f} %, moving {one.measure('attack_share') or 0:.1f} % of the class"
            for column, one in of_found.items()
        ]
        words.append(f"{of_row['title']}: " + "; ".join(texts) + ".")
        baselines = [one.mean for column, one in of_found.items() if column != "ours"]
        if "ours" in of_found and baselines:
            above = of_found["ours"].mean - max(baselines)
            words.append(f"It {'holds' if above > 0 else 'does not hold'} here ({above:+.1f}).")
    return words


def draw_attack(entry: dict[str, Any], found: dict[tuple[str, str], Measured]) -> Drawing:
    """Bars of both measures, side by side for each data set."""
    drawing, axes = axes_of(2)
    width = 0.8 / len(entry["columns"])
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for index, (column, title) in enumerate(entry["columns"].items()):
            heights = [_height(found.get((row, column)), measure) for row in entry["rows"]]
            places = [place + (index - (len(entry["columns"]) - 1) / 2) * width for place in range(len(heights))]
            axis.bar(places, heights, width, label=title)
        axis.set_xticks(range(len(entry["rows"])), [of_row["title"] for of_row in entry["rows"].values()])
        axis.set(ylabel=label, ylim=(0, 105))
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawing


def _height(one: Measured | None, measure: str) -> float:
    return 0.0 if one is None else one.measure(measure) or 0.0


def axes_of(count: int) -> tuple[Drawing, list[Any]]:
    """An empty drawing with so many axes, two side by side."""
    columns, rows = min(count, 2), -(-count // 2)
    drawing = Drawing(figsize=(6 if count == 1 else 9, 4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    axes: Any = drawing.subplots(rows, columns, squeeze=False)
    for empty in axes.flat[count:]:
        empty.remove()
    return drawing, list(axes.flat[:count])


def save(drawing: Drawing, path: Path) -> None:
    """Writes a drawing in the format of the path's suffix, whole or not at all."""
    from dd_lightning.system.atomic import atomic_path

    with atomic_path(path) as temporary:
        drawing.savefig(temporary)
