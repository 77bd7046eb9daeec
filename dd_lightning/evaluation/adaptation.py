"""Reference columns of Table 2: no adaptation, and few-shot adversarial domain adaptation."""

import copy
from collections.abc import Sequence
from itertools import product

import numpy as np

from dd_lightning.data import ImageDataset, Pictures, Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.adversarial import Domains, Setting, adapt, head_of
from dd_lightning.evaluation.evaluator import Evaluation, Learner, Outcome, held_out_result, numpy
from dd_lightning.evaluation.grid import check_different, choice
from dd_lightning.evaluation.heldout import count_choosing
from dd_lightning.networks import load_weights, stack, training_without_dropout
from dd_lightning.objectives import Measures
from dd_lightning.sources import Sets
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.seeding import Stream, derive_seed
from dd_lightning.system.workers import Result

COMPARED = 5  # sets with which combinations are compared: to adapt a LeNet by one of them takes about a minute


class NoAdaptation:
    """The held-out networks as they are. With networks trained on the target data set: "train on full target"."""

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        common = (evaluation.networks, evaluation.stream, evaluation.pictures)
        pieces = {
            f"networks{part.start}": (evaluation.learner, part, *common)
            for part in evaluation.chunks(evaluation.networks, evaluation.stream)
        }
        results = evaluation.workers.map("testing", _test, pieces)
        return Outcome(held_out_result(results), {}, [], evaluation.tested)


def _test(learner: Learner, part: slice, networks: int, stream: Stream, pictures: Pictures) -> Result:
    weights = stack(list(learner.held_out(networks, stream, part)))
    return {name: values[:, None] for name, values in numpy(learner.judged(weights, pictures)).items()}


class FewShotAdaptation:
    """Adapts held-out networks, trained on the source, with all source images and a set of target images.

    A discriminator tells four groups of pairs apart: two source images of one class (G1), a source and a target image
    of one class (G2), and the same of different classes (G3, G4). First it is trained with the network as it is; then,
    in turn, the network learns to classify both domains and to have its pairs of G2 taken for G1 and of G4 for G3
    (Eq. 5 of Motiian et al., NeurIPS 2017), and the discriminator to tell them apart.

    Public implementations take γ = 0.2 in Eq. 5; the paper's own value is not known here. As for other baselines, the
    best of several combinations is tested. They are compared on validation pictures, with five sets and a network for
    validation for each; then every set adapts a network of its own. What choosing on the test set would have brought
    is told as `gap`.

    Args:
        source: the data set the networks were trained on, in the form of the target.
        adversarial_weights: values of γ of their Eq. 5.
        learning_rates: of Adam.
        steps: numbers of steps of network and discriminator in turn.
        discriminator_steps: with the network as it is.
        batch_size: pairs of each group, source images, and target images in a step.
        seed: of the order of the images and the discriminators' initial weights.

    Raises:
        ValueError: no source, no or repeated values, a count below 1, or a rate or weight that is not positive.
    """

    def __init__(
        self,
        source: ImageDataset | None,
        adversarial_weights: Sequence[float] = (0.2, 1.0),
        learning_rates: Sequence[float] = (0.0003, 0.001),
        steps: Sequence[int] = (250, 500, 1000),
        discriminator_steps: int = 500,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        if source is None:
            raise ValueError("few-shot adaptation needs the networks' own data set: +dataset@source=NAME")
        check_different(adversarial_weights=adversarial_weights, learning_rates=learning_rates, steps=steps)
        check_count(discriminator_steps=discriminator_steps, batch_size=batch_size)
        check_count(**{f"steps[{i}]": value for i, value in enumerate(steps)})
        check_positive(**{f"adversarial_weights[{i}]": value for i, value in enumerate(adversarial_weights)})
        check_positive(**{f"learning_rates[{i}]": value for i, value in enumerate(learning_rates)})
        self.source, self.steps, self.seed = source, sorted(steps), seed
        self.settings = [
            Setting(weight, rate, discriminator_steps, batch_size)
            for weight, rate in product(adversarial_weights, learning_rates)
        ]

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        source, preprocessing = self.load(evaluation)
        validation, test = self.compare(evaluation, sets.members[:COMPARED], source, preprocessing)
        combinations = list(product(self.settings, self.steps))
        names = [
            {"adversarial_weight": setting.adversarial_weight, "learning_rate": setting.learning_rate, "steps": steps}
            for setting, steps in combinations
        ]
        chosen, details = choice(names, validation, test)
        setting, steps = combinations[chosen]
        networks = min(len(sets.members), evaluation.networks)
        common = (source, preprocessing, networks, evaluation.stream, [evaluation.pictures], self.seed)
        pieces = {
            f"set{i}": (setting, [0, steps], i, evaluation.learner, one, *common) for i, one in enumerate(sets.members)
        }
        results = evaluation.workers.map("adapting", adapt_one, pieces)
        result = held_out_result({i: {k: v[None, :, 0] for k, v in r.items()} for i, r in results.items()})
        chose = evaluation.learner.init.num_distinct(min(COMPARED, networks), Stream.HELD_OUT_VALIDATION)
        details |= {"networks_chose": chose, "pictures_chose": len(evaluation.data.validation)}
        tested = evaluation.learner.init.num_distinct(networks, evaluation.stream)
        return Outcome(result, {"sets": len(sets.members), **details}, sets.members, tested, chose)

    def load(self, evaluation: Evaluation) -> tuple[Pictures, Preprocessing]:
        """The source's pictures, and how its networks take them.

        Raises:
            ValueError: they are of another form than the target's, or the network is none that can be adapted.
        """
        self.source.prepare()
        source, _, preprocessing, classes = self.source.load()
        target = evaluation.data.preprocessing
        if preprocessing.image_shape != target.image_shape or classes != evaluation.data.num_classes:
            raise ValueError(
                f"source data set {self.source.name} has {classes} classes of "
                f"{'×'.join(map(str, preprocessing.image_shape))} images, the target {evaluation.data.num_classes} of "
                f"{'×'.join(map(str, target.image_shape))}; set the source's channels and image_size"
            )
        source = source.to(evaluation.pictures.labels.device)
        head_of(evaluation.learner.network, preprocessing(source.images[:2]))
        return source, preprocessing

    def compare(
        self, evaluation: Evaluation, sets: Sequence[DistilledData], source: Pictures, preprocessing: Preprocessing
    ) -> tuple[Result, Result]:
        """Mean of each measure in % for every combination, on validation and on test pictures."""
        networks = min(len(sets), evaluation.networks)
        count_choosing(evaluation.learner.init, networks, "how networks are adapted")
        parts = [evaluation.data.validation, evaluation.data.test]
        common = (source, preprocessing, networks, Stream.HELD_OUT_VALIDATION, parts, self.seed)
        pieces = {
            f"setting{j}_set{i}": (setting, self.steps, i, evaluation.learner, one, *common)
            for j, setting in enumerate(self.settings)
            for i, one in enumerate(sets)
        }
        results = list(evaluation.workers.map("comparing", adapt_one, pieces).values())
        means: tuple[Result, Result] = ({}, {})
        shape = (len(self.settings), len(sets), len(self.steps), len(parts))
        for name in results[0]:
            mean = np.stack([result[name] for result in results]).reshape(shape).mean(1)
            for part, of_part in enumerate(means):
                of_part[name] = mean[..., part].flatten()
        return means


def adapt_one(
    setting: Setting,
    points: Sequence[int],
    index: int,
    learner: Learner,
    distilled: DistilledData,
    source: Pictures,
    preprocessing: Preprocessing,
    networks: int,
    stream: Stream,
    parts_of_pictures: Sequence[Pictures],
    seed: int,
) -> Result:
    """The `index`-th held-out network while it is adapted to a set of target images.

    Args:
        points: numbers of steps after which it is judged; 0 is before it is adapted.
        networks: how many there are, as far as they are distinct; then they come again.

    Returns:
        Each measure in %, [point, pictures].
    """
    index %= learner.init.num_distinct(networks, stream)
    (weights,) = learner.held_out(networks, stream, slice(index, index + 1))
    network = copy.deepcopy(learner.network)
    load_weights(network, weights)
    few = distilled.to(source.labels.device)
    domains = Domains(source, preprocessing, few.images.flatten(0, 1), few.labels.flatten())
    judged: list[Measures] = []
    with training_without_dropout(network):
        for _ in adapt(network, domains, setting, points, derive_seed(seed, Stream.BASELINE, index)):
            now = stack([{name: parameter.detach() for name, parameter in network.named_parameters()}])
            judged.append(stack([learner.judged(now, pictures) for pictures in parts_of_pictures]))
    return {name: values.squeeze(2) for name, values in numpy(stack(judged)).items()}
