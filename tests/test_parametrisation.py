"""Images made of bases, and what data cost to keep: closed forms, gradients engine by engine, files, whole runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_resuming import ANY, RUN, Killed, at_step, killed
from test_unroll import ENGINES, problem

from dd_lightning import DistilledData
from dd_lightning.data import Whitening
from dd_lightning.networks import predict
from dd_lightning.parametrisation import Bases, Budget, FixedLabels, LearnedLabels, Pixels
from dd_lightning.unroll import Adam, GradientDescent, HigherUnroll, Momentum, ShuffledOrder

BASES = ("images=bases", "images.count=3", "distilled=noise")


def bases_problem(scale=2, learning_rate=0.05):
    """A float64 problem whose images are made of bases: minibatches of them, and real pictures that are whitened."""
    network, theta_0, data, (pictures, classes) = problem(SmallNet(), (1, 6, 6), 3, 1, 1, learning_rate=learning_rate)
    random = torch.Generator().manual_seed(1)
    start = torch.zeros(1, 12, 1, 6, 6, dtype=torch.float64)
    parametrisation = Bases(4, scale)
    raw = {name: value.requires_grad_() for name, value in parametrisation.raw(start, random).items()}
    labels = torch.arange(3).repeat(4)[None]
    matrix = torch.randn(36, 36, generator=random, dtype=torch.float64) / 6
    whitening = Whitening(torch.zeros(36, dtype=torch.float64), matrix @ matrix.T + torch.eye(36))
    data = replace(
        DistilledData.create(start, labels, 1, learning_rate),
        raw_learning_rates=data.raw_learning_rates.requires_grad_(),
        order=ShuffledOrder(5, images_per_class=2),
        parametrisation=parametrisation,
        raw_images=raw,
        whitening=whitening,
    )
    return network, theta_0, data, (whitening(pictures), classes)


def outer(unroll, network, theta_0, data, real):
    data = replace(data, images=data.parametrisation.images(data.raw_images))
    logits = predict(network, unroll(network, theta_0, data.steps()), real[0])
    return F.cross_entropy(logits.flatten(0, 1), real[1].repeat(len(logits)))


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("optimizer", [GradientDescent(), Momentum(0.8), Adam((0.8, 0.9), eps=1e-3)])
@pytest.mark.parametrize("scale", [1, 2])
def test_gradients_of_bases_and_coefficients_in_every_engine(engine, optimizer, scale):
    network, theta_0, data, real = bases_problem(scale)
    inputs = [*data.raw_images.values(), data.raw_learning_rates]
    found, expected = (
        torch.autograd.grad(outer(unroll, network, theta_0, data, real), inputs)
        for unroll in (engine(optimizer=optimizer), HigherUnroll(optimizer))
    )
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-8 * other.norm()


def test_gradients_of_bases_and_coefficients_against_finite_differences():
    network, theta_0, data, real = bases_problem()
    inputs = list(data.raw_images.values())
    unroll = HigherUnroll()
    for tensor, gradient in zip(
        inputs, torch.autograd.grad(outer(unroll, network, theta_0, data, real), inputs), strict=True
    ):
        flat = tensor.detach().view(-1)
        for index in range(0, len(flat), 7):
            losses = []
            for sign in (1, -1):
                flat[index] += sign * 1e-5
                losses.append(outer(unroll, network, theta_0, data, real).item())
                flat[index] -= sign * 1e-5
            assert gradient.view(-1)[index].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_images_are_sums_of_bases():
    random = torch.Generator().manual_seed(0)
    parametrisation = Bases(3, 2)
    raw = parametrisation.raw(torch.empty(2, 4, 3, 8, 8), random)
    assert {name: list(t.shape) for name, t in raw.items()} == {"coefficients": [2, 4, 3], "bases": [3, 3, 4, 4]}
    for name, bound in (("coefficients", (6 / (8 + 3)) ** 0.5), ("bases", (6 / (3 + 48)) ** 0.5)):
        assert 0.8 * bound < raw[name].abs().max() <= bound
    images = parametrisation.images(raw)
    for step in range(2):
        for i in range(4):
            expected = sum(
                raw["coefficients"][step, i, k]
                * F.interpolate(raw["bases"][k][None], size=(8, 8), mode="bilinear", align_corners=False)[0]
                for k in range(3)
            )
            torch.testing.assert_close(images[step, i], expected)
    full = {"coefficients": torch.eye(3)[None], "bases": torch.randn(3, 1, 5, 5)}
    assert torch.equal(Bases(3, 1).images(full)[0], full["bases"])
    with pytest.raises(ValueError, match="scale=2 does not divide the 5×5 pixels"):
        Bases(3, 2).raw(torch.empty(1, 2, 1, 5, 5), random)


CIFAR10, MNIST = (3, 32, 32), (1, 28, 28)


@pytest.mark.parametrize(
    ("budget", "images", "labels", "shape", "fitting"),
    [
        (Budget(10), Pixels(), FixedLabels(), MNIST, 10),
        (Budget(10), Pixels(), LearnedLabels(), MNIST, 9),  # ten labels are almost 1/78 of an image
        (Budget(1), Bases(16, 2), FixedLabels(), CIFAR10, (30720 - 16 * 768) // 160),
        (Budget(1), Bases(16, 2), LearnedLabels(), CIFAR10, (30720 - 16 * 768) // 260),
        (Budget(numbers=7841), Pixels(), FixedLabels(), MNIST, 1),
        (Budget(numbers=2 * 16 * 196 + 1), Bases(16, 2), FixedLabels(), MNIST, 16 * 196 // 160),
    ],
)
def test_a_budget_holds_what_it_stores(budget, images, labels, shape, fitting):
    found = budget.fitting(images, labels, shape, 10, 10)
    assert found == fitting
    total = budget.numbers or budget.images_per_class * 10 * shape[0] * shape[1] * shape[2] + 1
    for count, fits in ((found, True), (found + 1, False)):
        start = DistilledData.create(torch.zeros(1, 10 * count, *shape), torch.arange(10).repeat(count)[None])
        raw = images.raw(start.images, torch.Generator())
        soft = labels.raw(start.labels, 10, None)
        own = None if isinstance(images, Pixels) else raw
        assert (replace(start, raw_images=own, soft_labels=soft).stored_numbers <= total) == fits


def test_a_file_stores_what_was_learned_and_gives_images(tmp_path):
    parametrisation = Bases(4, 2)
    start = DistilledData.create(torch.zeros(1, 6, 1, 8, 8), torch.arange(3).repeat(2)[None])
    raw = parametrisation.raw(start.images, torch.Generator().manual_seed(0))
    data = replace(start, images=parametrisation.images(raw), parametrisation=parametrisation, raw_images=raw)
    path = tmp_path / "distilled.safetensors"
    data.save(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"coefficients", "bases", "labels", "raw_learning_rates"}
    again = DistilledData.load(tmp_path)
    assert torch.equal(again.images, data.images)
    assert again.parametrisation == parametrisation
    assert again.stored_numbers == data.stored_numbers == 6 * 4 + 4 * 16 + 1
    assert torch.equal(again.to("cpu", torch.float64).raw_images["bases"], raw["bases"].double())
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors | {"bases": tensors["bases"][:3].contiguous()}, path, metadata)
    with pytest.raises(ValueError, match=r"distilled\.safetensors: coefficients .* do not fit"):
        DistilledData.load(path)
    del tensors["bases"]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="lacks bases"):
        DistilledData.load(path)


@pytest.fixture(autouse=True)
def toy(packed):
    return packed(channels=3)


@pytest.mark.parametrize("unroll", [pytest.param("functional", marks=pytest.mark.slow), "batched"])
def test_bases_go_on_bit_for_bit_and_are_used_again(run, monkeypatch, unroll):
    lines = (*RUN, *ANY, *BASES, "budget.numbers=600", f"unroll={unroll}", "window=random", "augment=dsa")
    code, error, folder = run("distill", *lines, "name=straight")
    assert (code, error) == (0, "")
    with monkeypatch.context() as patch:
        at_step(patch, 5, killed)
        with pytest.raises(Killed):
            run("distill", *lines, "name=killed")
    assert run("distill", *lines, "name=killed")[:2] == (0, "")
    one, other = (DistilledData.load(next(Path("runs", name).iterdir())) for name in ("straight", "killed"))
    assert one.raw_images.keys() == {"coefficients", "bases"}
    for name, value in one.raw_images.items():
        assert torch.equal(value, other.raw_images[name])
    assert one.stored_numbers == one.card["stored_numbers"] <= 600
    assert one.card["budget"] == {"images_per_class": None, "numbers": 600}
    assert (folder / "bases.png").stat().st_size > 1000
    log = (folder / "dd-distill.log").read_text()
    assert f"distilling {one.stored_numbers:,} numbers into {one.images.shape[1]} images" in log
    network = ("network._target_=conftest.SmallNet",)
    code, error, evaluated = run("evaluate", f"distilled.path={folder}", "networks=3", *network)
    assert (code, error) == (0, "")
    tested = [json.loads((place / "result.json").read_text())["test"]["accuracies"] for place in (folder, evaluated)]
    assert tested[0] == pytest.approx(tested[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("budget.images_per_class=1", "images.count=40"), "budget: what all images share takes 4,320 numbers"),
        (("budget.numbers=2",), "budget: numbers=2 is less than one number for each of 3 classes"),
        (
            ("budget.numbers=330", "images.count=3"),
            "budget: one image of each class takes 343 numbers, the budget has 330",
        ),
        (("budget.numbers=9", "budget.images_per_class=1"), "give images_per_class or numbers, not both"),
        (("budget.numbers=0",), "numbers must be a whole number of at least 1, not 0"),
        (("images.count=0",), "images: count must be a whole number of at least 1, not 0"),
        (("images.scale=5",), "images: scale=5 does not divide the 12×12 pixels"),
        (("images.coefficient_decay=-1",), "images: coefficient_decay must be a number of at least 0"),
    ],
)
def test_bases_and_budgets_that_cannot_be(run, line, message):
    code, error, _ = run("distill", *RUN, *ANY, *BASES, "window=random", *line)
    assert code == 1
    assert message in error
    assert error.count("\n") <= 1
