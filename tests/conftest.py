"""Shared pieces: a small packed data set, small networks, and commands run as a user runs them."""

import contextlib
import logging
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from torch import nn

from dd_lightning.data import Packed, RealData
from dd_lightning.evaluation import Evaluation, Learner
from dd_lightning.init import RandomInit
from dd_lightning.init.population import Population
from dd_lightning.networks import class_name, stack
from dd_lightning.objectives import Classification
from dd_lightning.system.workers import Workers
from dd_lightning.unroll import FunctionalUnroll

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def packed(tmp_path):
    """Writes a packed data set of easily told classes; keyword arguments replace its arrays."""

    return partial(write_packed, tmp_path)


def write_packed(folder, name="toy", classes=3, size=12, channels=None, train=60, **replaced):
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", 30)):
        labels = np.arange(count, dtype=np.int64) % classes
        shape = (count, size, size) if channels is None else (count, size, size, channels)
        images = random.integers(0, 80, shape) + (labels * (160 // classes)).reshape(-1, *[1] * (len(shape) - 1))
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels}
    path = folder / f"{name}.npz"
    np.savez(path, **{k: v for k, v in (arrays | replaced).items() if v is not None})
    return path


class SmallNet(nn.Module):
    """Twice differentiable everywhere, with group norm and dropout: for finite differences."""

    def __init__(self, in_channels=1, image_size=6, num_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * image_size**2, num_classes)

    def forward(self, x):
        return self.fc(self.dropout(torch.tanh(self.norm(self.conv(x))).flatten(1)))


class BatchNormNet(nn.Module):
    def __init__(self, in_channels=1, image_size=6, num_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * image_size**2, num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


class SmallViT(nn.Module):
    """A Vision Transformer: patches, a class token, positions, and attention of one of several makes."""

    def __init__(self, attention="encoder", width=8, image_size=6, num_classes=3):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 1 + (image_size // 2) ** 2, width))
        if attention == "encoder":
            layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2)
        else:
            self.body = {"layer": AttentionLayer, "products": AttentionByProducts}[attention](width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.body(x)[:, 0]))


class AttentionLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class AttentionByProducts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.of_all, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.of_all(x).chunk(3, dim=2))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def write_population(path, network, image_shape, classes, networks=3, held_out=2, weights=None):
    """A population of networks whose weights are all their index (held-out ones: from 100), or made by `weights`."""
    shapes = {name: list(p.shape) for name, p in network.named_parameters()}
    counts = {"train": networks, "held_out": held_out}
    card = {
        "class": class_name(network),
        "shapes": shapes,
        "classes": classes,
        "preprocessing": {"channels": image_shape[0], "image_size": image_shape[1]},
        "parts": {part: {"networks": count, "seed": seed} for seed, (part, count) in enumerate(counts.items())},
    }
    population = Population(path, card)
    population.write_card()
    make = weights or (lambda index: {name: torch.full(shape, float(index)) for name, shape in shapes.items()})
    for part, count in counts.items():
        for start in range(0, count, 2):
            indices = range(start, min(start + 2, count))
            chunk = stack([make(index + (100 if part == "held_out" else 0)) for index in indices])
            population.write(part, start, chunk, torch.tensor(list(map(float, indices)), dtype=torch.float64))
    return population


@pytest.fixture(scope="session", autouse=True)
def mode_by_the_command_line():
    """Hydra composes a whole configuration, only to ask whether it is a sweep's: half of a refused command's time."""

    def mode(self, config_name, overrides):
        swept = any(o.startswith(("sweep=", "hydra.mode=MULTIRUN")) for o in overrides)
        return RunMode.MULTIRUN if swept else None  # then -m says it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", mode)
        yield


@pytest.fixture(autouse=True)
def own_log():
    """What a command logs to lies in a folder that goes with its test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a command in this process from a folder of its own; returns exit code, stderr and the run's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("DD_TRACEBACK", "DD_DATA_DIR", "DD_POPULATIONS_DIR", "DD_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")

    def call(command, *overrides):
        monkeypatch.setattr(sys, "argv", [f"dd-{command}", *overrides])
        before = set(Path("runs").glob("*/*"))
        try:
            import_module(f"dd_lightning.commands.{command}").main()
            code, message = 0, ""
        except SystemExit as stop:
            code, message = (stop.code, "") if isinstance(stop.code, int) else (1, str(stop.code))
        finally:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        new = sorted(set(Path("runs").glob("*/*")) - before)
        return code, message + capfd.readouterr().err, new[-1].resolve() if new else None

    return call


def forked(command, *overrides, printed="printed.txt", before=lambda: None):
    """Starts a command in a process that is forked from this one, so that nothing is imported again.

    Args:
        printed: file to which is added what the command prints.
        before: called in that process.
    """
    process = os.fork()
    if process:
        return process
    code = 99
    with contextlib.suppress(BaseException):
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [f"dd-{command}", *overrides]
        before()
        try:
            import_module(f"dd_lightning.commands.{command}").main()
            code = 0
        except SystemExit as stop:
            if not isinstance(stop.code, int):
                print(stop.code, file=sys.stderr, flush=True)
            code = stop.code if isinstance(stop.code, int) else 1
    os._exit(code)


def ended(process):
    """Exit code of a forked process, as shells tell it."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return 128 - code if code < 0 else code


@pytest.fixture
def data(packed):
    """Real data of small pictures."""
    result = RealData(Packed(str(packed(size=6)), validation=12), batch_size=16)
    result.setup()
    return result


@pytest.fixture
def evaluation(data):
    """Of a few small networks."""
    learner = Learner(SmallNet(), RandomInit(seed=3), FunctionalUnroll(), data.preprocessing, Classification())
    return Evaluation(learner, data, Workers(), networks=4)
