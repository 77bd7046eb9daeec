"""dd-doctor: one page, an exit code, no secrets."""

import sys

import pytest
import torch
from conftest import SmallNet, write_population

from dd_lightning.commands import doctor
from dd_lightning.system import installation
from dd_lightning.training import cost
from dd_lightning.unroll import AdjointUnroll, FunctionalUnroll


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    """Runs dd-doctor in an empty folder; returns its exit code and page."""
    monkeypatch.chdir(tmp_path)
    for name in ("DD_DATA_DIR", "DD_POPULATIONS_DIR", "DD_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["dd-doctor"])

    def call():
        with pytest.raises(SystemExit) as stop:
            doctor.main()
        return stop.value.code, capsys.readouterr().out

    return call


def test_a_machine_without_data_and_one_with(page, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    code, said = page()
    assert code == 0
    assert [line[7:20].strip() for line in said.splitlines()] == list(doctor.CHECKS)
    assert "in data: digits; downloaded when used: cifar10" in said
    assert "none in populations; dd-pretrain makes" in said
    assert "adjoint, batched, functional, higher, recompute: one gradient" in said
    assert "WANDB_MODE=offline; a key is set" in said
    assert "0123456789abcdef" not in said

    packed("mnist")
    write_population(tmp_path / "elsewhere" / "toy", SmallNet(image_size=12), (1, 12, 12), 3)
    monkeypatch.setenv("DD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DD_POPULATIONS_DIR", "elsewhere")
    monkeypatch.setattr(doctor, "engines", lambda: ("ok", ""))
    code, said = page()
    assert code == 0
    assert ": digits, mnist; downloaded when used" in said
    assert "toy (3 + 2 networks)" in said


def test_what_is_broken_is_told_and_the_rest_too(page, monkeypatch, tmp_path):
    (tmp_path / "runs").touch()
    asked = ["torch>=99", "no-such-package", "optional; extra == 'x'"]
    monkeypatch.setattr(installation, "requires", lambda name: asked)
    monkeypatch.setattr(cost, "gradient", lambda unroll, place: torch.full((3,), 1.0 + (type(unroll) is AdjointUnroll)))
    code, said = page()
    assert code == "dd-doctor: broken: packages, runs, engines"
    assert "is not >=99; no-such-package is missing" in said
    assert "not the gradient of adjoint: functional, higher" in said
    assert "BROKEN runs" in said
    assert said.count("\n") == len(doctor.CHECKS)


def test_engines_agree_and_a_wrong_one_does_not():
    place = torch.device("cpu")
    right = cost.gradient(FunctionalUnroll(), place)
    assert (cost.gradient(AdjointUnroll(), place) - right).norm() <= 1e-8 * right.norm()

    class FirstOrder(FunctionalUnroll):
        def window(self, network, theta, state, steps):
            theta, state = super().window(network, theta, state, list(steps)[:1])
            return theta, state

    assert (cost.gradient(FirstOrder(), place) - right).norm() > 1e-3 * right.norm()


def test_nothing_secret_is_printed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    text = "at /home/someone/runs: https://user:word@host/x hunter22"
    assert installation.without_secrets(text) == "at ~/runs: https://***@host/x ***"
