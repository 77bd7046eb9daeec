"""Populations on disk, and the distributions of initial weights that sample them."""

import json

import pytest
import torch
from conftest import SmallNet, write_population
from safetensors.torch import save_file

from dd_lightning.evaluation.heldout import count_choosing
from dd_lightning.init import FixedPretrainedInit, RandomInit, RandomPretrainedInit
from dd_lightning.init.population import HELD_OUT, TRAIN, Population, TrainedNetworks
from dd_lightning.networks import LeNet, unstack
from dd_lightning.system.seeding import Stream


@pytest.fixture
def population(tmp_path):
    return write_population(tmp_path / "toy", SmallNet(), (1, 6, 6), 3, networks=5, held_out=4)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_networks_come_back_bit_for_bit(population):
    networks = TrainedNetworks(population, TRAIN)
    assert len(networks) == 5
    assert [len(indices) for indices in population.shards(TRAIN)] == [2, 2, 1]
    for index, weights in enumerate(networks):
        assert all(value.eq(index).all() for value in weights.values())
    assert TrainedNetworks(population, HELD_OUT)[3]["fc.weight"].eq(103).all()
    assert population.accuracies(TRAIN) == [0, 1, 2, 3, 4]


def test_samples_are_networks_to_train_on_and_depend_on_seed_and_step_alone(population, tmp_path):
    init, network = RandomPretrainedInit("toy", str(tmp_path), per_step=3, seed=1), SmallNet()
    seen = set()
    for step in range(30):
        names = [int(single["fc.bias"][0]) for single in unstack(init.sample(network, step))]
        assert len(set(names)) == 3
        assert same(
            init.sample(network, step),
            RandomPretrainedInit(str(population.path), per_step=3, seed=1).sample(network, step),
        )
        seen |= set(names)
    assert seen == set(range(5))


def test_held_out_networks_are_never_sampled(population, tmp_path):
    init, network = RandomPretrainedInit("toy", str(tmp_path), per_step=5), SmallNet()

    def held_out(count, stream):
        return [int(weights["fc.bias"][0]) for weights in init.held_out(network, count, stream)]

    assert held_out(3, Stream.HELD_OUT_TEST) == [100, 101, 102]
    assert held_out(1, Stream.HELD_OUT_VALIDATION) == [103]
    assert held_out(200, Stream.HELD_OUT_TEST) == [100, 101, 102]
    assert held_out(200, Stream.HELD_OUT_VALIDATION) == [103]


@pytest.mark.parametrize(("held_out", "choose", "tested"), [(2, 1, 1), (3, 1, 2), (8, 2, 6), (65, 20, 45)])
def test_networks_that_choose_are_never_tested(tmp_path, held_out, choose, tested):
    write_population(tmp_path / "toy", SmallNet(), (1, 6, 6), 3, held_out=held_out)
    init, found = RandomPretrainedInit("toy", str(tmp_path), per_step=1), {}
    for stream, count in ((Stream.HELD_OUT_VALIDATION, choose), (Stream.HELD_OUT_TEST, tested)):
        weights = list(init.held_out(SmallNet(), 200, stream))
        found[stream] = {int(single["fc.bias"][0]) for single in weights}
        assert len(weights) == len(found[stream]) == count == init.num_distinct(200, stream)
        assert init.num_distinct(1, stream) == 1
    assert init.num_held_out(200) == tested
    assert set.union(*found.values()) == set(range(100, 100 + held_out))
    assert set.intersection(*found.values()) == set()


def test_a_held_out_part_too_small_to_choose_and_to_test_is_refused(tmp_path):
    write_population(tmp_path / "toy", SmallNet(), (1, 6, 6), 3, held_out=1)
    with pytest.raises(ValueError, match=r"toy holds out 1 network, but one .* dd-pretrain held_out_networks=2"):
        RandomPretrainedInit("toy", str(tmp_path), per_step=1)


def test_fewer_networks_that_choose_than_asked_for_are_told(population, tmp_path, caplog):
    init = RandomPretrainedInit("toy", str(tmp_path), per_step=1)
    assert count_choosing(init, 1, "the sets") == 1
    assert count_choosing(RandomInit(), 20, "the sets") == 20
    assert count_choosing(FixedPretrainedInit("toy", str(tmp_path)), 20, "the sets") == 1  # one by design
    assert caplog.messages == []
    assert count_choosing(init, 20, "the sets") == 1
    assert caplog.messages == ["1 network for validation chooses the sets, not 20: the population holds out too few"]


def test_fixed_is_one_of_them(population, tmp_path):
    init, network = FixedPretrainedInit("toy", str(tmp_path), index=2), SmallNet()
    (held_out,) = init.held_out(network, 200, Stream.HELD_OUT_TEST)
    for weights in (init.weights(network), held_out, unstack(init.sample(network, step=7))[0]):
        assert same(weights, TrainedNetworks(population, TRAIN)[2])
    assert init.fixed
    assert init.num_held_out(200) == 1
    with pytest.raises(ValueError, match="index is 5, but population toy has networks 0 to 4"):
        FixedPretrainedInit("toy", str(tmp_path), index=5)


def test_more_networks_per_step_than_there_are_is_refused(population, tmp_path):
    with pytest.raises(ValueError, match="per_step is 6, but population toy has 5 networks"):
        RandomPretrainedInit("toy", str(tmp_path), per_step=6)


@pytest.mark.parametrize(
    ("network", "shape", "classes", "message"),
    [
        (LeNet(), (1, 28, 28), 10, r"made with network conftest\.SmallNet; here network is .*LeNet"),
        (SmallNet(in_channels=3), (3, 6, 6), 3, "made with channels 1; here channels is 3"),
        (SmallNet(image_size=8), (1, 8, 8), 3, "made with image size 6; here image size is 8"),
        (SmallNet(num_classes=4), (1, 6, 6), 4, "made with classes 3; here classes is 4"),
        (SmallNet(image_size=8), (1, 6, 6), 3, "other settings of network"),
    ],
)
def test_another_network_is_refused_by_name(population, tmp_path, network, shape, classes, message):
    for init in (RandomPretrainedInit("toy", str(tmp_path)), FixedPretrainedInit("toy", str(tmp_path))):
        init.check(SmallNet(), (1, 6, 6), 3)
        with pytest.raises(ValueError, match=message):
            init.check(network, shape, classes)


def test_a_missing_or_unfinished_population_names_the_command(population, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"dd-pretrain pretrain=mnist_lenet populations_dir={tmp_path}"):
        RandomPretrainedInit("mnist_lenet", str(tmp_path))
    next(iter(population.shards(HELD_OUT).values())).unlink()
    with pytest.raises(
        ValueError, match=r"not finished: 2 of 4 held_out networks are missing; go on with: dd-pretrain"
    ):
        RandomPretrainedInit("toy", str(tmp_path))


def test_parts_that_share_a_seed_are_refused(population):
    card = population.card | {"parts": {part: {"networks": 1, "seed": 3} for part in (TRAIN, HELD_OUT)}}
    (population.path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="share seed 3"):
        Population(population.path)


@pytest.mark.parametrize("wrong", ["truncated", "foreign", "card", "other_card"])
def test_broken_files_are_refused_by_name(population, tmp_path, wrong):
    shard = next(iter(population.shards(TRAIN).values()))
    if wrong == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif wrong == "foreign":
        save_file({"x": torch.ones(2)}, shard)
    else:
        (population.path / "card.json").write_text("{" if wrong == "card" else "{}")
    with pytest.raises(ValueError, match=r"00000-00002\.safetensors" if wrong in ("truncated", "foreign") else "card"):
        list(TrainedNetworks(Population(population.path), TRAIN))


@pytest.mark.parametrize("value", [None, "text", 1.5, [], {}])
def test_a_card_that_lacks_something_or_has_it_otherwise_is_refused_by_its_name(population, value):
    written = json.loads((population.path / "card.json").read_text())
    for key in ("class", "classes", "shapes", "preprocessing", "parts"):
        if isinstance(value, type(written[key])) and value:
            continue  # such as another class, which is refused beside the network
        for card in (written | {key: value}, {name: one for name, one in written.items() if name != key}):
            if key == "shapes" and card.get("shapes") == {}:
                continue
            (population.path / "card.json").write_text(json.dumps(card))
            with pytest.raises(ValueError, match=rf"card\.json: {key}\S* is missing or not what dd-pretrain writes"):
                Population(population.path)


def test_a_shard_of_other_weights_is_refused_by_its_name(population):
    (path, *_) = population.shards(TRAIN).values()
    save_file({"weights/fc.bias": torch.zeros(2, 3)}, path, metadata={"format": "dd_lightning.population/1"})
    with pytest.raises(ValueError, match=r"00000-00002\.safetensors holds other weights than the card"):
        TrainedNetworks(population, TRAIN)[0]
