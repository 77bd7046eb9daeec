"""Pictures in folders: what is read, what is refused, what is kept, and crops that depend on (seed, step) alone."""

import io
import multiprocessing
import os
import pickle
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torchvision.transforms import RandomResizedCrop

import dd_lightning.report.picture as picture_module
from dd_lightning import DistilledData
from dd_lightning.data import Folder, OwnMinibatches, RealData, building
from dd_lightning.data.crops import Cut, cut_out, random_boxes
from dd_lightning.data.decoding import decoded
from dd_lightning.data.folders import pack_folder
from dd_lightning.data.store import ON_DEVICE, StoredPictures
from dd_lightning.training.resuming import load_checkpoint, newest_checkpoint

COLOURS = {"cat": (200, 40, 30), "dog": (30, 180, 60), "owl": (20, 60, 220)}
NAMES = {"Käse": "cat", "日本語": "dog", "हिन्दी $x_1$": "owl"}


def picture(colour, size=(20, 16), seed=0, mode="RGB"):
    """A picture of about one colour."""
    noise = np.random.default_rng(seed).integers(-15, 16, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def write(folder, parts=("train", "test"), names=COLOURS, count=6):
    """Pictures of several sizes."""
    for p, part in enumerate(parts):
        for k, (name, colour) in enumerate(names.items()):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                size = (14 + 3 * i + k, 24 - 2 * i)
                image = picture(COLOURS.get(colour, colour), size, seed=100 * p + 10 * k + i)
                image.save(folder / part / name / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture
def make(tmp_path):
    """Real data of the pictures in a folder."""

    def of(folder, batch_size=4, seed=0, **form):
        form = {"image_size": 8, "validation": 3, "workers": 0} | form
        data = RealData(Folder(str(folder), data_dir=str(tmp_path / "data"), **form), batch_size, seed)
        data.prepare_data()
        data.setup()
        return data

    return of


def test_a_folder_becomes_pictures_of_one_size_by_class(tmp_path, make):
    data = make(write(tmp_path / "pictures"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [15, 3, 18]
    assert data.class_names == ["cat", "dog", "owl"]
    assert data.train.images.shape[1:] == (3, 8, 8)
    for part in (data.train, data.validation, data.test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            expected = torch.tensor(list(COLOURS.values())[label])
            assert (image.float().mean((1, 2)) - expected).abs().max() < 12
    pixels = torch.cat([data.train.images, data.validation.images]).transpose(0, 1).flatten(1).double() / 255
    assert data.preprocessing.mean == pytest.approx(pixels.mean(1).tolist())
    assert data.preprocessing.std == pytest.approx(pixels.std(1).tolist())


def test_names_in_any_script(tmp_path, make):
    data = make(write(tmp_path / "ปลา $x$", names={name: COLOURS[colour] for name, colour in NAMES.items()}))
    assert data.class_names == sorted(NAMES)
    assert len(data.test) == 18


def test_one_tree_is_split_by_a_seed(tmp_path, make):
    folder = write(tmp_path / "pictures", parts=("",), count=10)
    first, again, other = (make(folder, test_share=0.3, split_seed=seed) for seed in (0, 0, 1))
    assert [len(part) for part in (first.train, first.validation, first.test)] == [18, 3, 9]
    assert torch.bincount(first.test.labels).tolist() == [3, 3, 3]
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


KINDS = {
    "grey": (picture((90, 90, 90), mode="L"), "PNG", (90, 90, 90)),
    "palette": (picture((200, 40, 30)).quantize(16), "PNG", (200, 40, 30)),
    "bilevel": (Image.new("1", (9, 9), 1), "PNG", (255, 255, 255)),
    "cmyk": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
    "16 bits": (Image.fromarray(np.full((9, 7), 0x40FF, np.uint16)), "PNG", (64, 64, 64)),
    "16 bits, tiff": (Image.fromarray(np.full((9, 7), 0x40FF, np.uint16)), "TIFF", (64, 64, 64)),
    "transparent": (Image.new("RGBA", (9, 9), (10, 20, 30, 0)), "PNG", (255, 255, 255)),
    "half transparent": (Image.new("RGBA", (9, 9), (0, 0, 0, 128)), "PNG", (127, 127, 127)),
    "transparent grey": (Image.new("LA", (9, 9), (10, 0)), "PNG", (255, 255, 255)),
    "gif": (picture((30, 180, 60)).quantize(8), "GIF", (30, 180, 60)),
    "webp": (picture((30, 180, 60)), "WEBP", (30, 180, 60)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind(kind):
    image, suffix, expected = KINDS[kind]
    pixels = decoded(Path("x"), encoded(image, suffix), channels=3)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (image.height, image.width, 3)
    assert np.abs(pixels.mean((0, 1)) - expected).max() < 6
    grey = decoded(Path("x"), encoded(image, suffix), channels=1)
    assert grey.shape == (image.height, image.width, 1)


def test_a_picture_is_turned_as_its_camera_says():
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = decoded(Path("x"), encoded(image, "PNG", exif=exif), channels=1)
    np.testing.assert_array_equal(pixels[:, :, 0], np.rot90(np.asarray(image), -1))


def test_a_large_picture_is_scaled_down_and_a_part_is_cut_out():
    large = decoded(Path("x"), encoded(picture((200, 40, 30), (640, 480)), "JPEG"), channels=3, least=32)
    assert large.shape == (32, 43, 3)
    assert np.abs(large.mean((0, 1)) - (200, 40, 30)).max() < 6
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    part = decoded(Path("x"), encoded(image), channels=1, box=(2, 1, 5, 3))
    np.testing.assert_array_equal(part[:, :, 0], np.asarray(image)[1:3, 2:5])


def bomb():
    """A tiny PNG whose header claims 60,000 × 60,000 pixels."""
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


BROKEN = {
    "none": (b"not a picture", "its content is none"),
    "empty": (b"", "its content is none"),
    "cut": (encoded(picture((99, 99, 99), (64, 64)), "JPEG")[:-400], "truncated"),
    "bomb": (bomb(), "3600000000 pixels"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its content is none"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_left_out_only_if_asked(tmp_path, make, kind):
    folder, (content, words) = write(tmp_path / "pictures"), BROKEN[kind]
    path = folder / "train" / "dog" / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="skip_broken=true") as error:
        make(folder)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    data = make(folder, skip_broken=True)
    assert len(data.train) == 15
    sound = make(write(tmp_path / "sound"))
    assert torch.equal(torch.bincount(data.test.labels), torch.bincount(sound.test.labels))


def spoil(folder, kind):
    if kind == "empty class":
        (folder / "train" / "eel").mkdir()
        (folder / "test" / "eel").mkdir()
    elif kind == "class in test alone":
        (folder / "test" / "eel").mkdir()
        picture((0, 0, 0)).save(folder / "test" / "eel" / "0.png")
    elif kind == "one class":
        for part in ("train", "test"):
            for name in ("cat", "dog"):
                (folder / part / name).rename(folder.parent / f"{part}{name}")
    elif kind == "file linked out":
        picture((0, 0, 0)).save(folder.parent / "elsewhere.png")
        (folder / "train" / "cat" / "x.png").symlink_to(folder.parent / "elsewhere.png")
    elif kind == "class linked out":
        (folder.parent / "elsewhere").mkdir()
        for part in ("train", "test"):
            (folder / part / "eel").symlink_to(folder.parent / "elsewhere")
    elif kind == "circle":
        (folder / "train" / "cat" / "again").symlink_to(folder / "train" / "cat")
    elif kind == "all broken":
        for path in (folder / "train" / "owl").iterdir():
            path.write_bytes(b"")


REFUSED = {
    "empty class": "class eel is empty",
    "class in test alone": "train lacks class eel",
    "one class": "at least two classes",
    "file linked out": "x.png is a link that leads out of",
    "class linked out": "eel is a link that leads out of",
    "circle": "again is a link that leads to a folder",
    "all broken": "class owl has no training picture that can be read",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_folders_are_refused_in_a_line(tmp_path, make, kind):
    folder = write(tmp_path / "pictures")
    spoil(folder, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=REFUSED[kind]) as error:
        make(folder, skip_broken=True)
    assert "\n" not in str(error.value)


def test_too_few_pictures_for_a_split_or_a_validation_part(tmp_path, make):
    folder = write(tmp_path / "pictures", parts=("",), count=1)
    with pytest.raises(ValueError, match=r"class cat in .* has too few pictures \(1\)"):
        make(folder)
    with pytest.raises(ValueError, match=r"class (cat|dog|owl) has no training picture left"):
        make(write(tmp_path / "more", count=2), validation=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"random_resized_crop": [0.5]}, "two shares"),
        ({"random_resized_crop": 0.5}, "two shares"),
        ({"random_resized_crop": [0.0, 1.0]}, "0 < from <= to <= 1"),
        ({"image_size": None}, "image_size"),
        ({"channels": 2}, "channels must be 1 or 3"),
        ({"test_share": 1.0}, "below 1"),
        ({"workers": -1}, "workers"),
        ({"cache_gb": 0}, "cache_gb"),
        ({"skip_broken": 1}, "skip_broken"),
    ],
)
def test_settings_are_checked_before_any_work(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        Folder(str(tmp_path), data_dir=str(tmp_path), **settings)


def test_other_classes_than_a_card_says_and_a_small_budget(tmp_path, make):
    folder = write(tmp_path / "pictures")
    with pytest.raises(ValueError, match="num_classes=4, but data set pictures has 3"):
        make(folder, num_classes=4)
    with pytest.raises(ValueError, match=r"36 pictures of 8×8 take .* GB on disk, more than dataset.cache_gb=1e-06"):
        make(folder, cache_gb=1e-6)


# Random crops


def test_boxes_lie_in_their_pictures_and_are_those_of_random_resized_crop():
    sizes = torch.tensor([[37, 53], [300, 20], [20, 300], [1, 1], [64, 64]]).repeat_interleave(4000, 0)
    boxes = random_boxes(sizes, (0.08, 1.0), torch.Generator().manual_seed(0))
    top, left, height, width = boxes.unbind(1)
    assert boxes[:, 2:].min() >= 1
    assert boxes[:, :2].min() >= 0
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    torch.manual_seed(0)
    for k, size in enumerate(sizes[::4000].tolist()):
        image = torch.empty(1, *size)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
        ours = boxes[4000 * k : 4000 * (k + 1)]
        error = 5 * (theirs.double().std(0) / 4000**0.5 * 2**0.5) + 1e-9
        assert ((theirs.double().mean(0) - ours.double().mean(0)).abs() <= error).all()


def test_a_crop_of_everything_is_the_picture_and_is_mirrored():
    image = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = cut_out(image, Cut(0, (0, 0, 8, 8), False), 8)
    assert torch.equal(whole, image.permute(2, 0, 1))
    assert torch.equal(cut_out(image, Cut(0, (0, 0, 8, 8), True), 8), whole.flip(2))
    part = cut_out(image, Cut(0, (2, 3, 4, 5), False), 8)
    assert torch.equal(part, cut_out(image[2:6, 3:8], Cut(0, (0, 0, 4, 5), False), 8))


CROPS = {"random_resized_crop": [0.3, 1.0], "flip": True}


def test_crops_depend_on_seed_and_step_alone(tmp_path, make):
    folder = write(tmp_path / "pictures")
    data = make(folder, **CROPS)
    straight = list(data.minibatches(0, 9))
    assert [len(labels) for _, labels in straight] == [4, 4, 4, 3] * 2 + [4]
    torch.manual_seed(5)
    for step, (images, labels) in zip(range(5, 9), make(folder, **CROPS).minibatches(5, 9), strict=True):
        assert torch.equal(images, straight[step][0])
        assert torch.equal(labels, straight[step][1])
    assert torch.equal(data.minibatch(6)[0], straight[6][0])
    assert not torch.equal(make(folder, seed=1, **CROPS).minibatch(6)[0], straight[6][0])


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")
def test_workers_a_small_cache_and_many_streams_give_the_same_crops(tmp_path, make):
    folder = write(tmp_path / "pictures")
    straight = list(make(folder, **CROPS).minibatches(0, 6))
    images_alone = 36 * 3 * 8 * 8 / 1e9
    others = make(folder, workers=2, cache_gb=images_alone + 4e-6, **CROPS)
    offsets = others.train.store._offsets
    assert 0 < (offsets >= 0).sum() < 18
    for (images, labels), (of_others, their_labels) in zip(straight, others.minibatches(0, 6), strict=True):
        assert torch.equal(images, of_others)
        assert torch.equal(labels, their_labels)
    streams = [others.reseeded(seed) for seed in (4, 5)]
    assert torch.equal(OwnMinibatches(streams)(1)[0][1], streams[1].minibatch(1)[0])


def test_a_file_that_is_gone_while_crops_are_cut_is_named(tmp_path, make):
    folder = write(tmp_path / "pictures")
    data = make(folder, cache_gb=36 * 3 * 8 * 8 / 1e9, **CROPS)
    for path in (folder / "train").glob("*/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"No such file.*\.jpg"):
        next(data.minibatches(0, 1))


# What is kept


def test_pictures_are_decoded_once(tmp_path, make, monkeypatch):
    folder = write(tmp_path / "pictures")
    first = make(folder, **CROPS)
    monkeypatch.setattr("dd_lightning.data.building.decoded", None)  # would be called
    again = make(folder, validation=0, **CROPS)
    assert again.content == first.content
    assert torch.equal(again.train.images[3:], first.train.images)
    assert again.validation is again.train


def test_content_follows_the_files_not_their_place_or_time(tmp_path, make):
    folder = write(tmp_path / "pictures")
    content = make(folder).content
    for path in folder.glob("*/*/*"):
        os.utime(path, (1, 1))
    moved = folder.rename(tmp_path / "elsewhere")
    assert make(moved).content == content
    picture((1, 2, 3)).save(moved / "test" / "cat" / "0.jpg")
    assert make(moved).content != content


def test_an_interrupted_build_goes_on(tmp_path, make, monkeypatch):
    folder = write(tmp_path / "pictures")
    whole = make(folder, **CROPS)
    kept = whole.train.store.folder
    files = {path.name: path.read_bytes() for path in kept.glob("*.u8")}
    for path in kept.iterdir():
        path.unlink()
    true, count = building._append, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 21:
            raise KeyboardInterrupt
        true(*arguments)

    monkeypatch.setattr(building, "_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, **CROPS)
    make(folder, **CROPS)
    assert count == 21 + 16
    assert {path.name: path.read_bytes() for path in kept.glob("*.u8")} == files


def test_a_damaged_store_is_made_again(tmp_path, make):
    folder = write(tmp_path / "pictures")
    first = make(folder)
    images = first.train.images.clone()
    for name, size in (("images.u8", 100), ("index.safetensors", 50)):
        os.truncate(first.train.store.folder / name, size)
        assert torch.equal(make(folder).train.images, images)


def test_stored_pictures_go_to_other_processes_by_reference(tmp_path, make):
    data = make(write(tmp_path / "pictures"))
    content = pickle.dumps(data.test)
    again = pickle.loads(content)
    assert torch.equal(again.images, data.test.images)
    assert torch.equal(again.labels, data.test.labels)
    chosen = pickle.loads(pickle.dumps(data.train[torch.tensor([5, 1])]))
    assert torch.equal(chosen.images, data.train.images[[5, 1]])
    assert len(pickle.dumps(make(tmp_path / "pictures", image_size=64).test)) < len(content) + 1000


def test_many_pictures_stay_where_they_are(tmp_path, make, monkeypatch):
    data = make(write(tmp_path / "pictures"))
    assert data.test.to("meta").images.is_meta
    monkeypatch.setattr("dd_lightning.data.store.ON_DEVICE", 100)
    assert ON_DEVICE > 100
    moved = data.test.to("meta")
    assert isinstance(moved, StoredPictures)
    assert moved.labels.is_meta
    assert not moved.images.is_meta


# Commands

SHORT = ("dataset=folder", "dataset.path=pictures", "dataset.image_size=8", "dataset.validation=3", "network=custom")
SHORT += ("network._target_=conftest.SmallNet", "batch_size=4", "unroll=functional", "callbacks.held_out.every=4")
CROPPED = ("dataset.random_resized_crop=[0.3,1.0]", "dataset.flip=true", "trainer.max_steps=8")


class Stop(Callback):
    """Asks the run to end, as a cluster does: the processes that decode, too."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and not Path("stopped").exists():
            Path("stopped").touch()
            for number in [child.pid for child in multiprocessing.active_children()] + [os.getpid()]:
                os.kill(number, signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*")
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, run):
    write(tmp_path / "pictures")
    code, error, straight = run("distill", *SHORT, *CROPPED, "name=straight", "dataset.workers=0")
    assert (code, error) == (0, "")
    line = (*SHORT, *CROPPED, "dataset.workers=2", "+callbacks.stop._target_=test_folders.Stop")
    code, error, folder = run("distill", *line)
    assert code == 128 + signal.SIGTERM
    assert "saved after outer step 3" in error
    assert run("distill", *line)[0] == 0
    assert torch.equal(DistilledData.load(straight).images, DistilledData.load(folder).images)


def test_class_names_travel_with_the_data(tmp_path, run, monkeypatch):
    write(tmp_path / "pictures", names={name: COLOURS[colour] for name, colour in NAMES.items()})
    titles = []
    true = picture_module.figure
    monkeypatch.setattr(picture_module, "figure", lambda *args: titles.append(args[3]) or true(*args))
    code, error, folder = run("distill", *SHORT, "trainer.max_steps=2", "distilled=real")
    assert (code, error) == (0, "")
    card = DistilledData.load(folder).card
    assert card["class_names"] == sorted(NAMES)
    assert "workers" not in run_settings(folder)
    assert run("export", f"path={folder}", "folder=exported")[:2] == (0, "")
    said = Path("exported/README.txt").read_text(encoding="utf-8")
    assert all(f"  {label}              {name}\n" in said for label, name in enumerate(sorted(NAMES)))
    code, error, folder = run("evaluate", *SHORT[:-2], "distilled=random_real", "distilled.steps=2", "networks=2")
    assert (code, error) == (0, "")
    assert (folder / "distilled.png").stat().st_size > 1000
    assert titles
    assert all(names == sorted(NAMES) for names in titles)
    code, error, _ = run("evaluate", *SHORT[:-2], "distilled=random_real", "distilled.steps=9", "networks=2")
    assert code == 1
    assert "training images, but 9 were asked for" in error
    assert any(f"class {name} has" in error for name in NAMES)


def run_settings(folder):
    saved = load_checkpoint(newest_checkpoint(folder / "checkpoints"))["dd_config"]
    return {key.removeprefix("dataset.") for key in saved}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dataset.path=null", "needs the path of their folder: dataset.path=FOLDER"),
        ("dataset.path=nowhere", "there is no folder of pictures at nowhere"),
        ("dataset.random_resized_crop=[1]", "dataset: random_resized_crop must be two shares"),
        ("dataset.cache_gb=1e-6", "more than dataset.cache_gb=1e-06"),
    ],
)
def test_commands_refuse_in_a_line(tmp_path, run, line, words):
    write(tmp_path / "pictures")
    code, error, _ = run("distill", *SHORT, line)
    assert code == 1
    assert words in error
    assert error.count("\n") <= 1


def test_a_folder_is_packed_as_before(tmp_path):
    folder = write(tmp_path / "pictures")
    arrays, names = pack_folder(folder, 8, 3, 5)
    assert names == list(COLOURS)
    assert arrays.train_images.shape == (18, 8, 8, 3)
    assert arrays.test_labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    (folder / "train" / "cat" / "0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.jpg is no picture that can be read .*; remove it"):
        pack_folder(folder, 8, 3, 5)
