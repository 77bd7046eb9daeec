"""Sets of other people, exports, and the gallery: what goes out comes back, and hostile files do nothing."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_safety import CHECKPOINTS, Bomb, torch_bytes

from dd_lightning import DistilledData
from dd_lightning.data import Packed, RealData, read_sets
from dd_lightning.report.export import export
from dd_lightning.sources import tensors
from dd_lightning.system import gallery
from dd_lightning.system.gallery import GALLERY, entries, located


def example(soft=False, steps=1, size=12, initial=False):
    """Data whose pixels are those of pictures, so that PNG files lose nothing."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(2).expand(steps, -1)
    pixels = torch.randint(0, 256, (steps, 6, 1, size, size), generator=random).float() / 255
    data = DistilledData.create((pixels - 0.5) / 0.25, labels, 1, 0.02)
    others = torch.softmax(torch.randn(steps, 6, 3, generator=random), -1)
    soft_labels = 0.7 * torch.eye(3)[labels] + 0.3 * others if soft else None
    weights = {"fc.weight": torch.ones(2)} if initial else None
    card = {"preprocessing": {"channels": 1, "image_size": size, "mean": [0.5], "std": [0.25]}}
    main = (data.images, data.labels, data.raw_learning_rates)
    return DistilledData(*main, card, weights, soft_labels)


@pytest.fixture
def real(packed):
    data = RealData(Packed(str(packed()), validation=10, mean=[0.5], std=[0.25]))
    data.setup()
    return data


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("form", ["distilled.npz", "distilled.pt", "images"])
def test_what_is_exported_comes_back_equal(real, tmp_path, form, soft):
    data = example(soft, steps=2)
    export(data, tmp_path / "out")
    (again,) = tensors(real, str(tmp_path / "out" / form), values="normalised").members
    exact = {"rtol": 1e-6, "atol": 1e-6} if form == "images" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(again.images, data.images.flatten(0, 1)[None], **exact)
    if soft:
        torch.testing.assert_close(again.soft_labels, data.soft_labels.flatten(0, 1)[None], rtol=0, atol=0)
    else:
        assert torch.equal(again.labels, data.labels.flatten()[None])
        assert again.soft_labels is None


def test_an_export_says_what_a_loop_needs_and_overwrites_none(tmp_path):
    data = example(soft=True, initial=True)
    data.images[0, 0, 0, 0, 0] = 7.0  # beyond white
    export(data, tmp_path)
    text = (tmp_path / "README.txt").read_text()
    for words in ("(pixel / 255 − [0.5]) / [0.25]", "in the .pt: initial_weights", "1 step of 6 images", "gd"):
        assert words in text
    assert "0.1 % of the pixels lay beyond black or white, the farthest by 1.25" in text
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 6
    with pytest.raises(ValueError, match="holds pictures already"):
        export(data, tmp_path)
    with pytest.raises(ValueError, match="does not say how pictures were normalised"):
        export(DistilledData.create(torch.ones(1, 3, 1, 8, 8), torch.arange(3)[None]), tmp_path / "x")


def test_numbers_from_0_to_1_are_normalised_as_the_data_set_is(real, tmp_path):
    data = example()
    unit = 0.25 * data.images[0] + 0.5
    pixels = (255 * unit).round().to(torch.uint8)
    for name, content in (("unit", {"images": unit}), ("pixels", {"images": pixels})):
        torch.save({**content, "labels": data.labels[0]}, tmp_path / f"{name}.pt")
        values = "unit" if name == "unit" else None
        (found,) = tensors(real, str(tmp_path / f"{name}.pt"), values=values).members
        torch.testing.assert_close(found.images, data.images, rtol=1e-5, atol=1e-5)


def test_files_as_the_code_of_dc_and_mtt_leaves_them(real, tmp_path):
    images, labels = example().images[0], example().labels[0]
    torch.save(
        {"data": [[images, labels], [images + 1, labels]], "accs_all_exps": {"ConvNet": [0.5]}}, tmp_path / "dc.pt"
    )
    assert [one.images.mean().item() for one in tensors(real, str(tmp_path / "dc.pt"), "normalised").members] == [
        pytest.approx(images.mean().item(), abs=1e-5),
        pytest.approx(images.mean().item() + 1, abs=1e-5),
    ]
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(labels, tmp_path / "labels_best.pt")
    paths = {"path": str(tmp_path / "images_best.pt"), "labels_path": str(tmp_path / "labels_best.pt")}
    (found,) = tensors(real, values="normalised", **paths).members
    assert torch.equal(found.images[0], images)
    assert torch.equal(found.labels[0], labels)
    save_file({"images": images, "labels": labels.float()}, tmp_path / "set.safetensors")
    (found,) = tensors(real, str(tmp_path / "set.safetensors"), "normalised").members
    assert torch.equal(found.labels[0], labels)


def npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


IMAGES, LABELS = np.zeros((3, 1, 12, 12), np.float32), np.arange(3)
WIDE = torch.ones(1).expand(10**12)  # claims a terabyte
HOSTILE = {
    **{f"{case}.pt": content for case, content in CHECKPOINTS.items() if case not in ("other", "tensor")},
    "bomb.pt": torch_bytes({"images": Bomb(), "labels": torch.arange(3)}),
    "wide.pt": torch_bytes({"images": WIDE.view(-1, 1, 10, 10), "labels": torch.arange(3)}),
    "sparse.pt": torch_bytes({"images": torch.ones(3, 1, 12, 12).to_sparse(), "labels": torch.arange(3)}),
    "nothing.pt": torch_bytes({"data": []}),
    "three.pt": torch_bytes([torch.ones(3, 1, 2, 2)] * 3),
    "names.pt": torch_bytes({"x": torch.ones(3)}),
    "object.npz": npz_bytes(images=np.array([Bomb()] * 3, dtype=object), labels=LABELS),
    "pickle.npz": pickle.dumps(Bomb()),
    "nan.npz": npz_bytes(images=IMAGES * np.nan, labels=LABELS),
    "complex.npz": npz_bytes(images=IMAGES + 1j, labels=LABELS),
    "text.npz": npz_bytes(images=np.array(["a"] * 3), labels=LABELS),
    "shape.npz": npz_bytes(images=IMAGES[:, 0], labels=LABELS),
    "count.npz": npz_bytes(images=IMAGES, labels=LABELS[:2]),
    "negative.npz": npz_bytes(images=IMAGES, labels=LABELS - 1),
    "fractions.npz": npz_bytes(images=IMAGES, labels=LABELS + 0.5),
    "none.npz": npz_bytes(images=IMAGES[:0], labels=LABELS[:0]),
    "text.safetensors": b"hello",
    "short.safetensors": b"\xff" * 8 + b"{}",
    "set.csv": b"1,2",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_do_nothing_and_are_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        read_sets(Path(name))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == [name]


def png_claiming(size):
    """A PNG file that says it is larger than it is."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = size.to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


PICTURES = {
    "text": b"hello",
    "empty": b"",
    "huge": png_claiming(10**5),
    "large": png_claiming(2000),
    "truncated": png_claiming(9)[:-20],
    "pickle": pickle.dumps(Bomb()),
}


@pytest.mark.parametrize("case", PICTURES)
def test_hostile_pictures_do_nothing_and_are_named(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for label in "01":
        Path("set", label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(Path("set", label, "0.png"))
    Path("set", "1", "1.png").write_bytes(PICTURES[case])
    with pytest.raises(ValueError, match=r"set/1/1\.png is not a picture of this set") as caught:
        read_sets(Path("set"))
    assert "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_a_folder_of_pictures_counts_its_classes(tmp_path):
    for label in ("10", "2", "0"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8), (int(label), 0, 0)).save(tmp_path / label / "a.png")
    ((images, labels),) = read_sets(tmp_path)
    assert labels.tolist() == [0, 10, 2]
    assert images[:, 0, 0, 0].tolist() == [0, 10, 2]
    (tmp_path / "labels.csv").write_text("file,class\n../elsewhere.png,1\n")
    with pytest.raises(ValueError, match=r"labels\.csv does not fit the pictures beside it"):
        read_sets(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "say which images and labels"),
        ({"path": "nowhere.pt"}, "there is no file of images and labels at nowhere.pt"),
        ({}, "say what the images' numbers are"),
        ({"values": "whitened"}, "unknown values 'whitened'; choose one of unit, normalised"),
        ({"values": "unit"}, "values=unit, but the images of set.pt run from"),
        ({"path": "eight.pt", "values": "unit"}, "eight.pt holds images of 1×8×8; data set toy has 1×12×12"),
        ({"path": "classes.pt", "values": "unit"}, "labels of other classes than the 3 of toy"),
    ],
)
def test_sets_that_do_not_fit_in_one_line(real, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    data = example()
    torch.save({"images": data.images[0], "labels": data.labels[0]}, "set.pt")
    torch.save({"images": torch.ones(3, 1, 8, 8), "labels": torch.arange(3)}, "eight.pt")
    torch.save({"images": torch.ones(5, 1, 12, 12), "labels": torch.arange(5)}, "classes.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tensors(real, **{"path": "set.pt", **settings})


TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "init=random")
TOY += ("network._target_=conftest.SmallNet", "networks=2", "use=ordinary", "use.epochs=3", "use.learning_rates=[0.01]")


def test_an_export_is_evaluated_as_the_data_are(run, packed, tmp_path):
    packed()
    data = example(soft=True)
    data.card["preprocessing"]["mean"] = [0.3]
    data.save("set.safetensors")
    assert run("export", "path=set.safetensors", "folder=out")[:2] == (0, "")
    found = []
    for line in (("distilled.path=set.safetensors",), ("distilled=tensors", "distilled.path=out/distilled.npz")):
        values = ("distilled.values=normalised",) if len(line) > 1 else ()
        code, error, folder = run("evaluate", *TOY, *line, *values)
        assert (code, error) == (0, "")
        result = json.loads((folder / "result.json").read_text())
        found.append((result["test"]["accuracies"], result["use"]["controls"]))
    assert found[0] == found[1]
    assert set(found[0][1]) == {"random", "hard"}
    code, error, _ = run("export", "path=nowhere")
    assert (code, error.count("\n") <= 1, "there is no distilled data at nowhere" in error) == (1, True, True)


def test_the_gallery_is_small_and_says_how_it_was_made():
    assert entries()
    assert sum(path.stat().st_size for path in GALLERY.iterdir()) <= 4 * 2**20
    for name in entries():
        data = DistilledData.load(f"gallery:{name}")
        assert data.images.dtype == torch.float32
        assert set(data.card["gallery"]) == {"command", "seed", "commit", "torch"}
        assert data.card["accuracy"]["accuracy_mean"] > 0
    with pytest.raises(FileNotFoundError, match=f"the gallery has no 'nothing'; it has .*{entries()[0]}"):
        DistilledData.load("gallery:nothing")
    with pytest.raises(FileNotFoundError, match="the gallery has no"):
        located("gallery:../system/gallery")


SHORT = (*TOY[:4], TOY[5], "batch_size=16", "unroll=functional", "trainer.max_steps=2", "distilled.images_per_class=2")


def test_a_run_is_put_into_the_gallery(run, packed, tmp_path, monkeypatch):
    packed()
    code, error, folder = run("distill", *SHORT, "seed=3", f"runs_dir={tmp_path}/runs")
    assert (code, error) == (0, "")
    monkeypatch.setattr(gallery, "GALLERY", tmp_path / "gallery")
    from dd_lightning.commands import gallery as command

    monkeypatch.setattr(command, "GALLERY", tmp_path / "gallery")
    monkeypatch.setattr(command, "tested", lambda content, networks: {**TESTED, "networks": networks})
    code, error, _ = run("gallery", f"add={folder}", "entry=toy", "commit=abc")
    assert code == 1
    assert "is tested otherwise than when it was made" in error
    TESTED["accuracy_mean"] = DistilledData.load(folder).card["accuracy"]["accuracy_mean"]
    assert run("gallery", f"add={folder}", "entry=toy", "commit=abc")[:2] == (0, "")
    data = DistilledData.load("gallery:toy")
    made = data.card["gallery"]
    assert (made["seed"], made["commit"]) == (3, "abc")
    assert made["command"].startswith("dd-distill dataset=packed")
    assert "runs_dir" not in made["command"]
    original = DistilledData.load(folder)
    torch.testing.assert_close(data.images, original.images, rtol=1e-3, atol=1e-3)
    assert not torch.equal(data.images, original.images)
    assert torch.equal(data.raw_learning_rates, original.raw_learning_rates)


TESTED = {"accuracy_mean": -1.0, "accuracy_std": 0.0}
DATA = str(Path(os.environ.get("DD_DATA_DIR", "data")).resolve())  # before a test changes the folder


@pytest.mark.parametrize(
    ("record", "more", "message"),
    [
        ("[seed=1", (), "overrides.yaml is not what a run writes"),
        ("a: 1", (), "overrides.yaml is not what a run writes"),
        ("[seed=1]", (), "there is no distilled data at"),
        ("[seed=1]", ("commit=[1,2]",), "commit must be letters"),
        ("[seed=1]", ("entry=../x",), "entry must be letters"),
    ],
)
def test_a_run_of_no_known_making_is_not_put_into_the_gallery(run, record, more, message):
    Path("run", ".hydra").mkdir(parents=True)
    Path("run", ".hydra", "overrides.yaml").write_text(record)
    Path("run", ".hydra", "config.yaml").write_text("seed: 1")
    code, error, _ = run("gallery", "add=run", "entry=x", "commit=1234567", *more)
    assert (code, error.count("\n") <= 1, "Error" in error) == (1, True, False)
    assert message in error


@pytest.mark.slow
@pytest.mark.parametrize("name", entries())
def test_every_entry_of_the_gallery_is_as_good_as_its_card_says(run, name):
    card = DistilledData.load(f"gallery:{name}").card
    dataset, test = card["dataset"]["choice"], card["accuracy"]
    if dataset != "digits" and not Path(DATA, f"{dataset}.npz").is_file():
        pytest.skip(f"{dataset} is not in {DATA}")
    line = (f"distilled.path=gallery:{name}", f"networks={test['networks']}", f"data_dir={DATA}")
    code, error, folder = run("evaluate", *line)
    assert (code, error) == (0, "")
    found = json.loads((folder / "result.json").read_text())["test"]
    assert found["accuracy_mean"] == pytest.approx(test["accuracy_mean"], abs=0.3)


def test_labels_beside_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"labels\.pt, but the labels of folder .* are in its labels\.csv"):
        read_sets(tmp_path, tmp_path / "labels.pt")
