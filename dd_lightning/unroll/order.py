"""Order: which distilled images an inner step sees, and at which rate."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_lightning.system.checks import check_count
from dd_lightning.system.seeding import Stream, generator


@dataclass(frozen=True)
class Draws:
    """The random numbers of a training's inner steps: functions of (seed, counters, inner step) alone.

    Attributes:
        counters: which training it is, such as the outer step.
        shared: whether all inner steps, and the real minibatch, share one draw of the augmentation.
    """

    seed: int = 0
    counters: tuple[int, ...] = ()
    shared: bool = False

    def order(self, step: int) -> torch.Generator:
        return generator(self.seed, Stream.ORDER, *self.counters, step)

    def augment(self, step: int) -> torch.Generator:
        return generator(self.seed, Stream.AUGMENT_DISTILLED, *self.counters, 0 if self.shared else step)

    def augment_real(self) -> torch.Generator:
        return self.augment(0) if self.shared else generator(self.seed, Stream.AUGMENT_REAL, *self.counters)


class Used(NamedTuple):
    """Distilled data as the inner loop uses them.

    Attributes:
        labels: classes, or a real number for each class.
        classes: of each image, by which minibatches are drawn.
    """

    images: Float[Tensor, "step batch c h w"]
    labels: Int[Tensor, "step batch"] | Float[Tensor, "step batch classes"]
    classes: Int[Tensor, "step batch"]
    rates: Float[Tensor, "epoch step"]

    def check(self) -> None:
        """Refuses tensors that do not fit together, or are not what they should be.

        Raises:
            ValueError: saying which.
        """
        images, classes, rates = self.images.shape, self.classes.shape, self.rates.shape
        if len(images) != 5 or classes != images[:2] or len(rates) != 2 or rates[1] != images[0]:
            shapes = f"images {list(images)}, labels {list(classes)} and learning rates {list(rates)}"
            raise ValueError(f"{shapes} do not fit together")
        if self.classes.is_floating_point() or self.classes.numel() == 0 or self.classes.min() < 0:
            raise ValueError("labels must be whole numbers from 0")
        numbers, soft = {"images": self.images, "learning rates": self.rates}, self.labels
        if soft is not self.classes:
            if soft.ndim != 3 or soft.shape[:-1] != classes or self.classes.max() >= soft.shape[-1]:
                raise ValueError(f"soft_labels {list(soft.shape)} do not fit labels {list(classes)}")
            numbers["soft_labels"] = soft
        for name, tensor in numbers.items():
            if not (tensor.is_floating_point() and tensor.isfinite().all()):
                raise ValueError(f"{name} holds values that are not finite numbers")


Step = tuple[Float[Tensor, "batch c h w"], Tensor, Float[Tensor, ""]]  # images, labels, η̃


class Order(ABC):
    """Which images an inner step sees, and at which rate."""

    @abstractmethod
    def total(self, rates: Float[Tensor, "epoch step"]) -> int:
        """T, the number of inner steps."""

    @abstractmethod
    def steps(self, used: Used, draws: Draws, start: int, stop: int) -> Iterator[Step]:
        """Images, labels and rate of inner steps `start` to `stop`."""

    @abstractmethod
    def of_epochs(self, epochs: int) -> tuple["Order", int]:
        """The order of a training of so many epochs, and of how many epochs it has rates."""

    def of_fewer(self, images_per_class: int) -> "Order":
        """The order of a set with so many images of each class."""
        return self

    @abstractmethod
    def check(self, images: Float[Tensor, "step batch c h w"], classes: Int[Tensor, "step batch"], epochs: int) -> None:
        """Refuses distilled data that cannot be used in this order.

        Raises:
            ValueError: saying why.
        """

    def as_dict(self) -> dict[str, Any]:
        """For a card, which says how the data are to be used."""
        choice = next(name for name, kind in ORDERS.items() if isinstance(self, kind))
        return {"choice": choice, "target": f"dd_lightning.unroll.{type(self).__name__}"}


@dataclass(frozen=True)
class FixedOrder(Order):
    """The paper's: the steps in the order of the file, in every epoch, each at its own rate (Section 3.4)."""

    def total(self, rates: Float[Tensor, "epoch step"]) -> int:
        return rates.numel()

    def steps(self, used: Used, draws: Draws, start: int, stop: int) -> Iterator[Step]:
        for epoch, rates in enumerate(used.rates):
            # Cut anew in every epoch: the gradients of an image are then added epoch by epoch, in one order.
            steps = zip(used.images, used.labels, rates, strict=True)
            yield from (step for i, step in enumerate(steps, epoch * len(rates)) if start <= i < stop)

    def of_epochs(self, epochs: int) -> tuple[Order, int]:
        return self, epochs

    def check(self, images: Float[Tensor, "step batch c h w"], classes: Int[Tensor, "step batch"], epochs: int) -> None:
        pass


@dataclass(frozen=True)
class ShuffledOrder(Order):
    """Ordinary training: minibatches that are drawn anew in every inner step, all at one rate.

    Attributes:
        inner_steps: T, of a whole training.
        images_per_class: of each class in a minibatch, without replacement; None takes all.
        classes: in a minibatch, without replacement; None takes all.

    Raises:
        ValueError: a count below 1.
    """

    inner_steps: int
    images_per_class: int | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        check_count(inner_steps=self.inner_steps)
        check_count(**{name: value for name, value in asdict(self).items() if value is not None})

    def total(self, rates: Float[Tensor, "epoch step"]) -> int:
        return self.inner_steps

    def steps(self, used: Used, draws: Draws, start: int, stop: int) -> Iterator[Step]:
        images, labels, classes = (part.flatten(0, 1) for part in used[:3])
        (rate,) = used.rates.flatten().unbind()
        if self.classes is None and self.images_per_class is None:
            yield from ((images, labels, rate) for _ in range(start, stop))
            return
        members = [(classes == k).nonzero().flatten().cpu() for k in classes.unique().tolist()]
        for i in range(start, stop):
            chosen = self.minibatch(members, draws, i).to(images.device)
            yield images[chosen], labels[chosen], rate

    def minibatch(self, members: list[Int[Tensor, " n"]], draws: Draws, step: int) -> Int[Tensor, " batch"]:
        """Which images an inner step sees.

        Args:
            members: the images of each class.
        """
        random = draws.order(step)
        of_classes = range(len(members))
        if self.classes is not None:
            of_classes = torch.randperm(len(members), generator=random)[: self.classes].sort().values.tolist()
        chosen = []
        for k in of_classes:
            order = torch.randperm(len(members[k]), generator=random)[: self.images_per_class]
            chosen.append(members[k][order])
        return torch.cat(chosen)

    def of_epochs(self, epochs: int) -> tuple[Order, int]:
        return replace(self, inner_steps=epochs), 1

    def of_fewer(self, images_per_class: int) -> Order:
        return self if (self.images_per_class or 0) < images_per_class else replace(self, images_per_class=None)

    def check(self, images: Float[Tensor, "step batch c h w"], classes: Int[Tensor, "step batch"], epochs: int) -> None:
        if len(images) != 1 or epochs != 1:
            raise ValueError(
                "order=shuffled has one set of images and one rate: distilled.steps=1 distilled.epochs=1, and "
                f"distilled.images_per_class for more images (here steps={len(images)}, epochs={epochs})"
            )
        counts = torch.bincount(classes.flatten())
        counts = counts[counts > 0]
        if self.classes is not None and self.classes > len(counts):
            raise ValueError(f"order.classes={self.classes}, but the images are of {len(counts)} classes")
        if self.images_per_class is not None and self.images_per_class > counts.max():
            raise ValueError(
                f"order.images_per_class={self.images_per_class}, but no class has more than {int(counts.max())} images"
            )

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | asdict(self)


ORDERS: dict[str, type[Order]] = {"fixed": FixedOrder, "shuffled": ShuffledOrder}


def order_of(card: dict[str, Any]) -> Order:
    """The order in which distilled data are to be used, from their card; the paper's by default.

    Raises:
        ValueError: the card names one that is not known, or settings that it does not have.
    """
    entry = card.get("order")
    if not isinstance(entry, dict):  # older cards describe the paper's in words
        return FixedOrder()
    try:
        return ORDERS[entry["choice"]](
            **{key: value for key, value in entry.items() if key not in ("choice", "target")}
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the card names an unknown order: {entry}") from error
