"""The paper's networks, and the check of a user's own."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import BatchNormNet, SmallNet
from torch import nn

from dd_lightning.init import RandomInit
from dd_lightning.networks import (
    MLP,
    VGG11,
    AlexCifarNet,
    ConvNet,
    LeNet,
    LocalResponseNorm,
    MaxPool2d,
    ResNet18,
    ViTSmall,
    check_network,
    class_name,
    predict,
    predictions,
    run_with,
    stack,
    training_without_dropout,
)
from dd_lightning.system.seeding import Stream


@pytest.mark.parametrize(
    ("network", "shape", "parameters"),
    [
        (LeNet(), (1, 28, 28), 61706),
        (LeNet(3, 32), (3, 32, 32), 62006),
        (AlexCifarNet(), (3, 32, 32), 1756426),
        (SmallNet(), (1, 6, 6), 483),
        (ConvNet(), (3, 32, 32), 320010),
        (ConvNet(1, 28, width=32, norm="none", pooling="max"), (1, 28, 28), 23946),
        (ConvNet(3, 64, width=8, depth=4, norm="group", activation="leaky_relu"), (3, 64, 64), 3330),
        (MLP(), (1, 28, 28), 118282),
        (VGG11(), (3, 32, 32), 9231114),  # as published, for ten classes of 32 pixels
        (VGG11(1, 28, width=8, norm="group"), (1, 28, 28), 145754),
        (ResNet18(), (3, 32, 32), 11173962),  # as published
        (ResNet18(1, 16, width=4, norm="layer"), (1, 16, 16), 44550),
        (ViTSmall(), (3, 32, 32), 1806538),
        (ViTSmall(1, 28, width=12, depth=2), (1, 28, 28), 3538),
    ],
)
def test_shapes_and_sizes(network, shape, parameters):
    classes = network.fc.out_features if isinstance(network, SmallNet) else 10
    check_network(network, shape, classes)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (LeNet(), (1, 16, 16), "does not take the data set's 1×16×16 images"),
        (LeNet(), (3, 28, 28), "does not take"),
        (LeNet(num_classes=7), (1, 28, 28), r"need \[4, 10\]"),
        (BatchNormNet(num_classes=10), (1, 6, 6), "norm.running_mean.*GroupNorm or InstanceNorm instead"),
        (nn.Flatten(), (1, 6, 6), "no trainable parameters"),
    ],
)
def test_networks_that_cannot_be_distilled_for_are_refused(network, shape, message):
    with pytest.raises(ValueError, match=message):
        check_network(network, shape, 10)


def test_the_check_leaves_the_network_as_it_was():
    network = BatchNormNet(num_classes=10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="leak"):
        check_network(network, (1, 6, 6), 10)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Changing(nn.Module):
    """Changes something in place: its images, a view of them, a weight, or what no one else has."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.fc = what, nn.Linear(36, 10)

    def forward(self, x):
        if self.what == "images":
            x -= 0.5
        if self.what == "view":
            x.flatten(1).clamp_(max=9.0)  # changes none of the check's pixels
        if self.what == "data":
            x.data.mul_(2)
        if self.what == "images when tested" and not self.training:
            x.relu_()
        if self.what == "weights":
            self.fc.weight.div_(self.fc.weight.norm())
        return self.fc((x * 2).relu_().flatten(1))


@pytest.mark.parametrize("what", ["images", "view", "data", "images when tested", "weights", "own"])
def test_networks_that_change_what_others_use_are_refused(what):
    network = Changing(what)
    before = network.fc.weight.clone()
    if what == "own":
        check_network(network, (1, 6, 6), 10)
    else:
        with pytest.raises(ValueError, match=r"fc\.weight" if what == "weights" else "Changing changes its images"):
            check_network(network, (1, 6, 6), 10)
    assert torch.equal(network.fc.weight, before)


def test_a_network_that_looks_at_the_pictures_beside_is_told(caplog):
    network = BatchNormNet(num_classes=10)
    network.norm = nn.BatchNorm2d(4, track_running_stats=False)
    check_network(network, (1, 6, 6), 10)
    (said,) = caplog.messages
    assert "BatchNormNet" in said
    assert "500 pictures at a time" in said
    assert inspect.signature(predictions).parameters["batch_size"].default == 500
    network.norm = nn.InstanceNorm2d(4, affine=True)
    check_network(network, (1, 6, 6), 10)
    check_network(LeNet(), (1, 28, 28), 10)
    assert len(caplog.messages) == 1


def test_a_state_that_the_first_forward_makes_is_no_training():
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    check_network(network, (1, 6, 6), 10)
    assert network[1].in_features == 36


def test_predict_runs_each_network_in_eval_mode():
    network = SmallNet()
    singles = [{n: torch.randn_like(p) for n, p in network.named_parameters()} for _ in range(3)]
    images = torch.randn(5, 1, 6, 6)
    logits = predict(network, stack(singles), images)
    for single, found in zip(singles, logits, strict=True):
        network.load_state_dict(single)
        network.eval()
        torch.testing.assert_close(found, network(images))


def test_training_without_dropout_leaves_rates_as_they_were():
    network = nn.ModuleList([nn.MultiheadAttention(8, 2, dropout=0.3), nn.LSTM(4, 4, 2, dropout=0.2), nn.Dropout(0.1)])
    network.eval()
    with training_without_dropout(network):
        assert network[0].training
        assert network[0].dropout == network[1].dropout == 0
        assert not network[2].training
    assert (network[0].dropout, network[1].dropout) == (0.3, 0.2)
    assert not network[0].training


def test_a_network_run_with_other_weights_is_left_as_it_was():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    network.append(network[0])
    network[2].weight = network[0].weight
    own = dict(network.named_parameters())
    weights = {name: torch.randn_like(value) for name, value in own.items()}
    x = torch.randn(3, 2)
    first = weights["0.weight"], weights["0.bias"]
    expected = F.linear(F.linear(F.linear(x, *first).tanh(), first[0], weights["2.bias"]), *first)
    torch.testing.assert_close(run_with(network, weights, x), expected)
    assert all(network.get_parameter(name) is value for name, value in own.items())
    del weights["2.bias"]
    expected = F.linear(F.linear(F.linear(x, *first).tanh(), first[0], own["2.bias"]), *first)
    torch.testing.assert_close(run_with(network, weights, x), expected)


def test_local_response_norm_is_that_of_torch():
    x = torch.randn(2, 7, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (1, 4, 5):
        options = {"alpha": 0.3, "beta": 0.75, "k": 1.5}
        torch.testing.assert_close(LocalResponseNorm(size, **options)(x), nn.LocalResponseNorm(size, **options)(x))


@pytest.mark.parametrize("size", [2, 3])
def test_max_pooling_is_that_of_torch(size):
    x = torch.randn(3, 2, 8, 7, generator=torch.Generator().manual_seed(0))
    expected = nn.MaxPool2d(size)(x)
    assert torch.equal(MaxPool2d(size)(x), expected)
    with torch.no_grad():
        assert torch.equal(MaxPool2d(size)(x), expected)


def test_a_network_of_ours_is_named_by_its_package():
    assert class_name(LeNet()) == "dd_lightning.networks.LeNet"
    assert class_name(nn.Linear(1, 1)) == "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"norm": "group", "width": 6}, "norm=group needs a width that four divides, not 6"),
        ({"image_size": 12, "depth": 4}, "depth=4 needs images of at least 16 pixels, not 12"),
        ({"width": 0}, "width must be a whole number of at least 1"),
    ],
)
def test_convnets_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(**settings)


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (VGG11, {"image_size": 16}, "VGG11 needs images of at least 28 pixels, not 16"),
        (VGG11, {"width": 6}, "width must be a multiple of 4, not 6"),
        (ResNet18, {"norm": "batch"}, "unknown norm 'batch'; choose one of instance, group, layer, none"),
        (ResNet18, {"image_size": 8}, "ResNet18 needs images of at least 16 pixels, not 8"),
        (ViTSmall, {"image_size": 30}, "patch=4 does not divide images of 30 pixels"),
        (ViTSmall, {"heads": 5}, "heads=5 does not divide width=192"),
    ],
)
def test_large_networks_that_cannot_be(network, settings, message):
    with pytest.raises(ValueError, match=message):
        network(**settings)


def test_tokens_and_positions_are_drawn_for_each_network():
    network = ViTSmall(1, 8, 3, width=12, depth=1)
    one, again = (RandomInit().draw(network, Stream.INIT, 0, 0) for _ in range(2))
    other = RandomInit().draw(network, Stream.INIT, 0, 1)
    for name in ("tokens.token", "tokens.positions"):
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
