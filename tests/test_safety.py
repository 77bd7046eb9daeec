"""Malicious and broken files: nothing in them is run, none is believed, and the error names the file."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from dd_lightning import DistilledData
from dd_lightning.data.packed import load_packed
from dd_lightning.training.resuming import load_checkpoint


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def good_checkpoint():
    parts = {"loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "dd_config": {}}
    return {"pytorch-lightning_version": "2.6", "global_step": 3, "state_dict": {"images": torch.ones(1000)}, **parts}


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def with_member(archive, ending, content, compression=zipfile.ZIP_STORED):
    """An archive in which the member whose name ends so is replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(ending) else old.read(name))
    return buffer.getvalue()


def claiming(archive, ending, size):
    """An archive whose directory says that a member is larger than it is."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        name = next(name for name in old.namelist() if name.endswith(ending)).encode()
    changed = bytearray(archive)
    place = changed.rindex(b"PK\x01\x02", 0, changed.rindex(name))
    changed[place + 20 : place + 28] = struct.pack("<II", size, size)
    return bytes(changed)


def packed_bytes(**replaced):
    labels = np.arange(6) % 3
    arrays = {f"{part}_images": np.zeros((6, 8, 8), np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": labels for part in ("train", "test")}
    buffer = io.BytesIO()
    np.savez(buffer, **(arrays | replaced))
    return buffer.getvalue()


def npy(header, content=b""):
    """An `.npy` file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


CHECKPOINTS = {
    "pickle": pickle.dumps(Bomb()),
    "torch": torch_bytes(Bomb()),
    "inside": torch_bytes(good_checkpoint() | {"callbacks": {"x": Bomb()}}),
    "legacy": torch_bytes(good_checkpoint() | {"x": Bomb()}, _use_new_zipfile_serialization=False),
    "replaced": with_member(torch_bytes(good_checkpoint()), "data.pkl", pickle.dumps(Bomb(), 2)),
    "eval": with_member(torch_bytes(good_checkpoint()), "data.pkl", b'cbuiltins\neval\n(S\'open("ran","w")\'\ntR.'),
    "network": torch_bytes(good_checkpoint() | {"network": torch.nn.Linear(2, 2)}),
    "truncated": torch_bytes(good_checkpoint())[:-100],
    "bit": with_member(torch_bytes(good_checkpoint()), "data/0", b"\0" * 4000)[:500] + b"\1" * 3000,
    "short storage": with_member(torch_bytes(good_checkpoint()), "data/0", b"\0" * 40),
    "claims more": claiming(torch_bytes(good_checkpoint()), "data/0", 2**31),
    "empty": b"",
    "text": b"hello",
    "zip": with_member(torch_bytes(good_checkpoint()), "data.pkl", b""),
    "other": torch_bytes({"weight": torch.ones(3)}),
    "tensor": torch_bytes(torch.ones(3)),
}


def distilled_bytes(card='{"format": "dd_lightning.distilled/1"}', **replaced):
    tensors = {"images": torch.ones(1, 3, 1, 8, 8), "labels": torch.arange(3)[None]}
    tensors |= {"raw_learning_rates": torch.ones(2, 1)} | replaced
    return save_tensors({name: value for name, value in tensors.items() if value is not None}, {"card": card})


def with_header(change):
    """Distilled data with a changed safetensors header."""
    content = distilled_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


DISTILLED = {
    "pickle": pickle.dumps(Bomb()),
    "torch": torch_bytes({"images": Bomb()}),
    "truncated": distilled_bytes()[:-10],
    "header length": struct.pack("<Q", 2**60) + distilled_bytes()[8:],
    "offsets": with_header(lambda h: h["images"].update(data_offsets=[0, 2**50])),
    "shape": with_header(lambda h: h["images"].update(shape=[10**12, 3, 1, 8, 8])),
    "overlap": with_header(lambda h: h["labels"].update(h["images"])),
    "type": with_header(lambda h: h["images"].update(dtype="PICKLE")),
    "nan": distilled_bytes(images=torch.full((1, 3, 1, 8, 8), torch.nan)),
    "negative": distilled_bytes(labels=-torch.ones(1, 3, dtype=torch.int64)),
    "fractions": distilled_bytes(labels=torch.rand(1, 3)),
    "whole": distilled_bytes(images=torch.ones(1, 3, 1, 8, 8, dtype=torch.int64)),
    "missing": distilled_bytes(labels=None),
    "shapes": distilled_bytes(labels=torch.arange(4)[None]),
    "deep": distilled_bytes(card="[" * 10**5),
    "list": distilled_bytes(card="[1]"),
    "foreign": distilled_bytes(card="{}"),
    "empty": b"",
}
NPY_HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': ({}, 8, 8)}}"
PACKED = {
    "object": packed_bytes(train_images=np.array([Bomb()] * 6, dtype=object)),
    "pickle": pickle.dumps(Bomb()),
    "pickled member": with_member(packed_bytes(), "train_images.npy", pickle.dumps(Bomb())),
    "claims more": with_member(packed_bytes(), "train_images.npy", npy(NPY_HEADER.format("|u1", 10**13))),
    "claims less": with_member(packed_bytes(), "train_images.npy", npy(NPY_HEADER.format("|u1", 1), b"\0" * 999)),
    "negative": with_member(packed_bytes(), "train_images.npy", npy(NPY_HEADER.format("|u1", -1))),
    "code": with_member(packed_bytes(), "train_images.npy", npy("__import__('os').system('touch ran')")),
    "deep": with_member(packed_bytes(), "train_images.npy", npy("(" * 5000)),
    "directory": claiming(packed_bytes(), "train_images.npy", 2**31),
    "deflated": claiming(with_member(packed_bytes(), "x", b"", zipfile.ZIP_DEFLATED), "train_images.npy", 2**31),
    "bits": packed_bytes().replace(b"\0" * 100, b"\0" * 99 + b"\1", 1),
    "truncated": packed_bytes()[:-100],
    "outside": with_member(packed_bytes(), "train_images.npy", b"").replace(b"train_images.npy", b"../../images.npy"),
    "empty": b"",
}
LOADERS = {
    "checkpoint": (CHECKPOINTS, load_checkpoint, "last-000003.ckpt"),
    "distilled": (DISTILLED, DistilledData.load, "distilled.safetensors"),
    "packed": (PACKED, load_packed, "toy.npz"),
}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, (cases, *_) in LOADERS.items() for case in cases])
def test_nothing_is_run_and_the_file_is_named(tmp_path, monkeypatch, kind, case):
    cases, load, name = LOADERS[kind]
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    Path(name).write_bytes(cases[case])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        load(Path(name))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", name]


def test_good_files_are_loaded(tmp_path):
    contents = {"checkpoint": torch_bytes(good_checkpoint()), "distilled": distilled_bytes(), "packed": packed_bytes()}
    for kind, (_, load, name) in LOADERS.items():
        (tmp_path / name).write_bytes(contents[kind])
        load(tmp_path / name)
    compressed = with_member(packed_bytes(), "x", b"", zipfile.ZIP_DEFLATED)
    (tmp_path / "toy.npz").write_bytes(compressed)
    assert load_packed(tmp_path / "toy.npz").train_images.shape == (6, 8, 8)


TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "batch_size=16")
TOY += ("network._target_=conftest.SmallNet", "trainer.max_steps=1")


def test_a_planted_checkpoint_ends_the_command_in_one_line(run, packed):
    packed()
    Path("planted.ckpt").write_bytes(CHECKPOINTS["inside"])
    code, error, _ = run("distill", *TOY, "resume=planted.ckpt")
    assert code == 1
    assert error.startswith("dd-distill: error: planted.ckpt is truncated, damaged or not a checkpoint")
    assert error.count("\n") <= 1
    assert not Path("ran").exists()


def test_a_card_chooses_neither_code_nor_places(run, packed):
    packed("mnist", classes=10, size=28)
    data = DistilledData.create(torch.randn(1, 10, 1, 28, 28), torch.arange(10)[None])
    entry = {"choice": "mnist", "target": "dd_lightning.data.TorchvisionDataset"}
    data.card["dataset"] = entry | {"name": "mnist", "source": "subprocess.Popen", "data_dir": "/", "validation": 10}
    data.save("distilled.safetensors")
    small = ("networks=1", "data_dir=.")
    code, error, _ = run("evaluate", "distilled.path=distilled.safetensors", *small)
    assert (code, error) == (0, "")
    data.card["dataset"]["name"] = "../../elsewhere"
    data.save("distilled.safetensors")
    code, error, _ = run("evaluate", "distilled.path=distilled.safetensors", *small)
    assert code == 1
    assert "dataset: name must be letters" in error


@pytest.mark.parametrize("choice", [None, 3, "../mnist"])
def test_a_card_without_the_name_of_its_network_is_not_taken_for_the_default(run, packed, choice):
    packed("mnist", classes=10, size=28)
    data = DistilledData.create(torch.randn(1, 10, 1, 28, 28), torch.arange(10)[None])
    data.card["network"] = {"choice": choice, "target": "dd_lightning.networks.MLP"}
    data.save("distilled.safetensors")
    line = ("distilled.path=distilled.safetensors", "networks=1", "data_dir=.")
    code, error, _ = run("evaluate", *line)
    assert code == 1
    assert "the card does not say which network the data were distilled with: name it, network=NAME" in error
    assert run("evaluate", *line, "network=mlp")[:2] == (0, "")


OUTSIDE = ("name=../elsewhere", "name=/tmp/elsewhere", "callbacks.resume.dirpath=/tmp/elsewhere")
OUTSIDE += ("logger.csv.save_dir=../elsewhere", "logger.csv.version=../../../elsewhere")


@pytest.mark.parametrize("override", OUTSIDE)
def test_a_configuration_cannot_write_outside_the_run_folder(run, packed, override):
    packed()
    before = set(Path("..").rglob("elsewhere"))
    code, error, _ = run("distill", *TOY, override)
    assert code == 1
    assert override.partition("=")[0] in error
    assert "elsewhere" in error
    assert set(Path("..").rglob("elsewhere")) == before
    assert not Path("/tmp/elsewhere").exists()
