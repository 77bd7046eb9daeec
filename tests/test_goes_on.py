"""The same command goes on, or the message says what to type: sweeps, their folders, the bar, what is left out."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning.callbacks import Callback
from test_resuming import at_step, heed

from dd_lightning import DistilledData
from dd_lightning.commands.launch import CONF
from dd_lightning.commands.resolvers import job_folder
from dd_lightning.training.callbacks import ProgressBar

TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "batch_size=16")
SHORT = (*TOY, "network._target_=conftest.SmallNet", "unroll=functional", "trainer.max_steps=6", "init=random")
SHORT += ("callbacks.held_out.every=3", "callbacks.held_out.networks=1", "callbacks.held_out.test_networks=2")
SHORT += ("init.per_step=1", "callbacks.pictures=null")


@pytest.fixture(autouse=True)
def toy(packed):
    return packed()


def interrupted(monkeypatch, step=4):
    """Within the block, outer step `step` gets a signal, once."""
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def images(folder):
    return {path.parent.name: DistilledData.load(path).images for path in sorted(folder.glob("*/*.safetensors"))}


@pytest.mark.parametrize("resume", [(), ("resume=null",)])
def test_a_sweep_of_ordinary_overrides_goes_on(run, monkeypatch, resume):
    assert run("distill", "-m", *SHORT, "seed=1,2", "name=straight")[0] == 0
    (straight,) = Path("runs/straight").glob("sweep_*")
    with monkeypatch.context() as patch:
        interrupted(patch)
        code, error, folder = run("distill", "-m", *SHORT, "seed=1,2", *resume)
    assert code == 143
    same = "the same command without resume=null goes on" if resume else "the same command goes on"
    assert f"saved after outer step 5; {same} from there" in error
    code, error, other = run("distill", "-m", *SHORT, "seed=1,2")
    assert (code, error, other) == (0, "", None)
    found = images(folder)
    assert found.keys() == {"0", "1"}
    assert all(torch.equal(found[job], expected) for job, expected in images(straight).items())
    log = (folder / "1" / "dd-distill.log").read_text(encoding="utf-8")
    assert "job 2 of 2 (about " in log
    assert "left): " in log
    code, _, other = run("distill", "-m", *SHORT, "seed=1,2")
    assert code == 0
    assert other not in (None, folder)  # a finished sweep is not touched


def test_a_run_whose_data_lie_elsewhere_now_goes_on(run, monkeypatch, packed):
    straight = run("distill", *SHORT)[2]
    with monkeypatch.context() as patch:
        interrupted(patch)
        folder = run("distill", *SHORT, "name=moved")[2]
    Path("toy.npz").rename("elsewhere.npz")
    there = ("name=moved", "dataset.path=elsewhere.npz", f"resume={folder}")
    assert run("distill", *SHORT, *there) == (0, "", None)
    assert torch.equal(DistilledData.load(folder).images, DistilledData.load(straight).images)


def test_a_run_that_was_new_goes_on_without_saying_so(run, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch)
        code, error, folder = run("distill", *SHORT, "resume=null")
    assert code == 143
    assert "the same command without resume=null goes on from there" in error
    assert run("distill", *SHORT) == (0, "", None)
    assert (folder / "result.json").is_file()


def test_a_finished_job_is_not_run_again_for_what_does_not_decide_it(run):
    line = ("-m", *SHORT, "seed=1,2", "hydra.sweep.dir=runs/sweep")
    assert run("distill", *line)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs/sweep").glob("*/result.json")}
    assert run("distill", *line, "resume=null")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/sweep").glob("*/result.json")}


def test_folders_of_jobs_can_be_typed():
    names = ["row=mnist,column=kmeans", "seed=1", "a=[0.1,0.2],b=x/y", "a=[0.1,0.2],b=x-y", "é=1", "lr=-1e-3"]
    folders = [job_folder(name) for name in names]
    assert folders[:2] == ["row-mnist_column-kmeans", "seed-1"]
    assert len(set(folders)) == len(folders)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for folder in folders:
            composed = compose("evaluate", overrides=[f"distilled.path=runs/sweep/{folder}"])
            assert composed.distilled.path == f"runs/sweep/{folder}"
        old = compose("evaluate", overrides=["distilled.path='runs/sweep/row=mnist,column=kmeans'"])
        assert old.distilled.path == "runs/sweep/row=mnist,column=kmeans"


def test_a_hang_up_saves(request, run, monkeypatch):
    heed(request, signal.SIGHUP)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGHUP))
        code, error, _ = run("distill", *SHORT)
    assert code == 128 + signal.SIGHUP
    assert "interrupted by SIGHUP and saved after outer step 5" in error
    assert run("distill", *SHORT) == (0, "", None)


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_an_interruption_stays_one_where_what_it_came_upon_then_fails(run, monkeypatch, sweep):
    from dd_lightning.commands.distill import build_data

    def interrupted_within(cfg):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return build_data(cfg)
        finally:
            raise AttributeError("half made")

    with monkeypatch.context() as patch:
        patch.setattr("dd_lightning.commands.distill.build_data", interrupted_within)
        code, error, folder = run("distill", *sweep, *SHORT)
    assert (code, error) == (143, "dd-distill: interrupted by SIGTERM\n")
    assert not list(folder.rglob("failed.json"))
    assert run("distill", *sweep, *SHORT) == (0, "", None)


class Late(Callback):
    """A signal, once, when the last outer step is done and saved."""

    sent = False

    def on_train_end(self, *args):
        if not Late.sent:
            Late.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_outer_step_is_not_lost(run):
    line = (*SHORT, "+callbacks.late._target_=test_goes_on.Late")
    code, error, folder = run("distill", *line)
    assert code == 143
    assert "interrupted by SIGTERM and saved after outer step 6" in error
    assert not (folder / "result.json").exists()
    assert run("distill", *line) == (0, "", None)
    assert (folder / "result.json").is_file()


@pytest.mark.parametrize("more", ["", "trainer.max_steps=8"])
def test_the_bar_begins_where_the_run_goes_on_and_fits_a_terminal(run, monkeypatch, more):
    seen, widths = [], []
    update = ProgressBar._update_metrics

    def noted(self, trainer, module):
        update(self, trainer, module)
        bar = self.train_progress_bar
        seen.append((bar.completed, bar.total, sum(sample.completed for sample in bar._progress)))
        options = self.progress.console.options.update(width=80)
        table = self.progress.make_tasks_table(self.progress.tasks)
        widths.append(len([row for row in self.progress.console.render_lines(table, options) if row]))

    monkeypatch.setattr(ProgressBar, "_update_metrics", noted)
    terminal = SimpleNamespace(is_terminal=True)
    monkeypatch.setattr(sys.modules["dd_lightning.training.progress"], "get_console", lambda: terminal)
    if more:
        folder = run("distill", *SHORT)[2]
    else:
        with monkeypatch.context() as patch:
            interrupted(patch)
            folder = run("distill", *SHORT)[2]
    assert list(dict.fromkeys(one[0] for one in seen)) == list(range(1, 7 if more else 6))
    seen.clear()
    assert run("distill", *SHORT, *([more, f"resume={folder}"] if more else []))[0] == 0
    assert list(dict.fromkeys(seen)) == ([(7, 8, 1), (8, 8, 2)] if more else [(6, 6, 1)])
    assert set(widths) == {1}


def test_no_bar_where_none_is_asked_for(run, monkeypatch):
    import pytorch_lightning as pl

    made, init = [], pl.Trainer.__init__
    monkeypatch.setattr(pl.Trainer, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0])
    assert run("distill", *SHORT, "callbacks.progress=null")[0] == 0
    assert [trainer.progress_bar_callback for trainer in made] == [None]


def test_trials_and_own_runs_in_the_report(run):
    assert run("distill", *SHORT)[0] == 0
    assert run("distill", *SHORT, "name=mine")[0] == 0
    (mine,) = Path("runs/mine").iterdir()
    result = json.loads((mine / "result.json").read_text(encoding="utf-8"))
    (mine / "result.json").write_text(json.dumps(result | {"outer_steps": 600}), encoding="utf-8")
    assert run("report")[0] == 0
    log = Path("runs/report/dd-report.log").read_text(encoding="utf-8")
    assert "1 run with debug or fewer than 100 outer steps left out" in log
    assert f"mine, toy.npz: {result['test']['accuracy_mean']:.1f}" in log
    assert "of the paper's numbers have no run; runs/report/report.html has the commands" in log
    assert "1 run; runs/report/report.html" in log
    page = Path("runs/report/report.html").read_text(encoding="utf-8")
    assert "Other runs" in page
    assert str(mine) in page
    assert "1 with debug or a few outer steps are left out" in page
