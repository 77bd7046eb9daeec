"""dd-linear: the bound M ≥ D of Section 3.3, made visible."""

import logging
import os
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig
from rich import get_console
from rich.progress import track
from rich.table import Table

from dd_lightning.commands.launch import command
from dd_lightning.linear import LinearData, Reached, closed_step, exact, random_data, reach, unrolled_step
from dd_lightning.system.atomic import atomic_path, write_json
from dd_lightning.system.checks import check_count, check_seed

log = logging.getLogger(__name__)


def linear(cfg: DictConfig) -> float:
    """Checks Eq. (6) and the exact construction, and optimises M = 1 … D + beyond distilled data.

    Returns:
        The largest difference between Eq. (6) and an unroll.
    """
    names = ("dimension", "count", "beyond", "iterations", "restarts", "networks")
    check_count(**{name: cfg[name] for name in names})
    check_seed(cfg.seed)
    if cfg.count < cfg.dimension:
        raise ValueError(f"count={cfg.count} real data cannot determine dimension={cfg.dimension} weights")
    folder = Path(HydraConfig.get().runtime.output_dir)
    real = random_data(cfg.count, cfg.dimension, cfg.seed)
    difference, above = checks(real, cfg.networks, cfg.seed)
    counts = range(1, cfg.dimension + cfg.beyond + 1)
    steps = reach(real, counts, cfg.iterations, cfg.restarts, cfg.seed)
    reached = list(track(steps, "optimising", len(counts), console=get_console(), transient=True))
    get_console().print(table(reached, cfg.dimension))
    for suffix in ("png", "pdf"):
        with atomic_path(folder / f"linear.{suffix}") as temporary:
            figure(reached, cfg.dimension).savefig(temporary)
    rows = [vars(one) for one in reached]
    content = {"dimension": cfg.dimension, "difference_eq6_unroll": difference, "exact_above_minimum": above}
    write_json(folder / "linear.json", content | {"rows": rows})
    log.info(f"Eq. (6) against an unroll: largest difference {difference:.1e}")
    log.info(f"M = D, d̃ = N·I, t̃ = N·θ*: loss above the global minimum {above:.1e}, from any of {cfg.networks} θ₀")
    log.info(f"saved in {os.path.relpath(folder)}: linear.json, linear.png, linear.pdf")
    return difference


def checks(real: LinearData, networks: int, seed: int) -> tuple[float, float]:
    """Over random θ₀: the largest relative difference of Eq. (6) from an unroll, and the largest relative loss above
    the global minimum of the exact construction."""
    random = torch.Generator().manual_seed(seed)
    distilled, learning_rate = exact(real)
    dimension = real.inputs.shape[1]
    other = random_data(dimension // 2 + 1, dimension, seed + 1)
    difference, above = 0.0, 0.0
    least = real.loss(torch.linalg.lstsq(real.inputs, real.targets).solution)
    for _ in range(networks):
        theta_0 = torch.randn(dimension, generator=random, dtype=torch.float64)
        closed, unrolled = closed_step(theta_0, other, 0.1), unrolled_step(theta_0, other, 0.1)
        difference = max(difference, ((closed - unrolled).norm() / unrolled.norm()).item())
        above = max(above, (real.loss(closed_step(theta_0, distilled, learning_rate)) / least - 1).item())
    return difference, above


def table(reached: list[Reached], dimension: int) -> Table:
    result = Table(title=f"E ℓ(x, θ₁) − ℓ(x, θ*) with M distilled data, D = {dimension}", title_justify="left")
    for heading in ("M", "by optimisation", "lower bound"):
        result.add_column(heading, justify="right")
    for one in reached:
        mark = " = D" if one.distilled_count == dimension else ""
        result.add_row(f"{one.distilled_count}{mark}", f"{one.excess:.3e}", f"{one.lower_bound:.3e}")
    return result


def figure(reached: list[Reached], dimension: int) -> Figure:
    """The best reachable loss over M, with the bound M = D."""
    fig = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(fig)
    axis = fig.subplots()
    counts = [one.distilled_count for one in reached]
    tiny = 1e-16  # where rounding ends
    axis.semilogy(counts, [max(one.excess, tiny) for one in reached], "o-", label="by optimisation")
    below = [one for one in reached if one.lower_bound > tiny]
    axis.semilogy([o.distilled_count for o in below], [o.lower_bound for o in below], "k--", label="lower bound")
    axis.axvline(dimension, color="gray", linestyle=":")
    axis.annotate(f"M = D = {dimension}", (dimension, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                  textcoords="offset points")  # fmt: skip
    axis.set(xlabel="M, number of distilled data", ylabel="expected loss above the minimum")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="lower left")
    return fig


main = command("linear")

if __name__ == "__main__":
    main()
