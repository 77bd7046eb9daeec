"""ZCA whitening: its formula, its inverse, its file, and that data which want it are used with it."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import SmallNet, write_population

from dd_lightning import DistilledData
from dd_lightning.data import Packed, Preprocessing, RealData
from dd_lightning.data.whitening import ZCA, fitted, standardised
from dd_lightning.report.picture import figure

TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "batch_size=16")
TOY += ("network._target_=conftest.SmallNet", "unroll=functional", "trainer.max_steps=2", "whitening=zca")
TOY += ("callbacks.held_out.networks=2", "callbacks.held_out.test_networks=3", "init=random", "init.per_step=2")
TOY += ("data_dir=.",)
CARD = ("network._target_=conftest.SmallNet", "networks=3", "data_dir=.")


def pictures(count=300, channels=3, size=5):
    """Pictures whose neighbouring pixels are alike."""
    random = np.random.default_rng(0)
    smooth = random.normal(size=(count, channels, size, size)).cumsum(2).cumsum(3)
    return torch.from_numpy(np.clip(128 + 12 * smooth, 0, 255).astype(np.uint8))


FORM = Preprocessing(3, 5, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])


@pytest.mark.parametrize("count", [300, 40])  # more and fewer than the 75 numbers of a picture
def test_the_covariance_of_whitened_pictures_is_that_of_the_formula(count):
    """Λ (Λ + r)⁻¹ in the basis of the eigenvectors, r a tenth of the mean eigenvalue."""
    images = pictures(count)
    whitening = fitted(images, FORM.normalised, ridge=0.1)
    u = standardised(FORM.normalised(images).double())
    torch.testing.assert_close(u.mean(1), torch.zeros(count, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(count, dtype=torch.float64))
    covariance = torch.from_numpy(np.cov(u.numpy(), rowvar=False, bias=True))
    values, vectors = np.linalg.eigh(covariance.numpy())
    expected = vectors @ np.diag(values / (values + 0.1 * values.mean())) @ vectors.T
    z = whitening(FORM.normalised(images).double()).flatten(1)
    found = np.cov(z.numpy(), rowvar=False, bias=True)
    assert np.abs(found - expected).max() <= 1e-6
    assert np.abs(z.mean(0).numpy()).max() <= 1e-10
    assert torch.equal(whitening.matrix, whitening.matrix.T) or torch.allclose(whitening.matrix, whitening.matrix.T)


def test_unwhitening_gives_the_picture_back(tmp_path):
    """With the mean and the norm that every picture loses: to single precision, in which it is stored, and exactly."""
    images = pictures()
    whitening = ZCA(str(tmp_path))(images, FORM.normalised, FORM.as_dict())
    x = FORM.normalised(images).double()
    u = whitening.inverse(whitening(x))
    mean, std = (x.flatten(1).mean(1), x.flatten(1).std(1, correction=0))
    back = u * std[:, None, None, None] + mean[:, None, None, None]
    assert (back - x).abs().max() <= 1e-6
    pixels = Preprocessing(3, 5, FORM.mean, FORM.std).inverse(back) * 255
    assert torch.equal(pixels.round().to(torch.uint8), images)


def test_it_is_fitted_once_to_training_pictures_alone(tmp_path, packed, caplog):
    def load(validation, ridge=0.1):
        data = RealData(Packed(str(path), validation=validation), zca=ZCA(str(tmp_path / "kept"), ridge))
        data.setup()
        return data

    path = packed(size=6, train=60)
    with caplog.at_level(logging.INFO):
        data = load(10)
    assert "36 eigenvectors of 50 training pictures" in caplog.text
    own = fitted(data.train.images, data.preprocessing.normalised, 0.1)
    torch.testing.assert_close(data.preprocessing.whitening.matrix, own.matrix.float())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = load(10)
    assert "eigenvectors" not in caplog.text
    assert torch.equal(again.preprocessing.whitening.matrix, data.preprocessing.whitening.matrix)
    load(20)
    load(10, ridge=0.2)
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3
    images, _ = data.minibatch(0)
    torch.testing.assert_close(images, own(data.preprocessing.normalised(data.train.images[data.order(0)])).float())


def test_fewer_pictures_than_numbers_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ZCA(str(tmp_path))(pictures(40), FORM.normalised, FORM.as_dict())
    assert "whitening: 40 pictures for 75 numbers each; where they say nothing, the ridge of 0.1" in caplog.text


def test_distilled_data_bring_their_whitening(run, packed, tmp_path):
    packed()
    code, error, folder = run("distill", *TOY, "distilled=real")
    assert (code, error) == (0, "")
    data = DistilledData.load(folder)
    real = RealData(Packed("toy.npz", validation=10), zca=ZCA("whitening"))
    real.setup()
    assert torch.equal(data.whitening.matrix, real.preprocessing.whitening.matrix)
    for form in (data.preprocessing, data.dataset().preprocessing):
        assert torch.equal(form(real.test.images), real.preprocessing(real.test.images))
    before = json.loads((folder / "result.json").read_text())["test"]["accuracies"]
    for path in (tmp_path / "whitening").iterdir():
        path.unlink()
    code, error, evaluated = run("evaluate", f"distilled.path={folder}", *CARD)
    assert (code, error) == (0, "")
    assert json.loads((evaluated / "result.json").read_text())["test"]["accuracies"] == before
    assert not list((tmp_path / "whitening").glob("*.safetensors"))  # the file's was used, none was fitted
    code, error, _ = run("evaluate", f"distilled.path={folder}", *CARD, "whitening=none")
    assert code == 1
    assert "was distilled from whitened pictures, and is of no use on others; use whitening=zca" in error
    code, error, _ = run("evaluate", f"distilled.path={folder}", *CARD, "dataset.mean=[0.3]", "dataset.std=[0.2]")
    assert code == 1
    assert "has a whitening for pictures normalised by mean" in error
    code, error, _ = run("distill", *TOY, "distilled=learned", f"distilled.path={folder}", "dataset.validation=20")
    assert code == 1
    assert "with another whitening than this data set's" in error
    code, error, plain = run("distill", *TOY, "whitening=none", "name=plain")
    assert (code, error) == (0, "")
    code, error, _ = run("evaluate", f"distilled.path={plain}", *CARD, "whitening=zca")
    assert code == 1
    assert "was distilled from pictures that were not whitened; use whitening=none" in error


def test_pictures_are_drawn_as_they_were_before(packed, tmp_path):
    """An image that is a whitened real picture is drawn like it, up to brightness and contrast."""
    real = RealData(Packed(str(packed(size=6, channels=3)), validation=10), zca=ZCA(str(tmp_path)))
    real.setup()
    chosen = real.train.images[:3]
    data = DistilledData.create(real.preprocessing(chosen)[None], real.train.labels[:3][None])
    axes = [axis for axis in figure(data, real.preprocessing).axes if axis.images]
    plain = Preprocessing(**real.preprocessing.as_dict())
    for axis, picture in zip(axes, plain.inverse(plain(chosen)), strict=True):
        drawn, own = (
            torch.as_tensor(np.asarray(p)).flatten() for p in (axis.images[0].get_array(), picture.permute(1, 2, 0))
        )
        assert torch.corrcoef(torch.stack([drawn.double(), own.double()]))[0, 1] > 0.98


@pytest.mark.parametrize("line", ["whitening.ridge=0", "whitening.ridge=-1"])
def test_whitenings_that_cannot_be(run, packed, line):
    packed()
    code, error, _ = run("distill", *TOY, line)
    assert code == 1
    assert "whitening: ridge must be a number above 0" in error
    assert error.count("\n") <= 1


def test_populations_were_not_whitened(run, packed, tmp_path):
    packed()
    write_population(tmp_path / "populations" / "toy", SmallNet(image_size=12), (1, 12, 12), 3)
    code, error, _ = run("distill", *TOY, "init=random_pretrained", "init.population=toy")
    assert code == 1
    assert "networks of a population were trained on pictures that are not whitened: whitening=none" in error
