"""dd-bench: every engine in every setting, and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from dd_lightning.commands import bench
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.training.arithmetic import counted, operations
from dd_lightning.training.cost import BareStep, Engine, Measured, peak_memory, ratio
from dd_lightning.training.peer import Peer
from dd_lightning.unroll import AdjointUnroll, HigherUnroll

LIMIT = bench.limit_memory


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
        assert row["seconds_recorded"] is None
        assert row["engine"] != "higher" or (row["ratio"], row["ratio_quartiles"]) == (1, [1, 1])
        assert row["ratio_to_authors"] is None
        (limit,) = [one for one in content["limits"] if one["steps"] == row["steps"]]
        least = limit["operations"] / limit["per_second"]
        assert row["share_of_limit"] == pytest.approx(least / row["seconds"])


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


def test_operations_of_an_outer_step():
    assert operations("lenet", 1, 5, 16) == counted("lenet", 1, 5, 16)
    assert operations("lenet", 2, 3, 16) == pytest.approx(counted("lenet", 2, 3, 16), rel=0.03)
    more = operations("lenet", 1, 3, 17) - operations("lenet", 1, 3, 16)  # of one real image, with its gradient
    forward = [28**2 * 6 * 25, 10**2 * 16 * 6 * 25, 400 * 120, 120 * 84, 84 * 10]
    assert more == 2 * (3 * sum(forward) - forward[0])  # the images themselves need no gradient


def test_a_recorded_step_gives_the_same_gradient():
    """Where there is no GPU it is not recorded, but goes the same way."""
    found = []
    for capture in (False, True):
        torch.manual_seed(0)
        step = BareStep("lenet", 2, 2, 8, torch.device("cpu"))
        laps = step.run(Engine(HigherUnroll(), OuterLoss(Classification()), capture))
        assert ("recorded" in laps) == capture
        found.append(step.distilled.images.detach().clone())
    torch.testing.assert_close(*found, rtol=0, atol=1e-8)


def test_ratios_are_of_pairs_with_their_quartiles():
    slow, fast = Measured([{"step": s} for s in (2, 4, 6, 8, 10)]), Measured([{"step": 2}] * 5)
    assert ratio(fast, slow) == (3, 2, 4)
    assert ratio(Measured(failure="out of memory"), slow) is None
    assert ratio(fast, None) is None


NETWORKS = """
import torch, six

@six.add_metaclass(type)
class Net:
    def reset(self, state):
        self.w = torch.ones(state.nc, requires_grad=True)

def get_networks(state, N):
    return [Net()]
"""

TRAINER = """
import os, torch, datasets

class Trainer:
    def __init__(self, state, models):
        self.models, self.params = models, [torch.ones(state.distill_steps, requires_grad=True)]
        self.optimizer = torch.optim.Adam(self.params)
        self.params[0].grad = torch.zeros_like(self.params[0])

    def get_steps(self):
        return list(self.params[0])

    def forward(self, model, images, labels, steps):
        assert images.shape == (4, 3, 32, 32) and len(steps) == 2
        return None, model.w

    def backward(self, model, images, labels, steps, saved):
        return saved

    def accumulate_grad(self, found):
        with open("found", "a") as file:
            file.write(f"{len(found)} {self.params[0].grad.sum()};")
        self.params[0].grad.add_(len(found))
        if os.path.exists("broken"):
            raise RuntimeError("it is broken")
"""


def test_the_authors_code_beside_ours(tmp_path, monkeypatch):
    """Of a checkout that is none, but has its functions: two outer steps, then one that fails."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    (tmp_path / "train_distilled_image.py").write_text(TRAINER)
    monkeypatch.chdir(tmp_path)
    with Peer(tmp_path, ("alexcifarnet", 3, 2, 4), torch.device("cpu")) as peer:
        assert peer.run()["step"] > 0
        assert peer.run()["step"] > 0
        Path("broken").touch()
        with pytest.raises(ValueError, match="peer: an outer step does not run: RuntimeError: it is broken"):
            peer.run()
    assert Path("found").read_text() == "3 0.0;" * 3  # gradients begin at 0, which torch 2 does not make them


def test_a_peer_that_is_none_is_refused(run):
    code, error, _ = run("bench", "networks=[lenet]", "peer=nowhere")
    assert code == 1
    assert "peer=nowhere is no checkout of SsnL/dataset-distillation" in error


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


@pytest.mark.parametrize(("hard", "gigabytes", "size"), [(-1, 1e300, 2**62), (-1, 2, 2**31), (2**30, 2.0, 2**30)])
def test_any_number_of_gigabytes_is_a_limit(monkeypatch, hard, gigabytes, size):
    resource, limits = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.append(both))
    LIMIT(gigabytes)
    assert limits == [(size, hard)]


@pytest.mark.parametrize("command", ["bench", "linear", "distill"])
@pytest.mark.parametrize("seed", ["-1", "nan", "inf", "1.5", str(2**70), "text", "null"])
def test_a_seed_that_is_none_is_refused(run, command, seed):
    code, error, _ = run(command, f"seed={seed}")
    assert (code, error.count("\n") <= 1) == (1, True)
    assert error.startswith(f"dd-{command}: error: seed must be ")


def test_an_unknown_network_is_refused(run):
    code, error, _ = run("bench", "networks=[resnet]")
    assert code == 1
    assert "lenet, alexcifarnet" in error
