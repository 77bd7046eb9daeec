"""dd-bench: what an outer step costs, engine by engine."""

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from rich import get_console
from rich.table import Table

from dd_lightning.commands.launch import command
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.system.atomic import write_json
from dd_lightning.system.checks import check_choice, check_count, check_positive, check_threads, check_whole
from dd_lightning.system.processor import device_of, hardware, versions
from dd_lightning.training.cost import NETWORKS, PARTS, BareStep, Engine, Measured, framework, measure, ratio

log = logging.getLogger(__name__)


def bench(cfg: DictConfig) -> None:
    """Times every engine in every setting, in turn; prints a table and writes `bench.json`."""
    check(cfg)
    device = device_of(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if device.type == "cpu":
        limit_memory(cfg.gigabytes)
    torch.manual_seed(cfg.seed)
    engines = {
        name: Engine(instantiate(engine.unroll), OuterLoss(Classification(), engine.precision))
        for name, engine in cfg.engines.items()
    }
    settings = [(n, j, t) for n in cfg.networks for j in cfg.per_step[n] for t in cfg.steps]
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(),
        "batch_size": cfg.batch_size,
        "rows": rows,
    }
    folder = Path(HydraConfig.get().runtime.output_dir)
    for network, per_step, steps in settings:
        title = f"{network}, J = {per_step}, T = {steps}"
        measured = measure(BareStep(network, per_step, steps, cfg.batch_size, device), engines, cfg.repeats, title)
        get_console().print(table(measured, f"{title}, B = {cfg.batch_size}"))
        rows += [as_row(network, per_step, steps, name, m, measured) for name, m in measured.items()]
        write_json(folder / "bench.json", content)
    if cfg.framework:
        seconds = framework(cfg.batch_size, 20 * cfg.repeats, device, folder)
        write_json(folder / "bench.json", content | {"framework": seconds})
        step, added = seconds["step"], seconds["data"] + seconds["rest"]
        get_console().print(
            f"Lightning, data, callbacks and logging add {1e3 * added:.2f} ms to {1e3 * step:.1f} ms of an outer step "
            f"({100 * added / step:.1f} %; LeNet on digits, J = 1, T = 3, B = {cfg.batch_size})"
        )


def check(cfg: DictConfig) -> None:
    """Refuses, before anything is timed, what cannot be.

    Raises:
        ValueError: naming the setting.
    """
    check_count(repeats=cfg.repeats, batch_size=cfg.batch_size)
    check_whole(seed=cfg.seed)
    lists = {"networks": cfg.networks, "steps": cfg.steps} | {f"per_step.{n}": j for n, j in cfg.per_step.items()}
    for key, value in lists.items():
        if not isinstance(value, ListConfig):
            raise ValueError(f"{key} must be a list, such as {key}=[{value}], not {value}")
        if key != "networks":
            check_count(**{f"{key}[{i}]": one for i, one in enumerate(value)})
    for name in (*cfg.networks, *cfg.per_step):
        check_choice("network", name, NETWORKS)
    for name, engine in cfg.engines.items():
        for key in engine:
            check_choice(f"setting of engines.{name}", key, ["unroll", "precision"])
    if cfg.gigabytes is not None:
        check_positive(gigabytes=cfg.gigabytes)
    if cfg.threads is not None:
        check_threads(cfg.threads)


def as_row(
    network: str, per_step: int, steps: int, name: str, m: Measured, measured: dict[str, Measured]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "network": network,
        "per_step": per_step,
        "steps": steps,
        "engine": name,
        "failure": m.failure,
    }
    if m.failure is None:
        row |= {"seconds": m.total, "ratio": ratio(m, measured), "peak_bytes": m.peak}
        row |= {f"seconds_{part}": m.median(part) for part in PARTS}
    return row


def table(measured: dict[str, Measured], title: str) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("engine")
    for heading in ("ms / outer step", *PARTS, "peak MiB", "times faster"):
        result.add_column(heading, justify="right")
    for name, m in measured.items():
        if m.failure:
            result.add_row(name, m.failure)
            continue
        times = [f"{1e3 * m.total:.1f}", *(f"{1e3 * m.median(part):.1f}" for part in PARTS)]
        faster = ratio(m, measured)
        result.add_row(name, *times, f"{m.peak / 2**20:.0f}", "" if faster is None else f"{faster:.2f}")
    return result


def limit_memory(gigabytes: float | None) -> None:
    """Makes an allocation fail instead of the whole process being killed, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        log.warning("this system bounds no process's memory: gigabytes has no effect")
        return
    if gigabytes is None:
        free = next(
            line
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("MemAvailable")
        )
        gigabytes = 0.9 * int(free.split()[1]) / 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30), hard))


main = command("bench")

if __name__ == "__main__":
    main()
