"""A run does what its command line says, or says why not."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from dd_lightning import DistilledData
from dd_lightning.system.checks import nearest
from dd_lightning.training.resuming import load_checkpoint, newest_checkpoint

TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom")
TOY += ("network._target_=conftest.SmallNet",)
SHORT = (*TOY, "batch_size=16", "unroll=functional", "trainer.max_steps=6", "callbacks.held_out.every=2")
SHORT += ("callbacks.held_out.networks=1", "callbacks.held_out.test_networks=2", "trainer.log_every_n_steps=1")
EVALUATE = (*TOY, "networks=2", "distilled=random_real", "distilled.steps=2")


@pytest.fixture(autouse=True)
def toy(packed):
    return packed()


WITHOUT = "callbacks.held_out=null callbacks.pictures=null callbacks.resume.every=1"
REFUSED = {
    "+trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches=2 is not a setting of Algorithm 1",
    "+trainer.limit_train_batches=0.5": "trainer.max_steps alone says how long a run is",
    "+trainer.overfit_batches=1": "trainer.max_steps alone",
    "+trainer.min_steps=9": "trainer.max_steps alone",
    "trainer.max_epochs=2": "trainer.max_steps alone",
    "+trainer.precision=16-mixed": "precision=bfloat16 is that of the pass over the real images",
    "+trainer.precision=64-true": "precision=bfloat16",
    "+trainer.fast_dev_run=true": "debug=short",
    "+trainer.callbacks=[]": "callbacks.NAME._target_=CLASS",
    "+trainer.default_root_dir=elsewhere": "runs_dir",
    "+trainer.val_check_interval=3": "it would do nothing here",
    "trainer.use_distributed_sampler=true": "all processes see the same minibatch",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be a number above 0",
    "trainer.gradient_clip_val=nan": "trainer.gradient_clip_val must be a number above 0",
    "+trainer.max_time=3": "trainer.max_time must be days, hours, minutes and seconds",
    "+trainer.max_time=00:00:00:00": "trainer.max_time must be",
    f"returned=validation {WITHOUT}": "returned=validation, but there is no held-out evaluation",
    "+lr=3": "lr is no setting of dd-distill; did you mean optimizer.lr?",
    "lr=3": "there is no setting lr; did you mean optimizer.lr?",
    "experment=demo": "there is no setting experment; did you mean experiment?",
    "experiment=demoo": "experiment has no option demoo; did you mean demo? (any_cifar100_10, ",
    "traner=gpu": "there is no setting traner; did you mean trainer?",
    "trainer.max_step=3": "there is no setting trainer.max_step; did you mean trainer.max_steps?",
    "network.weights=FILE": "there is no setting network.weights of the chosen network; network=torchvision has it",
    "callbacks.held_out=null": "callbacks.pictures.every and callbacks.resume.every: the value is that of "
    "callbacks.held_out.every, which is not there; give callbacks.pictures.every=VALUE callbacks.resume.every=VALUE",
    "+network.widht=3": "network: SmallNet takes no setting 'widht'; leave it out with ~network.widht",
    "+objective.foo=1": "objective: Classification takes no setting 'foo'",
    "+optimizer.foo=1": "optimizer: AdamW takes no setting 'foo'; leave it out with ~optimizer.foo",
    "+callbacks.mine.every=3": "callbacks.mine has no class: callbacks.mine._target_=CLASS",
    "--seed=1": "--seed=1 is no option; a setting is written without dashes: seed=1",
    "-seed=1": "-seed=1 is no option; a setting is written without dashes: seed=1",
    "--nonsense": "--nonsense is no option",
    "seed=1 -m batch_size=8": "options such as -m come before all settings, and here settings such as batch_size=8",
    "seed 1": "seed is no setting; one is written with =, such as seed=VALUE",
    "augment=dsa augment.strategies=flip": "augment: strategies must be a list, such as augment.strategies=[flip]",
    "augment.strategies=[flip": "augment.strategies=[flip: a bracket is missing; a list is augment.strategies=[1,2]",
    "distilled.classes=3": "distilled: classes must be a list, such as distilled.classes=[3], not 3",
    "optimizer.betas=0.5": "optimizer: betas must be a list, such as optimizer.betas=[0.5]",
    "optimizer.betas=[0.5]": "optimizer.betas must be two numbers",
    "seed=1,2": "seed=1,2: a sweep over values needs -m; a list is seed=[1,2]",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_not_done_is_refused_in_one_line_and_leaves_nothing(run, line):
    code, error, folder = run("distill", *SHORT, *line.split())
    assert code == 1
    assert error.startswith("dd-distill: error: ")
    assert REFUSED[line] in error
    assert error.count("\n") <= 1
    assert folder is None


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("evaluate", EVALUATE),
        ("pretrain", (*TOY, "name=toy", "networks=2", "held_out_networks=2", "recipe.epochs=1", "workers=1")),
        ("linear", ()),
        ("report", ()),
        ("bench", ()),
    ],
)
def test_no_command_takes_what_it_does_not_read(run, command, line):
    code, error, _ = run(command, *line, "+nonsense=1")
    assert code == 1
    assert error.startswith(f"dd-{command}: error: nonsense is no setting of dd-{command}")


def test_an_error_tells_no_settings_that_it_is_not_about(run):
    code, error, _ = run("distill", *SHORT, "distilled=learned")
    assert code == 1
    assert "held_out" not in error


def test_the_nearest_name():
    names = ["optimizer.lr", "recipe.lr", "seed", "init.seed", "network.width", "batch_size"]
    assert nearest("lr", names) == "; did you mean recipe.lr?"
    assert nearest("optimiser.lr", names) == "; did you mean optimizer.lr?"
    assert nearest("network.widht", names) == "; did you mean network.width?"
    assert nearest("batchsize", names) == "; did you mean batch_size?"
    assert nearest("nonsense", names) == ""


def test_what_costs_little_is_done(run):
    line = ("+trainer.detect_anomaly=true", "trainer.gradient_clip_val=0.1", "+trainer.gradient_clip_algorithm=value")
    assert run("distill", *SHORT, *line, "+trainer.accumulate_grad_batches=1", "+trainer.precision=32")[:2] == (0, "")


def test_a_time_limit_interrupts_and_the_same_command_goes_on(run):
    lines = (*SHORT, "trainer.max_steps=60", "callbacks.pictures=null", "callbacks.held_out.every=20")
    assert run("distill", *lines, "name=straight")[0] == 0
    slow = ("+callbacks.slow._target_=test_asked.Slow", "+trainer.max_time=00:00:00:01")
    code, error, folder = run("distill", *lines, *slow)
    assert code == 124
    step = load_checkpoint(newest_checkpoint(folder / "checkpoints"))["global_step"]
    assert error == (
        f"dd-distill: interrupted by trainer.max_time and saved after outer step {step}; "
        "the same command goes on from there\n"
    )
    assert 0 < step < 60
    assert not (folder / "result.json").exists()
    for _ in range(20):
        code, _, other = run("distill", *lines, *slow)
        assert (code, other) in ((124, None), (0, None))
        if code == 0:
            break
    straight = next(Path("runs/straight").iterdir())
    assert torch.equal(DistilledData.load(straight).images, DistilledData.load(folder).images)


class Slow(Callback):
    def on_train_batch_end(self, trainer, *args):
        signal.sigtimedwait([], 0.04)


class Enough(Callback):
    """A user's own reason to stop."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 3


EARLY = {
    "own": ("+callbacks.enough._target_=test_asked.Enough",),
    "lightning": (
        "+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping",
        "+callbacks.stop.monitor=heldout/accuracy_mean",
        "+callbacks.stop.mode=max",
        "+callbacks.stop.min_delta=100",
        "+callbacks.stop.patience=1",
    ),
}


@pytest.mark.parametrize(("kind", "step"), [("own", 3), ("lightning", 4)])
def test_an_early_stop_is_a_finish_that_says_so_and_can_go_on(run, kind, step):
    code, error, folder = run("distill", *SHORT, *EARLY[kind])
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert (result["outer_steps"], result["stopped_early"]) == (step, True)
    said = (folder / "dd-distill.log").read_text()
    where = os.path.relpath(folder)
    assert f"a callback stopped the run early, after {step} of 6 outer steps; resume={where} goes on" in said
    assert newest_checkpoint(folder / "checkpoints").name == f"last-{step:06d}.ckpt"
    assert run("distill", *SHORT, f"resume={where}") == (0, "", None)
    result = json.loads((folder / "result.json").read_text())
    assert (result["outer_steps"], result["stopped_early"]) == (6, False)


@pytest.mark.parametrize("resume", ["auto", "null"])
@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_a_finished_run_is_kept_whole(run, command, resume):
    folder = Path("runs/distill/mine")
    assert run("distill", *SHORT, f"hydra.run.dir={folder}")[:2] == (0, "")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    line = (*SHORT, "seed=3", f"resume={resume}") if command == "distill" else EVALUATE
    code, error, _ = run(command, *line, f"hydra.run.dir={folder}")
    assert code == 1
    assert error == f"dd-{command}: error: {folder} holds a finished run; give another hydra.run.dir"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_command_leaves_the_record_of_the_run_it_asked_for(run):
    folder = Path("runs/distill/mine")
    assert run("distill", *SHORT, f"hydra.run.dir={folder}")[:2] == (0, "")
    before = {path: path.read_bytes() for path in folder.glob(".hydra/*")}
    code, error, _ = run("distill", *SHORT, f"resume={folder}", "seed=3")
    assert code == 1
    assert "the checkpoint is of another config" in error
    assert before == {path: path.read_bytes() for path in folder.glob(".hydra/*")}


def test_a_run_does_not_go_back(run):
    folder = Path("runs/distill/mine")
    assert run("distill", *SHORT, f"hydra.run.dir={folder}")[:2] == (0, "")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".yaml", ".json")}
    code, error, _ = run("distill", *SHORT, f"resume={folder}", "trainer.max_steps=4")
    assert (code, error) == (
        1,
        "dd-distill: error: trainer.max_steps=4, but the checkpoint is of outer step 6",
    )
    assert before == {path: path.read_bytes() for path in before}


class Buffered(torch.nn.Module):
    """A network whose pixels are weighted by numbers that are drawn once, and are no parameters."""

    def __init__(self, in_channels, image_size, num_classes):
        super().__init__()
        self.register_buffer("weighting", torch.randn(in_channels * image_size**2))
        self.linear = torch.nn.Linear(in_channels * image_size**2, num_classes)

    def forward(self, x):
        return self.linear(x.flatten(1) * self.weighting)


def test_buffers_of_one_network_come_with_its_weights(run):
    line = (*SHORT, "network._target_=test_asked.Buffered")
    torch.manual_seed(1)
    code, error, folder = run("distill", *line)
    assert (code, error) == (0, "")
    expected = json.loads((folder / "result.json").read_text(encoding="utf-8"))["test"]["accuracies"]
    torch.manual_seed(2)
    code, error, again = run("evaluate", f"distilled.path={folder}", "network._target_=test_asked.Buffered")
    assert (code, error) == (0, "")
    assert json.loads((again / "result.json").read_text(encoding="utf-8"))["test"]["accuracies"] == expected
    data, network = DistilledData.load(folder), Buffered(1, 12, 3)
    data.train(network)
    assert torch.equal(network.weighting, data.initial_weights["weighting"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainer.deterministic=maybe", "trainer.deterministic must be true, false or warn, not 'maybe'"),
        ("+trainer.detect_anomaly=3", "trainer: detect_anomaly must be true or false, not 3"),
        ("callbacks.held_out.per_step=text", "callbacks.held_out: per_step must be true or false, not 'text'"),
        ("chunk=0", "chunk must be a whole number of at least 1, not 0"),
        ("schedule.gamma=-1", "schedule.gamma must be a number above 0, not -1"),
        ("schedule.step_size=0", "schedule.step_size must be a whole number of at least 1"),
        ("threads=100000", "threads must be at most 1024"),  # torch crashes
        ("dataset.flip=3", "dataset: flip must be true or false"),
        ("dataset.mean=0.5", "dataset: mean and std must be lists, such as [0.5]"),
        ("dataset.crop_padding=50", "dataset: crop_padding=50 must be below the 12 pixels"),
        ("dataset.path=.", "dd-pack folder=. path=my.npz"),
        ("name=a/b", "dd-distill: error: name must be letters"),
        ("resume=nowhere", "there is no checkpoint at nowhere"),
        ("capture=text", "capture must be true or false"),
        ("seed=4294967296", "seed must be below 2³², not 4294967296"),
        ("network=null", "network=null is none of the group's options"),
        ("network._target_=builtins.dict", "network must be a torch.nn.Module, not dict"),
    ],
)
def test_values_of_another_kind(run, line, message):
    code, error, folder = run("distill", *SHORT, line)
    assert code == 1
    assert message in error
    assert error.count("\n") <= 1
    assert folder is None
