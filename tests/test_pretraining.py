"""Training of populations: many at once against one at a time, and resuming."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet
from torch import nn

from dd_lightning.data import Packed, RealData
from dd_lightning.init import RandomInit
from dd_lightning.init.population import HELD_OUT, TRAIN, Population
from dd_lightning.init.pretraining import Recipe, _gradient, _gradient_of_many, check_batched, train_networks
from dd_lightning.networks import AlexCifarNet, LeNet, stack, unstack
from dd_lightning.system.seeding import Stream, derive_seed


@pytest.fixture
def data(packed):
    data = RealData(Packed(str(packed()), validation=10), batch_size=16)
    data.setup()
    return data


RECIPE = Recipe(epochs=3, lr=0.01, halve_every=2)


def test_each_network_is_trained_as_by_a_plain_loop(data):
    weights, accuracies = train_networks(SmallNet(1, 12), RandomInit(seed=4), data, RECIPE, range(2, 4))
    for index, found, accuracy in zip(range(2, 4), unstack(weights), accuracies, strict=True):
        network = SmallNet(1, 12)
        network.load_state_dict(RandomInit(seed=4).draw(network, Stream.PRETRAINING, index))
        network.dropout.p = 0.0
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01, betas=(0.5, 0.999))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        own = data.reseeded(derive_seed(4, Stream.PRETRAINING, index))
        for epoch in range(3):
            for step in range(4 * epoch, 4 * epoch + 4):
                images, labels = own.minibatch(step)
                optimizer.zero_grad()
                F.cross_entropy(network(images), labels).backward()
                optimizer.step()
            schedule.step()
        for name, value in network.named_parameters():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)
        correct = network(data.preprocessing(data.test.images)).argmax(1) == data.test.labels
        assert accuracy.item() == pytest.approx(100 * correct.double().mean().item())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_and_shared_weights_are_trained_as_by_a_plain_loop(data, precision):
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    network.append(network[4])
    network[5].bias.requires_grad_(False)
    network[1].weight.requires_grad_(False)
    own = {name: value.detach().clone() for name, value in network.named_parameters()}
    recipe = Recipe(2, 0.01, 1, precision=precision)
    weights, _ = train_networks(network, RandomInit(seed=4), data, recipe, range(2))
    for name, value in network.named_parameters():
        assert torch.equal(value, own[name])
        assert value.requires_grad or all(torch.equal(one, own[name]) for one in weights[name])
    if precision == "bfloat16":
        return
    network.load_state_dict(RandomInit(seed=4).draw(network, Stream.PRETRAINING, 1), strict=False)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.01, betas=(0.5, 0.999))
    stream = data.reseeded(derive_seed(4, Stream.PRETRAINING, 1))
    for step in range(2 * data.batches_per_epoch):
        optimizer.param_groups[0]["lr"] = 0.01 if step < data.batches_per_epoch else 0.005
        images, labels = stream.minibatch(step)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    for name, value in network.named_parameters():
        torch.testing.assert_close(weights[name][1], value.detach(), rtol=1e-4, atol=1e-5)
    theta = RandomInit(per_step=2).sample(network, 0)
    images, labels = torch.randn(2, 4, 1, 12, 12), torch.randint(0, 3, (2, 4))
    many, each = _gradient_of_many(network, theta, images, labels), _gradient(network, theta, images)
    for name, expected in each(theta, images, labels).items():
        torch.testing.assert_close(many[name], expected)
    check_batched(network, RandomInit(), data)


def test_which_networks_are_trained_together_does_not_matter(data):
    one, _ = train_networks(SmallNet(1, 12), RandomInit(), data, RECIPE, range(5), at_once=1)
    for at_once in (2, 5):
        other, _ = train_networks(SmallNet(1, 12), RandomInit(), data, RECIPE, range(5), at_once=at_once)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    part, _ = train_networks(SmallNet(1, 12), RandomInit(), data, RECIPE, range(3, 5))
    assert all(torch.equal(part[name], one[name][3:]) for name in part)


@pytest.mark.parametrize(("network", "shape"), [(LeNet(), (1, 28, 28)), (AlexCifarNet(), (3, 32, 32))])
def test_gradients_of_many_networks_at_once_are_those_of_each(network, shape):
    weights = RandomInit(per_step=3).sample(network, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, *shape, generator=generator)
    labels = torch.randint(0, 10, (3, 4), generator=generator)
    found = _gradient_of_many(network, weights, images, labels)
    for name, expected in _gradient(network, weights, images)(weights, images, labels).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_are_trained_on_a_gpu_as_on_a_cpu(data, precision):
    recipe = Recipe(1, 1e-3, 1, precision=precision)
    expected, _ = train_networks(SmallNet(1, 12), RandomInit(), data, recipe, range(3))
    data.to(torch.device("cuda"))
    found, _ = train_networks(SmallNet(1, 12).cuda(), RandomInit(), data, recipe, range(3), at_once=3)
    start = stack([RandomInit().draw(SmallNet(1, 12), Stream.PRETRAINING, index) for index in range(3)])
    for name, value in expected.items():
        assert (found[name].cpu() - value).norm() < 0.2 * (value - start[name]).norm()


def test_gradients_in_bfloat16_train_nearly_the_same_weights(data):
    exact, _ = train_networks(SmallNet(1, 12), RandomInit(), data, Recipe(1, 1e-3, 1), range(2))
    rounded, _ = train_networks(SmallNet(1, 12), RandomInit(), data, Recipe(1, 1e-3, 1, precision="bfloat16"), range(2))
    start = stack([RandomInit().draw(SmallNet(1, 12), Stream.PRETRAINING, index) for index in range(2)])
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        assert 0 < (rounded[name] - value).norm() < 0.2 * (value - start[name]).norm()


def test_every_network_has_its_own_start_and_order(data):
    orders = [data.reseeded(derive_seed(0, Stream.PRETRAINING, index)).minibatch(0)[0] for index in range(3)]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], data.minibatch(0)[0])
    starts = [
        RandomInit(seed=seed).draw(SmallNet(), Stream.PRETRAINING, i)["fc.weight"] for seed in (0, 1) for i in (0, 1)
    ]
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 4


def test_a_network_that_cannot_be_batched_is_refused(data):
    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x) * (1 if x.sum().item() > 0 else 2)

    with pytest.raises(ValueError, match="at_once=1"):
        check_batched(Branching(1, 12), RandomInit(), data)
    check_batched(SmallNet(1, 12), RandomInit(), data)


def test_a_network_that_diverges_is_refused_by_its_number(data):
    with pytest.raises(FloatingPointError, match=r"network 3 are not finite; try a smaller recipe\.lr"):
        train_networks(SmallNet(1, 12), RandomInit(), data, Recipe(1, 1e38, 1), range(3, 4))


def test_running_out_of_memory_names_what_takes_less(data, run, monkeypatch):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("dd_lightning.init.shards.train_networks", full)
    code, error, _ = run("pretrain", *TOY, "workers=1")
    assert code == 1
    assert "what is finished is kept; a smaller at_once, workers or batch_size takes less" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"halve_every": 0}, "halve_every"),
        ({"betas": [1.0, 0.9]}, "betas"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_impossible_recipes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"epochs": 1, "lr": 0.1, "halve_every": 1} | settings)


TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "batch_size=16")
TOY += ("network._target_=conftest.SmallNet", "recipe.epochs=2", "networks=5", "held_out_networks=2", "shard=2")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture
def straight(data, run, tmp_path):
    assert run("pretrain", *TOY, "name=straight", "workers=1")[:2] == (0, "")
    return tmp_path / "populations" / "straight"


def test_the_card_tells_what_was_made(straight):
    card = Population(straight).card
    assert card["class"] == "conftest.SmallNet"
    assert card["recipe"]["epochs"] == 2
    assert {part: (content["seed"], len(content["accuracies"])) for part, content in card["parts"].items()} == {
        TRAIN: (0, 5),
        HELD_OUT: (1, 2),
    }
    assert card["parts"][TRAIN]["accuracies"] == Population(straight).accuracies(TRAIN)


def test_going_on_after_an_interruption_gives_the_same_population(straight, run, tmp_path, monkeypatch):
    write, written = Population.write, []

    def interrupted(self, part, start, *args):
        if len(written) == 2:
            raise OSError("interrupted")
        written.append((part, start))
        write(self, part, start, *args)

    monkeypatch.setattr(Population, "write", interrupted)
    code, error, _ = run("pretrain", *TOY, "name=again", "workers=1")
    assert (code, error) == (1, "dd-pretrain: error: interrupted")
    written.clear()
    code, error, _ = run("pretrain", *TOY, "name=again", "workers=1")
    assert (code, error) == (0, "")
    assert written == [(TRAIN, 4), (HELD_OUT, 0)]
    assert files(tmp_path / "populations" / "again") == files(straight)


def test_several_processes_make_the_same_population(straight, run, tmp_path):
    assert run("pretrain", *TOY, "name=two", "workers=2")[:2] == (0, "")
    assert files(tmp_path / "populations" / "two") == files(straight)


def test_more_networks_are_added_to_those_that_are_there(straight, run):
    before = files(straight)
    assert run("pretrain", *TOY, "name=straight", "workers=1", "networks=6")[:2] == (0, "")
    after = files(straight)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_networks_are_added_to_a_population_whose_card_is_older_than_a_setting(straight, run):
    population = Population(straight)
    del population.card["recipe"]["precision"], population.card["dataset"]["border"]
    population.write_card()
    code, error, _ = run("pretrain", *TOY, "name=straight", "workers=1", "recipe.precision=bfloat16")
    assert code == 1
    assert "recipe.precision: float32 there, bfloat16 here" in error
    assert run("pretrain", *TOY, "name=straight", "workers=1", "networks=6")[:2] == (0, "")


def test_a_data_set_need_not_name_every_setting(data, run):
    for networks in (4, 5):
        given = (*TOY, "~dataset.border", "workers=1", f"networks={networks}")
        assert run("pretrain", *given)[:2] == (0, "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("seed=1", "seed and held_out_seed are both 1"),
        ("name=straight recipe.lr=0.1", "is of other settings (recipe.lr: 0.0002 there, 0.1 here)"),
        ("name=straight held_out_seed=7", "is of other settings"),
        ("networks=0", "networks must be a whole number of at least 1"),
        ("workers=0", "workers must"),
        ("recipe.epochs=0", "recipe: epochs must"),
        ("scheme=xavier", "unknown scheme"),
        ("pretrain=nothing", "mnist_lenet"),
    ],
)
def test_bad_input_in_one_line(straight, run, overrides, message):
    code, error, _ = run("pretrain", *TOY, *overrides.split())
    assert code == 1
    assert message in error
    assert error.startswith("dd-pretrain: error: ")
    assert "Traceback" not in error


def test_a_sweep_lies_among_the_runs_and_lists_what_failed(packed, run):
    packed()
    code, error, folder = run("pretrain", "-m", *TOY, "workers=1", "name=one", "networks=0,4")
    assert code == 1
    assert "1 job of the sweep failed" in error
    assert "networks must be a whole number of at least 1" in error
    assert folder.parent.name == "pretrain"
    assert not Path("multirun").exists()
    assert Path("populations/one/card.json").is_file()
