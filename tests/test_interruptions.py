"""A sweep that is interrupted again and again ends as one that is not: bit for bit, and no job is run twice."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ended, forked

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

SWEEP = ("-m", "seed=1,2,3", "dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom")
SWEEP += ("network._target_=conftest.SmallNet", "batch_size=16", "unroll=functional", "init=random", "init.per_step=1")
SWEEP += ("trainer.max_steps=12", "callbacks.resume.every=3", "callbacks.held_out.every=4", "callbacks.pictures=null")
SWEEP += ("callbacks.held_out.networks=1", "callbacks.held_out.test_networks=2", "trainer.log_every_n_steps=1")
SWEEP += ("callbacks.progress=null",)
TIMES = 20


def started(folder):
    return forked("distill", *SWEEP, f"hydra.sweep.dir={folder}")


def result(folder):
    """What the jobs of a sweep left that is the same whenever they are run."""
    found = {}
    for job in sorted(Path(folder).glob("[0-9]")):
        tested = json.loads((job / "result.json").read_text())
        kept = {key: tested[key] for key in ("test", "validation_accuracy_mean", "learning_rates", "outer_steps")}
        metrics = (job / "csv" / "version_0" / "metrics.csv").read_bytes()
        found[job.name] = kept, metrics, (job / "distilled.safetensors").read_bytes()
    return found


def finished(folder):
    """The jobs that are finished, and which file says so."""
    return {path.parent: path.stat().st_ino for path in Path(folder).glob("[0-9]/finished.json")}


@pytest.fixture
def straight(packed, tmp_path, monkeypatch):
    """A sweep that nothing interrupts, and how long it takes."""
    packed()
    monkeypatch.chdir(tmp_path)
    assert ended(started("warm")) == 0
    began = time.monotonic()
    assert ended(started("straight")) == 0
    seconds = time.monotonic() - began
    assert result("warm") == result("straight")
    return result("straight"), seconds


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_signals_at_any_moment(straight, name):
    expected, seconds = straight
    number, draws = getattr(signal, name), random.Random(name)
    interrupted = sweeps = 0
    while interrupted < TIMES:
        folder, before, code = Path(f"sweep{sweeps}"), {}, None
        while code != 0:
            process = started(folder)
            time.sleep(draws.uniform(0, 1.1 * seconds) if interrupted < TIMES else 0)
            if interrupted < TIMES and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                os.kill(process, number)
            code = ended(process)
            assert code in (0, 128 + number)
            interrupted += code != 0
            now = finished(folder)
            assert before.items() <= now.items()  # none was run again
            before = now
        sweeps += 1
        assert result(folder) == expected
    print(f"{name}: {interrupted} interruptions of {sweeps} sweeps")
    assert "Traceback" not in Path("printed.txt").read_text()


@pytest.fixture
def disk(tmp_path):
    """Makes a small disk, where the system lets us; it may grow."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kibibytes, *more):
        option = ",".join([*more, f"size={kibibytes}k"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("mounts need rights")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_full_disks(straight, disk):
    expected, _ = straight
    draws = random.Random(0)
    needed = sum(path.stat().st_size for path in Path("straight").rglob("*") if path.is_file()) // 1024
    interrupted = sweeps = 0
    while interrupted < TIMES:
        room = draws.randint(8, needed // 2)
        folder, before, code = disk(room) / "sweep", {}, None
        while code != 0:
            code = ended(started(folder))
            assert code in (0, 1)
            interrupted += code != 0
            now = finished(folder)
            assert before.items() <= now.items()
            before, room = now, room + draws.randint(8, needed // 2)
            disk(room, "remount")
        assert result(folder) == expected
        subprocess.run(["umount", str(folder.parent)], check=True)
        sweeps += 1
    print(f"{interrupted} full disks in {sweeps} sweeps")
    assert "Traceback" not in Path("printed.txt").read_text()
