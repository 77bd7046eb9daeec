"""Runs that are interrupted, and what the same command makes of them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dd_lightning import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.system.locking import locked
from dd_lightning.training.resuming import load_checkpoint, newest_checkpoint

# Random initial weights, augmentation and a schedule; checkpoints that fall neither on evaluations nor on epochs.
RUN = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "dataset.crop_padding=2", "dataset.flip=true")
RUN += ("network=custom", "network._target_=conftest.SmallNet", "unroll=functional", "init=random", "init.per_step=2")
RUN += ("batch_size=16", "schedule=cosine", "trainer.log_every_n_steps=1", "trainer.max_steps=10", "logger=csv")
RUN += ("callbacks.held_out.every=4", "callbacks.held_out.networks=2", "callbacks.held_out.test_networks=3")
RUN += ("callbacks.resume.every=3",)


@pytest.fixture(autouse=True)
def toy(packed):
    return packed(channels=3)


def at_step(monkeypatch, step, action):
    """Does something once, in the middle of an outer step."""
    training_step, left = DatasetDistiller.training_step, [action]

    def interrupted(self, *args):
        if self.global_step == step and left:
            left.pop()()
        return training_step(self, *args)

    monkeypatch.setattr(DatasetDistiller, "training_step", interrupted)


def same(one, other):
    """The same distilled data and results, bit for bit, and the same metrics, each logged once."""
    a, b = DistilledData.load(one), DistilledData.load(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    metrics = [(folder / "csv" / "version_0" / "metrics.csv").read_text() for folder in (one, other)]
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.raw_learning_rates, b.raw_learning_rates)
        and results[0]["test"] == results[1]["test"]
        and results[0]["validation_accuracy_mean"] == results[1]["validation_accuracy_mean"]
        and metrics[0] == metrics[1]
    )


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def straight(run, kept):
    """A run that was not interrupted."""
    if not kept:
        code, error, kept["folder"] = run("distill", *RUN)
        assert (code, error) == (0, "")
    return kept["folder"]


def heed(request, number):
    """What is started in the background ignores SIGINT, and leaves it so; here it is to be heeded anyway."""
    before = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, before))


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 3), ("SIGINT", 7), ("SIGHUP", 8), ("SIGUSR1", 9)])
def test_a_signal_saves_at_once_and_the_same_command_goes_on(request, run, monkeypatch, straight, name, step):
    number = signal.Signals[name]
    heed(request, number)
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))
    code, error, folder = run("distill", *RUN)
    assert code == 128 + number
    assert error == (
        f"dd-distill: interrupted by {name} and saved after outer step {step + 1}; "
        "the same command goes on from there\n"
    )
    assert newest_checkpoint(folder / "checkpoints").name == f"last-{step + 1:06d}.ckpt"
    assert run("distill", *RUN) == (0, "", None)
    assert same(straight, folder)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


ANY = ("inner=adam", "order=shuffled", "order.inner_steps=12", "order.images_per_class=2", "distilled.epochs=1")
ANY += ("distilled.images_per_class=4", "labels=learned", "labels.constraint=nonnegative", "window.length=4")
ANY += ("callbacks=adaptive_clipping", "distilled.learning_rate=0.01")


@pytest.mark.parametrize("where", [("window=random", "augment=flip_rotate"), ("window=pool", "augment=dsa")])
@pytest.mark.parametrize("unroll", ["functional", "batched"])
def test_data_for_any_order_go_on_bit_for_bit(run, monkeypatch, where, unroll):
    lines = (*RUN, *ANY, *where, f"unroll={unroll}")
    assert run("distill", *lines, "name=straight")[:2] == (0, "")
    for step in (5, 8):
        at_step(monkeypatch, step, killed)
        with pytest.raises(Killed):
            run("distill", *lines, "name=killed")
    assert run("distill", *lines, "name=killed")[:2] == (0, "")
    one, other = (next(Path("runs", name).iterdir()) for name in ("straight", "killed"))
    assert same(one, other)
    assert torch.equal(DistilledData.load(one).soft_labels, DistilledData.load(other).soft_labels)


class Killed(BaseException):
    """Stands for the end of the process."""


def killed():
    raise Killed


@pytest.mark.parametrize("where", ["step", "evaluation", "saving", "saved", "test", "result"])
def test_wherever_a_run_ends_the_same_command_goes_on(run, monkeypatch, straight, where):
    from dd_lightning.training.callbacks import HeldOutEvaluation
    from dd_lightning.training.resuming import ResumeCheckpoint

    save, evaluate, replace = ResumeCheckpoint._save, HeldOutEvaluation._evaluate, Path.replace
    with monkeypatch.context() as patch:
        if where == "step":
            at_step(patch, 5, killed)
        elif where == "evaluation":
            patch.setattr(HeldOutEvaluation, "_evaluate", lambda s, m, *a, **k: (evaluate(s, m, *a, **k), killed()))
        elif where == "saving":
            patch.setattr(Path, "replace", lambda s, t: killed() if "last-000006" in str(t) else replace(s, t))
        elif where == "saved":
            patch.setattr(ResumeCheckpoint, "_save", lambda s, trainer: (save(s, trainer), killed()))
        elif where == "test":
            patch.setattr(HeldOutEvaluation, "test", lambda *a: killed())
        else:
            patch.setattr("dd_lightning.training.finishing.write_json", lambda *a: killed())
        with pytest.raises(Killed):
            run("distill", *RUN)
    folder = max(Path("runs/distill").iterdir())
    assert run("distill", *RUN) == (0, "", None)
    assert same(straight, folder.resolve())
    assert not list(folder.glob("checkpoints/.*"))


def test_a_second_signal_stops_at_once(run, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 5, twice)
    code, error, folder = run("distill", *RUN)
    assert code == 143
    assert "stopped at once" in error
    assert newest_checkpoint(folder / "checkpoints").name == "last-000003.ckpt"


def interrupt(run, monkeypatch, step=7):
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, _, folder = run("distill", *RUN)
    assert code == 143
    return folder


def test_a_truncated_checkpoint_falls_back_to_the_one_before(run, monkeypatch, straight):
    folder = interrupt(run, monkeypatch)
    newest, before = sorted(folder.glob("checkpoints/*.ckpt"), reverse=True)
    assert (newest.name, before.name) == ("last-000008.ckpt", "last-000006.ckpt")
    newest.write_bytes(newest.read_bytes()[:-200])
    assert newest_checkpoint(folder / "checkpoints") == before
    assert run("distill", *RUN) == (0, "", None)
    warning = "last-000008.ckpt is truncated or not a checkpoint; trying the one before"
    assert warning in (folder / "dd-distill.log").read_text()
    assert same(straight, folder)


def test_no_readable_checkpoint_is_an_error_and_null_starts_anew(run, monkeypatch):
    folder = interrupt(run, monkeypatch)
    for path in folder.glob("checkpoints/*.ckpt"):
        path.write_bytes(b"")
    code, error, _ = run("distill", *RUN)
    assert code == 1
    assert error.splitlines()[-1].endswith("can be read; resume=null starts a new run")
    code, _, other = run("distill", *RUN, "resume=null")
    assert code == 0
    assert other not in (None, folder)


def changed(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("global_step"), "global_step"),
        (lambda c: c.update(global_step=-1), "global_step"),
        (lambda c: c.update(global_step=2.5), "global_step"),
        (lambda c: c.pop("loops"), "loops"),
        (lambda c: c.update(optimizer_states={}), "optimizer_states"),
        (lambda c: c.update(dd_config=[1]), "dd_config"),
    ],
)
def test_a_checkpoint_whose_parts_are_of_another_kind_is_refused_by_name(tmp_path, change, named):
    path = tmp_path / "last-000003.ckpt"
    kinds = {"global_step": 3, "state_dict": {}, "loops": {}, "callbacks": {}, "dd_config": {}}
    kinds |= {"optimizer_states": [], "lr_schedulers": [], "pytorch-lightning_version": "2"}
    torch.save(kinds, path)
    assert load_checkpoint(path) == kinds
    changed(path, change)
    with pytest.raises(ValueError, match=rf"{path} is not what a run writes: {named}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["state_dict"].pop("images"), 'Missing key(s) in state_dict: "images"'),
        (lambda c: c["state_dict"].update(images=1), "images"),
        (lambda c: c.update(global_step=5), "outer step 5, but 8 minibatches and 8 updates"),
        (lambda c: c["loops"]["fit_loop"].pop("epoch_loop.batch_progress"), "outer step 8"),
        (lambda c: c.update(optimizer_states=[]), "it lacks optimizer_states"),
        (lambda c: c.update(lr_schedulers=[{}]), "it lacks lr_schedulers"),
        (lambda c: c["callbacks"]["ResumeCheckpoint"].update(seconds="x"), "seconds must be a number"),
        (lambda c: c["callbacks"]["HeldOutEvaluation"].update(best={}), "it lacks 'accuracy'"),
        (lambda c: c["callbacks"]["HeldOutEvaluation"].update(best=7), "'int' object"),
    ],
)
def test_a_run_does_not_go_on_from_half_of_a_checkpoint(run, monkeypatch, kept, change, named):
    if "unfinished" not in kept:
        kept["unfinished"] = interrupt(run, monkeypatch)
    newest, _ = sorted(kept["unfinished"].glob("checkpoints/*.ckpt"), reverse=True)
    path = shutil.copytree(kept["unfinished"], Path("copy")) / "checkpoints" / newest.name
    changed(path, change)
    code, error, _ = run("distill", *RUN, "hydra.run.dir=copy")
    message = error.splitlines()[-1]
    assert (code, message.startswith("dd-distill: error: cannot go on from ")) == (1, True)
    assert newest.name in message
    assert named in message
    assert not Path("copy", "result.json").exists()


def test_one_changed_bit_is_noticed(run, monkeypatch):
    path = newest_checkpoint(interrupt(run, monkeypatch) / "checkpoints")
    content = bytearray(path.read_bytes())
    content[content.index(b"images") + 3000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        load_checkpoint(path)


def test_a_finished_run_is_not_touched(run):
    code, _, first = run("distill", *RUN)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    code, _, again = run("distill", *RUN)
    assert code == 0
    assert again not in (None, first)
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert same(first, again)


def test_another_config_does_not_go_on(run, monkeypatch):
    folder = interrupt(run, monkeypatch)
    code, _, other = run("distill", *RUN, "seed=1")
    assert code == 0
    assert other not in (None, folder)
    code, error, _ = run("distill", *RUN, "seed=1", f"resume={folder}")
    assert code == 1
    assert "another config: dataset" not in error
    assert "seed (0 there, 1 here)" in error


def test_changed_data_are_refused(run, monkeypatch, packed):
    interrupt(run, monkeypatch)
    packed(channels=3, train_images=np.zeros((60, 12, 12, 3), np.uint8))
    code, error, _ = run("distill", *RUN)
    assert code == 1
    assert "the checkpoint is of another config: dataset.content" in error


def test_the_same_run_twice_at_once_is_refused(run, monkeypatch):
    folder = interrupt(run, monkeypatch)
    with locked(folder / ".lock"):
        code, error, _ = run("distill", *RUN)
    assert code == 1
    assert f"this run is going on already in {folder} (process {os.getpid()}); resume=null starts another" in error


def test_no_two_commands_work_in_one_folder(run):
    data = ("dataset=packed", "dataset.path=toy.npz", "network=mlp")
    evaluate = (*data, "distilled=random_real", "networks=2", "hydra.run.dir=folder")
    pretrain = (*data, "name=toy", "networks=2", "held_out_networks=2", "recipe.epochs=1", "workers=1")
    for command, line, folder in (("evaluate", evaluate, "folder"), ("pretrain", pretrain, "populations/toy")):
        with locked(Path(folder, ".lock")):
            code, error, _ = run(command, *line)
        assert (code, error.count("\n") <= 1, "is going on already in " in error) == (1, True, True)
        assert not list(Path(folder).glob("*.json"))
        assert run(command, *line)[:2] == (0, "")


@pytest.mark.slow
def test_twenty_kills(tmp_path, run):
    """SIGKILL at random moments of five runs, four times each."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    longer = [*RUN, "trainer.max_steps=600", "callbacks.resume.every=5", "callbacks.pictures.every=100"]
    code, _, reference = run("distill", *longer)
    assert code == 0
    moments, kills = random.Random(0), 0
    for number in range(5):
        runs = Path(f"runs/killed{number}")

        def restart(name=runs.name):
            command = [sys.executable, "-m", "dd_lightning.commands.distill", *longer, f"name={name}"]
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

        for _ in range(4):
            process, started = restart(), time.time()
            while not any(path.stat().st_mtime > started for path in runs.glob("*/.lock")):
                time.sleep(0.02)  # imports
            time.sleep(moments.uniform(0, 3))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        assert restart().wait() == 0
        (folder,) = runs.iterdir()
        assert same(reference, folder.resolve())
    assert kills == 20
