"""Packed data sets, their form, and minibatches that depend on (seed, step) alone."""

import numpy as np
import pytest
import torch

from dd_lightning.data import Digits, OwnMinibatches, Packed, Preprocessing, RealData, TorchvisionDataset
from dd_lightning.data.augmentation import random_crop, random_flip
from dd_lightning.data.packed import load_packed
from dd_lightning.networks import LeNet, check_network


def real_data(path, batch_size=16, seed=0, **form):
    data = RealData(Packed(str(path), validation=10, **form), batch_size, seed)
    data.setup()
    return data


def test_digits_need_nothing_and_are_split_once():
    data = RealData(Digits("digits", 10, 1, 28, validation=200))
    data.setup()
    assert (len(data.train), len(data.validation), len(data.test)) == (1237, 200, 360)
    assert data.train.images.shape[1:] == (1, 28, 28)
    images = data.preprocessing(torch.cat([data.train.images, data.validation.images]))
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_every_epoch_sees_every_picture_once(packed):
    data = real_data(packed())
    assert data.batches_per_epoch == 4
    batches = [data.minibatch(step) for step in range(8)]
    assert [len(labels) for _, labels in batches[:4]] == [16, 16, 16, 2]
    first, second = (torch.cat([x for x, _ in part]).flatten(1) for part in (batches[:4], batches[4:]))
    every = data.preprocessing(data.train.images).flatten(1)
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, every.tolist()))
    assert not torch.equal(first, second)


def test_a_minibatch_depends_on_seed_and_step_alone(packed):
    path = packed(channels=3)
    form = {"crop_padding": 2, "flip": True}
    data = real_data(path, **form)
    straight = [data.minibatch(step) for step in range(6)]
    again = real_data(path, **form)
    torch.manual_seed(5)
    assert torch.equal(again.minibatch(5)[0], straight[5][0])
    assert torch.equal(again.minibatch(2)[0], straight[2][0])
    assert not torch.equal(real_data(path, seed=1, **form).minibatch(5)[0], straight[5][0])


@pytest.mark.parametrize("form", [{}, {"crop_padding": 2, "flip": True}])
def test_minibatches_of_many_streams_are_those_of_each(packed, form):
    data = real_data(packed(channels=3), **form)
    streams = [data.reseeded(seed) for seed in (4, 5, 6)]
    cut = OwnMinibatches(streams)
    for step in (0, 3, 5):
        images, labels = cut(step)
        for j, stream in enumerate(streams):
            alone = stream.minibatch(step)
            assert torch.equal(images[j], alone[0])
            assert torch.equal(labels[j], alone[1])


def test_form_is_an_option(packed):
    train, _, preprocessing, classes = Packed(
        str(packed()), channels=3, image_size=16, mean=[0.5], std=[0.25], validation=10
    ).load()
    assert train.images.shape[1:] == (3, 16, 16)
    assert preprocessing == Preprocessing(3, 16, [0.5] * 3, [0.25] * 3)
    assert classes == 3
    stored = Packed(str(packed()), validation=10).load()[0].images
    bordered = Packed(str(packed()), border=2, validation=10).load()[0].images
    assert torch.equal(bordered, torch.nn.functional.pad(stored, (2, 2, 2, 2)))
    doubled = Packed(str(packed()), border=2, image_size=32, validation=10).load()[0].images  # with its border
    assert not doubled[:, :, :3].any()
    assert doubled[:, :, 3].any()
    of_three = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    grey, _, preprocessing, _ = Packed(str(packed("color", channels=3)), channels=1, validation=10, **of_three).load()
    assert grey.images.shape[1:] == (1, 12, 12)
    assert preprocessing.mean == pytest.approx([grey.images.double().mean().item() / 255])


@pytest.mark.parametrize("size", [16, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("stored_size", "stored_channels"), [(16, None), (28, None), (32, 3)])  # USPS, MNIST, SVHN
def test_digits_of_every_kind_are_brought_to_one_form(packed, size, channels, stored_size, stored_channels):
    path = packed(size=stored_size, channels=stored_channels)
    mean_of_stored = [0.4] * (stored_channels or 1)
    form = {"image_size": size, "channels": channels, "mean": mean_of_stored, "std": mean_of_stored}
    data = RealData(Packed(str(path), validation=10, **form), batch_size=8)
    data.setup()
    images, _ = data.minibatch(0)
    assert images.shape == (8, channels, size, size)
    check_network(LeNet(channels, size, 3), data.preprocessing.image_shape, 3)
    if channels == 3 and stored_channels is None:
        assert torch.equal(images[:, 0], images[:, 2])


def test_preprocessing_and_its_inverse():
    preprocessing = Preprocessing(3, 4, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    x = preprocessing(images)
    assert x[1, 2, 0, 0].item() == pytest.approx((images[1, 2, 0, 0].item() / 255 - 0.3) / 0.7, rel=1e-5)
    torch.testing.assert_close(preprocessing.inverse(x), images / 255)


def test_crop_and_flip_cut_real_pixels():
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(50, 3, 8, 8)
    padded = torch.nn.functional.pad(images.float(), [2] * 4, mode="reflect").to(torch.uint8)
    windows = [padded[0, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    crops = random_crop(images, 2, generator)
    assert all(any(torch.equal(crop, window) for window in windows) for crop in crops)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 10
    flipped = random_flip(images, generator)
    mirrored = [torch.equal(image, images[0].flip(2)) for image in flipped]
    assert 10 < sum(mirrored) < 40
    assert all(m or torch.equal(image, images[0]) for m, image in zip(mirrored, flipped, strict=True))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_images": None}, "lacks train_images"),
        ({"train_images": np.zeros((60, 12, 12), np.float32)}, "uint8"),
        ({"train_images": np.zeros((60, 144), np.uint8)}, "shape"),
        ({"train_images": np.zeros((60, 12, 10), np.uint8)}, "square"),
        ({"train_labels": np.zeros(59, np.int64)}, "60 whole numbers"),
        ({"train_labels": np.zeros(60)}, "whole numbers"),
        ({"test_labels": np.full(30, 3)}, "outside 0 to 2"),
        ({"train_labels": np.arange(60) % 3 - 1}, "outside"),
        ({"train_labels": np.arange(60) % 2 * 2}, "no training picture of class 1"),
        ({"test_images": np.zeros((30, 14, 14), np.uint8)}, "different sizes"),
        ({"train_images": np.array([{}] * 60, dtype=object)}, "not a packed data set"),
    ],
)
def test_wrong_files_are_refused_by_name(packed, replaced, message):
    path = packed(**replaced)
    with pytest.raises(ValueError, match=message) as caught:
        load_packed(path)
    assert str(path) in str(caught.value)


def test_truncated_and_missing_files_are_refused_by_name(packed):
    path = packed()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"toy\.npz is truncated"):
        load_packed(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_packed(path.with_name("nowhere.npz"))


class FakeSource:
    """Stands for a torchvision data set."""

    failing = False

    def __init__(self, root, train, download):
        if FakeSource.failing and not train:
            raise RuntimeError("connection lost")
        self.pictures = [(np.full((12, 12), i, np.uint8), i % 3) for i in range(30)]

    def __getitem__(self, index):
        return self.pictures[index]


def test_download_is_packed_once_and_whole(tmp_path):
    arguments = {
        "name": "fake",
        "source": f"{__name__}.FakeSource",
        "train": {"train": True},
        "test": {"train": False},
        "data_dir": str(tmp_path),
        "validation": 5,
    }
    FakeSource.failing = True
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*connection lost"):
        TorchvisionDataset(**arguments).prepare()
    assert not (tmp_path / "fake.npz").exists()
    FakeSource.failing = False
    TorchvisionDataset(**arguments).prepare()
    FakeSource.failing = True
    dataset = TorchvisionDataset(**arguments)
    dataset.prepare()
    assert len(dataset.arrays().train_labels) == 30
    data = RealData(dataset)
    data.setup()
    assert (len(data.train), len(data.validation), len(data.test)) == (25, 5, 30)


def test_a_validation_part_that_takes_a_whole_class_is_refused(packed):
    labels = np.arange(60) % 2
    labels[0] = 2
    with pytest.raises(ValueError, match="validation"):
        RealData(Packed(str(packed(train_labels=labels)), validation=59)).setup()
    with pytest.raises(ValueError, match="leaves none"):
        RealData(Packed(str(packed()), validation=60)).setup()
