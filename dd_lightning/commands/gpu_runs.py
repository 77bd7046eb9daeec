"""Runs that `dd-doctor --gpu` starts: killed and resumed, experiments, and how much of each is done."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dd_lightning.distilled import DistilledData
from dd_lightning.system.installation import BROKEN, NOTE, OK
from dd_lightning.training.proving import SECONDS, Numbers, Proof, Size
from dd_lightning.training.resuming import checkpoints, load_checkpoint

Lines = dict[str, Callable[[], Proof]]


class Amount(NamedTuple):
    """How much a part does: all of it on a GPU, on a CPU as much as shows that it goes through."""

    networks: tuple[str, ...]
    size: Size
    settings: list[tuple[str, int, int, int]]  # of dd-bench
    repeats: int
    outer_steps: int
    few: tuple[str, ...]  # settings of every run
    any_order: tuple[str, ...]  # and of the one for data in any order


FULL = Amount(
    ("lenet", "alexcifarnet"),
    Size(4, 30, 1024),
    [("lenet", 1, 30, 1024), ("lenet", 4, 30, 1024), ("alexcifarnet", 1, 30, 1024), ("lenet", 16, 30, 1024)],
    3,
    200,
    ("callbacks.held_out.test_networks=20",),
    ("callbacks.held_out.every=50",),
)
SMALL = Amount(
    ("lenet",),
    Size(2, 2, 16),
    [("lenet", 1, 2, 16)],
    1,
    4,
    ("callbacks.held_out.networks=1", "callbacks.held_out.test_networks=1", "batch_size=16", "trainer.max_steps=4"),
    ("network.width=2", "network.depth=1", "callbacks.held_out.every=2", "order.inner_steps=4", "window.length=2"),
)


class Place(NamedTuple):
    """Where a part runs, what it may leave behind and where, and how long it has."""

    device: torch.device
    folder: Path
    seconds: float

    @property
    def amount(self) -> Amount:
        return SMALL if self.device.type == "cpu" else FULL

    def distil(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        """`dd-distill`, whose run is the folder of that name."""
        accelerator = "cpu" if self.device.type == "cpu" else "gpu"
        line = [
            *overrides,
            *self.amount.few,
            f"trainer.accelerator={accelerator}",
            f"hydra.run.dir={self.folder / name}",
        ]
        line.append("+callbacks.seconds._target_=dd_lightning.training.proving.KeptSeconds")
        command = [sys.executable, "-m", "dd_lightning.commands.distill", *line]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str], *codes: int) -> None:
    """Waits for a command.

    Raises:
        RuntimeError: it ended with another exit code than 0 or one of these; with the last line of what it said.
    """
    _, said = process.communicate()
    if process.returncode not in (0, *codes):
        raise RuntimeError(said.strip().rpartition("\n")[2] or f"exit code {process.returncode}")


def resume(place: Place) -> Lines:
    def equal() -> Proof:
        try:
            return killed_and_resumed(place, "true")
        except RuntimeError as error:
            _, said, numbers = killed_and_resumed(place, "warn")
            return BROKEN, f"trainer.deterministic=true: {error}; with warn {said}", numbers

    return {"batched": equal}


def killed_and_resumed(place: Place, deterministic: str) -> Proof:
    """A run that is killed after its first checkpoint and goes on, against one that is not."""
    steps, names = place.amount.outer_steps, [f"{name}_{deterministic}" for name in ("whole", "killed")]
    line = ["dataset=digits", "init=random", "init.per_step=2", "unroll=batched", "distilled.epochs=2"]
    line += [f"trainer.max_steps={steps}", f"callbacks.held_out.every={steps // 4}", "schedule=cosine"]
    line += [f"trainer.deterministic={deterministic}"]
    whole, killed = (place.distil(name, *line) for name in names)
    folder = place.folder / names[1] / "checkpoints"
    while killed.poll() is None and not checkpoints(folder):
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    at = checkpoints(folder)[0].stem if checkpoints(folder) else "it ended by itself"
    finished(place.distil(names[1], *line, "resume=auto"))
    finished(whole)
    one, two = (DistilledData.load(place.folder / name).images for name in names)
    error = (one - two).abs().max().item()
    said = f"killed after {at}: images {error:.1e} from those of a run that was not killed"
    return OK if error == 0 else BROKEN, said, {"error": error}


def on_mnist() -> tuple[str, ...]:
    """What a run on MNIST says where there is none and nothing can be downloaded."""
    there = Path(os.environ.get("DD_DATA_DIR", "data"), "mnist.npz").is_file()
    return () if there else ("dataset=digits",)


def demo(place: Place) -> Lines:
    def run() -> Proof:
        began = time.monotonic()
        finished(place.distil("demo", "experiment=demo"))
        return told(place, "demo", time.monotonic() - began)

    return {"functional, digits": run}


def fig3a(place: Place) -> Lines:
    def run() -> Proof:
        began, steps = time.monotonic(), f"trainer.max_steps={place.amount.outer_steps}"
        finished(place.distil("fig3a", "experiment=fig3a_mnist_random", steps, *on_mnist()))
        return told(place, "fig3a", time.monotonic() - began)

    return {f"batched, {(*on_mnist(), 'dataset=mnist')[0]}": run}


def told(place: Place, name: str, seconds: float) -> Proof:
    """What a finished run has reached."""
    test = json.loads((place.folder / name / "result.json").read_text(encoding="utf-8"))["test"]
    said, numbers = steps_of(place, name)
    said += f", in all {seconds:.0f} s; accuracy {test['accuracy_before']:.1f} → {test['accuracy_mean']:.1f} %"
    numbers |= {"seconds": seconds, "accuracy": test["accuracy_mean"]}
    return OK if test["accuracy_mean"] > test["accuracy_before"] else NOTE, said, numbers


def steps_of(place: Place, name: str) -> tuple[str, Numbers]:
    """How many outer steps a run took, and the median of their seconds."""
    each = json.loads((place.folder / name / SECONDS).read_text(encoding="utf-8"))
    said = f"{len(each)} outer steps of {1e3 * statistics.median(each):.1f} ms"
    return said, {"steps": len(each), "seconds_a_step": statistics.median(each)}


def any_order(place: Place) -> Lines:
    seconds = min(120, max(10, int(place.seconds) - 40))  # and the rest for the start

    def run() -> Proof:
        limit = f"+trainer.max_time={{seconds:{seconds}}}"
        finished(place.distil("any", "experiment=any_mnist_10", limit, *place.amount.any_order, *on_mnist()), 124)
        content = load_checkpoint(checkpoints(place.folder / "any" / "checkpoints")[0])
        best = [state["best"] for state in content["callbacks"].values() if state.get("best")]
        said, numbers = steps_of(place, "any")
        accuracy = f"at best {best[0]['accuracy']:.1f} % on validation pictures" if best else "not evaluated yet"
        return OK, f"{said} in {seconds} s; {accuracy}", numbers

    return {f"functional, {(*on_mnist(), 'dataset=mnist')[0]}": run}
