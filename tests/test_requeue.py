"""Jobs of a cluster that are told to end come back, and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_commands import TOY

from dd_lightning.commands.launch import CONF


@pytest.mark.slow  # starts processes
def test_a_job_that_submitit_ends_is_queued_again_and_goes_on(tmp_path, packed):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    packed()
    line = ("seed=1", "init=fixed", "unroll=functional", "trainer.max_steps=200", "callbacks.held_out.every=200")
    line += ("callbacks.resume.every=20", "hydra.sweep.dir=runs/sweep", "hydra/launcher=submitit_local")
    command = [sys.executable, "-m", "dd_lightning.commands.distill", "-m", *TOY, *line]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(CONF.parent)])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("runs/sweep/0/checkpoints/last-*.ckpt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (job,) = (path.name for path in tmp_path.glob("runs/sweep/.submitit/*") if path.name.isdigit())
        (worker,) = Path(f"/proc/{job}/task/{job}/children").read_text().split()
        os.kill(int(worker), signal.SIGUSR2)  # as submitit and SLURM do before a job's time is over
        _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    told = "".join(path.read_text() for path in tmp_path.glob("runs/sweep/.submitit/*/*_log.*"))
    assert f"Requeued job {job}" in told
    log = (tmp_path / "runs" / "sweep" / "0" / "dd-distill.log").read_text()
    assert "going on from outer step" in log
    assert json.loads((tmp_path / "runs" / "sweep" / "0" / "result.json").read_text())["outer_steps"] == 200
