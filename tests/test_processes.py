"""Several processes distil what one distils, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_folders import CROPPED, write
from test_folders import SHORT as PICTURES

from dd_lightning import DistilledData, LeNet
from dd_lightning.init import RandomInit
from dd_lightning.training.processes import SameSettings, check_strategy

TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "dataset.crop_padding=2", "network=custom")
TOY += ("network._target_=conftest.SmallNet", "unroll=functional", "init=random", "init.per_step=5", "batch_size=16")
TOY += ("callbacks.held_out.networks=3", "callbacks.held_out.test_networks=5", "callbacks.held_out.every=4")
TOY += ("trainer.max_steps=20", "schedule=cosine", "optimizer.lr=0.02", "trainer.gradient_clip_val=0.1")
FOREVER = (*TOY, "trainer.max_steps=1000000", "callbacks.held_out.every=1000000", "callbacks.resume.every=1000000")
FOREVER += ("trainer=ddp_sim", "+logger.csv.flush_logs_every_n_steps=1", "trainer.log_every_n_steps=1")


@pytest.fixture(autouse=True)
def toy(packed, monkeypatch, tmp_path):
    packed()
    monkeypatch.chdir(tmp_path)


def start(*overrides, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DD_")} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "dd_lightning.commands.distill", *overrides]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def distil(name, *overrides, of=TOY):
    """The run's folder."""
    process = start(*of, *overrides, f"name={name}")
    _, error = process.communicate()
    assert process.returncode == 0, error
    (folder,) = Path("runs", name).iterdir()
    return folder


def same(one, other):
    a, b = DistilledData.load(one), DistilledData.load(other)
    tested = [json.loads((folder / "result.json").read_text())["test"] for folder in (one, other)]
    return (
        torch.equal(a.images, b.images) and torch.equal(a.learning_rates, b.learning_rates) and tested[0] == tested[1]
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_initial_weights_are_split_by_index(world):
    init, network = RandomInit(per_step=5, seed=2), LeNet()
    whole = init.sample(network, 7)
    parts = [init.sample(network, 7, rank, world) for rank in range(world)]
    for name, value in whole.items():
        joined = torch.empty_like(value)
        for rank, part in enumerate(parts):
            joined[rank::world] = part[name]
        assert torch.equal(joined, value)


def test_two_processes_distil_what_one_does(run, monkeypatch):
    """Bit for bit, with five initial weights per step: one process has three of them, the other two."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    # The first process is this one; Lightning starts the other like the program's main module.
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="dd_lightning.commands.distill"))
    (code, error, one), (other, said, two) = (run("distill", *TOY, f"trainer={name}") for name in ("cpu", "ddp_sim"))
    assert (code, error, other, said) == (0, "", 0, "")
    assert same(one, two)
    assert (one / "csv" / "version_0" / "metrics.csv").read_text().count("\n") == (
        (two / "csv" / "version_0" / "metrics.csv").read_text().count("\n")
    )


@pytest.mark.slow
@pytest.mark.parametrize("unroll", ["functional", "higher", "recompute"])
def test_any_number_of_processes_distils_the_same(unroll):
    runs = [distil(f"p{n}", "trainer=ddp_sim", f"trainer.devices={n}", f"unroll={unroll}") for n in (1, 2, 4)]
    again = distil("again", "trainer=ddp_sim", "trainer.devices=4", f"unroll={unroll}")
    assert same(runs[2], again)
    for other in runs[1:]:
        if unroll == "recompute":  # batched: the sum over a process's networks is rounded inside
            images = [DistilledData.load(folder).images for folder in (runs[0], other)]
            torch.testing.assert_close(*images, rtol=0, atol=1e-4)
        else:
            assert same(runs[0], other)


@pytest.mark.slow
def test_several_processes_see_the_same_parts_of_pictures(tmp_path):
    write(tmp_path / "pictures")
    several = (*PICTURES, *CROPPED, "dataset.workers=1", "init=random", "init.per_step=3")
    one, two = (distil(name, f"trainer={name}", of=several) for name in ("cpu", "ddp_sim"))
    assert same(one, two)


@pytest.mark.slow
def test_a_sweep_of_several_processes_writes_one_tree():
    process = start("-m", *TOY, "trainer=ddp_sim", "seed=0,1")
    _, error = process.communicate()
    assert process.returncode == 0, error
    (sweep,) = Path("runs/distill").iterdir()
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
    assert all((sweep / job / "result.json").is_file() for job in "01")
    for job in "01":
        assert same(sweep / job, distil(f"single{job}", f"seed={job}"))


@pytest.mark.slow
def test_processes_that_something_else_starts_share_a_folder():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(*TOY, "trainer=ddp_sim", LOCAL_RANK=str(r), RANK=str(r), GROUP_RANK="0", **shared) for r in (1, 0)]
    assert [process.communicate() and process.returncode for process in ranks] == [0, 0]
    (folder,) = Path("runs/distill").iterdir()
    assert same(folder, distil("one"))


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.2)
    return found


def running():
    """The main process of a run on two processes that has done some outer steps, and the process id of the other."""
    main = start(*FOREVER)
    wait_for(
        lambda: (
            main.poll() is not None or [path for path in Path("runs").rglob("metrics.csv") if path.stat().st_size > 200]
        )
    )
    others = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
    (other,) = (int(p) for p in others if b"train_ddp_process_1" in Path(f"/proc/{p}/cmdline").read_bytes())
    return main, other


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["main", "other"])
def test_a_killed_process_ends_the_others(killed):
    main, other = running()
    os.kill(main.pid if killed == "main" else other, signal.SIGKILL)
    _, error = main.communicate(timeout=60)
    assert main.returncode != 0
    wait_for(lambda: not is_alive(other), 60)
    assert "Traceback" not in error
    assert "another process of this run ended; the same command goes on" in error


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["main", "other"])
def test_a_signal_to_one_process_saves_and_stops_all(asked):
    main, other = running()
    os.kill(main.pid if asked == "main" else other, signal.SIGTERM)
    _, error = main.communicate(timeout=60)
    assert main.returncode == 143
    assert error.count("\n") == 1
    assert "interrupted by SIGTERM and saved after outer step" in error
    wait_for(lambda: not is_alive(other), 60)
    assert len(list(Path("runs").rglob("checkpoints/last-*.ckpt"))) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("trainer.strategy=fsdp", "fsdp splits the parameters of large models"),
        ("trainer.strategy=deepspeed_stage_2", "deepspeed_stage_2 splits"),
        ("trainer.strategy=ddp_spawn", "use trainer=ddp"),
        ("trainer.strategy=horovod", "trainer.strategy=horovod is not known"),
        ("trainer=ddp_sim trainer.devices=6", "init.per_step=5, which cannot be split over 6 processes"),
        ("trainer=ddp_sim init=fixed init.per_step=1", "a fixed init has one network"),
        ("trainer=ddp_sim trainer.num_nodes=3", "cannot be split over 6 processes"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_starts(run, overrides, message):
    code, error, _ = run("distill", *TOY, *overrides.split())
    assert code == 1
    assert error.startswith("dd-distill: error: ")
    assert message in error


def test_processes_that_compute_something_else_are_refused(monkeypatch):
    strategy = SimpleNamespace(broadcast=lambda settings: {"seed": 0, "dataset.content": "b"})
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda all_of_them, mine: all_of_them.__setitem__(1, mine)
    )
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    SameSettings({"seed": 0, "dataset.content": "b"}).on_fit_start(trainer, None)
    with pytest.raises(ValueError, match=r"process 1 computes from another dataset\.content than process 0"):
        SameSettings({"seed": 0, "dataset.content": "a"}).on_fit_start(trainer, None)


def test_strategies_known_to_work():
    check_strategy("auto")
    check_strategy("ddp")
    with pytest.raises(ValueError, match="must be auto or ddp"):
        check_strategy(SimpleNamespace())
