"""The outer loss and its gradient: against a plain graph, in chunks, in bfloat16, and as a CUDA graph."""

import logging
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet
from torch import nn

from dd_lightning.data import Pictures
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import RandomInit
from dd_lightning.networks import LeNet, evaluating, forward_each
from dd_lightning.objectives import Classification, Poisoning
from dd_lightning.outer import OuterLoss
from dd_lightning.unroll import AdjointUnroll, OuterStep, layers


class ViewingNet(nn.Module):
    """Takes no images in channels last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.fc(self.conv(x).view(len(x), -1))


class InPlaceNet(nn.Sequential):
    """Changes its activations in place, the first ones after a narrow convolution."""

    def __init__(self, *after):
        super().__init__(nn.Conv2d(3, 4, 3), *after, nn.Flatten(), nn.Linear(4 * 36, 5))


class Adding(nn.Module):
    def forward(self, x):
        x += 1
        return F.relu(x, inplace=True)


def real(channels, size, classes, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, channels, size, size, generator=generator).to(device, dtype)
    return images, (torch.arange(12) % classes).to(device)


@pytest.mark.parametrize(
    ("network", "shape", "classes"),
    [(LeNet(1, 16, 4), (1, 16), 4), (SmallNet(3, 8, 5), (3, 8), 5), (ViewingNet(), (3, 8), 5)]
    + [(InPlaceNet(layer), (3, 8), 5) for layer in (nn.LeakyReLU(inplace=True), nn.ReLU(inplace=True), Adding())],
)
def test_loss_and_gradient_are_those_of_a_plain_graph(network, shape, classes):
    network = network.double()
    theta = {n: v.requires_grad_() for n, v in RandomInit(per_step=7).sample(network, 0).items()}
    images, labels = real(*shape, classes)
    with evaluating(network):
        expected = Classification()(forward_each(network, theta, images), labels)
    found = OuterLoss(Classification())(network, theta, images, labels)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(2 * loss, list(theta.values())) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("piece", [1, 5, 12, 99])
@pytest.mark.parametrize("objective", [Classification(), Poisoning(0, 2)], ids=["classification", "poisoning"])
def test_pieces_of_the_minibatch_change_nothing(piece, objective):
    """The last of five images is of two alone, and counts as two."""
    network = LeNet(1, 16, 4).double()
    theta = {n: v.requires_grad_() for n, v in RandomInit(per_step=2).sample(network, 0).items()}
    images, labels = real(1, 16, 4)
    losses = [OuterLoss(objective, piece=size)(network, theta, images, labels) for size in (piece, None)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, list(theta.values())) for loss in losses), strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()
    with pytest.raises(ValueError, match="piece must be a whole number of at least 1, not 0"):
        OuterLoss(objective, piece=0)


def test_a_network_sees_a_piece_at_a_time(monkeypatch):
    seen, gradient = [], OuterLoss._gradient
    monkeypatch.setattr(
        OuterLoss, "_gradient", lambda self, *args: (seen.append(len(args[2])), gradient(self, *args))[1]
    )
    network = LeNet(1, 16, 4)
    theta = RandomInit().sample(network, 0)
    OuterLoss(Classification(), piece=5)(network, theta, *real(1, 16, 4, torch.float32))
    assert seen == [5, 5, 2]


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("wrong", [None, "error", "value"])
def test_the_rules_for_layers_are_taken_where_they_are_right(monkeypatch, wrong, networks):
    """Of the whole network, or of what follows the layers that networks share."""
    right = layers.Linear.backward

    def broken(self, w, *args):
        if wrong == "error":
            raise TypeError("no rule fits")
        return right(self, [2 * w[0], *w[1:]], *args)

    if wrong:
        monkeypatch.setattr(layers.Linear, "backward", broken)
    network = LeNet(1, 16, 4).double()
    theta = {n: v.requires_grad_() for n, v in RandomInit(per_step=networks).sample(network, 0).items()}
    images, labels = real(1, 16, 4)
    loss = OuterLoss(Classification())
    found = torch.autograd.grad(loss(network, theta, images, labels), list(theta.values()))
    assert (loss._known[1] is None) == (wrong is not None)
    with evaluating(network):
        expected = Classification()(forward_each(network, theta, images), labels)
    torch.testing.assert_close(found, torch.autograd.grad(expected, list(theta.values())))


def test_bfloat16_is_near_and_not_the_same():
    network = LeNet(1, 16, 4)
    theta = {n: v.requires_grad_() for n, v in RandomInit(per_step=2).sample(network, 0).items()}
    images, labels = real(1, 16, 4, torch.float32)
    exact, rough = (
        torch.autograd.grad(OuterLoss(Classification(), p)(network, theta, images, labels), list(theta.values()))
        for p in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.2 * one.norm()
    with pytest.raises(ValueError, match="float32, bfloat16"):
        OuterLoss(Classification(), "float8")


def outer_step(device="cpu", dtype=torch.float64, **options):
    network = LeNet(1, 16, 4).to(device, dtype)
    theta_0 = RandomInit(per_step=5).sample(network, 0)
    images = torch.randn(2, 4, 1, 16, 16, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    data = DistilledData.create(images, torch.arange(4).expand(2, 4), 2, 0.1).to(device)
    parameters = [data.images.requires_grad_(), data.raw_learning_rates.requires_grad_()]
    unroll, outer_loss = AdjointUnroll(), OuterLoss(Classification())
    step = OuterStep(lambda theta, x, y: outer_loss(network, unroll(network, theta, data.steps()), x, y), **options)
    return step, theta_0, real(1, 16, 4, dtype, device), parameters


@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_chunks_change_nothing(chunk):
    step, theta_0, batch, parameters = outer_step(chunk=chunk)
    loss, gradients = step((theta_0, *batch), parameters)
    expected = 5 * step.loss(theta_0, *batch)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(tuple(gradients), torch.autograd.grad(expected, parameters))


def test_parts_add_up():
    step, theta_0, batch, parameters = outer_step()
    parts = [{name: value[own] for name, value in theta_0.items()} for own in (slice(0, 2), slice(2, 5))]
    sums = [step((part, *batch), parameters) for part in parts]
    loss, gradients = step((theta_0, *batch), parameters)
    torch.testing.assert_close(sums[0][0] + sums[1][0], loss)
    torch.testing.assert_close([a + b for a, b in zip(sums[0][1], sums[1][1], strict=True)], gradients)


def test_what_cannot_be_captured_runs_all_the_same(monkeypatch, caplog):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    class OnGpu:
        type = "cuda"

    monkeypatch.setattr("dd_lightning.unroll.capture._Graph", refuse)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    step, theta_0, batch, parameters = outer_step()
    expected = step.gradients((theta_0, *batch), parameters)
    images = MagicMock(device=OnGpu(), shape=batch[0].shape)
    monkeypatch.setattr(step, "gradients", lambda *args: expected)
    with caplog.at_level(logging.WARNING):
        assert step((theta_0, images, batch[1]), parameters) is expected
    assert "operation not permitted" in caplog.text
    assert not step.capture


@pytest.mark.cuda
def test_a_cuda_graph_gives_the_same_gradient_step_after_step():
    step, theta_0, (images, labels), parameters = outer_step("cuda")
    for _ in range(3):
        images = images.flip(0)
        theta_0 = {name: value + 0.01 for name, value in theta_0.items()}
        expected = step.gradients((theta_0, images, labels), parameters)
        found = step((theta_0, images, labels), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
        with torch.no_grad():
            parameters[0].add_(0.1)
    assert step.capture
    assert len(step._graphs) == 1


def test_pictures_that_go_in_pieces_wait_where_they_were_cut(data):
    """The device is one without memory: what is moved there shows."""
    cut = data.train.images[:16]
    data.train = Pictures(data.train.images, data.train.labels.to("meta"))
    found = {}
    for data.apart in (True, False):
        batch = data.finished(cut, 0)
        distilled = DistilledData.create(torch.randn(1, 3, 1, 6, 6), torch.arange(3)[None])
        options = {"piece": 4 if data.apart else None}
        parts = (SmallNet(), RandomInit(), AdjointUnroll(), Classification(), torch.optim.Adam)
        distiller = DatasetDistiller(distilled, *parts, **options)
        moved, _ = distiller.transfer_batch_to_device(batch, torch.device("meta"), 0)
        found[data.apart] = batch[0].device.type, moved.device.type
    assert found == {True: ("cpu", "cpu"), False: ("meta", "meta")}
