"""How good the prefixes of a set that was grown are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dd_lightning.system.atomic import atomic_path


class Tested(Protocol):
    """Accuracies in %."""

    @property
    def mean(self) -> float: ...

    @property
    def std(self) -> float: ...


def prefixes_figure(prefixes: Mapping[int, Tested], title: str) -> Figure:
    """Accuracy by images of each class, with the standard deviation over networks."""
    fig = Figure(figsize=(5, 3.5), dpi=100, layout="constrained")
    FigureCanvasAgg(fig)
    axis = fig.subplots()
    means, spreads = ([getattr(tested, name) for tested in prefixes.values()] for name in ("mean", "std"))
    axis.errorbar(list(prefixes), means, spreads, marker="o", capsize=3)
    axis.set(title=title, xlabel="images of each class, the first of the set", ylabel="test accuracy (%)")
    axis.set_xscale("log")
    axis.set_xticks(list(prefixes), [str(n) for n in prefixes], minor=False)
    axis.minorticks_off()
    return fig


def draw_prefixes(prefixes: Mapping[int, Tested], title: str, path: Path) -> None:
    """Writes `prefixes_figure` as a picture file."""
    with atomic_path(path) as temporary:
        prefixes_figure(prefixes, title).savefig(temporary)
