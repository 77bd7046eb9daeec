"""Initial weights: their distribution, and that they depend on (seed, step, index) alone."""

import math
import threading

import pytest
import torch
from conftest import SmallNet, SmallViT
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from dd_lightning.init import FixedInit, RandomInit
from dd_lightning.networks import LeNet, check_network, unstack
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


SCHEMES_OF_ALL = ["xavier_normal", "xavier_uniform", "kaiming_normal", "orthogonal", "default"]


@pytest.mark.parametrize("scheme", SCHEMES_OF_ALL)
def test_parameters_that_no_module_draws_stay_as_the_network_came(scheme):
    network = SmallViT("layer")
    own = {name: value.detach().clone() for name, value in network.named_parameters()}
    one, other = unstack(RandomInit(scheme, per_step=2).sample(network, step=0))
    kept = [name for name in own if torch.equal(one[name], other[name])]
    assert [name for name in kept if not name.endswith("bias") and "norm" not in name] == ["token", "positions"]
    assert all(torch.equal(one[name], own[name]) for name in ("token", "positions"))
    assert all(torch.equal(value, own[name]) for name, value in network.named_parameters())


@pytest.mark.parametrize("own_sizes", [False, True])
def test_matrices_of_attention_are_drawn_one_by_one(own_sizes):
    network = nn.MultiheadAttention(32, 4, kdim=32 + own_sizes)
    weights = RandomInit("orthogonal", gain=2.0).draw(network, Stream.INIT)
    parts = [weights[f"{name}_proj_weight"] for name in "qv"] if own_sizes else weights["in_proj_weight"].chunk(3)
    for matrix in [*parts, weights["out_proj.weight"]]:
        torch.testing.assert_close(matrix @ matrix.T, 4 * torch.eye(32), rtol=1e-4, atol=1e-4)
    assert not weights["in_proj_bias"].any()
    assert not weights["out_proj.bias"].any()


def test_the_default_of_attention_is_that_of_torch():
    """Its reset comes after that of the linear layer in it, whose biases it sets to 0."""
    weights = RandomInit("default").draw(nn.MultiheadAttention(16, 2), Stream.INIT)
    assert not weights["out_proj.bias"].any()
    assert weights["in_proj_weight"].std().item() == pytest.approx(math.sqrt(2 / (16 + 48)), rel=0.1)


@pytest.mark.parametrize("scheme", SCHEMES_OF_ALL)
def test_parametrized_layers_are_drawn_through_their_weight(scheme):
    network = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(36, 10)), nn.Linear(10, 3))
    check_network(network, (1, 6, 6), 3)
    own = {name: value.detach().clone() for name, value in network.named_parameters()}
    one, other = (RandomInit(scheme).draw(network, Stream.INIT, index) for index in range(2))
    plain = RandomInit(scheme).draw(nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.Linear(10, 3)), Stream.INIT, 0)
    assert list(one) == list(own)
    network.load_state_dict(one, strict=False)
    torch.testing.assert_close(network[1].weight, plain["1.weight"])
    network.load_state_dict(other, strict=False)
    assert not torch.allclose(network[1].weight, plain["1.weight"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: nn.Sequential(weight_norm(nn.Linear(4, 3))), r"cannot draw 0\.weight_g: .*parametrizations"),
        (
            lambda: nn.Sequential(prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)),
            r"cannot draw 0\.weight_orig",
        ),
        (
            lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
            r"cannot draw parametrizations\.weight\.original.*\.base",
        ),
        (lambda: nn.Sequential(OneWay(), nn.Linear(4, 3)), r"cannot draw 0\.scale: OneWay has no way back"),
        (lambda: nn.Sequential(Locked(4, 3)), r"network Sequential cannot be copied to draw its weights"),
        (lambda: one_way(nn.Linear(4, 3)), r"cannot draw parametrizations\.weight\.original"),
    ],
)
def test_parameters_that_cannot_be_drawn_are_refused_by_name(made, message):
    with pytest.raises(ValueError, match=message):
        RandomInit().check(made(), (1, 2, 2), 3)


class OneWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))

    def reset_parameters(self):
        raise RuntimeError("OneWay has no way back")


class Locked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lock = threading.Lock()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def one_way(layer):
    return parametrize.register_parametrization(layer, "weight", Doubled())


@pytest.mark.parametrize("scheme", SCHEMES_OF_ALL)
def test_what_a_reset_leaves_alone_is_kept_and_no_draw_depends_on_the_last(scheme):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.scale, self.shift = nn.Parameter(torch.full((3,), 5.0)), nn.Parameter(torch.ones(3))

        def reset_parameters(self):
            super().reset_parameters()
            if hasattr(self, "shift"):
                self.shift.data.mul_(3)

    network = Scaled()
    draws = [RandomInit(scheme).draw(network, Stream.INIT, index) for index in (0, 1, 0)]
    assert all(torch.equal(value, draws[2][name]) for name, value in draws[0].items())
    assert draws[0]["scale"].eq(5).all()
    assert draws[0]["shift"].eq(3 if scheme == "default" else 1).all()
    assert network.shift.eq(1).all()


@pytest.mark.parametrize("scheme", SCHEMES_OF_ALL)
def test_frozen_parameters_are_not_drawn(scheme):
    network = LeNet()
    network.conv1.requires_grad_(False)
    network.fc1.bias.requires_grad_(False)
    for init in (RandomInit(scheme, per_step=2), FixedInit(scheme)):
        for single in unstack(init.sample(network, step=0)):
            for name, value in network.named_parameters():
                assert torch.equal(single[name], value) != value.requires_grad or not single[name].any()
    assert RandomInit(scheme).draw(network, Stream.INIT)["conv1.weight"].data_ptr() != network.conv1.weight.data_ptr()


@pytest.mark.cuda
def test_a_gpu_draws_the_same_weights():
    network = SmallViT()
    expected = RandomInit().draw(network, Stream.INIT)
    network.cuda()
    for change in (1.0, 2.0):
        with torch.no_grad():
            network.token.mul_(change)
        found = RandomInit().draw(network, Stream.INIT)
        assert torch.equal(found.pop("token").cpu(), change * expected["token"])
        assert all(value.is_cuda and torch.equal(value.cpu(), expected[name]) for name, value in found.items())
