"""Distilled data on their own: order, learning rates, files, reuse."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dd_lightning import DistilledData, LeNet
from dd_lightning.distilled import softplus_inverse
from dd_lightning.networks import load_weights


def example(steps=2, epochs=3, learning_rate=0.02):
    images = torch.randn(steps, 10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return DistilledData.create(images, torch.arange(10).expand(steps, -1), epochs, learning_rate)


@pytest.mark.parametrize("value", [1e-6, 0.001, 0.02, 1.0, 30.0])
def test_softplus_inverse(value):
    raw = softplus_inverse(torch.tensor(value, dtype=torch.float64))
    assert torch.nn.functional.softplus(raw).item() == pytest.approx(value, rel=1e-9)


def test_steps_cycle_in_order_with_untied_learning_rates():
    data = example()
    data.raw_learning_rates.copy_(torch.arange(6.0).view(3, 2))
    steps = list(data.steps())
    assert len(steps) == 6
    for i, (images, labels, rate) in enumerate(steps):
        assert torch.equal(images, data.images[i % 2])
        assert labels.tolist() == list(range(10))
        assert rate.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(float(i))).item())


def test_save_and_load_keep_every_bit(tmp_path):
    data = example(learning_rate=0.3)
    data.card["network"] = {"choice": "lenet"}
    data.save(tmp_path / "distilled.safetensors")
    again = DistilledData.load(tmp_path)
    for name in ("images", "labels", "raw_learning_rates"):
        assert torch.equal(getattr(data, name), getattr(again, name))
    assert again.card["network"] == {"choice": "lenet"}
    assert again.card["learning_rates"] == data.learning_rates.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["distilled.safetensors"]


def test_three_lines_in_a_fresh_process(tmp_path):
    data = example(steps=1)
    torch.manual_seed(0)
    network = LeNet()
    data = DistilledData(data.images, data.labels, data.raw_learning_rates, {}, dict(network.state_dict()))
    data.save(tmp_path / "distilled.safetensors")
    expected = data.train(network)(torch.ones(1, 1, 28, 28)).tolist()
    code = """
import json, torch
from dd_lightning import DistilledData, LeNet
distilled = DistilledData.load("distilled.safetensors")
network = LeNet()
distilled.train(network)
print(json.dumps(network(torch.ones(1, 1, 28, 28)).tolist()))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(out)[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-5)


def test_train_is_plain_sgd_and_keeps_the_mode():
    network, data = LeNet().eval(), example(learning_rate=0.05)
    reference = LeNet()
    reference.load_state_dict(network.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    for images, labels, _ in data.steps():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(images), labels).backward()
        optimizer.step()
    data.train(network)
    torch.testing.assert_close(dict(network.named_parameters()), dict(reference.named_parameters()))
    assert not network.training


def test_weights_of_a_fixed_network_that_do_not_fit_are_refused():
    data = example()
    data = DistilledData(data.images, data.labels, data.raw_learning_rates, {}, dict(LeNet(num_classes=7).state_dict()))
    with pytest.raises(ValueError, match="one fixed network"):
        data.train(LeNet())


class Around(torch.nn.Module):
    """A network inside another module, with a weight beside it."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = LeNet(), torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.body(x)


def of_one_network():
    torch.manual_seed(3)
    data, network = example(), LeNet()
    return replace(data, initial_weights={name: p.detach().clone() for name, p in network.named_parameters()}), network


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, torch.compile, lambda n: torch.compile(torch.nn.DataParallel(n))]
)
def test_a_wrapped_network_gets_the_weights_of_its_own(wrap):
    data, network = of_one_network()
    expected = dict(data.train(network).named_parameters())
    torch.manual_seed(4)
    other = LeNet()
    wrapped = wrap(other)
    load_weights(wrapped, data.initial_weights)
    assert all(torch.equal(p, data.initial_weights[name]) for name, p in other.named_parameters())
    if wrap is torch.nn.DataParallel:
        data.train(wrapped)
        torch.testing.assert_close(dict(other.named_parameters()), expected)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Around, "it lacks conv1.bias"),
        (Around, "body.conv1.bias"),
        (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), "1.weight"),
        (lambda: LeNet(num_classes=7), "[10, 84], and [7, 84] here"),
    ],
)
def test_a_network_of_other_weights_is_not_trained_from_its_own(make, named):
    data, network = of_one_network()[0], make()
    before = {name: p.clone() for name, p in network.named_parameters()}
    with pytest.raises(ValueError, match="distilled for one fixed network; the weights do not fit") as caught:
        data.train(network)
    assert named in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("wrong", ["missing", "text", "truncated", "pickle", "foreign", "empty"])
def test_broken_files_are_refused_by_name(tmp_path, wrong):
    path = tmp_path / "distilled.safetensors"
    if wrong == "text":
        path.write_text("hello")
    elif wrong == "truncated":
        example().save(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif wrong == "pickle":
        path.write_bytes(pickle.dumps({"images": 1}))
    elif wrong == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    elif wrong == "empty":
        path.touch()
    with pytest.raises((ValueError, FileNotFoundError), match=r"distilled\.safetensors"):
        DistilledData.load(path)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        example(**settings)
