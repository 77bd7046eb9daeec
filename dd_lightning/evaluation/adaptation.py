"""Reference columns of Table 2: no adaptation, and few-shot adversarial domain adaptation.

Motiian, Jones, Iranmanesh, Doretto: Few-Shot Adversarial Domain Adaptation, NeurIPS 2017.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.data import ImageDataset, Pictures, Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.evaluator import Evaluation, Learner, Outcome, held_out_result, numpy
from dd_lightning.networks import stack, training_without_dropout
from dd_lightning.sources import Sets
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.seeding import Stream, derive_seed
from dd_lightning.system.workers import Result

SOURCE_SAME, TARGET_SAME, SOURCE_OTHER, TARGET_OTHER = range(4)  # G1 to G4, the groups of pairs (their Section 3.1)


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
    """Adapts each held-out network, trained on the source, with all source images and a set of target images.

    A discriminator tells four groups of pairs apart: two source images of one class (G1), a source and a target image
    of one class (G2), and the same of different classes (G3, G4). First it is trained with the network as it is; then,
    in turn, the network learns to classify both domains and to have its pairs of G2 taken for G1 and of G4 for G3
    (their Eq. 5), and the discriminator to tell them apart.

    Args:
        source: the data set the networks were trained on, in the form of the target.
        adversarial_weight: γ of their Eq. 5.
        discriminator_steps: with the network as it is.
        steps: of network and discriminator in turn.
        batch_size: pairs of each group, source images, and target images in a step.
        learning_rate: of Adam.
        seed: of the order of the images and the discriminators' initial weights.

    Raises:
        ValueError: no source, a count below 1, or a rate or weight that is not positive.
    """

    def __init__(
        self,
        source: ImageDataset | None,
        adversarial_weight: float = 0.2,
        discriminator_steps: int = 500,
        steps: int = 1000,
        batch_size: int = 32,
        learning_rate: float = 0.001,
        seed: int = 0,
    ) -> None:
        if source is None:
            raise ValueError("few-shot adaptation needs the networks' own data set: +dataset@source=NAME")
        check_count(discriminator_steps=discriminator_steps, steps=steps, batch_size=batch_size)
        check_positive(adversarial_weight=adversarial_weight, learning_rate=learning_rate)
        self.source, self.adversarial_weight, self.learning_rate = source, adversarial_weight, learning_rate
        self.discriminator_steps, self.steps, self.batch_size, self.seed = discriminator_steps, steps, batch_size, seed

    def __call__(self, evaluation: Evaluation, sets: Sets) -> Outcome:
        self.source.prepare()
        source, _, preprocessing, classes = self.source.load()
        target = evaluation.data.preprocessing
        if preprocessing.image_shape != target.image_shape or classes != evaluation.data.num_classes:
            raise ValueError(
                f"source data set {self.source.name} has {classes} classes of "
                f"{'×'.join(map(str, preprocessing.image_shape))} images, the target {evaluation.data.num_classes} of "
                f"{'×'.join(map(str, target.image_shape))}; set the source's channels and image_size"
            )
        if not any(isinstance(module, nn.Linear) for module in evaluation.learner.network.modules()):
            raise ValueError("few-shot adaptation needs a network whose last layer is linear")
        source = source.to(evaluation.pictures.labels.device)
        common = (preprocessing, source, evaluation.pictures, evaluation.networks, evaluation.stream)
        pieces = {f"set{i}": (self, i, evaluation.learner, one, *common) for i, one in enumerate(sets.members)}
        results = evaluation.workers.map("adapting", adapt_one, pieces)
        details = {"sets": len(sets.members), "adversarial_weight": self.adversarial_weight, "steps": self.steps}
        tested = min(len(sets.members), evaluation.tested)
        return Outcome(held_out_result(results), details, sets.members, tested)


def adapt_one(
    settings: FewShotAdaptation,
    index: int,
    learner: Learner,
    distilled: DistilledData,
    preprocessing: Preprocessing,
    source: Pictures,
    pictures: Pictures,
    networks: int,
    stream: Stream,
) -> Result:
    """The `index`-th held-out network before and after adaptation to a set of target images, accuracy in %."""
    index %= learner.init.num_distinct(networks, stream)
    (weights,) = learner.held_out(networks, stream, slice(index, index + 1))
    network = copy.deepcopy(learner.network)
    before = learner.judged(stack([weights]), pictures)
    network.load_state_dict(weights, strict=False)
    few = distilled.to(source.labels.device)
    domains = Domains(source, preprocessing, few.images.flatten(0, 1), few.labels.flatten())
    with training_without_dropout(network):
        adapt(network, domains, settings, derive_seed(settings.seed, Stream.BASELINE, index))
    adapted = {name: parameter.detach() for name, parameter in network.named_parameters()}
    after = learner.judged(stack([adapted]), pictures)
    return numpy({name: torch.stack([before[name], after[name]], dim=1) for name in before})


class Domains:
    """Many source images and few target images, drawn in pairs."""

    def __init__(
        self,
        source: Pictures,
        preprocessing: Preprocessing,
        images: Float[Tensor, "few c h w"],
        labels: Int[Tensor, " few"],
    ) -> None:
        self.source, self.preprocessing, self.images, self.labels = source, preprocessing, images, labels
        classes = range(int(source.labels.max()) + 1)
        self._of_source = [(source.labels == k).nonzero().flatten().cpu() for k in classes]
        self._of_target = [(labels == k).nonzero().flatten().cpu() for k in classes]

    def source_images(self, classes: Int[Tensor, " n"], random: torch.Generator) -> Float[Tensor, "n c h w"]:
        """A random source image of each class."""
        chosen = _members(self._of_source, classes, random).to(self.source.labels.device)
        return self.preprocessing(self.source.images[chosen])

    def target_images(self, classes: Int[Tensor, " n"], random: torch.Generator) -> Float[Tensor, "n c h w"]:
        """A random target image of each class."""
        return self.images[_members(self._of_target, classes, random).to(self.images.device)]

    def pairs(
        self, group: int, count: int, random: torch.Generator
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """Random pairs of a group: the first image is the source's, the second as the group says."""
        k = len(self._of_source)
        first = torch.randint(k, (count,), generator=random)
        same = group in (SOURCE_SAME, TARGET_SAME)
        second = first if same else (first + torch.randint(1, k, (count,), generator=random)) % k
        draw = self.source_images if group in (SOURCE_SAME, SOURCE_OTHER) else self.target_images
        return self.source_images(first, random), draw(second, random)


def _members(of_class: list[Int[Tensor, " m"]], classes: Int[Tensor, " n"], random: torch.Generator) -> Tensor:
    places = torch.rand(len(classes), generator=random)
    return torch.stack(
        [of_class[k][int(p * len(of_class[k]))] for k, p in zip(classes.tolist(), places.tolist(), strict=True)]
    )


class Discriminator(nn.Module):
    """Which of the four groups a pair of features belongs to: two fully connected layers, 64 units between them."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * features, hidden), nn.ReLU(), nn.Linear(hidden, 4))

    def forward(self, first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, "n 4"]:
        return self.layers(torch.cat([first, second], dim=1))


def adapt(network: nn.Module, domains: Domains, settings: FewShotAdaptation, seed: int) -> None:
    """Trains `network` in place, by their Algorithm 1 from its second step on."""
    random = torch.Generator().manual_seed(seed)
    device, count = domains.images.device, settings.batch_size
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    encode = encoder(network, last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(last.in_features).to(device)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=settings.learning_rate)
    of_network = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)

    def taken_for(group: int, label: int, through_network: bool) -> Float[Tensor, ""]:
        """−log φ: how far the discriminator is from taking pairs of `group` for those of `label`."""
        first, second = domains.pairs(group, count, random)
        with torch.set_grad_enabled(through_network):
            features = encode(torch.cat([first, second])).split(count)
        return F.cross_entropy(discriminator(*features), torch.full((count,), label, device=device))

    def train_discriminator() -> None:
        loss = torch.stack([taken_for(group, group, False) for group in range(4)]).sum()
        of_discriminator.zero_grad()
        loss.backward(inputs=list(discriminator.parameters()))
        of_discriminator.step()

    def train_network() -> None:
        confusion = taken_for(TARGET_SAME, SOURCE_SAME, True) + taken_for(TARGET_OTHER, SOURCE_OTHER, True)
        loss = settings.adversarial_weight * confusion
        for draw in (domains.source_images, domains.target_images):
            labels = torch.randint(last.out_features, (count,), generator=random)
            loss = loss + F.cross_entropy(network(draw(labels, random)), labels.to(device))
        of_network.zero_grad()
        loss.backward(inputs=list(network.parameters()))
        of_network.step()

    for _ in range(settings.discriminator_steps):
        train_discriminator()
    for _ in range(settings.steps):
        train_network()
        train_discriminator()


def encoder(network: nn.Module, last: nn.Linear) -> Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n d"]]:
    """What the network computes before its last layer."""

    def encode(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        features = []
        with last.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0])):
            network(images)
        return features[0]

    return encode
