"""What is around a command: start-up, terminals, locales, systems, folders of pictures."""

import ast
import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dd_lightning import DistilledData
from dd_lightning.commands import launch
from dd_lightning.commands.help import together
from dd_lightning.commands.launch import CONF
from dd_lightning.data import TorchvisionDataset
from dd_lightning.evaluation import HeldOutResult
from dd_lightning.system import processor

SOURCES = sorted((Path(__file__).parents[1] / "dd_lightning").rglob("*.py"))
TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "batch_size=16")
SHORT = ("unroll=functional", "callbacks.held_out.networks=1", "callbacks.held_out.test_networks=1")


def python(code, folder, *arguments, **environment):
    """What a fresh process prints."""
    path = os.pathsep.join([str(Path(__file__).parent), str(CONF.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    return done.returncode, done.stdout, done.stderr


def test_help_errors_and_completion_import_neither_torch_nor_lightning(tmp_path):
    code = """
import contextlib, io, sys
from dd_lightning.commands import launch
commands = ("bench", "distill", "evaluate", "linear", "pack", "pretrain", "report")
lines = [[name, "--help"] for name in commands] + [["distill", "trainer.max_step=3"], ["distill", "--seed=1"]]
lines += [["distill", "-sc", "query=bash"], ["distill", "--cfg", "job"]]
for name, *arguments in lines:
    sys.argv = [f"dd-{name}", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            getattr(launch, name)()
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
    assert name not in ("report",) or "dd-report puts" in out.getvalue()
print([m for m in ("torch", "torchvision", "pytorch_lightning", "lightning_fabric", "matplotlib") if m in sys.modules])
"""
    status, out, error = python(code, tmp_path, COMP_LINE="dd-distill see", COMP_POINT="14")
    assert status == 0, error
    assert out.splitlines()[-1] == "[]"
    assert "trainer.max_step; did you mean trainer.max_steps?" in error
    assert "without dashes: seed=1" in error
    assert not list(tmp_path.iterdir())


HELPED = ["bench", "distill", "evaluate", "export", "gallery", "linear", "pack", "pretrain", "report"]


@pytest.mark.parametrize("name", HELPED)
def test_help_fits_a_screen(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"dd-{name}", "--help"])
    with contextlib.suppress(SystemExit):
        getattr(launch, name)()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


def test_every_sweep_is_named_by_the_help_of_its_command():
    said = [(CONF / "hydra" / "help" / f"{name}.yaml").read_text(encoding="utf-8") for name in ("distill", "evaluate")]
    for sweep in (CONF / "sweep").glob("*.yaml"):
        assert sum(bool(re.search(rf"\b{sweep.stem}\b", text)) for text in said) >= 1


def test_options_that_differ_in_a_number_alone_stand_together():
    assert together(["a_1", "a_10", "a_2", "a_x", "b_1", "demo"]) == ["a_{1,2,10}", "a_x", "b_1", "demo"]


def test_the_scripts_start_where_nothing_is_imported():
    text = (CONF.parent / "pyproject.toml").read_text(encoding="utf-8")
    scripts = [line for line in text.splitlines() if line.startswith("dd-")]
    assert len(scripts) == 10
    for name, script in (line[3:].split(" = ") for line in scripts):  # the doctor is to start where imports fail
        assert script == f'"dd_lightning.commands.{"doctor:main" if name == "doctor" else f"launch:{name}"}"'


def test_distilled_data_can_be_used_where_there_are_no_locks_and_few_signals(tmp_path):
    """On Windows, that is."""
    labels = torch.arange(10)[None]
    DistilledData.create(torch.randn(1, 10, 1, 28, 28), labels).save(tmp_path / "distilled.safetensors")
    code = """
import signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
from dd_lightning import DistilledData, LeNet
DistilledData.load("distilled.safetensors").train(LeNet())
from dd_lightning.commands import bench, distill, launch
from dd_lightning.system.locking import alone
from pathlib import Path
with alone(Path(".")):
    pass
sys.argv = ["dd-evaluate", "distilled.path=distilled.safetensors", "dataset=digits", "networks=1"]
launch.evaluate()
"""
    status, out, error = python(code, tmp_path, DD_RUNS_DIR="runs")
    assert status == 0, error
    assert "cannot be locked (this system has no locks)" in error
    assert list(tmp_path.glob("runs/evaluate/*/result.json"))
    assert f"saved in {next(tmp_path.glob('runs/evaluate/*')).relative_to(tmp_path)}: result.json" in out


def test_a_terminal_gets_what_it_can_show(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1", errors="strict"))
    launch.prepare()
    print("10 % → 94 ± 2 %", flush=True)
    assert shown.getvalue() == "10 % ? 94 ± 2 %\n".encode("latin-1")


def test_files_of_text_name_their_encoding():
    """The locale's own is not that of the machine where they are read."""
    unnamed = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            text = name in ("read_text", "write_text") or (
                name == "open" and not any("b" in str(getattr(n, "value", "")) for a in node.args for n in ast.walk(a))
            )
            of = getattr(getattr(node.func, "value", None), "id", "")
            if (
                text
                and of not in ("os", "Image", "archive", "tarfile")
                and not any(k.arg == "encoding" for k in node.keywords)
            ):
                unnamed.append(f"{path}:{node.lineno}")
    assert not unnamed
    assert "encoding: utf-8" in (CONF / "hydra" / "job_logging" / "rich.yaml").read_text(encoding="utf-8")


@pytest.mark.slow  # a process of its own
def test_a_run_under_a_locale_without_arrows(tmp_path, packed):
    packed()
    code = "from dd_lightning.commands import launch; launch.distill()"
    line = (*TOY, *SHORT, "network._target_=conftest.SmallNet", "trainer.max_steps=1", "hydra.run.dir=out")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    status, out, error = python(code, tmp_path, *line, **environment)
    assert status == 0, error
    assert "% ? " in out
    assert "→" in (tmp_path / "out" / "dd-distill.log").read_text(encoding="utf-8")


def test_a_closed_pipe_ends_in_silence(tmp_path):
    code = "from dd_lightning.commands import launch; launch.linear()"
    command = [sys.executable, "-c", code, "--help"]
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 128 + 13


def test_tilde_in_an_env_file_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DD_DATA_DIR", raising=False)
    Path(".env").write_text("DD_DATA_DIR=~/pictures\n", encoding="utf-8")
    launch.prepare()
    assert os.environ["DD_DATA_DIR"] == str(Path.home() / "pictures")


OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_channels, image_size, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
"""


def test_a_network_in_the_folder_of_the_command_and_where_its_card_says_it_was(run, packed, monkeypatch):
    packed()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    Path("my_own_network.py").write_text(OWN, encoding="utf-8")
    code, error, folder = run("distill", *TOY, *SHORT, "network._target_=my_own_network.Net", "trainer.max_steps=1")
    assert (code, error) == (0, "")
    entry = DistilledData.load(folder).card["network"]
    assert entry["file"] == str(Path("my_own_network.py").resolve())
    assert len(entry["file_hash"]) == 16
    code, error, _ = run("evaluate", f"distilled.path={folder}")
    assert code == 1
    assert f"my_own_network.Net (in {entry['file']}), which network=custom is not here" in error


class InPlace(nn.Module):
    """A linear network that halves its images where they are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 3)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return self.linear(x.mul_(0.5).flatten(1))


def test_a_forward_that_changes_its_images_sees_the_same_in_every_epoch():
    images = torch.randn(1, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = DistilledData.create(images.clone(), torch.arange(3)[None], epochs=3, learning_rate=0.5)
    changing = data.train(InPlace())
    reference = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        reference[1].weight.zero_()
        reference[1].bias.copy_(torch.zeros(3))
        changing_again = InPlace()
        changing_again.linear.bias.zero_()
    halved = DistilledData.create(images / 2, torch.arange(3)[None], epochs=3, learning_rate=0.5)
    halved.train(reference)
    data.train(changing_again)
    torch.testing.assert_close(changing_again.linear.weight, reference[1].weight)
    assert torch.equal(data.images, images)
    assert changing is not None


@pytest.mark.parametrize("length", [0, 100])
def test_raw_files_that_are_cut_name_their_folder_and_what_to_do(tmp_path, length):
    raw = tmp_path / "download" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 5) + bytes(5))
        whole = struct.pack(">iiii", 2051, 5, 28, 28) + bytes(5 * 28 * 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(whole[:length])
    dataset = TorchvisionDataset(
        "mnist", "torchvision.datasets.MNIST", {"train": True}, {"train": False}, str(tmp_path)
    )
    with pytest.raises(ValueError, match="is incomplete or damaged") as caught:
        dataset.prepare()
    assert f"what was downloaded into {tmp_path / 'download' / 'mnist'}" in str(caught.value)
    assert "damaged ()" not in str(caught.value)
    assert "delete that folder, and the same command downloads it again" in str(caught.value)


@pytest.mark.parametrize(("error", "kept"), [(1.09e-6, True), (1e-4, False)])
def test_rounding_is_told_from_lost_precision(monkeypatch, error, kept):
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "ieee"
        monkeypatch.setattr(processor, "_matmul_error", lambda rows, inner, columns: error if inner > 150 else 1e-7)
        processor.use_onednn_for_matmul()
        assert (settings.fp32_precision == "bf16") == kept
    finally:
        settings.fp32_precision = before


def test_two_networks_have_no_interval():
    result = HeldOutResult(torch.tensor([[10.0, 7.0], [10.0, 18.5]]))
    assert result.interval == (result.mean, result.mean)


def pictures(folder, classes=("cat", "dog"), count=10):
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shape = (20, 30 + i, 3)
            Image.fromarray(random.integers(0, 255, shape).astype(np.uint8)).save(folder / name / f"{i}.png")


def test_a_folder_of_pictures_becomes_a_packed_data_set(run):
    pictures(Path("pictures"))
    code, error, folder = run("pack", "folder=pictures", "path=my.npz", "image_size=12")
    assert (code, error) == (0, "")
    said = (folder / "dd-pack.log").read_text(encoding="utf-8")
    assert "class 1, dog: 8 training and 2 test pictures" in said
    assert "16 training and 4 test pictures of 2 classes" in said
    with np.load("my.npz") as file:
        assert file["train_images"].shape == (16, 12, 12, 3)
        assert file["test_labels"].tolist() == [0, 0, 1, 1]
    line = ("dataset=packed", "dataset.path=my.npz", "network=custom", "network._target_=conftest.SmallNet")
    code, error, folder = run("distill", *line, *SHORT, "trainer.max_steps=1", "batch_size=4")
    assert (code, error) == (0, "")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["card"]["classes"] == 2
    code, error, _ = run("pack", "folder=pictures", "path=my.npz")
    assert (code, "path: my.npz exists; remove it" in error) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("pictures/cat/3.png").write_bytes(b"no picture"), "pictures/cat/3.png is no picture that can"),
        (
            lambda: [p.unlink() for p in Path("pictures/cat").iterdir()],
            "class cat is empty: pictures/cat",
        ),
        (lambda: Path("pictures").rename("elsewhere"), "there is no folder of pictures at pictures"),
        (lambda: (Path("pictures/train").mkdir(), Path("pictures/test").mkdir()), "at least two classes"),
    ],
)
def test_a_folder_that_cannot_be_packed(run, change, message):
    pictures(Path("pictures"))
    change()
    code, error, _ = run("pack", "folder=pictures", "path=my.npz")
    assert code == 1
    assert error.startswith("dd-pack: error: ")
    assert message in error
    assert not Path("my.npz").exists()


def test_every_tenth_picture_validates_unless_there_are_few(packed):
    from dd_lightning.data import Packed, RealData

    for train, validation in ((60, 6), (20, 0)):
        data = RealData(Packed(str(packed(train=train)), validation=None), 8)
        data.setup()
        assert data.dataset.validation == validation
        assert len(data.validation) == (validation or train)
