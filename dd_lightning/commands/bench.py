"""dd-bench: what an outer step costs, engine by engine."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

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
from dd_lightning.system.checks import check_choice, check_count, check_positive, check_seed, check_threads
from dd_lightning.system.processor import device_of, hardware, versions
from dd_lightning.system.words import counted
from dd_lightning.training.arithmetic import Product, operations
from dd_lightning.training.cost import NETWORKS, PARTS, BareStep, Engine, Measured, Ratio, framework, measure, ratio
from dd_lightning.training.peer import Peer, check_checkout

log = logging.getLogger(__name__)


Setting = tuple[str, int, int, int]  # network, J, T, real images

PEER, LIMIT = "authors", "limit"


def bench(cfg: DictConfig) -> None:
    """Times every engine in every setting, in turn; prints a table and writes `bench.json`."""
    check(cfg)
    device = device_of(cfg.device)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if device.type == "cpu":
        limit_memory(cfg.gigabytes)
    torch.manual_seed(cfg.seed)
    engines = build_engines(cfg.engines, device)
    settings = [(n, j, t, cfg.batch_size) for n in cfg.networks for j in cfg.per_step[n] for t in cfg.steps]
    content: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "batch_size": cfg.batch_size}
    content |= {"rows": [], "limits": []}
    folder = Path(HydraConfig.get().runtime.output_dir)
    for setting in settings:
        measured, limit = compared(setting, engines, cfg.repeats, device, cfg.peer)
        get_console().print(table(setting, measured, limit))
        content["rows"] += as_rows(setting, measured, limit)
        content["limits"].append(dict(zip(("network", "per_step", "steps"), setting, strict=False)) | limit._asdict())
        write_json(folder / "bench.json", content)
    if cfg.framework:
        seconds = framework(cfg.batch_size, 20 * cfg.repeats, device, folder)
        write_json(folder / "bench.json", content | {"framework": seconds})
        step, added = seconds["step"], seconds["data"] + seconds["rest"]
        get_console().print(
            f"Lightning, data, callbacks and logging add {1e3 * added:.2f} ms to {1e3 * step:.1f} ms of an outer step "
            f"({100 * added / step:.1f} %; LeNet on digits, J = 1, T = 3, B = {cfg.batch_size})"
        )


def build_engines(settings: DictConfig, device: torch.device) -> dict[str, Engine]:
    """The engines by name; those that are recorded only where they can be."""
    return {
        str(name): Engine(
            instantiate(one.unroll), OuterLoss(Classification(), one.precision), one.get("capture", False)
        )
        for name, one in settings.items()
        if device.type == "cuda" or not one.get("capture")
    }


class Limit(NamedTuple):
    """What the arithmetic of an outer step would take if it were one large matrix product."""

    operations: int
    per_second: float

    @property
    def seconds(self) -> float:
        return self.operations / self.per_second


def compared(
    setting: Setting, engines: dict[str, Engine], repeats: int, device: torch.device, peer: str | None = None
) -> tuple[dict[str, Measured], Limit]:
    """Engines, the authors' code where `peer` is its folder, and a large matrix product, in turn."""
    product = Product(device)
    others = {LIMIT: product.run}
    with ExitStack() as stack:
        if peer is not None:
            others[PEER] = stack.enter_context(Peer(Path(peer), setting, device)).run
        measured = measure(BareStep(*setting, device), engines, repeats, title(setting), others)
    return measured, Limit(operations(*setting), product.flops / measured.pop(LIMIT).total)


def title(setting: Setting) -> str:
    return "{}, J = {}, T = {}, B = {}".format(*setting)


def check(cfg: DictConfig) -> None:
    """Refuses, before anything is timed, what cannot be.

    Raises:
        ValueError: naming the setting.
    """
    check_count(repeats=cfg.repeats, batch_size=cfg.batch_size)
    check_seed(cfg.seed)
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
            check_choice(f"setting of engines.{name}", key, ["unroll", "precision", "capture"])
    if cfg.peer is not None:
        check_checkout(Path(cfg.peer))
    if cfg.gigabytes is not None:
        check_positive(gigabytes=cfg.gigabytes)
    if cfg.threads is not None:
        check_threads(cfg.threads)


def as_rows(setting: Setting, measured: dict[str, Measured], limit: Limit) -> list[dict[str, Any]]:
    rows, (network, per_step, steps, _) = [], setting
    for name, m in measured.items():
        row = {"network": network, "per_step": per_step, "steps": steps, "engine": name, "failure": m.failure}
        if m.failure is None:
            row |= {"seconds": m.total, "peak_bytes": m.peak, "share_of_limit": limit.seconds / m.total}
            row |= {f"seconds_{part}": m.median(part) for part in PARTS}
            for key, found in ratios(m, measured).items():
                row |= {key: found and found.median, f"{key}_quartiles": found and found[1:]}
        rows.append(row)
    return rows


def ratios(m: Measured, measured: dict[str, Measured]) -> dict[str, Ratio | None]:
    """How many times faster than the first engine, and than the authors' code."""
    return {"ratio": ratio(m, next(iter(measured.values()))), "ratio_to_authors": ratio(m, measured.get(PEER))}


def table(setting: Setting, measured: dict[str, Measured], limit: Limit) -> Table:
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if not torch.cuda.is_available() else ""
    product = f"{limit.per_second / 1e9:.0f} GFLOP/s, those of a large matrix product{threads}"
    caption = f"{limit.operations / 1e9:.3g} GFLOP take {1e3 * limit.seconds:.3g} ms at {product}"
    result = Table(title=title(setting), title_justify="left", caption=caption, caption_justify="left")
    parts = [part for part in PARTS if any(part in step for m in measured.values() for step in m.seconds)]
    against = [f"× {next(iter(measured))}", *([f"× {PEER}"] if PEER in measured else [])]
    result.add_column("engine")
    for heading in ("ms / outer step", *parts, "peak MiB", *against, "% of the limit"):
        result.add_column(heading, justify="right")
    for name, m in measured.items():
        if m.failure:
            result.add_row(name, m.failure)
            continue
        times = [in_ms(m.total), *(in_ms(m.median(part)) for part in parts)]
        peak = "" if m.peak is None else f"{m.peak / 2**20:.0f}"
        faster = [in_words(one) for one in ratios(m, measured).values()][: len(against)]
        result.add_row(name, *times, peak, *faster, f"{100 * limit.seconds / m.total:.0f}")
    return result


def in_ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def in_words(one: Ratio | None) -> str:
    return "" if one is None else f"{one.median:.2f} ({one.low:.2f} to {one.high:.2f})"


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
    size = int(min(gigabytes, 2**32) * 2**30)  # no machine has more, and systems count no further
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


main = command("bench")

if __name__ == "__main__":
    main()
