"""dd-doctor --gpu: its lines on a CPU, and how parts end that crash or take too long."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dd_lightning.commands import doctor, gpu
from dd_lightning.commands.gpu import LIMITS, Line, Part, answered, prove
from dd_lightning.commands.gpu_parts import PARTS
from dd_lightning.commands.gpu_runs import Place
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.system.installation import BROKEN, NOTE, OK
from dd_lightning.training.cost import Engine
from dd_lightning.training.proving import Size, memory_growth, same_gradient, same_recorded
from dd_lightning.unroll import AdjointUnroll, FunctionalUnroll

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class FirstStep(FunctionalUnroll):
    """Takes one GD step alone."""

    def window(self, network, theta, state, steps):
        return super().window(network, theta, state, list(steps)[:1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "wrong"), [(torch.float64, BROKEN), (torch.float32, NOTE)])
def test_a_wrong_gradient_is_told(device, dtype, wrong):
    found = [same_gradient(unroll, torch.device(device), "lenet", dtype) for unroll in (AdjointUnroll(), FirstStep())]
    assert [mark for mark, *_ in found] == [OK, wrong]
    assert found[0][2]["error"] < 1e-8 if dtype == torch.float64 else 1e-2
    assert found[1][2]["error"] > 1e-2


@pytest.mark.parametrize(("device", "mark"), [("cpu", NOTE), pytest.param("cuda", OK, marks=pytest.mark.cuda)])
def test_recorded_steps_against_the_same_kernel_by_kernel(device, mark):
    engine = Engine(AdjointUnroll(), OuterLoss(Classification()), True)
    found, said, numbers = same_recorded(engine, torch.device(device), Size(2, 2, 8))
    assert found == mark, said
    assert numbers["error"] <= 1e-4
    assert ("skipped" in said) == (device == "cpu")


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]])
def test_memory_of_recompute_alone_hardly_grows(device):
    loss, grown = OuterLoss(Classification()), []
    for unroll in (AdjointUnroll(), AdjointUnroll(recompute=True)):
        mark, _, numbers = memory_growth(Engine(unroll, loss), torch.device(device), Size(1, 10, 64))
        assert mark in (OK, NOTE)
        grown.append(numbers["growth"])
    assert grown[1] < 2 < grown[0]


def test_a_line_that_fails_is_told_with_its_engine_and_the_others_go_on():
    def failing():
        raise RuntimeError("CUDA error:\n an illegal memory access")

    begun, failed, begun_too, fine = answered({"adjoint": failing, "batched": lambda: (OK, "as it should", {"a": 1})})
    assert (begun, begun_too) == (Line("adjoint"), Line("batched"))
    assert failed[:3] == ("adjoint", BROKEN, "RuntimeError: CUDA error: an illegal memory access")
    assert (fine.name, fine.mark, fine.numbers) == ("batched", OK, {"a": 1})


PART = """#!/bin/sh
read seconds
test "$seconds" = 2 || exit 9
echo '["adjoint"]'
echo '["adjoint", "ok", "said", 1.0, null]'
echo '["batched"]'
"""


@pytest.mark.parametrize(
    ("end", "said"), [("sleep 60", "cut after 2 s"), ("echo no memory >&2; exit 1", "ended with 1: no memory")]
)
def test_a_part_that_hangs_or_crashes_names_the_line_it_was_at(tmp_path, monkeypatch, end, said):
    script = tmp_path / "part"
    script.write_text(PART + end)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(gpu, "LEAST", 0)
    done, ended = Part("gradients", "cpu", tmp_path).lines(2)
    assert done == ("adjoint", OK, "said", 1.0, None)
    assert ended == Line("batched", BROKEN, said)


def test_what_was_found_is_in_the_file_at_once(tmp_path, monkeypatch, capsys):
    class Toy:
        def __init__(self, name, device, folder):
            self.name = name

        def lines(self, seconds):
            assert seconds <= 20 * LIMITS[self.name]
            line = Line("batched", OK, "as it should", 1.0, {"error": 0.0})
            yield line
            rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
            assert rows[-1] == {"part": self.name} | line._asdict()
            yield Line("recompute", BROKEN, "not")

    monkeypatch.setattr(gpu, "Part", Toy)
    assert prove("cpu", tmp_path, ["gradients", "bench"]) == ["gradients of recompute", "bench of recompute"]
    assert capsys.readouterr().out.count("\n") == 4


def test_no_time_is_left(tmp_path):
    assert list(Part("demo", "cpu", tmp_path).lines(5)) == [Line("", BROKEN, "no time was left for it")]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dd-doctor", "--gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 0
    assert "torch sees no GPU here: nothing is checked" in capsys.readouterr().out


def test_every_part_has_lines_and_a_limit():
    assert list(PARTS) == list(LIMITS)
    for device in ("cpu", "cuda"):
        place = Place(torch.device(device), Path("nowhere"), 60)
        assert all(part(place) for part in PARTS.values())


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_all_of_it(device, tmp_path):
    assert prove(device, tmp_path) == []
