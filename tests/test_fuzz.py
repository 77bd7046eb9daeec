"""Any configuration either runs an outer step or is refused in one line that names the setting."""

import contextlib
import io
import os
import shutil
import signal
import sys
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import MISSING, OmegaConf

from dd_lightning import DistilledData
from dd_lightning.commands import distill
from dd_lightning.commands.build import CARD_GROUPS
from dd_lightning.commands.launch import CONF

BASE = ["trainer.max_steps=1", "trainer.accelerator=cpu", "init.per_step=1", "batch_size=8", "data_dir=."]
BASE += ["callbacks.held_out.networks=1", "callbacks.held_out.test_networks=1", "dataset.validation=15"]
BASE += ["callbacks.progress=null", "unroll=functional"]
GROUPS = ("dataset", "network", "init", "objective", "distilled", "inner", "unroll", "optimizer", "schedule", "trainer")
GROUPS += ("callbacks", "logger", "debug", "order", "augment", "labels", "window", "images", "grow", "whitening")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
# wandb asks for an account, ddp starts this file's program again, tracebacks are what this file looks for.
OPTIONS = [o for o in OPTIONS if o not in ("logger=wandb", "trainer=ddp", "trainer=ddp_sim") and "debug" not in o]
OPTIONS = [o for o in OPTIONS if o not in ("logger=many", "logger=mlflow")]  # wandb, too, and what may not be installed
PAIRS = [p for p in combinations(OPTIONS, 2) if p[0].partition("=")[0] != p[1].partition("=")[0]]
# What an option cannot be without.
WITH = {f"window={name}": ["window.length=1"] for name in ("random", "end", "pool")}
WITH |= {"window=pool": ["window.length=1", "window.networks=2"]}
WITH |= {"grow=stages": ["grow.stages=[1,2]", "trainer.max_steps=2"], "images=bases": ["images.count=2"]}
WITH |= {f"network={name}": ["network.width=8"] for name in ("convnet", "resnet18", "vgg11", "vit_small")}  # quick
WITH |= {"order=shuffled": ["order.inner_steps=2", "distilled.steps=1", "distilled.epochs=1"]}
OPTIONS += [f"{group}=nonsense" for group in GROUPS]
UNTOUCHED = ("traceback", "dry_run", "data_dir", "runs_dir", "expected", "trainer.devices", "trainer.accelerator")
VALUES = ["0", "-1", "1", "2", "0.5", "1.5", "1e-30", "1e15", "nan", "inf", "-inf", "null", "true", "text", "''", "'é'"]
VALUES += ["[]", "[1,2]", "[0.5]", "[nan]", "{a: 1}", "${nope}", "${seed}", "???", "[", "a/b", "../x", "/etc/passwd"]
# So many would be what was asked for, and take forever.
PATIENT = ("networks", "test_networks", "steps", "epochs", "images_per_class", "per_step", "image_size")


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def keys_of(option):
    """What its own file sets: to compose every option takes half a minute."""
    group, _, name = option.partition("=")
    content = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    content.pop("defaults", None)
    return set(leaves({group: content})) if content else set()


def settings_of():
    """(choices of groups, key) of every setting there is."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        default = set(leaves(OmegaConf.to_container(compose("distill"))))
    yield from (((), key) for key in sorted(default))
    for option in OPTIONS:
        if not option.endswith("=nonsense"):
            yield from (((option,), key) for key in sorted(keys_of(option) - default))


SETTINGS = [(choices, key) for choices, key in settings_of() if key not in UNTOUCHED]


@st.composite
def command_lines(draw):
    """A choice of options, and one setting's value; either may be wrong."""
    line = draw(st.lists(st.sampled_from(OPTIONS), max_size=2, unique_by=lambda option: option.partition("=")[0]))
    if line and draw(st.booleans()):
        return line
    choices, key = draw(st.sampled_from(SETTINGS))
    value = draw(st.sampled_from(VALUES))
    if value == "1e15" and key.endswith(PATIENT):
        value = "2"
    chosen = {choice.partition("=")[0] for choice in choices}
    return [*(o for o in line if o.partition("=")[0] not in chosen), *choices, f"{key}={value}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Packed files of every data set's name."""
    folder, random = tmp_path_factory.mktemp("fuzz"), np.random.default_rng(0)
    grey, coloured = ("mnist", "fashion_mnist", "kmnist"), ("svhn", "cifar10", "cifar100")
    shapes = dict.fromkeys(grey, (28, 28)) | dict.fromkeys(coloured, (32, 32, 3)) | {"usps": (16, 16)}
    for name, shape in shapes.items():
        arrays, classes = {}, 100 if name == "cifar100" else 10
        for part, count in (("train", 6 * classes), ("test", 3 * classes)):
            arrays[f"{part}_images"] = random.integers(0, 255, (count, *shape)).astype(np.uint8)
            arrays[f"{part}_labels"] = np.arange(count) % classes
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def outcome(line):
    """Exit code and all that the command printed to stderr."""
    printed = io.StringIO()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{line} hangs"))
    signal.alarm(600)
    try:
        with contextlib.redirect_stderr(printed):
            sys.argv = ["dd-distill", *BASE, *line]
            distill.main()
        return 0, printed.getvalue()
    except SystemExit as stop:
        return 1, f"{stop.code}\n"
    finally:
        signal.alarm(0)
        os.environ.pop("HYDRA_FULL_ERROR", None)


def check(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in ("DD_TRACEBACK", "DD_DATA_DIR", "DD_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    code, printed = outcome(line)
    results = list(Path("runs").rglob("result.json"))
    kept = [path for path in Path("runs").glob("*/*") if not any(made(file) for file in path.rglob("*"))]
    if code == 0:
        check_record(results[0].parent, line)
    shutil.rmtree("runs", ignore_errors=True)
    assert "Traceback" not in printed
    if code == 0:
        assert len(results) == 1
        return
    assert not kept
    assert printed.startswith("dd-distill: error: ")
    assert printed.count("\n") == 1
    named = [part for override in line for part in override.partition("=")[0].split(".")]
    assert any(part in printed for part in named)


def made(file):
    """Whether a file of a run's folder is of work that was done."""
    return file.is_file() and file.parent.name != ".hydra" and file.name not in (".lock", "dd-distill.log")


def check_record(folder, line):
    """The run's own record is what was asked."""
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    choices = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.choices
    card = OmegaConf.create({"card": DistilledData.load(folder).card}).card
    for override in OverridesParser.create().parse_overrides(line):
        key, value = override.key_or_group, override.value()
        if key in GROUPS:
            assert choices[key] == value
            assert key not in CARD_GROUPS or card[key].choice == value
        elif "${" not in override.input_line:
            asked = OmegaConf.create({"value": value}).value
            assert repr(OmegaConf.select(config, key)) == repr(asked)
            if key.partition(".")[0] in CARD_GROUPS and OmegaConf.select(card, key, default=MISSING) != MISSING:
                assert asked is None or repr(OmegaConf.select(card, key)) == repr(asked)


SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
@given(line=command_lines())
def test_a_few_configurations(line, folder, monkeypatch):
    check(line, folder, monkeypatch)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=SUPPRESSED)
@given(line=command_lines())
def test_many_configurations(line, folder, monkeypatch):
    check(line, folder, monkeypatch)


def of_pair(pair):
    """A command line of two options, with what they cannot be without; of pictures the one at the end is enough."""
    more = [one for option in pair for one in WITH.get(option, ())]
    return list(dict.fromkeys([*pair, *more, "callbacks.pictures=null"]))


@pytest.mark.parametrize("pair", Random(3).sample(PAIRS, 5), ids=" ".join)
def test_a_few_pairs_of_options(pair, folder, monkeypatch):
    check(of_pair(pair), folder, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("first", sorted({pair[0] for pair in PAIRS}))
def test_every_pair_of_options(first, folder, monkeypatch):
    monkeypatch.setattr("dd_lightning.report.picture.IMAGES", 1)  # to draw all takes half of the time
    for pair in PAIRS:
        if pair[0] == first:
            check(of_pair(pair), folder, monkeypatch)
