"""Commands as a user runs them: what they leave behind, and bad input in one line."""

import contextlib
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, write_packed, write_population
from safetensors.torch import save_file
from torchvision import models

from dd_lightning import AlexCifarNet, DistilledData, LeNet
from dd_lightning.commands import launch
from dd_lightning.commands.launch import CONF
from dd_lightning.init import RandomInit
from dd_lightning.system.seeding import Stream

POPULATIONS = (
    ("mnist_lenet", LeNet(1, 28), (1, 28)),
    ("usps_lenet", LeNet(1, 28), (1, 28)),
    ("svhn_lenet", LeNet(3, 32), (3, 32)),
    ("cifar10_alexcifarnet", AlexCifarNet(3, 32), (3, 32)),
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom")
TOY += ("network._target_=conftest.SmallNet", "batch_size=16")
SHORT = (*TOY, "unroll=functional", "trainer.max_steps=4", "callbacks.held_out.every=2")
SHORT += ("trainer.log_every_n_steps=1",)


@pytest.fixture(autouse=True)
def toy(packed):
    return packed()


def test_distill_then_evaluate(run):
    code, error, folder = run("distill", *SHORT, "distilled.steps=2", "init=fixed", "callbacks.held_out.per_step=true")
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert (folder / "distilled.png").stat().st_size > 1000
    assert len(list((folder / "pictures").iterdir())) == 2
    assert "train/loss" in (folder / "csv" / "version_0" / "metrics.csv").read_text()
    assert "wandb" not in sys.modules
    assert len(result["test"]["accuracy_per_step"]) == 7
    distilled = DistilledData.load(folder)
    assert distilled.card["accuracy"] == result["test"]
    assert distilled.card["network"]["target"] == "conftest.SmallNet"
    assert distilled.card["preprocessing"]["channels"] == 1
    assert distilled.initial_weights is not None

    where = ("distilled=learned", f"distilled.path={folder}", "network._target_=conftest.SmallNet")
    code, error, again = run("evaluate", *where, "per_step=true")
    assert (code, error) == (0, "")
    same = json.loads((again / "result.json").read_text())["test"]
    assert same == result["test"]

    code, error, other = run("evaluate", *where, "init=random", "networks=3")
    assert code == 0
    test = json.loads((other / "result.json").read_text())["test"]
    assert (test["networks"], test["networks_chose"]) == (3, 1)

    code, error, _ = run("evaluate", *where[:2])
    assert code == 1
    assert "network=NAME" in error


def test_random_init_and_real_images(run):
    engine = ("unroll=recompute", "inner=momentum")
    code, error, folder = run("distill", *SHORT, *engine, "init=random", "init.per_step=2", "distilled=real")
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert (result["test"]["networks"], result["test"]["networks_chose"]) == (200, 20)
    distilled = DistilledData.load(folder)
    assert distilled.initial_weights is None
    assert distilled.card["inner"] == {
        "choice": "momentum",
        "target": "dd_lightning.unroll.Momentum",
        "momentum": 0.9,
    }


def test_resume_goes_on_and_refuses_another_config(run):
    steps = "trainer.max_steps=8"
    code, _, straight = run("distill", *SHORT, steps)
    assert code == 0
    code, _, first = run("distill", *SHORT)
    code, error, _ = run("distill", *SHORT, steps, f"resume={first}", "schedule.step_size=3")
    assert code == 1
    assert "another config: schedule.step_size" in error
    code, error, second = run("distill", *SHORT, steps, f"resume={first}")
    assert (code, error, second) == (0, "", None)
    one, other = DistilledData.load(straight), DistilledData.load(first)
    assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_pretrain_then_poison_then_evaluate(run, kind, tmp_path):
    here = (*TOY[:5], "name=toy", "networks=3", "held_out_networks=6", "workers=1", "recipe.epochs=5", "recipe.lr=0.01")
    assert run("pretrain", *here)[:2] == (0, "")
    poison = (f"init={kind}_pretrained", "init.population=toy", "objective=poisoning", "init.per_step=1")
    code, error, folder = run("distill", *SHORT, *poison, "callbacks.held_out.networks=3")
    assert (code, error) == (0, "")
    log = (folder / "dd-distill.log").read_text()
    tested, chose = ("the fixed", "the same network") if kind == "fixed" else ("4 unseen", "2 other networks")
    assert f"test accuracy of {tested} network" in log
    assert f"distilled images, chosen with {chose} on validation pictures: " in log
    assert ("2 networks for validation choose the distilled data, not 3" in log) == (kind == "random")
    test = json.loads((folder / "result.json").read_text())["test"]
    assert (test["networks"], test["networks_chose"]) == ((1, 1) if kind == "fixed" else (4, 2))
    assert test["measures"]["accuracy_modified_labels"]["after"] == test["accuracy_mean"]
    assert test["measures"]["accuracy_true_labels"]["before"] > 60
    assert {"attack_share", "accuracy_class_0", "accuracy_class_2"} < set(test["measures"])
    metrics = (folder / "csv" / "version_0" / "metrics.csv").read_text()
    assert "heldout/attack_share_after" in metrics
    assert (DistilledData.load(folder).initial_weights is not None) == (kind == "fixed")

    where = ("distilled=learned", f"distilled.path={folder}", "network._target_=conftest.SmallNet")
    shutil.move("populations", "elsewhere")
    if kind == "random":
        code, error, _ = run("evaluate", *where)
        assert code == 1
        assert "dd-pretrain pretrain=toy populations_dir=populations" in error
        where += ("populations_dir=elsewhere",)
    code, error, again = run("evaluate", *where)
    assert (code, error) == (0, "")
    assert json.loads((again / "result.json").read_text())["test"] == test


FEW_SHOT = (
    "use=few_shot_adaptation +dataset@source=packed source.path=toy.npz source.validation=10 "
    "use.steps=[1,2] use.discriminator_steps=5"
)
COUNTED = {  # networks tested, networks and pictures that chose
    "use=training": (4, None, None),
    "use=grid use.epochs=[1,2] use.learning_rates=[0.1,0.3] use.pictures=2": (4, 2, 8),
    "use=knn": (None, None, 10),
    FEW_SHOT: (3, 2, 10),
    "use=no_adaptation": (4, None, None),
    "use=training +distilled.keep=2": (4, 2, None),
    "use=training split=validation": (2, None, None),
}


@pytest.mark.parametrize("use", COUNTED)
def test_results_say_how_many_networks_tested_and_chose(run, use, tmp_path):
    write_population(tmp_path / "populations" / "toy", SmallNet(image_size=12), (1, 12, 12), 3, held_out=6)
    sets = (
        "init=random_pretrained",
        "init.population=toy",
        "init.per_step=1",
        "distilled=random_real",
        "distilled.sets=3",
    )
    code, error, folder = run("evaluate", *TOY[:5], *sets, "distilled.steps=1", *use.split())
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    found = result["validation" if "split=validation" in use else "test"]
    assert (found["networks"], found["networks_chose"], result["use"].get("pictures_chose")) == COUNTED[use]
    log = (folder / "dd-evaluate.log").read_text()
    assert (f"from {found['networks']} networks" in log) == (found["networks"] is not None)
    assert (f"chosen with {found['networks_chose']}" in log) == (found["networks_chose"] is not None)
    assert ("chosen on 50 training pictures and 2 networks: 2 of 3 sets" in log) == ("keep" in use)


def smaller(experiment):
    """What makes an experiment for any order, or for a GPU, cheap."""
    made = []
    if experiment.startswith(("any_", "rat_", "grow_", "bases_")):
        made += ["order.inner_steps=4", "order.images_per_class=1", "distilled.images_per_class=2"]
        made += [] if experiment == "bases_cifar10_1" else ["window.length=2"]
    of_convnets = experiment.startswith(("any_", "rat_", "bases_cifar"))
    if of_convnets and "lenet" not in experiment and "alexcifarnet" not in experiment:
        made += ["network.width=4"]
        made += ["dataset.image_size=16"] if "cifar" in experiment else []
    if experiment.startswith("grow_"):
        made += ["trainer.max_steps=4", "grow.stages=[1,2,3,4]"]  # one outer step a stage
    if experiment == "soft_cifar10_fixed_100":
        made += ["distilled.steps=1"]
    if experiment.startswith("table3_"):  # other pictures and weights
        made += [
            "dataset=packed",
            "dataset.path=${data_dir}/cifar10.npz",
            "network=torchvision",
            "network.name=squeezenet1_1",
        ]
        made += ["network.weights=${data_dir}/weights.safetensors"]
    if experiment.startswith(("fig2b_cifar10", "fig3b_cifar10", "fig6_cifar10")):
        made += ["distilled.steps=2"]
    return made


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of data sets and populations, by the names that experiments have for them."""
    folder = tmp_path_factory.mktemp("world")
    for name, network, shape in POPULATIONS:
        init = RandomInit()
        weights = functools.partial(init.draw, network, Stream.PRETRAINING)
        write_population(folder / "populations" / name, network, shape, 10, weights=weights)
    pictures = (("mnist", 28, None), ("fashion_mnist", 28, None), ("usps", 16, None), ("cifar10", 32, 3))
    for name, size, channels in pictures:
        write_packed(folder, name, classes=10, size=size, channels=channels, train=180)
    write_packed(folder, "cifar100", classes=100, size=32, channels=3, train=400)
    save_file(models.squeezenet1_1().state_dict(), folder / "weights.safetensors")
    return folder


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(run, experiment, world):
    overrides = ["trainer.max_steps=1", "init.per_step=1", "batch_size=8", "callbacks.held_out.test_networks=2"]
    overrides += ["callbacks.held_out.networks=1", "dataset.validation=15", "optimizer.lr=0.001"]
    overrides += [f"data_dir={world}", f"populations_dir={world / 'populations'}"]
    overrides += smaller(experiment)
    code, error, folder = run("distill", f"experiment={experiment}", *overrides)
    assert (code, error) == (0, "")
    assert json.loads((folder / "result.json").read_text())["name"] == experiment


BAD = {
    "distilled.steps=0": "distilled: steps must be a whole number of at least 1, not 0",
    "distilled.epochs=0": "distilled: epochs must",
    "distilled.images_per_class=0": "distilled: images_per_class must",
    "distilled.learning_rate=-0.1": "distilled: learning_rate[0] must be a number above 0, not -0.1",
    "distilled.learning_rate=0": "distilled: learning_rate[0] must",
    "distilled.std=0": "distilled: std must",
    "init.per_step=0": "init: per_step must",
    "init.scheme=xavier": "init: unknown scheme 'xavier'; choose one of xavier_normal",
    "batch_size=0": "batch_size must",
    "trainer.max_steps=0": "trainer.max_steps must",
    "optimizer.lr=0": "optimizer.lr must",
    "rate_scale=-1": "rate_scale must",
    "init=random_pretrained": "init.population=NAME_OR_PATH",
    "init=random_pretrained init.population=mnist": "dd-pretrain pretrain=mnist populations_dir=populations",
    "init=fixed_pretrained init.population=mnist_lenet init.per_step=2": "a fixed init has one network",
    "objective=poisoning objective.target_class=0": "attack_class and target_class are both 0",
    "objective=poisoning objective.attack_class=3": "there is no attack_class 3 among the classes 0 to 2",
    "dataset.path=nowhere.npz": "there is no packed data set at nowhere.npz",
    "dataset.image_size=20 network=lenet network.image_size=28": "does not take the data set's 1×20×20 images",
    "network._target_=conftest.BatchNormNet": "running_mean",
    "network._target_=no.such.Net": "no.such",
    "dataset=imagenet": "cifar10",
    "init=magic": "random",
    "resume=nowhere": "there is no checkpoint at nowhere",
    "callbacks.held_out.every=0": "every must",
    "distilled=learned": "distilled.path=RUN_OR_FILE",
    "distilled=learned distilled.path=nowhere": "there is no distilled data at nowhere",
    "distilled.nonsense=1": "nonsense",
    "runs_dir=toy.npz": "toy.npz",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_input_in_one_line(run, overrides):
    code, error, _ = run("distill", *SHORT, *overrides.split())
    assert code not in (0, None)
    assert BAD[overrides] in error
    assert "Traceback" not in error
    assert error.startswith("dd-distill: error: ")


def test_a_folder_of_data_that_is_a_file_is_named(run):
    code, error, _ = run("distill", "dataset=mnist", "data_dir=toy.npz")
    assert code == 1
    assert error.startswith("dd-distill: error: ")
    assert "toy.npz" in error


@pytest.mark.parametrize("wrong", ["truncated", "pickle", "classes", "shape", "checkpoint"])
def test_wrong_files_in_one_line(run, wrong, tmp_path):
    path = tmp_path / "distilled.safetensors"
    classes, size = (4 if wrong == "classes" else 3), (8 if wrong == "shape" else 12)
    labels = torch.arange(classes)[None]
    DistilledData.create(torch.randn(1, classes, 1, size, size), labels).save(path)
    if wrong == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif wrong == "pickle":
        path.write_bytes(pickle.dumps("x"))
    elif wrong == "checkpoint":
        save_file({"x": torch.ones(1)}, path)
    code, error, _ = run("evaluate", *TOY, "distilled=learned", f"distilled.path={path}")
    assert code == 1
    assert error.startswith("dd-evaluate: error: ")
    assert str(path) in error
    assert "Traceback" not in error


def test_a_card_cannot_name_code(run, tmp_path):
    """A card is somebody else's: its targets are compared, never instantiated."""
    labels = torch.arange(3)[None]
    data = DistilledData.create(torch.randn(1, 3, 1, 12, 12), labels)
    data.card["network"] = {"choice": "lenet", "target": "os.system", "_target_": "os.system", "command": "touch ran"}
    data.save(tmp_path / "distilled.safetensors")
    code, error, _ = run("evaluate", f"distilled.path={tmp_path}", *TOY[:3])
    assert code == 1
    assert "os.system" in error
    assert not (tmp_path / "ran").exists()


def test_traceback_on_demand(run, monkeypatch):
    monkeypatch.setenv("DD_TRACEBACK", "1")
    with pytest.raises(Exception, match="steps"):
        run("distill", *SHORT, "distilled.steps=0")


def test_wandb_offline_and_two_runs_of_a_multirun(tmp_path, toy):
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "dd_lightning.commands.distill", "-m", *SHORT, "logger=wandb", "seed=1,2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.glob("runs/*/sweep_*/*/wandb/offline-run-*"))
    assert len(runs) == 2
    assert {run.parents[1].name for run in runs} == {"0", "1"}
    assert len({run.name.rpartition("-")[2] for run in runs}) == 2
    for run in runs:
        assert list(run.glob("*.wandb"))
        assert list(run.glob("files/media/images/*.png"))


@pytest.mark.parametrize(("name", "group"), [("distill", "experiment   a claim"), ("evaluate", "distilled    where")])
def test_help_explains_the_groups(monkeypatch, capsys, name, group):
    monkeypatch.setattr(sys, "argv", [f"dd-{name}", "--help"])
    with contextlib.suppress(SystemExit):
        getattr(launch, name)()
    shown = capsys.readouterr().out
    assert group in shown
    assert "lenet" in shown


def test_an_env_file_is_read_from_the_folder_of_the_command(tmp_path, toy):
    (tmp_path / ".env").write_text("DD_RUNS_DIR=elsewhere\n")
    environment = {k: v for k, v in os.environ.items() if k != "DD_RUNS_DIR"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-m", "dd_lightning.commands.distill", *SHORT, "logger=tensorboard"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "TPU" not in said.stdout + said.stderr  # of what Lightning tells of itself
    (folder,) = (tmp_path / "elsewhere" / "distill").iterdir()
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow  # builds a wheel
def test_an_installed_wheel_brings_its_configuration(tmp_path):
    source = Path(__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "dd_lightning.commands.distill", "experiment=fig2a_mnist_fixed", "--cfg", "job"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "name: fig2a_mnist_fixed" in shown
    assert (tmp_path / "installed" / "dd_lightning" / "conf" / "distill.yaml").is_file()


@pytest.mark.parametrize("last_is_best", [True, False])
def test_the_best_of_all_evaluations_is_kept(run, monkeypatch, last_is_best):
    """Also where the last evaluation does not fall on a checkpoint."""
    from dd_lightning.evaluation.heldout import HeldOutResult
    from dd_lightning.training.callbacks import HeldOutEvaluation

    scores = iter([50.0, 40.0, 60.0 if last_is_best else 30.0, 99.0])
    monkeypatch.setattr(
        HeldOutEvaluation, "_evaluate", lambda *a, **k: HeldOutResult(torch.tensor([[10.0, next(scores)]]))
    )
    code, error, folder = run("distill", *SHORT, "trainer.max_steps=5")
    assert (code, error) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert result["validation_accuracy_mean"] == (60 if last_is_best else 50)
    last = torch.load(folder / "checkpoints" / "last-000005.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(last["images"], DistilledData.load(folder).images) == last_is_best


def test_out_of_memory_names_what_takes_less_and_keeps_what_was_distilled(run, monkeypatch):
    from dd_lightning.unroll import FunctionalUnroll

    unroll, calls = FunctionalUnroll.unroll, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return unroll(self, *args, **kwargs)

    monkeypatch.setattr(FunctionalUnroll, "unroll", full)
    code, error, folder = run("distill", *SHORT, "callbacks.held_out.every=4")
    assert code == 1
    assert "out of memory at outer step 2" in error
    assert "a chunk of networks, unroll=recompute, a smaller init.per_step" in error
    assert DistilledData.load(folder / "last_good.safetensors").images.isfinite().all()


def test_a_setting_that_an_option_does_not_take_names_how_to_leave_it_out(run):
    code, error, _ = run("distill", "experiment=demo", "distilled=real")
    assert code == 1
    assert error.startswith("dd-distill: error: distilled: ")
    assert "'std'; leave it out with ~distilled.std" in error


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("callbacks.HeldOutEvaluation", "training.HeldOutEvaluation"),
        ("baselines.Grid", "evaluation.Grid"),
        ("baselines.kmeans", "sources.kmeans"),
        ("pretraining.Recipe", "init.Recipe"),
    ],
)
def test_a_setting_of_an_older_layout_says_so(run, old, now):
    code, error, _ = run("distill", *SHORT, f"callbacks.held_out._target_=dd_lightning.{old}")
    assert code == 1
    assert error.count("\n") <= 1
    assert f"dd_lightning.{old} is of an older layout; it is dd_lightning.{now} now" in error
    room, _, name = now.partition(".")
    assert hasattr(import_module(f"dd_lightning.{room}"), name)


ANY = ("order=shuffled", "order.inner_steps=6", "inner=adam", "labels=learned", "labels.constraint=softmax")
NET, RATE = ("network._target_=conftest.SmallNet",), "distilled.learning_rate=0.02"
ANY += ("distilled=real", "distilled.epochs=1", "distilled.images_per_class=4", "window=random", "window.length=3")


def test_data_for_any_order_are_used_as_their_card_says_or_otherwise(run):
    code, error, folder = run("distill", *SHORT, *ANY, "init=random", "init.per_step=2", "distilled.learning_rate=0.01")
    assert (code, error) == (0, "")
    card = DistilledData.load(folder).card
    assert card["order"] == {
        "choice": "shuffled",
        "target": "dd_lightning.unroll.ShuffledOrder",
        "inner_steps": 6,
        "images_per_class": None,
        "classes": None,
    }
    assert card["stored_numbers"] == 12 * 144 + 12 * 3 + 1
    found = []
    for line in (
        (),
        ("order=shuffled", "order.inner_steps=9", "order.images_per_class=2", "inner=momentum", RATE),
        ("distilled.soft_labels=false",),
    ):
        code, error, evaluated = run("evaluate", f"distilled.path={folder}", "networks=3", *NET, *line)
        assert (code, error) == (0, "")
        found.append(json.loads((evaluated / "result.json").read_text())["test"]["accuracies"])
    assert found[0] == json.loads((folder / "result.json").read_text())["test"]["accuracies"][:3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("window.length=7",), "window: length=7 is more than the 6 inner steps"),
        (("window.start=5",), "window: start=5 and length=3 go beyond"),
        (("window.start=middle",), "window: start must be random, end, pool or a number"),
        (("order.classes=4",), "order.classes=4, but the images are of 3 classes"),
        (("distilled.epochs=2",), "order=shuffled has one set of images and one rate"),
        (("distilled.classes=[0,5]",), "classes must be different ones of 0 to 2"),
        (("augment=dsa", "augment.strategies=[]"), "augment: strategies must name at least one"),
        (("labels.constraint=positive",), "labels: unknown constraint 'positive'"),
    ],
)
def test_windows_orders_and_labels_that_cannot_be(run, line, message):
    check_refused(run, (*SHORT, *ANY, *line), message)


def test_what_the_papers_order_and_labels_cannot_take(run):
    check_refused(run, (*SHORT, "distilled.classes=[0,1]"), "labels: without an image of each of the 3 classes")
    check_refused(run, (*SHORT, "window=pool", "window.length=1"), "need data in any order: order=shuffled")
    few = ("init=random", "init.per_step=3", "window=pool", "window.networks=2")
    check_refused(run, (*SHORT, *ANY, *few), "window: networks=2 in the pool, but init.per_step=3 are taken from it")


def check_refused(run, line, message):
    code, error, _ = run("distill", *line)
    assert code == 1
    assert message in error
    assert error.count("\n") <= 1
