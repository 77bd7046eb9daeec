"""Windows, orders, learned labels, augmentation: the mathematics, engine by engine, and that every draw is repeated."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet
from test_unroll import ENGINES, problem
from torch import nn
from torch.func import functional_call

from dd_lightning.data import FlipRotate, Siamese, augment_of
from dd_lightning.data.differentiable import STRATEGIES, mirrored, rotated
from dd_lightning.distilled import DistilledData
from dd_lightning.init import RandomInit
from dd_lightning.networks import MLP, ConvNet, predict
from dd_lightning.parametrisation import FixedLabels, LearnedLabels
from dd_lightning.unroll import (
    Adam,
    Draws,
    FixedOrder,
    GradientDescent,
    Momentum,
    Pool,
    ShuffledOrder,
    Window,
    order_of,
)

OPTIMIZERS = [GradientDescent(), Momentum(0.8), Adam((0.8, 0.9), eps=1e-3)]


def soft_problem(kind=SmallNet, shape=(1, 6, 6)):
    """A float64 problem whose labels are real numbers, some negative, that need gradients."""
    network, theta_0, data, real = problem(kind(), shape, 3, steps=3, epochs=2, learning_rate=0.05)
    random = torch.Generator().manual_seed(1)
    soft = F.one_hot(data.labels, 3).double() + 0.3 * torch.randn(3, 3, 3, generator=random, dtype=torch.float64)
    for tensor in (data.images, data.raw_learning_rates, soft):
        tensor.requires_grad_()
    return network, theta_0, replace(data, soft_labels=soft), real


def through_window(engine, network, theta, state, data, real, place):
    """The outer loss after the window, its gradient, and the optimizer's state there."""
    theta_T, state_T = engine.window(network, theta, state, data.steps(None, place.start, place.stop))
    logits = predict(network, theta_T, real[0])
    loss = F.cross_entropy(logits.flatten(0, 1), real[1].repeat(len(logits)))
    inputs = [data.images, data.raw_learning_rates, data.soft_labels]
    return torch.autograd.grad(loss, inputs, materialize_grads=True), state_T


def by_hand(optimizer, network, theta_0, data, real, place):
    """The same with torch's own optimizer formulae, network by network, cut where the window begins."""
    losses = []
    for j in range(len(next(iter(theta_0.values())))):
        theta = {name: value[j].clone().requires_grad_() for name, value in theta_0.items()}
        state = optimizer.init(theta)
        for i, (images, labels, rate) in enumerate(data.steps(None, 0, place.stop)):
            if i == place.start:
                theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
                state = {name: value.detach() for name, value in state.items()}
            log_p = F.log_softmax(functional_call(network, theta, (images,)), 1)
            inner = -(labels * log_p).sum() / len(images)
            gradient = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            theta, state = optimizer.update(theta, dict(zip(theta, gradient, strict=True)), state, rate)
        losses.append(F.cross_entropy(functional_call(network, theta, (real[0],)), real[1]))
    inputs = [data.images, data.raw_learning_rates, data.soft_labels]
    return torch.autograd.grad(torch.stack(losses).mean(), inputs, materialize_grads=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", [range(0, 6), range(2, 5), range(4, 6)])
def test_a_window_is_an_unroll_that_is_cut_at_its_start(engine, optimizer, place):
    network, theta_0, data, real = soft_problem()
    network.eval()  # with dropout off, the modes are the same for this network
    expected = by_hand(optimizer, network, theta_0, data, real, place)
    unroll = engine(optimizer=optimizer)
    state_0 = optimizer.init(theta_0, 2)
    theta, state = unroll.advance(network, theta_0, state_0, data.detach().steps(None, 0, place.start))
    found, after = through_window(unroll, network, theta, state, data, real, place)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()
    _, straight = unroll.advance(network, theta_0, state_0, data.detach().steps(None, 0, place.stop))
    assert after.keys() == straight.keys() == state_0.keys()
    for name, value in straight.items():
        torch.testing.assert_close(after[name], value)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_hot_labels_are_classes(engine):
    network, theta_0, data, _ = soft_problem()
    soft = replace(data, soft_labels=F.one_hot(data.labels, 3).double())
    for one, other in zip(*(engine()(network, theta_0, d.steps()).values() for d in (data, soft)), strict=True):
        assert not torch.equal(one, other)
    hard = replace(data, soft_labels=None)
    for one, other in zip(*(engine()(network, theta_0, d.steps()).values() for d in (hard, soft)), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_labels_against_finite_differences():
    network, theta_0, data, real = soft_problem()
    unroll = ENGINES[2].values[0](optimizer=GradientDescent())
    (_, _, found), _ = through_window(unroll, network, theta_0, {}, data, real, range(0, 6))
    flat = data.soft_labels.detach().view(-1)
    for index in range(0, len(flat), 5):
        losses = []
        for sign in (1, -1):
            flat[index] += sign * 1e-5
            logits = predict(network, unroll(network, theta_0, data.steps()), real[0])
            losses.append(F.cross_entropy(logits.flatten(0, 1), real[1].repeat(2)).item())
            flat[index] -= sign * 1e-5
        assert found.view(-1)[index].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [lambda: ConvNet(1, 8, 3, width=4, depth=2), lambda: MLP(1, 8, 3, width=5)])
def test_convnets_and_perceptrons_in_every_engine(engine, kind):
    network, theta_0, data, real = soft_problem(kind, (1, 8, 8))
    expected = by_hand(GradientDescent(), network, theta_0, data, real, range(0, 6))
    found, _ = through_window(engine(), network, theta_0, {}, data, real, range(0, 6))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm()


def shuffled(images_per_class=None, classes=None, count=12):
    labels = torch.arange(3).repeat(count // 3)[None]
    images = torch.arange(float(count)).view(1, -1, 1, 1, 1)
    return replace(DistilledData.create(images, labels), order=ShuffledOrder(40, images_per_class, classes))


def test_minibatches_have_so_many_images_of_so_many_classes():
    data, seen = shuffled(2, 2), set()
    for images, labels, rate in data.steps(Draws(3, (7,))):
        chosen = images.flatten().int().tolist()
        assert len(set(chosen)) == 4
        assert sorted(labels.bincount(minlength=3).tolist()) == [0, 2, 2]
        assert labels.tolist() == [i % 3 for i in chosen]
        assert torch.equal(rate, data.learning_rates[0, 0])
        seen |= set(chosen)
    assert seen == set(range(12))


def test_draws_are_functions_of_seed_and_counters():
    data = shuffled(1)

    def drawn(draws, start=0):
        return [images.flatten().tolist() for images, _, _ in data.steps(draws, start, 40)]

    straight = drawn(Draws(3, (7,)))
    assert drawn(Draws(3, (7,)), start=25) == straight[25:]
    assert straight != drawn(Draws(3, (8,)))
    assert straight != drawn(Draws(4, (7,)))


def test_all_images_are_a_full_batch():
    for images, labels, _ in shuffled().steps():
        assert torch.equal(images, shuffled().images[0])
        assert torch.equal(labels, shuffled().labels[0])


@pytest.mark.parametrize("kind", [FixedOrder(), ShuffledOrder(7, 2, None)])
def test_a_card_says_how_data_are_used(kind, tmp_path):
    data = replace(shuffled(), order=kind, card={"augment": {"choice": "flip_rotate", "degrees": 5}})
    data = replace(data, soft_labels=torch.rand(1, 12, 4), augment=augment_of(data.card))
    data.save(tmp_path / "d.safetensors")
    again = DistilledData.load(tmp_path / "d.safetensors")
    assert again.order == kind == order_of(again.card)
    assert isinstance(again.augment, FlipRotate)
    assert again.augment.degrees == 5
    assert torch.equal(again.soft_labels, data.soft_labels)
    assert again.num_classes == 4
    assert again.stored_numbers == 12 + 48 + 1


def test_windows_are_placed_by_seed_and_outer_step():
    window = Window(30, "random", minimum=10)
    places = [window.place(150, 0, step) for step in range(300)]
    assert places == [window.place(150, 0, step) for step in range(300)]
    starts = {place.start for place in places}
    assert min(starts) == 10
    assert max(starts) == 120
    assert all(len(place) == 30 for place in places)
    assert Window(30, "end").place(150, 0, 5) == range(120, 150)
    assert Window(30, 7).place(150, 0, 5) == range(7, 37)
    assert Window().place(150, 0, 5) == range(150)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (Window(151), "length=151 is more than the 150"),
        (Window(30, 121), "start=121 and length=30 go beyond"),
        (Window(30, "random", 121), "minimum=121 and length=30 go beyond"),
    ],
)
def test_windows_that_do_not_fit(window, message):
    with pytest.raises(ValueError, match=message):
        window.check(150)


def test_a_pool_goes_on_and_draws_anew():
    network = nn.Linear(2, 1)
    init, pool = RandomInit(per_step=2, seed=1), Pool(3, length=10, total=30, seed=0)
    ages, fresh = {}, 0
    for step in range(40):
        theta_0 = init.sample(network, step)
        theta, state = pool.take(step, theta_0, {"step": torch.zeros(2)})
        for j, place in enumerate(pool._taken):
            if state["step"][j] == 0:
                fresh += 1
                assert torch.equal(theta["weight"][j], theta_0["weight"][j])
            else:
                assert state["step"][j] == ages[place]
                assert torch.equal(theta["weight"][j], torch.full((1, 2), float(ages[place])))
        state = {"step": state["step"] + 10}
        ages |= dict(zip(pool._taken, state["step"].tolist(), strict=True))
        pool.put({n: state["step"].view(-1, *[1] * (v.ndim - 1)).expand_as(v) for n, v in theta.items()}, state)
        other = Pool(3, 10, 30, 0)
        other.load_state_dict(pool.state_dict())
        pool = other
    assert max(ages.values()) == 30
    assert fresh == pytest.approx(80 / 3, abs=3)


def test_learned_labels_start_one_hot_and_keep_their_constraint():
    classes = torch.tensor([[0, 2, 1]])
    assert FixedLabels().raw(classes, 3, None) is None
    free, positive, soft = (LearnedLabels(c) for c in ("none", "nonnegative", "softmax"))
    one_hot = F.one_hot(classes, 3).float()
    for labels in (free, positive):
        assert torch.equal(labels.labels(labels.raw(classes, 3, None)), one_hot)
    raw = soft.raw(classes, 3, None)
    torch.testing.assert_close(soft.labels(raw).max(2).values, torch.full((1, 3), 0.99))
    torch.testing.assert_close(soft.labels(raw).sum(2), torch.ones(1, 3))
    changed = one_hot - 0.5
    positive.project_(changed)
    assert torch.equal(changed, one_hot * 0.5)
    with pytest.raises(ValueError, match="single class"):
        free.raw(classes * 0, 1, None)


IMAGES = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("augment", [FlipRotate(), *(Siamese([name]) for name in STRATEGIES)])
def test_augmentations_are_differentiable_and_repeated(augment):
    changed = 0
    for seed in range(8):
        draw = [torch.Generator().manual_seed(seed) for _ in range(3)]
        once, again = augment(IMAGES, draw[0]), augment(IMAGES, draw[1])
        assert torch.equal(once, again)
        assert once.shape == IMAGES.shape
        changed += not torch.equal(once, IMAGES)
        images = IMAGES.clone().requires_grad_()
        weights = torch.rand(IMAGES.shape, dtype=torch.float64, generator=draw[2])
        draw = [torch.Generator().manual_seed(seed) for _ in range(3)]
        (gradient,) = torch.autograd.grad((augment(images, draw[0]) * weights).sum(), images)
        direction = torch.rand(IMAGES.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        up, down = (augment(IMAGES + sign * 1e-4 * direction, g) for sign, g in zip((1, -1), draw[1:], strict=True))
        numeric = ((up - down) * weights).sum() / 2e-4
        assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-6, abs=1e-8)
    assert changed


def test_rotation_and_mirror():
    quarter = rotated(IMAGES, torch.full((5,), 90.0, dtype=torch.float64))
    torch.testing.assert_close(quarter, IMAGES.rot90(1, (2, 3)), rtol=1e-4, atol=1e-4)
    which = torch.tensor([True, False, True, False, False])
    assert torch.equal(mirrored(IMAGES, which)[0], IMAGES[0].flip(2))
    assert torch.equal(mirrored(IMAGES, which)[1], IMAGES[1])


def test_a_siamese_draw_is_shared_by_all_of_an_outer_step():
    draws, own = Draws(1, (4,), shared=True), Draws(1, (4,))
    numbers = [torch.rand((), generator=g) for g in (draws.augment(0), draws.augment(7), draws.augment_real())]
    assert numbers[0] == numbers[1] == numbers[2]
    others = [torch.rand((), generator=g) for g in (own.augment(0), own.augment(7), own.augment_real())]
    assert len({float(o) for o in others}) == 3
