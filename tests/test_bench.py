"""dd-bench: every engine in every setting, and what it writes."""

import json

import pytest
import torch

from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.training.cost import BareStep, Engine, peak_memory
from dd_lightning.unroll import AdjointUnroll


@pytest.fixture(autouse=True)
def no_memory_limit(monkeypatch):
    """The limit would stay with this process."""
    monkeypatch.setattr("dd_lightning.commands.bench.limit_memory", lambda gigabytes: None)


def test_bench_times_every_engine(run):
    small = ("networks=[lenet]", "per_step.lenet=[2]", "steps=[2,3]", "repeats=1", "batch_size=8")
    code, error, folder = run("bench", *small)
    assert (code, error) == (0, "")
    content = json.loads((folder / "bench.json").read_text())
    rows, lightning = content["rows"], content["framework"]
    assert all(lightning[part] > 0 for part in ("step", "data", "rest"))
    engines = {"higher", "functional", "functional_bfloat16", "adjoint", "adjoint_bfloat16"}
    engines |= {"batched", "batched_bfloat16", "recompute"}
    assert {(row["engine"], row["steps"]) for row in rows} == {(e, t) for e in engines for t in (2, 3)}
    for row in rows:
        parts = sum(row[f"seconds_{part}"] for part in ("init", "inner", "outer", "backward", "update"))
        assert row["seconds"] == pytest.approx(parts)
        assert row["engine"] != "higher" or row["ratio"] == 1


def test_running_out_of_memory_is_a_row(run, monkeypatch):
    from dd_lightning.unroll import FunctionalUnroll

    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(FunctionalUnroll, "__call__", full)
    small = ("networks=[lenet]", "per_step.lenet=[1]", "steps=[1]", "repeats=1", "batch_size=8", "framework=false")
    code, _, folder = run("bench", *small)
    assert code == 0
    rows = {row["engine"]: row for row in json.loads((folder / "bench.json").read_text())["rows"]}
    assert rows["functional"]["failure"] == "out of memory"
    assert rows["higher"]["failure"] is None


def test_peak_memory_sees_what_is_freed_again():
    held = torch.ones(2**20)
    peak = peak_memory(torch.device("cpu"), lambda: torch.ones(2**24).sum() + held.sum())
    assert 2**26 <= peak < 2**26 + 2**10


def test_memory_of_recompute_hardly_grows_with_the_steps():
    def peak(steps, **options):
        step = BareStep("lenet", 1, steps, 64, torch.device("cpu"))
        engine = Engine(AdjointUnroll(**options), OuterLoss(Classification()))
        step.run(engine)
        return peak_memory(step.device, lambda: step.run(engine))

    assert peak(100) > 5 * peak(10)
    stored, images = 4 * 61706 * 16, 4 * 784 * 900  # weights of the steps, and the gradients of the images
    assert peak(100, recompute=True) < peak(10, recompute=True) + stored + 2 * images


def test_an_unknown_network_is_refused(run):
    code, error, _ = run("bench", "networks=[resnet]")
    assert code == 1
    assert "lenet, alexcifarnet" in error
