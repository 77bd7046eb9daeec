"""Few-shot adversarial domain adaptation of one network.

Motiian, Jones, Iranmanesh, Doretto: Few-Shot Adversarial Domain Adaptation, NeurIPS 2017.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.data import Pictures, Preprocessing
from dd_lightning.networks import training_without_dropout

SOURCE_SAME, TARGET_SAME, SOURCE_OTHER, TARGET_OTHER = range(4)  # G1 to G4, the groups of pairs (their Section 3.1)


@dataclass(frozen=True)
class Setting:
    """How a network and its discriminator are trained.

    Attributes:
        adversarial_weight: γ of their Eq. 5.
        learning_rate: of Adam.
        discriminator_steps: with the network as it is.
        batch_size: pairs of each group, source images, and target images in a step.
    """

    adversarial_weight: float
    learning_rate: float
    discriminator_steps: int
    batch_size: int


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
        chosen = self.source[_members(self._of_source, classes, random)]
        return self.preprocessing(chosen.images.to(chosen.labels.device))

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


def adapt(network: nn.Module, domains: Domains, setting: Setting, points: Collection[int], seed: int) -> Iterator[int]:
    """Trains `network` in place, by their Algorithm 1 from its second step on; yields when it took `points` steps."""
    random = torch.Generator().manual_seed(seed)
    device, count, head = domains.images.device, setting.batch_size, head_of(network, domains.images[:2])
    encode = encoder(network, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(head.in_features).to(device)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=setting.learning_rate)
    trained = [p for p in network.parameters() if p.requires_grad]
    of_network = torch.optim.Adam(trained, lr=setting.learning_rate)

    def taken_for(group: int, label: int, through_network: bool) -> Float[Tensor, ""]:
        """−log φ: how far the discriminator is from taking pairs of `group` for those of `label`."""
        first, second = domains.pairs(group, count, random)
        with torch.set_grad_enabled(through_network):
            features = encode(torch.cat([first, second])).split(count)
        return F.cross_entropy(discriminator(*features), torch.full((count,), label, device=device))

    def discriminator_loss() -> Float[Tensor, ""]:
        return torch.stack([taken_for(group, group, False) for group in range(4)]).sum()

    def network_loss() -> Float[Tensor, ""]:
        confusion = taken_for(TARGET_SAME, SOURCE_SAME, True) + taken_for(TARGET_OTHER, SOURCE_OTHER, True)
        loss = setting.adversarial_weight * confusion
        for draw in (domains.source_images, domains.target_images):
            labels = torch.randint(head.out_features, (count,), generator=random)
            loss = loss + F.cross_entropy(network(draw(labels, random)), labels.to(device))
        return loss

    if 0 in points:
        yield 0
    for _ in range(setting.discriminator_steps):
        _step(of_discriminator, discriminator_loss())
    for step in range(1, max(points) + 1):
        _step(of_network, network_loss())
        if step in points:
            yield step
        _step(of_discriminator, discriminator_loss())


def _step(optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""]) -> None:
    """One step along the gradient of the optimizer's own weights."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def head_of(network: nn.Module, images: Float[Tensor, "n c h w"]) -> nn.Linear:
    """The linear layer that the logits come from: the last that is used, wherever it was registered.

    Raises:
        ValueError: the logits do not come from a linear layer.
    """
    used: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            used.append((module, output))

    with ExitStack() as hooks, torch.no_grad(), training_without_dropout(network):
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(note))
        logits = network(images)
    if not used or not torch.equal(used[-1][1], logits):
        raise ValueError(
            f"few-shot adaptation needs a network whose logits come from a linear layer; those of "
            f"{type(network).__name__} do not"
        )
    return used[-1][0]


def encoder(network: nn.Module, head: nn.Linear) -> Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n d"]]:
    """What the network computes before its last layer."""

    def encode(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        features = []
        with head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0])):
            network(images)
        return features[-1]

    return encode
