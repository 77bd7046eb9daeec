"""Ordinary training of fresh networks, its controls and its scores, against plain loops and numbers by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet
from torch import nn

from dd_lightning.data import FlipRotate, Siamese, Unchanged
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation import Ordinary, Training, fresh
from dd_lightning.evaluation.ordinary import Examples, Protocol, judge_trained
from dd_lightning.evaluation.scores import scores
from dd_lightning.init import FixedInit
from dd_lightning.sources import Sets, average_real, random_real, real_images
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.workers import Workers


class ConvOnly(nn.Module):
    """Without a norm, which on a CPU is trained in channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.dropout, self.fc = nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.conv(x)).flatten(1)))


def trained_by_hand(weights, one, counters, rate, epochs, batch_size, optimizer, seed, kind=SmallNet):
    """As anyone writes it; the order and the augmentation are drawn as the evaluation draws them."""
    network = kind()
    network.load_state_dict(weights)
    network.train()
    network.dropout.p = 0.0
    optimizer = optimizer(network.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [(epochs + 1) // 2], 0.1)
    images = one.images.flatten(0, 1)
    labels = (one.labels if one.soft_labels is None else one.soft_labels).flatten(0, 1)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator(seed, Stream.ORDINARY, *counters, epoch))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            draw = generator(seed, Stream.ORDINARY, *counters, epoch, start // batch_size)
            loss = F.cross_entropy(network(one.augment(images[batch], draw)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network.eval()


def hits(network, pictures, preprocessing):
    return int((network(preprocessing(pictures.images)).argmax(1) == pictures.labels).sum())


PROTOCOLS = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.8, weight_decay=0.01),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, rate, weight_decay=0.01),
}


@pytest.mark.parametrize("augment", [Unchanged(), FlipRotate(), Siamese(["crop", "scale", "cutout"])])
@pytest.mark.parametrize("optimizer", PROTOCOLS)
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("kind", [SmallNet, ConvOnly])
def test_accuracies_are_those_of_a_plain_loop_to_the_picture(evaluation, optimizer, augment, labels, kind):
    evaluation = replace(evaluation, learner=replace(evaluation.learner, network=kind()))
    (one,) = random_real(evaluation.data, steps=2, images_per_class=3, sets=1).members
    one = replace(one, augment=augment)
    if labels == "soft":
        soft = torch.softmax(torch.randn(*one.labels.shape, 3, generator=torch.Generator().manual_seed(0)), -1)
        one = replace(one, soft_labels=0.7 * F.one_hot(one.labels, 3) + 0.3 * soft)
    use = Ordinary(
        [0.02], controls=[], seed=5, optimizer=optimizer, epochs=7, batch_size=8, momentum=0.8, weight_decay=0.01
    )
    outcome = use(evaluation, Sets([one]))
    learner, test = evaluation.learner, evaluation.data.test
    found = []
    for index, weights in enumerate(learner.init.held_out(learner.network, 4, Stream.HELD_OUT_TEST)):
        counters = (int(Stream.HELD_OUT_TEST), index)
        network = trained_by_hand(weights, one, counters, 0.02, 7, 8, PROTOCOLS[optimizer], 5, kind)
        found.append(100 * hits(network, test, evaluation.data.preprocessing) / len(test))
    assert outcome.result.accuracies[:, -1].tolist() == found
    assert (outcome.networks, outcome.networks_chose) == (4, None)


def test_the_rate_is_chosen_on_validation_with_other_networks_and_tested_once(evaluation):
    sets = random_real(evaluation.data, steps=1, images_per_class=2, sets=2)
    settings = {"optimizer": "sgd", "epochs": 3, "batch_size": 4, "momentum": 0.8, "weight_decay": 0.01}
    outcome = Ordinary([0.0003, 0.03], choosing=3, controls=[], seed=5, **settings)(evaluation, sets)
    learner, data = evaluation.learner, evaluation.data

    def accuracies(stream, networks, rate, pictures):
        found = []
        for index, weights in enumerate(learner.init.held_out(learner.network, networks, stream)):
            one = sets.members[index % 2]
            network = trained_by_hand(weights, one, (int(stream), index), rate, 3, 4, PROTOCOLS["sgd"], 5)
            found.append(100 * hits(network, pictures, data.preprocessing) / len(pictures))
        return found

    table = outcome.details["combinations"]
    assert [row["learning_rate"] for row in table] == [0.0003, 0.03]
    for row in table:
        for part, pictures in (("validation", data.validation), ("test", data.test)):
            by_hand = accuracies(Stream.HELD_OUT_VALIDATION, 3, row["learning_rate"], pictures)
            assert row[part] == pytest.approx(np.mean(by_hand))
    chosen = max(table, key=lambda row: row["validation"])
    assert outcome.details["chosen"] == chosen
    assert outcome.details["gap"] == pytest.approx(max(row["test"] for row in table) - chosen["test"])
    by_hand = accuracies(Stream.HELD_OUT_TEST, 4, chosen["learning_rate"], data.test)
    assert outcome.result.accuracies[:, -1].tolist() == pytest.approx(by_hand)
    assert (outcome.networks_chose, outcome.details["pictures_chose"]) == (3, 12)


def with_soft_labels(data):
    (one,) = average_real(data, steps=1).members
    return replace(one, soft_labels=torch.full((1, 3, 3), 1 / 3), augment=FlipRotate())


def test_controls_have_the_same_training(evaluation):
    one = with_soft_labels(evaluation.data)
    everything = ["random", "hard", "whole", "unaugmented"]
    settings = {"epochs": 2, "batch_size": 8, "whole_epochs": 1, "seed": 5}
    details = Ordinary([0.02], controls=everything, **settings)(evaluation, Sets([one])).details
    controls = details["controls"]
    assert set(controls) == {"random", "hard", "whole", "unaugmented", "random_unaugmented"}
    hard = Ordinary([0.02], controls=[], **settings)(evaluation, Sets([replace(one, soft_labels=None)]))
    assert controls["hard"]["accuracy_mean"] == hard.result.mean
    plain = Ordinary([0.02], controls=[], **settings)(evaluation, Sets([replace(one, augment=Unchanged())]))
    assert controls["unaugmented"]["accuracy_mean"] == plain.result.mean
    random = random_real(evaluation.data, steps=1, images_per_class=1, sets=4, seed=5)
    random = Sets([replace(r, augment=one.augment) for r in random.members])
    assert (
        controls["random"]["accuracy_mean"] == Ordinary([0.02], controls=[], **settings)(evaluation, random).result.mean
    )
    assert (controls["random"]["images"], controls["random"]["stored_numbers"]) == (3, 108)
    recovered = Ordinary([0.02], controls=["whole"], **settings)(evaluation, Sets([replace(one, soft_labels=None)]))
    assert details["scores"]["HLR"] == recovered.details["scores"]["HLR"]
    assert (controls["whole"]["images"], controls["whole"]["epochs"], controls["whole"]["networks"]) == (48, 1, 3)
    assert set(details["scores"]) == {"IOR", "HLR", "LRS", "ARS"}


def test_random_images_are_as_many_as_the_numbers_that_are_stored(evaluation):
    one = replace(with_soft_labels(evaluation.data), soft_labels=None)
    more = replace(one, images=one.images.expand(3, -1, -1, -1, -1), labels=one.labels.expand(3, -1))
    controls = Ordinary([0.02], epochs=1)(evaluation, Sets([more])).details["controls"]
    assert set(controls) == {"random"}
    assert controls["random"]["images"] == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; choose one of sgd, adam"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates must be different values"),
        ({"learning_rates": [0.0]}, r"learning_rates\[0\] must be a number above 0"),
        ({"controls": ["hrd"]}, "unknown control 'hrd'; choose one of random, hard, whole, unaugmented"),
        ({"controls": "hard"}, r"controls must be a list, such as \[hard\]"),
        ({"epochs": 0}, "epochs must"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"weight_decay": -1.0}, "weight_decay must"),
    ],
)
def test_impossible_training_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Ordinary(**settings)


def test_one_fixed_network_is_not_fresh(evaluation):
    fixed = replace(evaluation, learner=replace(evaluation.learner, init=FixedInit()))
    with pytest.raises(ValueError, match="add init=random"):
        Ordinary()(fixed, random_real(evaluation.data, steps=1))
    with pytest.raises(ValueError, match="takes all sets"):
        Ordinary()(evaluation, random_real(evaluation.data, steps=1, sets=3, keep=1))


def test_scores_by_hand():
    """α = ½·0.25 − ½·0.2 = 0.025 and β = ½·0.25 + ½·0.05 = 0.15, with e = 2.7182818 and e⁻¹ = 0.3678794."""
    accuracies = {"own": 75.0, "random": 50.0, "whole": 90.0, "hard": 70.0}
    found = scores(accuracies | {"unaugmented": 45.0, "random_unaugmented": 40.0})
    assert found == {
        "IOR": pytest.approx(0.25),
        "HLR": pytest.approx(0.20),
        "LRS": pytest.approx((1.0253151 - 0.3678794) / 2.3504024, abs=1e-7),
        "ARS": pytest.approx((1.1618342 - 0.3678794) / 2.3504024, abs=1e-7),
    }
    assert scores({"own": 75.0}) == {}
    assert scores({"own": 75.0, "whole": 90.0}) == {}  # what hard labels bring is not known
    perfect = scores({"own": 100.0, "random": 0.0, "whole": 100.0, "hard": 100.0})
    assert perfect["LRS"] == pytest.approx((1.6487213 - 0.3678794) / 2.3504024, abs=1e-7)


TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "init=random")
TOY += ("network._target_=conftest.SmallNet", "networks=2", "use=ordinary", "use.epochs=2", "use.choosing=2")


def test_an_evaluation_that_was_ended_goes_on(run, packed, monkeypatch):
    packed()
    labels = torch.arange(3)[None]
    path = "set.safetensors"
    DistilledData.create(torch.randn(1, 3, 1, 12, 12, generator=torch.Generator().manual_seed(0)), labels).save(path)
    line = (f"distilled.path={path}", *TOY)
    judge, done = fresh.judge_trained, []

    def ended(*arguments):
        done.append(arguments)
        if len(done) == 5:
            raise OSError("the disk is full")
        return judge(*arguments)

    monkeypatch.setattr(fresh, "judge_trained", ended)
    code, error, folder = run("evaluate", *line)
    assert (code, "the disk is full" in error) == (1, True)
    code, error, new = run("evaluate", *line)
    assert (code, error, new) == (0, "", None)
    assert len(done) == 1 + 2 * (4 * 2 + 2)  # own and random: four rates with two networks, and two tested; one again
    result = json.loads((folder / "result.json").read_text())
    assert result["use"]["controls"]["random"]["images"] == 3
    assert not (folder / "pieces").exists()
    log = (folder / "dd-evaluate.log").read_text()
    assert "choosing on the test set would have brought" in log
    assert "beside it, 3 random real images" in log


def test_pieces_are_of_the_content_of_the_sets(evaluation):
    """What lies at a path may have changed when an evaluation goes on."""
    one = with_soft_labels(evaluation.data)
    found = {Sets([one]).digest, Sets([one, one]).digest, Sets([replace(one, soft_labels=None)]).digest}
    found |= {
        Sets([replace(one, **{name: getattr(one, name) + 1})]).digest for name in ("images", "raw_learning_rates")
    }
    assert len(found) == 5
    assert Sets([with_soft_labels(evaluation.data)]).digest in found


def test_fresh_networks_are_asked_for_in_one_line(run, packed):
    packed()
    code, error, _ = run(
        "evaluate", *TOY[:4], "network._target_=conftest.SmallNet", "distilled=random_real", "use=ordinary"
    )
    assert code == 1
    assert "use=ordinary trains fresh networks, and here is one fixed network: add init=random" in error


class WithFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(36, 5), nn.Linear(5, 3)
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.flatten(1))))


def test_frozen_weights_stay(evaluation):
    from dd_lightning.evaluation.ordinary import trained

    network, (one,) = WithFrozen(), average_real(evaluation.data, steps=1).members
    weights = dict(network.named_parameters())
    after = trained(network, weights, Examples.of(one), 0.1, Protocol(epochs=2))
    same = [name for name in weights if torch.equal(weights[name], after[name])]
    assert same == ["first.weight"]


def test_controls_of_data_with_rates_of_their_own(evaluation):
    """The same order and rates, on random real images; baselines stand alone."""
    one = with_soft_labels(evaluation.data)
    few = replace(evaluation, networks=10)
    assert "controls" not in Training(["random", "hard"])(few, Sets([one])).details
    one = replace(one, card={"made": "somehow"})
    controls = Training(["random", "hard"])(few, Sets([one])).details["controls"]
    assert controls["hard"]["accuracy_mean"] == few.test([replace(one, soft_labels=None)]).mean
    real = [
        real_images(evaluation.data, one.labels, generator(evaluation.data.seed, Stream.BASELINE, index))
        for index in range(5)
    ]
    beside = replace(few, networks=2).test([replace(one, images=images, soft_labels=None) for images in real])
    assert controls["random"]["accuracy_mean"] == beside.mean
    assert (controls["random"]["networks"], controls["random"]["sets"], controls["random"]["images"]) == (2, 5, 3)
    with pytest.raises(ValueError, match="unknown control 'whole'; choose one of random, hard"):
        Training(["whole"])


def test_accuracy_during_training_is_of_validation_pictures(evaluation):
    one = replace(with_soft_labels(evaluation.data), augment=Unchanged())
    settings = {"optimizer": "sgd", "batch_size": 8, "momentum": 0.8, "weight_decay": 0.01, "seed": 5}
    outcome = Ordinary([0.02], controls=["random"], epochs=4, **settings)(evaluation, Sets([one]))
    along = outcome.details["along"]
    assert along["epochs"] == [0, 1, 2, 3, 4]
    assert outcome.details["controls"]["random"]["along"]["epochs"] == along["epochs"]
    learner, validation = evaluation.learner, evaluation.data.validation
    before, after = [], []
    for index, weights in enumerate(learner.init.held_out(learner.network, 4, Stream.HELD_OUT_TEST)):
        counters = (int(Stream.HELD_OUT_TEST), index)
        trained = trained_by_hand(weights, one, counters, 0.02, 4, 8, PROTOCOLS["sgd"], 5)
        network = SmallNet().eval()
        network.load_state_dict(weights)
        for found, judged in ((before, network), (after, trained)):
            found.append(100 * hits(judged, validation, evaluation.data.preprocessing) / len(validation))
    assert along["accuracy"][0] == pytest.approx(np.mean(before))
    assert along["accuracy"][-1] == pytest.approx(np.mean(after))
    assert Protocol(epochs=300).judged == list(range(0, 301, 30))


def test_networks_that_choose_a_rate_are_judged_once(evaluation):
    data, examples = evaluation.data, Examples.of(with_soft_labels(evaluation.data))
    common = (evaluation.learner, examples, 0.02, Protocol(epochs=1), 0, 2, Stream.HELD_OUT_VALIDATION)
    once = judge_trained(*common, [data.validation, data.test])
    twice = judge_trained(*common, [data.validation, data.test], data.validation)
    assert {name: values.shape for name, values in once.items()} == {"accuracy": (2, 1, 1)}
    assert {name: values.shape for name, values in twice.items()} == {"accuracy": (2, 1, 2), "along": (1, 1, 2)}
    assert np.array_equal(once["accuracy"][..., -1], twice["accuracy"][..., -1])
    assert twice["along"][0, 0].tolist() == twice["accuracy"][0, 0].tolist()


@pytest.mark.slow  # starts processes
def test_several_processes_find_what_one_finds(evaluation):
    one, use = with_soft_labels(evaluation.data), Ordinary([0.01, 0.03], choosing=2, epochs=2)
    alone = use(evaluation, Sets([one]))
    with Workers(2) as workers:
        together = use(replace(evaluation, workers=workers), Sets([one]))
    assert torch.equal(alone.result.accuracies, together.result.accuracies)
    assert alone.details == together.details
