"""Distilled data: a few images, their labels and learning rates, in the order in which they are used."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import safetensors
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from dd_lightning.data import Augment, Unchanged, augment_of
from dd_lightning.networks import training_without_dropout
from dd_lightning.system.atomic import write_bytes
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.unroll import Draws, FixedOrder, Order, Step, Used, inner_optimizer, order_of

FORMAT = "dd_lightning.distilled/1"
INITIAL = "initial_weights/"  # prefix of the tensors of θ₀ in the file


def softplus_inverse(x: Tensor) -> Tensor:
    """The raw value whose softplus is `x` > 0: log(eˣ − 1) = x + log(1 − e⁻ˣ)."""
    return x + torch.log(-torch.expm1(-x))


@dataclass(frozen=True)
class DistilledData:
    """M distilled images x̃ with labels, learning rates η̃, and the order in which an inner loop uses them.

    In the paper's order there is one minibatch for each GD step, and one rate for each GD step of each epoch (Section
    3.4); in shuffled order one set of images and one rate.

    Attributes:
        images: normalised pixels, never clipped; one minibatch per GD step.
        labels: class of each image; fixed (Section 3.1).
        raw_learning_rates: η̃ before the softplus that keeps it positive (Section S-1); not tied across epochs.
        card: what the data were made for: classes, preprocessing, network, init, objective, accuracy.
        initial_weights: the network θ₀ for which the data were distilled, where it is one fixed network.
        soft_labels: real numbers for each class, used instead of `labels` where they were learned.
        order: which images an inner step sees, and at which rate.
        augment: what an inner step does to its images.

    Example:
        >>> data = DistilledData.create(torch.randn(2, 10, 1, 28, 28), torch.arange(10).expand(2, 10), epochs=3)
        >>> data.learning_rates.shape, len(list(data.steps()))
        (torch.Size([3, 2]), 6)
    """

    images: Float[Tensor, "step batch c h w"]
    labels: Int[Tensor, "step batch"]
    raw_learning_rates: Float[Tensor, "epoch step"]
    card: dict[str, Any] = field(default_factory=dict)
    initial_weights: dict[str, Tensor] | None = None
    soft_labels: Float[Tensor, "step batch classes"] | None = None
    order: Order = field(default_factory=FixedOrder)
    augment: Augment = field(default_factory=Unchanged)

    @classmethod
    def create(
        cls,
        images: Float[Tensor, "step batch c h w"],
        labels: Int[Tensor, "step batch"],
        epochs: int = 1,
        learning_rate: float | Sequence[float] = 0.02,
    ) -> Self:
        """Distilled data with every learning rate η̃ equal to `learning_rate`: one value, or one for each epoch.

        Raises:
            ValueError: epochs below 1, a learning rate that is not positive, or not one for each epoch.
        """
        check_count(epochs=epochs)
        of_epoch = list(learning_rate) if isinstance(learning_rate, Sequence) else [learning_rate] * epochs
        check_positive(**{f"learning_rate[{epoch}]": value for epoch, value in enumerate(of_epoch)})
        if len(of_epoch) != epochs:
            raise ValueError(f"learning_rate has {len(of_epoch)} values for {epochs} epochs")
        rates = torch.tensor(of_epoch, dtype=torch.float64)[:, None].expand(-1, len(images))
        return cls(images, labels, softplus_inverse(rates).to(images.dtype))

    @property
    def learning_rates(self) -> Float[Tensor, "epoch step"]:
        """η̃ > 0."""
        return F.softplus(self.raw_learning_rates)

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1 if self.soft_labels is None else self.soft_labels.shape[-1]

    @property
    def inner_steps(self) -> int:
        """T, the number of inner steps of a whole training."""
        return self.order.total(self.raw_learning_rates)

    @property
    def stored_numbers(self) -> int:
        """Pixels, learned labels and rates: what the data cost to keep."""
        soft = 0 if self.soft_labels is None else self.soft_labels.numel()
        return self.images.numel() + soft + self.raw_learning_rates.numel()

    def steps(self, draws: Draws | None = None, start: int = 0, stop: int | None = None) -> Iterator[Step]:
        """(x̃ᵢ, ỹᵢ, η̃ᵢ) of inner steps `start` to `stop`; of all T by default.

        Args:
            draws: the random numbers of order and augmentation; the same for the same, as often as it is asked.
        """
        draws, stop = draws or Draws(), self.inner_steps if stop is None else stop
        labels = self.labels if self.soft_labels is None else self.soft_labels
        used = Used(self.images, labels, self.labels, self.learning_rates)
        for i, (images, of_step, rate) in enumerate(self.order.steps(used, draws, start, stop), start):
            yield self.augment(images, draws.augment(i)), of_step, rate

    def of_epochs(self, epochs: int, raw_learning_rates: Float[Tensor, "epoch step"] | None = None) -> Self:
        """The same images for so many epochs; in shuffled order for so many inner steps.

        Args:
            raw_learning_rates: of so many epochs at least; by default each has the rates of the first.
        """
        order, rates = self.order.of_epochs(epochs)
        raw = self.raw_learning_rates[:1].expand(rates, -1) if raw_learning_rates is None else raw_learning_rates
        return replace(self, order=order, raw_learning_rates=raw[:rates].to(self.images))

    def dataset(self) -> "DistilledDataset":
        """The images and labels as an ordinary data set, for a loop of one's own."""
        return DistilledDataset(self.detach())

    def train(self, network: nn.Module) -> nn.Module:
        """Trains `network` in place on the mean cross entropy, with the inner optimizer of the card: plain GD, Eq. (9).

        Data that were distilled for one fixed network bring its weights θ₀, which are loaded first. The network's
        inputs must be normalised as `card["preprocessing"]` says.

        Args:
            network: takes images of shape [batch, c, h, w] and returns logits.

        Returns:
            The same network, in the mode (train or eval) it came in.

        Raises:
            ValueError: the data belong to a fixed network of other shapes.
        """
        if self.initial_weights is not None:
            try:
                network.load_state_dict(self.initial_weights, strict=False)
            except RuntimeError as error:
                raise ValueError(
                    "these data were distilled for one fixed network, whose weights do not fit this "
                    f"{type(network).__name__}"
                ) from error
        theta: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
        like = next(iter(theta.values()))
        optimizer = inner_optimizer(self.card)
        state = optimizer.init(theta)
        with training_without_dropout(network):
            for images, labels, learning_rate in self.detach().to(like.device, like.dtype).steps():
                loss = F.cross_entropy(network(images), labels)
                found = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
                gradients = dict(zip(theta, found, strict=True))
                with torch.no_grad():
                    updated, state = optimizer.update(theta, gradients, state, learning_rate)
                    for name, parameter in theta.items():
                        parameter.copy_(updated[name])
        return network

    def detach(self) -> Self:
        """A copy that shares nothing with the tensors being optimised."""
        return replace(
            self,
            images=self.images.detach().clone(),
            labels=self.labels.clone(),
            raw_learning_rates=self.raw_learning_rates.detach().clone(),
            soft_labels=None if self.soft_labels is None else self.soft_labels.detach().clone(),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return replace(
            self,
            images=self.images.to(device, dtype),
            labels=self.labels.to(device),
            raw_learning_rates=self.raw_learning_rates.to(device, dtype),
            soft_labels=None if self.soft_labels is None else self.soft_labels.to(device, dtype),
        )

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, atomically; the card is its metadata."""
        tensors = {
            "images": self.images,
            "labels": self.labels,
            "raw_learning_rates": self.raw_learning_rates,
            **({} if self.soft_labels is None else {"soft_labels": self.soft_labels}),
            **{INITIAL + name: value for name, value in (self.initial_weights or {}).items()},
        }
        named = self.card.get("order")
        order = (named if isinstance(named, dict) else {}) | self.order.as_dict()
        card = {"format": FORMAT, **self.card, "order": order, "learning_rates": self.learning_rates.tolist()}
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_bytes(path, save(contiguous, metadata={"card": json.dumps(card)}))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads what `save` wrote; `path` may also be the run's folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, not safetensors, or not distilled data.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "distilled.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"there is no distilled data at {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                card = json.loads((file.metadata() or {}).get("card", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file, but holds no distilled data")
        missing = [name for name in ("images", "labels", "raw_learning_rates") if name not in tensors]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        initial = {n.removeprefix(INITIAL): t for n, t in tensors.items() if n.startswith(INITIAL)}
        main = (tensors["images"], tensors["labels"], tensors["raw_learning_rates"])
        soft = tensors.get("soft_labels")
        data = cls(*main, card, initial or None, soft, order_of(card), augment_of(card))
        _check_tensors(data, path)
        return data


def _check_tensors(data: DistilledData, path: Path) -> None:
    """Refuses tensors of a file that do not fit together, or are not what they should be.

    Raises:
        ValueError: saying which.
    """
    images, labels, rates = data.images.shape, data.labels.shape, data.raw_learning_rates.shape
    if len(images) != 5 or labels != images[:2] or len(rates) != 2 or rates[1] != images[0]:
        raise ValueError(
            f"{path}: images {list(images)}, labels {list(labels)} and learning rates {list(rates)} do not fit together"
        )
    if data.labels.is_floating_point() or data.labels.numel() == 0 or data.labels.min() < 0:
        raise ValueError(f"{path}: labels must be whole numbers from 0")
    soft = data.soft_labels
    if soft is not None and (soft.shape[:-1] != labels or soft.ndim != 3 or data.labels.max() >= soft.shape[-1]):
        raise ValueError(f"{path}: soft_labels {list(soft.shape)} do not fit labels {list(labels)}")
    numbers = {"images": data.images, "raw_learning_rates": data.raw_learning_rates, "soft_labels": soft}
    for name, tensor in numbers.items():
        if tensor is not None and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds values that are not finite numbers")
    data.order.check(data.images, data.labels, len(data.raw_learning_rates))


class DistilledDataset(Dataset[tuple[Tensor, Tensor]]):
    """Distilled images and their labels, one after the other.

    Attributes:
        images: [n, c, h, w], normalised as `card["preprocessing"]` says.
        labels: classes [n], or real numbers [n, classes]; `F.cross_entropy` takes both.
        learning_rates: of each epoch and step; of data in shuffled order a single one, for the card's inner optimizer.
        inner_steps: how many the data were made for.
        card: all else that is known of the data.
    """

    def __init__(self, distilled: DistilledData) -> None:
        self.images = distilled.images.flatten(0, 1)
        self.labels = (distilled.labels if distilled.soft_labels is None else distilled.soft_labels).flatten(0, 1)
        self.learning_rates, self.inner_steps = distilled.learning_rates, distilled.inner_steps
        self.card = distilled.card

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
