"""The mathematics of Eq. (9): closed form, finite differences, one engine against another."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, SmallViT
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dd_lightning.distilled import DistilledData
from dd_lightning.init import RandomInit
from dd_lightning.networks import (
    VGG11,
    AlexCifarNet,
    ConvNet,
    LeNet,
    ResNet18,
    ViTSmall,
    check_network,
    predict,
    stack,
    unstack,
)
from dd_lightning.objectives import Classification
from dd_lightning.outer import OuterLoss
from dd_lightning.unroll import (
    Adam,
    AdjointUnroll,
    FunctionalUnroll,
    GradientDescent,
    HigherUnroll,
    Momentum,
    first_gradient,
    layers,
    stacked,
)
from dd_lightning.unroll.choice import _trial, batched_gradient, single_gradient
from dd_lightning.unroll.gradients import AutogradGradient
from dd_lightning.unroll.layered import LayeredGradient, PlainGradient, StackedGradient
from dd_lightning.unroll.norms import GroupNorm

ENGINES = [
    HigherUnroll,
    FunctionalUnroll,
    pytest.param(AdjointUnroll, id="batched"),
    pytest.param(lambda **k: AdjointUnroll(batched=False, **k), id="looped"),
    pytest.param(lambda **k: AdjointUnroll(recompute=True, **k), id="recompute"),
    pytest.param(lambda **k: AdjointUnroll(batched=False, recompute=True, offload=True, **k), id="offload"),
]


def problem(network, shape, classes, steps=2, epochs=2, per_step=2, learning_rate=0.1):
    """A float64 problem: template, θ₀ of J networks, distilled data that need gradients, and a real batch."""
    generator = torch.Generator().manual_seed(3)
    network = network.double()
    theta_0 = RandomInit(per_step=per_step, seed=5).sample(network, step=0)
    labels = torch.arange(classes).expand(steps, -1)
    images = torch.randn(steps, classes, *shape, generator=generator, dtype=torch.float64)
    data = DistilledData.create(images, labels, epochs, learning_rate)
    real = torch.randn(6, *shape, generator=generator, dtype=torch.float64), torch.arange(6) % classes
    return network, theta_0, data, real


def outer_loss(engine, network, theta_0, data, real):
    logits = predict(network, engine(network, theta_0, data.steps()), real[0])
    return F.cross_entropy(logits.flatten(0, 1), real[1].repeat(len(logits)))


def gradients(engine, network, theta_0, data, real):
    data.images.requires_grad_()
    data.raw_learning_rates.requires_grad_()
    loss = outer_loss(engine, network, theta_0, data, real)
    return torch.autograd.grad(loss, [data.images, data.raw_learning_rates])


@pytest.mark.parametrize("engine", ENGINES)
def test_one_step_of_softmax_regression_in_closed_form(engine):
    """θ₁ = θ₀ − η̃ (softmax(xθ₀) − y)ᵀ x / M."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    network, theta_0, data, _ = problem(network, (1, 2, 2), 3, steps=1, epochs=1)
    theta_1 = engine()(network, theta_0, data.steps())["1.weight"]
    x, y = data.images[0].flatten(1), torch.eye(3, dtype=torch.float64)
    for j, weight in enumerate(theta_0["1.weight"]):
        expected = weight - 0.1 * (torch.softmax(x @ weight.T, 1) - y).T @ x / 3
        torch.testing.assert_close(theta_1[j], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_against_central_finite_differences(engine):
    network, theta_0, data, real = problem(SmallNet(), (1, 6, 6), 3)
    for tensor, gradient in zip(
        (data.images, data.raw_learning_rates), gradients(engine(), network, theta_0, data, real), strict=True
    ):
        flat = tensor.detach().view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 12)):
            losses = []
            for sign in (1, -1):
                flat[index] += sign * 1e-5
                losses.append(outer_loss(engine(), network, theta_0, data, real).item())
                flat[index] -= sign * 1e-5
            assert gradient.view(-1)[index].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("network", "shape"), [(LeNet(), (1, 28, 28)), (AlexCifarNet(), (3, 32, 32)), (SmallNet(3, 8, 10), (3, 8, 8))]
)
def test_higher_equals_a_plain_functional_call_unroll(network, shape):
    network, theta_0, data, real = problem(network, shape, 10)
    found = gradients(HigherUnroll(), network, theta_0, data, real)
    network.eval()  # with dropout off, the modes are the same for these networks
    losses = []
    for j in range(2):
        theta = {name: value[j].clone().requires_grad_() for name, value in theta_0.items()}
        for images, labels, learning_rate in data.steps():
            inner = F.cross_entropy(functional_call(network, theta, (images,)), labels)
            step = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            theta = {n: w - learning_rate * g for (n, w), g in zip(theta.items(), step, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, theta, (real[0],)), real[1]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), [data.images, data.raw_learning_rates])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_learning_rate_changes_from_step_to_step(engine):
    """A rate given to one step must not stick for the next."""
    network, theta_0, data, _ = problem(SmallNet(), (1, 6, 6), 3, steps=2, epochs=1)
    (x1, y1, _), (x2, y2, _) = data.steps()
    zero, rate = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    theta = engine()(network, theta_0, [(x1, y1, rate), (x2, y2, zero)])
    once = engine()(network, theta_0, [(x1, y1, rate)])
    torch.testing.assert_close(theta, once)
    assert not torch.equal(once["fc.weight"], theta_0["fc.weight"])


@pytest.mark.parametrize("engine", ENGINES)
def test_trajectory_is_the_same_with_and_without_gradients(engine):
    network, theta_0, data, _ = problem(SmallNet(), (1, 6, 6), 3)
    before = {name: value.clone() for name, value in theta_0.items()}
    with torch.no_grad():
        points = list(engine().trajectory(network, theta_0, data.steps()))
    assert len(points) == 4
    assert not points[-1]["fc.weight"].requires_grad
    torch.testing.assert_close(points[-1], engine()(network, theta_0, data.steps()))
    torch.testing.assert_close(theta_0, before, rtol=0, atol=0)
    assert network.training
    assert network.dropout.training


def test_engines_train_like_distilled_data_do():
    """`DistilledData.train` and the engines are the same inner loop."""
    network, _, data, _ = problem(SmallNet(), (1, 6, 6), 3)
    start = stack([{name: value.detach().clone() for name, value in network.named_parameters()}])
    theta = FunctionalUnroll()(network, start, data.steps())
    data.train(network)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value, theta[name][0])


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("optimizer", [None, Momentum(0.8), Adam((0.8, 0.9), eps=1e-4)], ids=["gd", "momentum", "adam"])
@pytest.mark.parametrize("network", [LeNet(1, 16, 4), AlexCifarNet(1, 16, 4), SmallNet(1, 16, 4)])
def test_every_engine_and_inner_optimizer_equals_higher(engine, optimizer, network):
    rate = 0.01 if isinstance(optimizer, Adam) else 0.1
    network, theta_0, data, real = problem(network, (1, 16, 16), 4, learning_rate=rate)
    expected = gradients(HigherUnroll(optimizer), network, theta_0, data, real)
    for one, other in zip(gradients(engine(optimizer=optimizer), network, theta_0, data, real), expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-8 * other.norm()


class Pooled(nn.Sequential):
    """A narrow strided convolution of the images, whose 3 × 2 pooling drops a rest of its pixels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 3, (3, 4), stride=(1, 2), padding=1, bias=False), nn.MaxPool2d((3, 2)), nn.ReLU(), nn.Flatten()
        )
        self.append(nn.Linear(36, 4))


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize(
    ("network", "shape"), [(LeNet(1, 28, 4), (1, 28, 28)), (LeNet(3, 17, 4), (3, 17, 17)), (Pooled(), (2, 11, 17))]
)
def test_a_convolution_taken_with_its_pooling_has_the_same_gradient_and_derivative(network, shape, networks):
    """For one network the phases are more rows of the product, for two more columns."""
    network, theta, _, _ = problem(network, shape, 4)
    theta = {name: value[:networks] for name, value in theta.items()}
    images = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[:, :, : shape[1] // 2] = 0.5  # where all pixels of a window are equal, the first has the gradient
    labels = torch.arange(6) % 4
    phased = StackedGradient(network)
    first = next(layer for layer, _ in phased._layers if isinstance(layer, stacked.Conv2d))
    pictures = images.permute(1, 2, 3, 0)[None, :, None]
    assert first._widened(networks, pictures) == (networks == 1)
    direction = {name: torch.randn_like(value) for name, value in theta.items()}
    (one, one_x), (other, other_x) = (
        (gradient, engine.derivative(tape, direction))
        for engine in (phased, AutogradGradient(network, batched=False))
        for gradient, tape in [engine(engine.prepared(theta), images, labels, again=True)]
    )
    for found, expected in [(one, other), (one_x[0], other_x[0]), ({"x": one_x[1]}, {"x": other_x[1]})]:
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-10 * value.norm()


class Normed(nn.Sequential):
    """A norm of the images, a strided convolution, a norm without weights, and pooling whose windows overlap."""

    def __init__(self) -> None:
        norms = nn.GroupNorm(1, 2), nn.GroupNorm(2, 4, affine=False)
        convolution = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        super().__init__(norms[0], convolution, norms[1], nn.AvgPool2d((3, 2), (2, 1)), nn.Flatten(), nn.Linear(12, 4))


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("rules", [StackedGradient, PlainGradient])
@pytest.mark.parametrize(
    "network",
    [
        Normed(),
        *(ConvNet(2, 8, 4, 4, 2, norm, "relu", p) for norm in ("instance", "group") for p in ("average", "max")),
    ],
)
def test_norms_and_average_pooling_have_the_gradient_and_derivative_of_autograd(network, rules, networks):
    network, theta, _, _ = problem(network, (2, 8, 8), 4)
    generator = torch.Generator().manual_seed(0)
    moved = {n: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in theta.items()}
    theta = {n: torch.cat([theta[n][:1], moved[n]])[-networks:] for n in theta}
    direction = {n: torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in theta.items()}
    images = torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64)
    results = []
    for engine in (rules(network), AutogradGradient(network, batched=False)):
        gradient, tape = engine(engine.prepared(theta), images, torch.arange(5) % 4, again=True)
        product, of_images, _ = engine.derivative(tape, engine.prepared(direction))
        results.append([*gradient.values(), *product.values(), of_images])
    assert any(isinstance(layer, GroupNorm) for layer, _ in rules(network)._layers)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", [GradientDescent(), Adam((0.8, 0.9), eps=1e-4)], ids=["gd", "adam"])
@pytest.mark.parametrize(("network", "narrow"), [(LeNet(1, 16, 4), True), (AlexCifarNet(1, 16, 4), False)])
def test_steps_without_gradients_are_those_with_them(network, narrow, optimizer):
    """Narrow networks take them by rules."""
    network, theta_0, data, _ = problem(network, (1, 16, 16), 4, learning_rate=0.01)
    engine = FunctionalUnroll(optimizer)
    found = list(engine.trajectory(network, theta_0, data.detach().steps()))[-1]
    expected = engine(network, theta_0, data.steps())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-10 * value.norm()
    assert isinstance(engine._known[1], StackedGradient) == narrow


class UnusualNet(nn.Module):
    """Has layers with rules only, but uses one in another way, or a weight by itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.fc = kind, nn.Conv2d(1, 3, 3, padding=1), nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(108, 4)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "linear of pictures":
            x = self.fc(x)
        if self.kind == "flat part":
            x = x.flatten(2).relu()
        if self.kind == "weight":
            x = x * self.fc.weight
        if self.kind == "twice":
            x = torch.tanh(x + x)
        if self.kind == "by name":
            x = self.fc(input=x)
        if self.kind == "unread":
            torch.tanh(x)
        return self.last(x.flatten(1))


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("kind", ["linear of pictures", "flat part", "weight", "twice", "by name", "unread"])
def test_unusual_networks_are_differentiated_by_autograd(engine, kind):
    network, theta_0, data, real = problem(UnusualNet(kind), (1, 6, 6), 4)
    if kind == "flat part":
        del network.fc
        theta_0 = {name: value for name, value in theta_0.items() if not name.startswith("fc")}
    expected = gradients(FunctionalUnroll(), network, theta_0, data, real)
    for one, other in zip(gradients(engine(), network, theta_0, data, real), expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


class InPlaceNet(nn.Module):
    """Changes its activations in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.fc = how, nn.Conv2d(1, 4, 3), nn.Linear(64, 3)
        self.layer = nn.ELU(inplace=True) if how == "layer" else nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        if self.how in ("layer", "relu"):
            y = self.layer(y)
        if self.how == "function":
            y = F.elu(y, inplace=True)
        if self.how == "by position":
            y = F.elu(y, 1.0, True)
        if self.how == "sum":
            y += y.mean()
        if self.how == "read again":
            y = torch.tanh(self.layer(y) + y)
        return self.fc(y.flatten(1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["layer", "relu", "function", "by position", "sum", "read again"])
def test_activations_may_be_changed_in_place(engine, how):
    network, theta_0, data, real = problem(InPlaceNet(how), (1, 6, 6), 3)
    images = data.images.clone()
    expected = gradients(HigherUnroll(), network, theta_0, data, real)
    outer = OuterLoss(Classification())(network, engine()(network, theta_0, data.steps()), *real)
    for one, other in zip(torch.autograd.grad(outer, [data.images, data.raw_learning_rates]), expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()
    assert torch.equal(data.images, images)


@pytest.mark.parametrize("layer", [nn.ELU(inplace=True), nn.LeakyReLU(inplace=True), F.elu, F.leaky_relu])
@pytest.mark.parametrize("rules", [StackedGradient, PlainGradient])
def test_rules_keep_activations_that_a_forward_changes_in_place(rules, layer):
    class Net(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[2](self[1](layer(y) if isinstance(layer, nn.Module) else layer(y, inplace=True)))

    layers = [nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 3), *([layer] if isinstance(layer, nn.Module) else [])]
    network, theta, data, _ = problem(Net(*layers), (1, 6, 6), 3)
    found, expected = (_trial(g, theta, data.images[0]) for g in (rules(network), AutogradGradient(network, False)))
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value)


class ViewingNet(nn.Module):
    """Takes neither images nor weights in channels last: of the activations, or of a weight."""

    def __init__(self, channels: int, of: str) -> None:
        super().__init__()
        self.of, self.conv, self.fc = of, nn.Conv2d(channels, 4, 3, bias=False), nn.Linear(64, 3)

    def forward(self, x):
        if self.of == "activations":
            return self.fc(self.conv(x).view(x.size(0), -1))
        return self.fc(self.conv(x).flatten(1)) * self.conv.weight.view(-1).norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("of", ["activations", "weights"])
@pytest.mark.parametrize("channels", [1, 2])
def test_networks_that_take_no_other_memory_format_are_unrolled_in_theirs(engine, channels, of):
    network, theta_0, data, real = problem(ViewingNet(channels, of), (channels, 6, 6), 3)
    expected = gradients(HigherUnroll(), network, theta_0, data, real)
    for one, other in zip(gradients(engine(), network, theta_0, data, real), expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()
    list(engine().trajectory(network, theta_0, data.detach().steps()))


def train_by_hand(network, single, data, optimizer, moving):
    """θ_T of one network, by the network itself: those of its parameters that are `moving` follow Eq. (9)."""
    theta = {name: single[name].detach().clone().requires_grad_() for name in moving}
    state = optimizer.init(theta)
    for images, labels, rate in data.steps():
        with sdpa_kernel(SDPBackend.MATH):
            logits = functional_call(network, {**single, **theta}, (images,))
        found = torch.autograd.grad(F.cross_entropy(logits, labels), list(theta.values()), create_graph=True)
        theta, state = optimizer.update(theta, dict(zip(theta, found, strict=True)), state, rate)
    return {**single, **theta}


FROZEN = [
    (SmallNet(), ("conv.weight", "fc.bias"), (1, 6, 6), 3),
    (LeNet(1, 16, 4), ("conv1.weight", "conv1.bias", "fc2.weight"), (1, 16, 16), 4),
    (UnusualNet("weight"), ("conv.weight", "fc.weight"), (1, 6, 6), 4),
    (SmallViT(), ("token", "body.layers.0.self_attn.in_proj_weight", "norm.bias"), (1, 6, 6), 3),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "optimizer", [GradientDescent(), Momentum(0.8), Adam((0.8, 0.9), eps=1e-4)], ids=["gd", "momentum", "adam"]
)
@pytest.mark.parametrize(("network", "names", "shape", "classes"), FROZEN)
def test_frozen_parameters_are_drawn_as_they_are_and_stay(engine, optimizer, network, names, shape, classes):
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in names)
    own = {name: parameter.detach().clone() for name, parameter in network.double().named_parameters()}
    rate = 0.01 if isinstance(optimizer, Adam) else 0.1
    network, theta_0, data, real = problem(network, shape, classes, learning_rate=rate)
    theta_T = engine(optimizer=optimizer)(network, theta_0, data.steps())
    last = list(engine(optimizer=optimizer).trajectory(network, theta_0, data.steps()))[-1]
    for name in names:
        assert all(torch.equal(theta[name][j], own[name]) for theta in (theta_0, theta_T, last) for j in range(2))
    found = gradients(engine(optimizer=optimizer), network, theta_0, data, real)
    network.eval()  # dropout off
    moving = [name for name in own if name not in names]
    by_hand = [train_by_hand(network, one, data, optimizer, moving) for one in unstack(theta_0)]
    loss = Classification()(torch.stack([functional_call(network, one, (real[0],)) for one in by_hand]), real[1])
    torch.testing.assert_close(OuterLoss(Classification())(network, theta_T, *real), loss)
    for one, other in zip(found, torch.autograd.grad(loss, [data.images, data.raw_learning_rates]), strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()
    network.load_state_dict(unstack(theta_0)[0])
    choice = {"GradientDescent": "gd"}.get(type(optimizer).__name__, type(optimizer).__name__.lower())
    settings = dict(vars(optimizer))
    replace(data, card={"inner": {"choice": choice, **settings}}).train(network)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.detach(), by_hand[0][name].detach())
        assert name not in names or torch.equal(value, own[name])
    network.train()


class Sharing(nn.Module):
    """One module under two names, or one weight in two modules."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a if what == "module" else nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.Linear(4, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x.flatten(1))))))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["module", "weight"])
def test_shared_weights_are_one_weight(engine, what):
    network, theta_0, data, real = problem(Sharing(what), (1, 2, 2), 3)
    assert list(theta_0) == [name for name, _ in network.named_parameters()]
    own = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for _ in range(2):  # the first time leaves the network as it was
        engine().check(network, theta_0, data.images[0].detach())
        found = gradients(engine(), network, theta_0, data, real)
        assert all(p.is_leaf and torch.equal(p, own[name]) for name, p in network.named_parameters())

    def logits(theta, x):
        a, c = ((theta[f"{name}.weight"], theta[f"{name}.bias"]) for name in "ac")
        b = (a[0], theta.get("b.bias", a[1]))
        return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x.flatten(1), *a)), *b)), *c)

    losses = []
    for theta in unstack(theta_0):
        theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
        for images, labels, rate in data.steps():
            inner = F.cross_entropy(logits(theta, images), labels)
            step = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            theta = {n: w - rate * g for (n, w), g in zip(theta.items(), step, strict=True)}
        losses.append(F.cross_entropy(logits(theta, real[0]), real[1]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), [data.images, data.raw_learning_rates])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("attention", ["encoder", "layer", "products"])
def test_a_vision_transformer_runs_in_every_engine(engine, attention):
    """Against one network after the other, in eval mode: dropout is off, and attention is by plain products."""
    network = SmallViT(attention).double()
    check_network(network, (1, 6, 6), 3)
    network, theta_0, data, real = problem(network, (1, 6, 6), 3)
    engine().check(network, theta_0, data.images[0])
    found = gradients(engine(), network, theta_0, data, real)
    network.eval()
    by_hand = [train_by_hand(network, one, data, GradientDescent(), list(theta_0)) for one in unstack(theta_0)]
    logits = torch.stack([functional_call(network, one, (real[0],)) for one in by_hand])
    loss = Classification()(logits, real[1])
    expected = torch.autograd.grad(loss, [data.images, data.raw_learning_rates])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()
    outer = OuterLoss(Classification())(network, engine()(network, theta_0, data.steps()), *real)
    torch.testing.assert_close(outer, loss)
    last = list(engine().trajectory(network, theta_0, data.steps()))[-1]
    with torch.no_grad():  # in which torch has a faster way through the encoder
        torch.testing.assert_close(predict(network, last, real[0]), logits.detach())


LARGE = [
    (VGG11, {"image_size": 32, "width": 4, "norm": "group"}),
    (ResNet18, {"image_size": 16, "width": 4, "norm": "instance"}),
    (ViTSmall, {"image_size": 8, "width": 6, "depth": 2}),
]


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize(("kind", "settings"), LARGE)
def test_large_networks_run_in_every_engine(engine, kind, settings):
    settings = {"in_channels": 1, "num_classes": 3, **settings}
    shape = (1, settings["image_size"], settings["image_size"])
    network, theta_0, data, real = problem(kind(**settings), shape, 3, steps=1)
    engine().check(network, theta_0, data.images[0])
    found, expected = (gradients(e, network, theta_0, data, real) for e in (engine(), HigherUnroll()))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Refused(nn.Module):
    def __init__(self, why: str) -> None:
        super().__init__()
        self.why, self.fc, self.last = why, nn.Linear(4, 4), nn.Linear(4, 3)
        self.unseen = [self.fc]

    def forward(self, x):
        if self.why == "unseen":
            return self.last(torch.tanh(self.unseen[0](x.flatten(1))))
        return self.last(OnceDifferentiable.apply(self.fc(x.flatten(1))))


@pytest.mark.parametrize("engine", ENGINES)
def test_networks_that_are_not_differentiable_twice_are_refused_at_the_start(engine):
    network, theta_0, data, _ = problem(Refused("once"), (1, 2, 2), 3)
    with pytest.raises(ValueError, match="network Refused cannot be "):
        engine().check(network, theta_0, data.images[0])
    if not engine().batched:
        list(engine().trajectory(network, theta_0, data.steps()))  # which needs first derivatives alone


def test_a_module_that_higher_does_not_see_is_refused():
    network, theta_0, data, _ = problem(Refused("unseen"), (1, 2, 2), 3)
    FunctionalUnroll().check(network, theta_0, data.images[0])
    with pytest.raises(ValueError, match=r"network Refused cannot be patched by higher .* use unroll=functional"):
        HigherUnroll().check(network, theta_0, data.images[0])


@pytest.mark.parametrize("pass_", ["forward", "backward", "tangent", "backward_tangent"])
@pytest.mark.parametrize("wrong", ["error", "value"])
@pytest.mark.parametrize(
    ("batched", "choose"), [(True, batched_gradient), (False, single_gradient), (False, first_gradient)]
)
def test_rules_that_fail_in_any_pass_lead_to_autograd(monkeypatch, batched, choose, wrong, pass_):
    """The derivative is tried as well as the gradient."""
    network, theta_0, data, _ = problem(SmallNet(), (1, 6, 6), 3)
    if choose is first_gradient:
        monkeypatch.setattr("dd_lightning.unroll.choice.PlainGradient", None)
    right = getattr(layers.Linear, pass_)

    def broken(self, w, *args):
        if wrong == "error":
            raise TypeError("no rule fits")
        return right(self, [2 * w[0], *w[1:]], *args)

    assert isinstance(choose(network, theta_0, data.images[0]), LayeredGradient)
    monkeypatch.setattr(layers.Linear, pass_, broken)
    found = choose(network, theta_0, data.images[0])
    assert isinstance(found, AutogradGradient)
    assert found.batched == batched


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_in_a_trial_is_told(monkeypatch, error):
    def full(*args):
        raise error

    network, theta_0, data, _ = problem(SmallNet(), (1, 6, 6), 3)
    monkeypatch.setattr(layers.Linear, "backward_tangent", full)
    with pytest.raises(type(error), match="memory"):
        batched_gradient(network, theta_0, data.images[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("traced", [True, False])
def test_weights_that_the_forward_does_not_use_stay_as_they_are(engine, traced):
    class Spare(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
            self.spare = nn.Linear(2, 2)

        def forward(self, x):
            if not traced and x.isnan().all():  # such a branch cannot be traced
                return x
            return self[3](self[2](self[1](self[0](x))))

    if not traced and isinstance(engine(), AdjointUnroll) and engine().batched:
        pytest.skip("vmap takes no branches either")
    network, theta_0, data, real = problem(Spare(), (1, 2, 2), 3)
    for name in ("spare.weight", "spare.bias"):
        theta_0[name] += 1
    theta_T = engine()(network, theta_0, data.steps())
    assert all(torch.equal(theta_T[name], theta_0[name]) for name in ("spare.weight", "spare.bias"))
    expected = gradients(HigherUnroll(), network, theta_0, data, real)
    for one, other in zip(gradients(engine(), network, theta_0, data, real), expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


def test_the_gradient_of_a_rate_keeps_its_digits_in_large_layers():
    """Its sum is of as many products as there are weights: most of them small, beside a few large ones."""
    random = torch.Generator().manual_seed(0)
    gradient = torch.rand(2**23, generator=random) ** 8
    weights = {"large": gradient[None], "small": torch.ones(1, 3)}
    adjoint = {name: torch.ones_like(value) for name, value in weights.items()}
    found = GradientDescent().reverse((weights, weights, {}), torch.tensor(0.1), adjoint, {})[-1]
    expected = -(sum(part.double().sum() for part in gradient.split(2**16)) + 3)
    assert abs(found.double() / expected - 1) < 2e-5


@pytest.mark.parametrize("optimizer", [Momentum(0.8), Adam((0.8, 0.9), eps=1e-12)])
def test_inner_optimizers_are_those_of_torch(optimizer):
    network, theta_0, data, _ = problem(SmallNet(), (1, 6, 6), 3, per_step=1, learning_rate=0.05)
    theta = FunctionalUnroll(optimizer)(network, theta_0, data.steps())
    network.load_state_dict({name: value[0] for name, value in theta_0.items()})
    network.eval()
    by_torch = optimizer.torch_optimizer(network.parameters())
    by_torch.param_groups[0]["lr"] = 0.05
    for images, labels, _ in data.steps():
        by_torch.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        by_torch.step()
    for name, value in network.named_parameters():
        torch.testing.assert_close(theta[name][0], value)
