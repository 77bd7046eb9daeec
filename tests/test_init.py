"""Initial weights: their distribution, and that they depend on (seed, step, index) alone."""

import math

import pytest
import torch
from conftest import SmallNet
from torch import nn

from dd_lightning.init import FixedInit, RandomInit
from dd_lightning.networks import LeNet, unstack
from dd_lightning.system.seeding import Stream


@pytest.mark.parametrize(
    ("scheme", "gain", "std"),
    [
        ("xavier_normal", None, math.sqrt(2 / (400 + 120))),
        ("xavier_normal", 2.0, 2 * math.sqrt(2 / (400 + 120))),
        ("xavier_uniform", None, math.sqrt(2 / (400 + 120))),
        ("kaiming_normal", None, math.sqrt(2 / 400)),
        ("kaiming_normal", 1.0, math.sqrt(1 / 400)),
        ("orthogonal", None, math.sqrt(1 / 400)),
        ("default", None, math.sqrt(1 / (3 * 400))),
    ],
)
def test_scheme_has_its_standard_deviation(scheme, gain, std):
    weights = RandomInit(scheme, gain).sample(LeNet(), step=0)
    assert weights["fc1.weight"].std().item() == pytest.approx(std, rel=0.03)
    if scheme != "default":
        assert all(not value.any() for name, value in weights.items() if name.endswith("bias"))


def test_norm_layers_keep_their_own_reset():
    weights = RandomInit().sample(SmallNet(), step=0)
    assert weights["norm.weight"].eq(1).all()
    assert weights["norm.bias"].eq(0).all()


def test_draws_depend_on_seed_step_and_index_alone():
    init, network = RandomInit(per_step=3, seed=1), LeNet()
    torch.manual_seed(0)
    first = init.sample(network, step=7)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = RandomInit(per_step=2, seed=1).sample(network, step=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in again.items():
        assert torch.equal(value, first[name][:2])
    drawn = [*unstack(first), *unstack(init.sample(network, step=8)), *init.held_out(network, 2, Stream.HELD_OUT_TEST)]
    drawn += [*init.held_out(network, 2, Stream.HELD_OUT_VALIDATION)]
    assert len({tuple(single["conv1.weight"].flatten().tolist()) for single in drawn}) == len(drawn)


def test_fixed_init_is_one_network():
    init, network = FixedInit(seed=2), LeNet()
    one = unstack(init.sample(network, step=0))[0]
    for other in [*unstack(init.sample(network, step=5)), *init.held_out(network, 200, Stream.HELD_OUT_TEST)]:
        assert torch.equal(one["fc1.weight"], other["fc1.weight"])
    assert init.num_held_out(200) == 1
    assert not torch.equal(FixedInit(seed=3).weights(network)["fc1.weight"], one["fc1.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "xavier"}, "xavier_normal, xavier_uniform"),
        ({"per_step": 0}, "per_step"),
        ({"gain": -1.0}, "gain"),
        ({"scheme": "default", "gain": 2.0}, "no gain"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomInit(**settings)
    with pytest.raises(ValueError, match="fixed init has one network"):
        FixedInit(per_step=4)


def test_parameters_that_cannot_be_drawn_are_refused():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))

    with pytest.raises(ValueError, match="token"):
        RandomInit().check(Token(), (1, 6, 6), 3)
