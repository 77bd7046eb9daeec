"""The shared first layers: which networks have them, and that nothing changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dd_lightning.init import RandomInit
from dd_lightning.networks import AlexCifarNet, LeNet, forward_each, predict, stack, stem_of, unstack


class Net(nn.Module):
    """A few layers, put together in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect" if kind == "reflect" else "zeros", bias=False)
        self.norm = nn.GroupNorm(2, 6)
        self.in_place = nn.LeakyReLU(inplace=True)
        self.second = nn.Conv2d(6, 6, 3)
        self.last = nn.Linear(6, 4)
        if kind == "tied":
            self.again = self.first
        if kind == "parametrized":
            weight_norm(self.first)
        if kind == "unused":
            self.spare = nn.Linear(2, 2)

    def forward(self, x):
        y = self.first(x)
        if self.kind == "residual":
            y = y + F.relu(y)
        if self.kind == "in place":
            y = self.in_place(y)
        if self.kind == "in place later":
            y = F.relu(y, inplace=True)
            y += 1
        if self.kind == "in place, read again":
            y = F.relu(y, inplace=True) + y
        if self.kind == "images twice":
            y = y + x.mean(1, keepdim=True)
        if self.kind == "python" and y.mean() > 100:
            return y
        y = F.avg_pool2d(self.norm(y).relu() if self.kind == "norm first" else self.norm(F.relu(y).relu()), 2)
        if self.kind == "tied":
            y = y + self.again(y[:, :2])
        return self.last(self.second(y).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "has_stem"),
    [
        (Net("plain"), True),
        (Net("reflect"), True),
        (Net("norm first"), True),
        (Net("residual"), True),
        (Net("in place"), False),
        (Net("in place later"), True),
        (Net("in place, read again"), False),
        (Net("parametrized"), False),
        (Net("images twice"), False),
        (Net("python"), False),
        (Net("tied"), False),
        (Net("unused"), False),
        (LeNet(2, 16, 4), True),
        (AlexCifarNet(2, 16, 4), False),
    ],
)
def test_networks_through_their_stem_give_the_same_logits(network, has_stem):
    network = network.eval()
    own = {name: value.detach() for name, value in network.named_parameters()}
    weights = stack([{n: v + 0.1 * v.std() * torch.randn_like(v) for n, v in own.items()} for _ in range(7)])
    images = torch.randn(5, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (stem_of(network, images, torch.contiguous_format) is not None) == has_stem
    torch.testing.assert_close(predict(network, weights, images), forward_each(network, weights, images))


def test_a_stem_takes_any_number_of_networks():
    network = LeNet().eval()
    stem = stem_of(network, torch.zeros(2, 1, 28, 28), torch.channels_last)
    assert stem is not None
    assert stem.networks == 5
    weights = RandomInit(per_step=3).sample(network, 0)
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = stem.inputs(stem({name: weights[name] for name in stem.names}, images))
    for single, features in zip(unstack(weights), inputs, strict=True):
        network.load_state_dict(single)
        torch.testing.assert_close(features, F.relu(network.pool(network.conv1(images))))
