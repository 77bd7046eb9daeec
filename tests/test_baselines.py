"""Baseline images, the grid and K-NN against closed forms and a plain loop."""

import weakref
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet
from hydra import compose, initialize_config_dir
from torch import nn

import dd_lightning.evaluation.knn as knn_module
import dd_lightning.sources.sets as sets_module
from dd_lightning.commands.launch import CONF
from dd_lightning.data import Packed, Pictures, Preprocessing, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation import Evaluation, FewShotAdaptation, Grid, KNearestNeighbours, Learner, Training
from dd_lightning.evaluation.adaptation import NoAdaptation
from dd_lightning.evaluation.adversarial import Discriminator, Domains, Setting, adapt, encoder, head_of
from dd_lightning.evaluation.grid import best, dealt, share
from dd_lightning.evaluation.learning_rates import learn_rates
from dd_lightning.init import FixedInit, RandomInit
from dd_lightning.networks import predict
from dd_lightning.objectives import Classification, Poisoning
from dd_lightning.sources import Sets, average_real, kmeans, random_real
from dd_lightning.system.seeding import Stream, derive_seed
from dd_lightning.system.workers import Workers
from dd_lightning.unroll import FunctionalUnroll


def is_one_of(image, pictures):
    return (pictures - image).flatten(1).abs().amax(1).min() < 1e-6


def test_random_real_sets_are_different_real_images_of_their_class(data):
    sets = random_real(data, steps=2, sets=3)
    assert len(sets.members) == 3
    assert not torch.equal(sets.members[0].images, sets.members[1].images)
    for one in sets.members:
        for image, label in zip(one.images.flatten(0, 1), one.labels.flatten(), strict=True):
            assert is_one_of(image, data.preprocessing(data.train.images[data.train.labels == label]))
    again = random_real(data, steps=2, sets=3)
    assert torch.equal(sets.members[2].images, again.members[2].images)


def test_average_real_is_the_mean_of_each_class_in_every_step(data):
    (one,) = average_real(data, steps=3).members
    assert one.images.shape == (3, 3, 1, 6, 6)
    for label in range(3):
        mean = data.preprocessing(data.train.images[data.train.labels == label]).mean(0)
        for step in range(3):
            torch.testing.assert_close(one.images[step, label], mean)


def test_kmeans_of_one_cluster_is_the_mean_and_of_all_is_the_images(data):
    (mean,) = average_real(data, steps=1).members
    (one,) = kmeans(data, steps=1, sets=1).members
    torch.testing.assert_close(one.images, mean.images, rtol=1e-4, atol=1e-4)
    counts = data.train.labels.bincount()
    rarest = int(counts.argmin())
    members = data.preprocessing(data.train.images[data.train.labels == rarest])
    (every,) = kmeans(data, steps=1, images_per_class=len(members), sets=1).members
    found = every.images[every.labels == rarest]
    assert all(is_one_of(image, found) for image in members)


def test_kmeans_goes_on_until_it_is_a_fixed_point(packed):
    """Pictures without clusters, which take many iterations."""
    noise = np.random.default_rng(1).integers(0, 256, (600, 6, 6)).astype(np.uint8)
    data = RealData(Packed(str(packed(size=6, train_images=noise, train_labels=np.arange(600) % 3)), validation=12))
    data.setup()
    (one,) = kmeans(data, steps=4, images_per_class=2, sets=1).members
    for label in range(3):
        members = data.preprocessing(data.train.images[data.train.labels == label]).flatten(1)
        centroids = one.images[one.labels == label].flatten(1)
        nearest = torch.cdist(members, centroids).argmin(1)
        means = torch.stack([members[nearest == k].mean(0) for k in range(8)])
        torch.testing.assert_close(means, centroids, rtol=1e-4, atol=1e-4)


def test_kmeans_is_a_fixed_point_of_its_own_assignment(data):
    (one,) = kmeans(data, steps=2, images_per_class=2, sets=1).members
    for label in range(3):
        members = data.preprocessing(data.train.images[data.train.labels == label]).flatten(1)
        centroids = one.images[one.labels == label].flatten(1)
        nearest = torch.cdist(members, centroids).argmin(1)
        for k in range(4):
            torch.testing.assert_close(members[nearest == k].mean(0), centroids[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"sets": 0}, "sets must"), ({"sets": 2, "keep": 3}, "keep=3"), ({"steps": 9, "images_per_class": 9}, "class 0")],
)
def test_impossible_sets_are_refused(data, wrong, message):
    with pytest.raises(ValueError, match=message):
        random_real(data, **wrong)


def test_too_many_clusters_are_refused_before_the_work(data):
    with pytest.raises(ValueError, match="too few for 99 clusters"):
        kmeans(data, steps=99)
    with pytest.raises(ValueError, match="learning_rate"):
        kmeans(data, learning_rate=-1.0)


def trained_by_hand(weights, one, rate, epochs, pictures, preprocessing):
    network = SmallNet()
    network.load_state_dict(weights)
    DistilledData.create(one.images, one.labels, epochs, rate).train(network)
    hits = network.eval()(preprocessing(pictures.images)).argmax(1) == pictures.labels
    return 100 * hits.double().mean().item()


def test_the_grid_equals_training_and_testing_every_combination_by_hand(evaluation):
    sets = random_real(evaluation.data, steps=2, sets=2)
    grid = Grid([0.003, 0.3], [1, 3], pictures=12)
    outcome = grid(evaluation, sets)
    learner, data = evaluation.learner, evaluation.data
    networks = list(learner.init.held_out(learner.network, 4, Stream.HELD_OUT_VALIDATION))
    table = {(row["learning_rate"], row["epochs"]): row for row in outcome.details["combinations"]}
    assert len(table) == 4
    for (rate, epochs), row in table.items():
        dealt = [(network, sets.members[i // 2]) for i, network in enumerate(networks)]  # two networks to each set
        by_hand = [
            trained_by_hand(network, one, rate, epochs, data.validation, data.preprocessing) for network, one in dealt
        ]
        assert row["validation"] == pytest.approx(np.mean(by_hand))
    chosen = max(table.values(), key=lambda row: row["validation"])
    assert outcome.details["chosen"] == chosen
    assert outcome.details["gap"] == pytest.approx(max(r["test"] for r in table.values()) - chosen["test"])
    tested = list(learner.init.held_out(learner.network, 4, Stream.HELD_OUT_TEST))
    by_hand = [
        trained_by_hand(w, one, chosen["learning_rate"], chosen["epochs"], data.test, data.preprocessing)
        for one in sets.members
        for w in tested
    ]
    assert outcome.result.accuracies[:, -1].tolist() == pytest.approx(by_hand)


class FewForValidation(RandomInit):
    """Draws like its parent; has two networks for validation alone."""

    def num_distinct(self, count, stream):
        return min(count, 2) if stream == Stream.HELD_OUT_VALIDATION else count


@pytest.mark.parametrize("sets", [1, 3, 10])
@pytest.mark.parametrize(("init", "count"), [(RandomInit(), 12), (FewForValidation(), 2), (FixedInit(), 1)])
def test_networks_that_choose_are_dealt_over_the_sets(evaluation, init, count, sets):
    few = replace(evaluation, networks=12, learner=replace(evaluation.learner, init=init))
    parts = dealt(few, sets)
    pairs = [(network, index) for part, index in parts for network in range(part.start, part.stop)]
    assert len(pairs) == len(set(pairs)) == (min(12, 2 * sets) if count == 2 else count)
    assert {network for network, _ in pairs} == set(range(count))
    assert len({index for _, index in pairs}) == min(sets, len(parts))


def test_what_is_chosen_is_never_chosen_with_a_network_of_the_test(evaluation, monkeypatch):
    """In a grid over sets of which the best are kept: every use of the networks asks for its own stream."""
    asked = []
    held_out = RandomInit.held_out
    monkeypatch.setattr(
        RandomInit, "held_out", lambda s, n, c, stream: asked.append(stream) or held_out(s, n, c, stream)
    )
    sets = random_real(evaluation.data, steps=1, sets=3, keep=2)
    outcome = Grid([0.1, 0.3], [1], pictures=5)(evaluation, sets)
    choosing = asked.index(Stream.HELD_OUT_TEST)
    assert set(asked[:choosing]) == {Stream.HELD_OUT_VALIDATION}
    assert set(asked[choosing:]) == {Stream.HELD_OUT_TEST}
    assert (outcome.networks, outcome.networks_chose, outcome.details["pictures_chose"]) == (4, 4, 10)
    assert outcome.details["sets_chosen"] == {"of": 3, "networks": 20, "training_pictures": 48}
    asked.clear()
    Training()(replace(evaluation, split="validation"), sets)
    assert set(asked) == {Stream.HELD_OUT_VALIDATION}


def test_learned_rates_are_as_good_as_a_line_search():
    """One network and one minibatch, so that a line search finds the best rate."""

    class Real:
        train = type("Train", (), {"labels": torch.zeros(1)})

        def minibatch(self, step):
            random = torch.Generator().manual_seed(0)
            images = torch.randn(30, 1, 2, 2, generator=random)
            return images, (images[:, 0, 0, 0] > 0).long()

    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    init = RandomInit(seed=1)
    init.sample = lambda network, step: RandomInit.sample(init, network, 0)  # type: ignore[method-assign]
    real, unroll = Real(), FunctionalUnroll()
    images = torch.randn(1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    start = DistilledData.create(images, torch.tensor([[0, 1]]), 1, 0.02)
    raw = learn_rates([start], network, init, unroll, Classification(), real, 80, 0.3)["raw"]  # type: ignore[arg-type]

    def loss(rate):
        data = DistilledData.create(start.images, start.labels, 1, float(rate))
        theta = unroll(network, init.sample(network, 0), data.steps())
        x, y = real.minibatch(0)
        return F.cross_entropy(x.flatten(1) @ theta["1.weight"][0].T + theta["1.bias"][0], y).item()

    learned = F.softplus(torch.from_numpy(raw)).item()
    rates = np.geomspace(1e-3, 100, 100)
    assert loss(learned) <= min(map(loss, rates)) + 1e-3
    assert torch.equal(start.raw_learning_rates, DistilledData.create(images, start.labels, 1, 0.02).raw_learning_rates)


def test_rates_are_learned_by_adam_with_the_papers_betas(evaluation):
    """Adam written out: betas (0.5, 0.999), its step size along a cosine, the gradient's norm at most 1."""
    data, learner, steps = evaluation.data, evaluation.learner, 5
    (start,) = random_real(data, steps=2, epochs=2, learning_rate=0.3, sets=1).members
    common = (learner.network, learner.init, learner.unroll, learner.objective, data)
    found = learn_rates([start], *common, outer_steps=steps, step_size=0.1)["raw"]
    raw = start.raw_learning_rates.clone()
    first, second, late, norms = torch.zeros_like(raw), torch.zeros_like(raw), [], []
    for step in range(steps):
        leaf = raw.clone().requires_grad_()
        images, labels = data.minibatch(step)
        inner_steps = replace(start, raw_learning_rates=leaf).steps()
        theta = learner.unroll(learner.network, learner.init.sample(learner.network, step), inner_steps)
        loss = learner.objective(predict(learner.network, theta, images), labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        norms.append(gradient.norm().item())
        gradient = gradient / max(1.0, norms[-1])
        first, second = 0.5 * first + 0.5 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.5 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        rate = 0.1 * (1 + np.cos(np.pi * step / steps)) / 2
        raw = raw - rate * mean / (square.sqrt() + 1e-8)
        late += [raw] if step >= 2 else []
    np.testing.assert_allclose(found, torch.stack(late).mean(0).numpy(), rtol=1e-4)
    assert min(norms) < 1 < max(norms)


def test_learned_rates_are_a_combination_of_each_number_of_epochs(evaluation):
    sets = random_real(evaluation.data, steps=2, sets=1)
    outcome = Grid(["learned"], [1, 2], outer_steps=3)(evaluation, sets)
    assert {k: np.shape(v) for k, v in outcome.details["learned_rates"].items()} == {"1": (1, 2), "2": (2, 2)}
    epochs = outcome.details["chosen"]["epochs"]
    used = outcome.sets[0].learning_rates
    torch.testing.assert_close(used, torch.tensor(outcome.details["learned_rates"][str(epochs)]))


def test_optimised_sets_are_the_best_on_training_pictures(evaluation):
    sets = random_real(evaluation.data, steps=1, epochs=2, learning_rate=0.1, sets=4, keep=2)
    kept = Training()(evaluation, sets).sets
    learner, data = evaluation.learner, evaluation.data
    networks = list(learner.init.held_out(learner.network, 20, Stream.HELD_OUT_VALIDATION))
    scores = [
        np.mean([trained_by_hand(w, one, 0.1, 2, data.train, data.preprocessing) for w in networks])
        for one in sets.members
    ]
    expected = [sets.members[i] for i in sorted(np.argsort(scores)[::-1][:2])]
    assert len(kept) == len(expected)
    assert all(torch.equal(one.images, other.images) for one, other in zip(kept, expected, strict=True))


@pytest.mark.parametrize("use", [Training(), Grid([0.1, "learned"], [1, 2], outer_steps=3)])
def test_memory_holds_one_candidate_at_a_time(evaluation, monkeypatch, use):
    alive, most = set(), []

    def counted(*args):
        images = true(*args)
        alive.add(id(images))
        weakref.finalize(images, alive.discard, id(images))
        most.append(len(alive))
        return images

    true = sets_module.real_images
    monkeypatch.setattr(sets_module, "real_images", counted)
    sets = random_real(evaluation.data, steps=2, sets=9, keep=6)
    assert not most
    outcome = use(evaluation, sets)
    assert len(outcome.sets) == 6
    assert max(most) <= 2  # the next one is made before the last is let go


def test_pictures_are_real_numbers_a_few_at_a_time(evaluation, monkeypatch):
    data, most = evaluation.data, []
    sets = random_real(data, steps=2, sets=1)
    at_once = [average_real(data).members[0].images, KNearestNeighbours()(evaluation, sets).result.accuracies]
    true = Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, "__call__", lambda self, images: most.append(len(images)) or true(self, images))
    monkeypatch.setattr(sets_module, "PIECE", 5)
    monkeypatch.setattr(knn_module, "PIECE", 5)
    in_pieces = [average_real(data).members[0].images, KNearestNeighbours()(evaluation, sets).result.accuracies]
    assert max(most) <= 5
    torch.testing.assert_close(in_pieces, at_once)
    kmeans(data, steps=1, sets=2)
    assert max(most) == data.train.labels.bincount().max()


@pytest.fixture
def mirrored(packed):
    """Real data whose training pictures are mirrored and moved at random."""
    result = RealData(Packed(str(packed(size=6)), validation=12, flip=True, crop_padding=1), batch_size=16)
    result.setup()
    return result


def test_baselines_may_be_of_pictures_as_training_sees_them(mirrored):
    seen = [mirrored.minibatch(step) for step in range(mirrored.batches_per_epoch)]
    images, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    (average,) = average_real(mirrored, steps=1, augmented=True).members
    for label in range(3):
        torch.testing.assert_close(average.images[0, label], images[labels == label].mean(0))
    whole = mirrored.preprocessing(mirrored.train.images)
    padded = F.pad(whole, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, top : top + 6, left : left + 6] for top, left in product(range(3), range(3))]
    ways = torch.cat([*moved, *(part.flip(3) for part in moved)])
    sets = random_real(mirrored, steps=4, sets=3, augmented=True).members
    drawn = torch.cat([one.images.flatten(0, 1) for one in sets])
    assert all(is_one_of(image, ways) for image in drawn)
    assert not all(is_one_of(image, whole) for image in drawn)
    assert torch.equal(sets[1].images, sets[1].images)
    with pytest.raises(ValueError, match="augmented must be true or false, not 'yes'"):
        random_real(mirrored, augmented="yes")  # type: ignore[arg-type]


def test_baselines_of_photographs_are_crops_and_of_others_whole_pictures():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for row, augmented in (("voc", True), ("cub", True), ("mnist", False), ("cifar10", False)):
            for column in ("random_real", "optimized_real", "average_real"):
                distilled = compose("evaluate", [f"row={row}", f"column={column}"]).distilled
                assert distilled.augmented is augmented


@pytest.mark.parametrize("wrong", [{"learning_rates": []}, {"learning_rates": [0.1, 0.1]}, {"learning_rates": [-1]}])
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(ValueError, match="learning_rates"):
        Grid(**{"epochs": [1], **wrong})


def test_every_share_of_pictures_comes_in_turn(data):
    numbered = Pictures(data.validation.images, torch.arange(12))
    seen = torch.cat([share(numbered, i, 4).labels for i in range(3)])
    assert torch.equal(seen.sort().values, numbered.labels)
    assert torch.equal(share(numbered, 3, 4).labels, seen[:4])
    assert len(share(numbered, 0, 100)) == 12


def test_a_share_of_pictures_that_lie_class_by_class_holds_every_class():
    sorted_by_class = Pictures(torch.zeros(300, 1, 2, 2, dtype=torch.uint8), torch.arange(300) // 100)
    assert share(sorted_by_class, 0, 60).labels.bincount().min() > 10


def test_the_best_combination_is_the_most_accurate():
    assert best({"accuracy": np.array([3.0, 9.0, 5.0])}) == 1


def test_a_poisoning_combination_must_move_the_attacked_class():
    """Figure 6's rule: the best accuracy among those that move at least 10 %."""
    accuracy = np.array([90.0, 80.0, 70.0])
    assert best({"accuracy_modified_labels": accuracy, "attack_share": np.array([0.0, 11.0, 99.0])}, 10) == 1
    assert best({"accuracy_modified_labels": accuracy, "attack_share": np.array([0.0, 8.0, 9.0])}, 10) == 2


def test_baselines_of_poisoning_carry_the_modified_labels(data):
    sets = average_real(data, steps=2).relabelled(Poisoning(0, 2))
    assert sets.members[0].labels.tolist() == [[2, 1, 2]] * 2


@pytest.mark.parametrize(("metric", "p"), [("l1", 1), ("l2", 2)])
def test_nearest_neighbours_by_hand(evaluation, metric, p):
    sets = random_real(evaluation.data, steps=2, sets=2)
    outcome = KNearestNeighbours([1], [metric])(evaluation, sets)
    test = evaluation.data.test
    pictures = evaluation.data.preprocessing(test.images).flatten(1)
    for one, found in zip(sets.members, outcome.result.accuracies[:, -1], strict=True):
        distances = torch.cdist(pictures, one.images.flatten(0, 1).flatten(1), p=p)
        hits = one.labels.flatten()[distances.argmin(1)] == test.labels
        assert found.item() == pytest.approx(100 * hits.double().mean().item())


def test_nearest_neighbours_are_chosen_on_validation_pictures(evaluation):
    """On pictures of which one neighbour is always right for validation, and three for the test."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 1, 6, 6), generator=random, dtype=torch.uint8)
    (one,) = random_real(evaluation.data, steps=4, sets=1).members
    pictures = evaluation.data.preprocessing(images).flatten(1)
    distances = torch.cdist(pictures, one.images.flatten(0, 1).flatten(1))
    nearest = one.labels.flatten()[distances.topk(3, largest=False).indices]  # [picture, neighbour]
    alone, voted = nearest[:, 0], nearest.mode(1).values
    clear = (nearest == voted[:, None]).sum(1) > 1  # no ties
    images, alone, voted = images[clear], alone[clear], voted[clear]
    evaluation.data.validation, evaluation.data.test = Pictures(images, alone), Pictures(images, voted)
    outcome = KNearestNeighbours([1, 3], ["l2"])(evaluation, Sets([one]))
    same = 100 * (alone == voted).double().mean().item()
    assert same < 90
    chosen, on_test = outcome.details["chosen"], outcome.details["chosen_on_test"]
    assert (chosen["neighbours"], chosen["validation"], chosen["test"]) == (1, 100, pytest.approx(same))
    assert (on_test["neighbours"], on_test["test"]) == (3, 100)
    assert outcome.details["gap"] == pytest.approx(100 - same)
    assert outcome.result.mean == pytest.approx(same)


def test_pieces_of_work_are_kept_and_not_done_again(tmp_path):
    done = []

    def work(number):
        done.append(number)
        if number == 2 and len(done) < 4:
            raise KeyboardInterrupt
        return {"square": np.array([number**2])}

    pieces = {str(n): (n,) for n in (1, 3, 2)}
    with pytest.raises(KeyboardInterrupt):
        Workers(1, tmp_path).map("squares", work, pieces)
    results = Workers(1, tmp_path).map("squares", work, pieces)
    assert done == [1, 3, 2, 2]
    assert [int(r["square"][0]) for r in results.values()] == [1, 9, 4]


@pytest.mark.slow  # starts processes
def test_several_processes_find_what_one_finds(evaluation):
    sets = random_real(evaluation.data, steps=1, sets=3)
    one = Training()(evaluation, sets).result
    two = Training()(replace(evaluation, workers=Workers(2)), sets).result
    assert torch.equal(one.accuracies, two.accuracies)


def test_no_adaptation_is_the_accuracy_of_the_networks_as_they_are(evaluation):
    untrained = NoAdaptation()(evaluation, Sets([])).result
    trained = Training()(evaluation, average_real(evaluation.data, steps=1)).result
    assert torch.equal(untrained.accuracies[:, 0], trained.accuracies[:, 0])


def test_pairs_are_of_their_group(data):
    (few,) = random_real(data, steps=2, sets=1).members
    domains = Domains(data.train, data.preprocessing, few.images.flatten(0, 1) + 100, few.labels.flatten())
    source = data.preprocessing(data.train.images)
    random = torch.Generator().manual_seed(0)

    def label(image):
        pictures, labels = (source, data.train.labels) if image.max() < 50 else (domains.images, domains.labels)
        return labels[(pictures - image).flatten(1).abs().amax(1).argmin()].item()

    for group, (same, target) in enumerate([(True, False), (True, True), (False, False), (False, True)]):
        first, second = domains.pairs(group, 20, random)
        assert first.max() < 50
        assert (second.min() > 50) == target
        assert all((label(a) == label(b)) == same for a, b in zip(first, second, strict=True))


def stripes(labels, left):
    """Noise with a bright stripe in the row of the class, on the left or on the right."""
    images = np.random.default_rng(0).integers(0, 80, (len(labels), 6, 6)).astype(np.uint8)
    images[np.arange(len(labels)), labels, 0 if left else 3] += 150
    images[np.arange(len(labels)), labels, 1 if left else 4] += 150
    return images


@pytest.fixture
def domains(packed):
    """Source pictures, and real data of the target, whose stripes are where a source network has learned nothing."""
    form, files = {"validation": 12, "mean": [0.5], "std": [0.25]}, {}
    for name in ("source", "target"):
        labels = {"train_labels": np.arange(60) % 3, "test_labels": np.arange(30) % 3}
        images = {k.replace("labels", "images"): stripes(v, name == "source") for k, v in labels.items()}
        files[name] = Packed(str(packed(name=name, **labels, **images)), **form)
    target = RealData(files["target"])
    target.setup()
    return files["source"], target


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 3))


def test_few_shot_adaptation_learns_a_shifted_domain(domains):
    source, target = domains
    pictures, _, preprocessing, _ = source.load()
    network = perceptron()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(50):
        loss = F.cross_entropy(network(preprocessing(pictures.images)), pictures.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (few,) = random_real(target, steps=2, sets=1).members
    images = target.preprocessing(target.test.images)
    before = (network(images).argmax(1) == target.test.labels).double().mean()
    both = Domains(pictures, preprocessing, few.images.flatten(0, 1), few.labels.flatten())
    assert list(adapt(network, both, Setting(0.2, 0.01, 10, 16), [50], seed=0)) == [50]
    after = (network(images).argmax(1) == target.test.labels).double().mean()
    assert before < 0.6
    assert after > 0.9


def adapted_by_hand(network, domains, weight, rate, pretrained, steps, seed):
    """Algorithm 1 of Motiian et al. written out; G1 … G4 are 0 … 3, eight pairs of each in a step."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    discriminator = Discriminator(16)
    of_network, of_discriminator = (torch.optim.Adam(m.parameters(), lr=rate) for m in (network, discriminator))

    def taken_for(group, wanted):
        first, second = (network[:-1](images) for images in domains.pairs(group, 8, random))
        return F.cross_entropy(discriminator(first, second), torch.tensor([wanted] * 8))

    def tell_apart():
        loss = sum(taken_for(group, group) for group in range(4))
        of_discriminator.zero_grad()
        loss.backward()
        of_discriminator.step()

    for _ in range(pretrained):
        tell_apart()
    for _ in range(steps):
        loss = weight * (taken_for(1, 0) + taken_for(3, 2))  # G2 is to be taken for G1, and G4 for G3
        for draw in (domains.source_images, domains.target_images):
            labels = torch.randint(3, (8,), generator=random)
            loss = loss + F.cross_entropy(network(draw(labels, random)), labels)
        of_network.zero_grad()
        loss.backward()
        of_network.step()
        tell_apart()


@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_few_shot_adaptation_by_hand(domains, weight):
    source, target = domains
    pictures, _, preprocessing, _ = source.load()
    (few,) = random_real(target, steps=2, sets=1).members
    both = Domains(pictures, preprocessing, few.images.flatten(0, 1), few.labels.flatten())
    adapted, by_hand = perceptron(), perceptron()
    seen = []
    for step in adapt(adapted, both, Setting(weight, 0.01, 5, 8), [0, 2, 4], seed=3):
        seen.append(step)
        by_hand = perceptron()
        adapted_by_hand(by_hand, both, weight, 0.01, 5, step, seed=3)
        for one, other in zip(adapted.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert seen == [0, 2, 4]


def test_few_shot_adaptation_leaves_frozen_weights(domains):
    source, target = domains
    pictures, _, preprocessing, _ = source.load()
    (few,) = random_real(target, steps=2, sets=1).members
    both, network = Domains(pictures, preprocessing, few.images.flatten(0, 1), few.labels.flatten()), perceptron()
    first = next(iter(network.parameters())).requires_grad_(False)
    before = [p.clone() for p in network.parameters()]
    list(adapt(network, both, Setting(0.2, 0.01, 5, 8), [3], seed=3))
    same = [torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True)]
    assert same == [p is first for p in network.parameters()]


class Shuffled(nn.Module):
    """The layer of its logits is registered first, and used last."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.head, self.unused, self.body, self.scale = nn.Linear(16, 3), nn.Linear(5, 5), nn.Linear(36, 16), scale

    def forward(self, x):
        return self.scale * self.head(torch.tanh(self.body(x.flatten(1))))


def test_the_head_is_the_last_linear_layer_in_use():
    images, network = torch.randn(2, 1, 6, 6), Shuffled()
    assert head_of(network, images) is network.head
    torch.testing.assert_close(encoder(network, network.head)(images), torch.tanh(network.body(images.flatten(1))))
    with pytest.raises(ValueError, match="logits come from a linear layer; those of Shuffled do not"):
        head_of(Shuffled(2.0), images)
    with pytest.raises(ValueError, match="those of Sequential do not"):
        head_of(nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()), images)


def test_few_shot_adaptation_is_chosen_on_validation_and_tested_on_other_networks(domains):
    source, target = domains
    learner = Learner(perceptron(), RandomInit(seed=3), FunctionalUnroll(), target.preprocessing, Classification())
    sets = random_real(target, steps=2, sets=3)
    use = FewShotAdaptation(source, [0.2, 1.0], [1e-6, 0.01], [20, 3], discriminator_steps=2, batch_size=8, seed=1)
    outcome = use(Evaluation(learner, target, Workers(), networks=2), sets)
    pictures, _, preprocessing, _ = source.load()

    def accuracies(stream, weight, rate, steps, judged):
        initial, found = list(learner.init.held_out(learner.network, 2, stream)), []
        for i, few in enumerate(sets.members):
            network = perceptron()
            network.load_state_dict(initial[i % 2])
            both = Domains(pictures, preprocessing, few.images.flatten(0, 1), few.labels.flatten())
            adapted_by_hand(network, both, weight, rate, 2, steps, derive_seed(1, Stream.BASELINE, i % 2))
            hits = network(target.preprocessing(judged.images)).argmax(1) == judged.labels
            found.append(100 * hits.double().mean().item())
        return found

    table = outcome.details["combinations"]
    keys = ("adversarial_weight", "learning_rate", "steps")
    assert [tuple(row[key] for key in keys) for row in table] == list(product([0.2, 1.0], [1e-6, 0.01], [3, 20]))
    for row in table:
        for part, judged in (("validation", target.validation), ("test", target.test)):
            by_hand = accuracies(Stream.HELD_OUT_VALIDATION, *(row[key] for key in keys), judged)
            assert row[part] == pytest.approx(np.mean(by_hand))
    chosen = max(table, key=lambda row: row["validation"])
    assert outcome.details["chosen"] == chosen
    assert outcome.details["gap"] == pytest.approx(max(row["test"] for row in table) - chosen["test"])
    by_hand = accuracies(Stream.HELD_OUT_TEST, *(chosen[key] for key in keys), target.test)
    assert outcome.result.accuracies[:, 1].tolist() == pytest.approx(by_hand)
    assert (outcome.networks, outcome.networks_chose, outcome.details["pictures_chose"]) == (2, 2, 12)


def test_few_shot_adaptation_refuses_what_it_cannot_adapt(domains):
    source, target = domains
    learner = Learner(Shuffled(2.0), RandomInit(), FunctionalUnroll(), target.preprocessing, Classification())
    with pytest.raises(ValueError, match="those of Shuffled do not"):
        FewShotAdaptation(source)(Evaluation(learner, target, Workers()), random_real(target, steps=1))
    with pytest.raises(ValueError, match=r"steps must be a list, such as \[1000\], not 1000"):
        FewShotAdaptation(source, steps=1000)
    with pytest.raises(ValueError, match=r"adversarial_weights\[0\] must be a number above 0"):
        FewShotAdaptation(source, [0.0])
