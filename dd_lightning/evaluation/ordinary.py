"""Ordinary training: fresh networks on shuffled minibatches, as people train on distilled data (Zhao et al., 2021)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from dd_lightning.data import Augment, Batch, Pictures, Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.evaluator import Learner, numpy
from dd_lightning.networks import channels_last, frozen, memory_format, run_with, stack, training_without_dropout
from dd_lightning.system.checks import check_choice, check_count, check_positive
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.system.workers import Result

OPTIMIZERS = ("sgd", "adam")
ALONG = "along"  # the name, beside those of measures, of accuracies during training
POINTS = 10  # of training, at which it is judged
DECAY = 0.1  # of the learning rate, after half of the epochs


@dataclass(frozen=True)
class Examples:
    """What networks are trained on.

    Attributes:
        images: normalised; or pixels, which `preprocessing` normalises.
        labels: classes, or a real number for each class.
        augment: what each minibatch is changed by.
    """

    images: Float[Tensor, "n c h w"] | UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"] | Float[Tensor, "n classes"]
    augment: Augment
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, distilled: DistilledData) -> Self:
        """The images of distilled data, without their order."""
        labels = distilled.labels if distilled.soft_labels is None else distilled.soft_labels
        return cls(distilled.images.flatten(0, 1), labels.flatten(0, 1), distilled.augment)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def minibatch(self, chosen: Int[Tensor, " batch"], random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels of some."""
        chosen = chosen.to(self.labels.device)
        images = self.images[chosen] if self.preprocessing is None else self.preprocessing(self.images[chosen])
        return self.augment(images, random), self.labels[chosen]


@dataclass(frozen=True)
class Protocol:
    """How a network is trained.

    Attributes:
        optimizer: sgd or adam.
        epochs: passes over the examples; after half of them the learning rate is a tenth.
        batch_size: of the minibatches; the last of an epoch may be smaller.
        momentum: of sgd.
        weight_decay: added to the gradient.
        seed: of the minibatches and the augmentation.

    Raises:
        ValueError: naming the setting that cannot be.
    """

    optimizer: str = "sgd"
    epochs: int = 300
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_count(epochs=self.epochs, batch_size=self.batch_size)
        for name in ("momentum", "weight_decay"):
            if getattr(self, name) != 0:
                check_positive(**{name: getattr(self, name)})
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, not {self.momentum}")

    @property
    def judged(self) -> list[int]:
        """The numbers of epochs after which a network is judged along its training."""
        return sorted({round(self.epochs * point / POINTS) for point in range(POINTS + 1)})

    def torch_optimizer(self, parameters: Iterable[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, learning_rate, self.momentum, weight_decay=self.weight_decay)


def trained(
    network: nn.Module,
    weights: dict[str, Tensor],
    examples: Examples,
    learning_rate: float,
    protocol: Protocol,
    counters: tuple[int, ...] = (),
    after_epoch: Callable[[int, dict[str, Tensor]], None] = lambda epochs, weights: None,
) -> dict[str, Tensor]:
    """The weights of one network after training, with dropout off.

    Args:
        network: the template.
        weights: before training.
        counters: which network it is; minibatches and augmentation depend on the seed and these alone.
        after_epoch: told the weights after so many epochs; it must leave them as they are.
    """
    seed, stream = protocol.seed, Stream.ORDINARY
    first, _ = examples.minibatch(torch.arange(min(2, len(examples))), generator(seed, stream, *counters))

    def minibatches(epoch: int) -> Iterator[Batch]:
        order = torch.randperm(len(examples), generator=generator(seed, stream, *counters, epoch))
        for i, chosen in enumerate(order.split(protocol.batch_size)):
            yield examples.minibatch(chosen, generator(seed, stream, *counters, epoch, i))

    return trained_on(network, weights, minibatches, first, learning_rate, protocol, after_epoch)


def trained_on(
    network: nn.Module,
    weights: dict[str, Tensor],
    minibatches: Callable[[int], Iterable[Batch]],
    first: Float[Tensor, "batch c h w"],
    learning_rate: float,
    protocol: Protocol,
    after_epoch: Callable[[int, dict[str, Tensor]], None] = lambda epochs, weights: None,
) -> dict[str, Tensor]:
    """The weights of one network after training on these minibatches.

    Args:
        minibatches: of an epoch.
        first: two images.
        after_epoch: as in `trained`.
    """
    fixed = frozen(network)
    # On CPUs the gradient of group norm is slow in channels last.
    normed = any(isinstance(module, nn.GroupNorm) for module in network.modules())
    format = torch.contiguous_format if normed else memory_format(network, first)
    if format == torch.channels_last:
        weights = {name: channels_last(value) for name, value in weights.items()}
    weights = {name: value.detach().clone().requires_grad_(name not in fixed) for name, value in weights.items()}
    optimizer = protocol.torch_optimizer([w for w in weights.values() if w.requires_grad], learning_rate)
    with training_without_dropout(network), torch.enable_grad():
        for epoch in range(protocol.epochs):
            if epoch == (protocol.epochs + 1) // 2:
                for group in optimizer.param_groups:
                    group["lr"] = DECAY * learning_rate
            for images, labels in minibatches(epoch):
                loss = F.cross_entropy(run_with(network, weights, images.to(memory_format=format)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            after_epoch(epoch + 1, weights)
    return {name: value.detach() for name, value in weights.items()}


def judge_trained(
    learner: Learner,
    examples: Examples,
    learning_rate: float,
    protocol: Protocol,
    index: int,
    networks: int,
    stream: Stream,
    parts_of_pictures: list[Pictures],
    along: Pictures | None = None,
) -> Result:
    """One unseen network, the `index`-th of so many, judged after its training.

    Args:
        along: pictures that its accuracy is measured on during its training; then it is judged before it, too.

    Returns:
        Each measure in %, [pictures, network, point], of the one network; and `along`, where it was asked for, [1,
        network, point]: the accuracy after as many epochs as the protocol's `judged` says.
    """
    (theta,) = learner.held_out(networks, stream, slice(index, index + 1))
    seen: list[Tensor] = []

    def judge(epochs: int, weights: dict[str, Tensor]) -> None:
        if along is not None and epochs in protocol.judged:
            with torch.no_grad():
                seen.append(next(iter(learner.judged(stack([weights]), along).values())))

    judge(0, theta)
    device = parts_of_pictures[0].labels.device
    after = trained(learner.network, theta, examples.to(device), learning_rate, protocol, (int(stream), index), judge)
    found = judged_at(learner, [after] if along is None else [theta, after], parts_of_pictures)
    return found | ({ALONG: torch.stack(seen, 1)[None].cpu().numpy()} if seen else {})


def judged_at(learner: Learner, points: list[dict[str, Tensor]], parts_of_pictures: list[Pictures]) -> Result:
    """One network judged at points of its training: each measure in %, [pictures, network, point]."""
    found = [stack([learner.judged(stack([one]), pictures) for pictures in parts_of_pictures]) for one in points]
    return numpy({name: torch.stack([point[name] for point in found], -1) for name in found[0]})
