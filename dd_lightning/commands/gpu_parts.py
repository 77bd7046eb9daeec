"""What `dd-doctor --gpu` goes through: each part's lines, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dd_lightning.commands.bench import as_rows, build_engines, compared
from dd_lightning.commands.gpu_runs import Lines, Place, any_order, demo, fig3a, resume
from dd_lightning.commands.launch import CONF
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.system.installation import BROKEN, OK
from dd_lightning.training.cost import Engine
from dd_lightning.training.proving import Proof, memory_growth, same_gradient, same_recorded, two_processes


def engines() -> dict[str, Any]:
    """The settings of every engine, for plain gradient descent."""
    inner = OmegaConf.load(CONF / "inner" / "gd.yaml")
    return {
        path.stem: instantiate(OmegaConf.load(path), optimizer=inner)
        for path in sorted((CONF / "unroll").glob("*.yaml"))
    }


def gradients(place: Place) -> Lines:
    kinds = [(network, torch.float64) for network in place.amount.networks] + [("lenet", torch.float32)]
    return {
        f"{name}, {network}, {str(dtype).removeprefix('torch.')}": partial(
            same_gradient, unroll, place.device, network, dtype
        )
        for network, dtype in kinds
        for name, unroll in engines().items()
    }


def recorded(place: Place) -> Lines:
    losses = {"": OuterLoss(Classification()), " bfloat16": OuterLoss(Classification(), "bfloat16")}
    return {
        name + of: partial(same_recorded, Engine(unroll, loss, True), place.device, place.amount.size)
        for of, loss in losses.items()
        for name, unroll in engines().items()
        if not of or name == "batched"
    }


def memory(place: Place) -> Lines:
    loss, size = OuterLoss(Classification()), place.amount.size._replace(per_step=1)
    return {
        name: partial(memory_growth, Engine(unroll, loss), place.device, size) for name, unroll in engines().items()
    }


def bench(place: Place) -> Lines:
    settings = OmegaConf.load(CONF / "bench.yaml").engines
    assert isinstance(settings, DictConfig)
    for name in ("adjoint", "adjoint_bfloat16", "functional_bfloat16"):  # far from the fastest on a GPU
        settings.pop(name)

    def rows(setting: tuple[str, int, int, int]) -> Proof:
        engines = build_engines(settings, place.device)
        found = as_rows(setting, *compared(setting, engines, place.amount.repeats, place.device))
        failed = [f"{row['engine']}: {row['failure']}" for row in found if row["failure"]]
        first = found[0]
        times = [f"{row['engine']} {row['ratio']:.2f}" for row in found[1:] if row.get("ratio")]
        said = f"{first['engine']} {1e3 * first.get('seconds', 0):.1f} ms, times faster: {', '.join(times)}"
        return BROKEN if failed else OK, "; ".join([*failed, said]), {"rows": found}

    return {"{}, J = {}, T = {}".format(*setting): partial(rows, setting) for setting in place.amount.settings}


def processes(place: Place) -> Lines:
    return {"functional, gloo": partial(two_processes, place.device, place.amount.outer_steps)}


PARTS: dict[str, Callable[[Place], Lines]] = {
    "gradients": gradients,
    "recorded": recorded,
    "memory": memory,
    "processes": processes,
    "resume": resume,
    "fig3a": fig3a,
    "demo": demo,
    "bench": bench,
    "any_order": any_order,
}
