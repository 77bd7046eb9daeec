"""Distilled data: a few images, their labels and learning rates, in the order in which they are used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.data import Augment, DistilledDataset, Preprocessing, Unchanged, Whitening, augment_of, whitening_of
from dd_lightning.networks import completed, load_weights, training_without_dropout
from dd_lightning.parametrisation import Images, Pixels, images_of, softplus_inverse
from dd_lightning.system.cards import check_card
from dd_lightning.system.checks import check_count, check_positive
from dd_lightning.system.gallery import located, whole, widened
from dd_lightning.system.tensors import read_tensors, write_tensors
from dd_lightning.unroll import Draws, FixedOrder, Order, Step, Used, inner_optimizer, order_of

FORMAT = "dd_lightning.distilled/1"
OTHERS = "other_initial_weights"  # on the card: what weights of θ₀ are that are not in the file, and their hash
INITIAL, WHITENING = "initial_weights/", "whitening/"  # prefixes of the tensors of θ₀ and of a whitening in the file


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
        initial_weights: the network θ₀ of the data, where it is one fixed one; of published weights its last layer.
        soft_labels: real numbers for each class, used instead of `labels` where they were learned.
        order: which images an inner step sees, and at which rate.
        augment: what an inner step does to its images.
        parametrisation: the map from what was learned of the images to images.
        raw_images: what was learned of them, and is stored; None where that are their pixels.
        whitening: of the pictures that the images are like.

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
    parametrisation: Images = field(default_factory=Pixels)
    raw_images: dict[str, Tensor] | None = None
    whitening: Whitening | None = None

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
    def learned_images(self) -> dict[str, Tensor]:
        """What is learned of the images: their pixels, or what they are made of."""
        return {"images": self.images} if self.raw_images is None else self.raw_images

    @property
    def stored_numbers(self) -> int:
        """Pixels or what they are made of, learned labels and rates: what the data cost to keep."""
        soft = 0 if self.soft_labels is None else self.soft_labels.numel()
        return sum(t.numel() for t in self.learned_images.values()) + soft + self.raw_learning_rates.numel()

    @property
    def preprocessing(self) -> Preprocessing:
        """Makes of pictures (uint8, [n, c, h, w]) what networks that are trained on these data take."""
        return Preprocessing.of_card(self.card, self.whitening)

    @property
    def _used(self) -> Used:
        labels = self.labels if self.soft_labels is None else self.soft_labels
        return Used(self.images, labels, self.labels, self.learning_rates)

    def steps(self, draws: Draws | None = None, start: int = 0, stop: int | None = None) -> Iterator[Step]:
        """(x̃ᵢ, ỹᵢ, η̃ᵢ) of inner steps `start` to `stop`; of all T by default.

        Args:
            draws: the random numbers of order and augmentation; the same for the same, as often as it is asked.
        """
        draws, stop = draws or Draws(), self.inner_steps if stop is None else stop
        for i, (images, of_step, rate) in enumerate(self.order.steps(self._used, draws, start, stop), start):
            yield self.augment(images, draws.augment(i)), of_step, rate

    def of_epochs(self, epochs: int, raw_learning_rates: Float[Tensor, "epoch step"] | None = None) -> Self:
        """The same images for so many epochs; in shuffled order for so many inner steps.

        Args:
            raw_learning_rates: of so many epochs at least; by default each has the rates of the first.
        """
        order, rates = self.order.of_epochs(epochs)
        raw = self.raw_learning_rates[:1].expand(rates, -1) if raw_learning_rates is None else raw_learning_rates
        return replace(self, order=order, raw_learning_rates=raw[:rates].to(self.images))

    @property
    def places(self) -> Int[Tensor, "step batch"]:
        """Of each image among those of its class, from 1."""
        return F.one_hot(self.labels).cumsum(1).gather(2, self.labels[..., None]).squeeze(2)

    def first(self, images_per_class: int) -> Self:
        """The first so many images of each class, of every step."""
        kept = self.chosen((self.places[0] <= images_per_class).nonzero().flatten())
        return replace(kept, order=self.order.of_fewer(images_per_class))

    def chosen(self, which: Int[Tensor, " n"]) -> Self:
        """Some images of every step, by their numbers, in this order."""
        name = self.parametrisation.names[0]
        raw = None if self.raw_images is None else self.raw_images | {name: self.raw_images[name][:, which]}
        soft = None if self.soft_labels is None else self.soft_labels[:, which]
        cut = {"images": self.images[:, which], "labels": self.labels[:, which]}
        return replace(self, **cut, soft_labels=soft, raw_images=raw)

    def prefix(self, images_per_class: int) -> Self:
        """Of a set that was grown, the images of a stage, with the learning rates that it ended with.

        Raises:
            ValueError: that was never a stage.
        """
        stages = self.card.get("stages", {})
        if str(images_per_class) not in stages:
            grown = f"those are {', '.join(stages)}" if stages else "these data were not grown"
            raise ValueError(f"{images_per_class} images a class were never a stage; {grown}")
        rates = self.raw_learning_rates.new_tensor(stages[str(images_per_class)])
        cut = replace(self.first(images_per_class), raw_learning_rates=rates)
        cut._used.check()
        return cut.with_card(stored_numbers=cut.stored_numbers, stages={})

    def with_card(self, **entries: Any) -> Self:
        """The same with more on its card."""
        return replace(self, card=self.card | entries)

    def dataset(self) -> DistilledDataset:
        """The images and labels as an ordinary data set, for a loop of one's own."""
        own = self.detach()
        rates, form = own.learning_rates, self.preprocessing if "preprocessing" in self.card else None
        return DistilledDataset(own.images, own._used.labels, rates, self.inner_steps, self.card, form)

    def train(self, network: nn.Module) -> nn.Module:
        """Trains `network` in place on the mean cross entropy, with the inner optimizer of the card: plain GD, Eq. (9).

        Data that were distilled for one fixed network bring its weights θ₀, which are loaded first. The network's
        inputs must be normalised as `card["preprocessing"]` says.

        Args:
            network: takes images of shape [batch, c, h, w] and returns logits.

        Returns:
            The same network, in the mode (train or eval) it came in.

        Raises:
            ValueError: the data belong to a fixed network with other weights; the message names those that differ.
        """
        if self.initial_weights is not None:
            try:
                weights, others = self.initial_weights, self.card.get(OTHERS)
                load_weights(network, completed(network, weights, others) if others else weights)
            except ValueError as error:
                raise ValueError(f"these data were distilled for one fixed network; {error}") from error
        theta: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
        like = next(iter(theta.values()))
        optimizer = inner_optimizer(self.card)
        state = optimizer.init(theta)
        with training_without_dropout(network):
            for images, labels, learning_rate in self.detach().to(like.device, like.dtype).steps():
                # A forward may change its images in place, and later epochs use them again.
                loss = F.cross_entropy(network(images.clone()), labels)
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
            raw_images=self._raw_images(lambda tensor: tensor.detach().clone()),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return replace(
            self,
            images=self.images.to(device, dtype),
            labels=self.labels.to(device),
            raw_learning_rates=self.raw_learning_rates.to(device, dtype),
            soft_labels=None if self.soft_labels is None else self.soft_labels.to(device, dtype),
            raw_images=self._raw_images(lambda tensor: tensor.to(device, dtype)),
        )

    def _raw_images(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor] | None:
        return None if self.raw_images is None else {name: change(value) for name, value in self.raw_images.items()}

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, atomically; the card is its metadata.

        What was learned is stored: where that are not the pixels of the images, `load` makes the images.
        """
        tensors = {
            **self.learned_images,
            "labels": self.labels,
            "raw_learning_rates": self.raw_learning_rates,
            **({} if self.soft_labels is None else {"soft_labels": self.soft_labels}),
            **{INITIAL + name: value for name, value in (self.initial_weights or {}).items()},
            **({} if self.whitening is None else {WHITENING + n: t for n, t in self.whitening.tensors().items()}),
        }
        named = self.card.get("order")
        order = (named if isinstance(named, dict) else {}) | self.order.as_dict()
        card = {"format": FORMAT, **self.card, "order": order, "learning_rates": self.learning_rates.tolist()}
        write_tensors(path, tensors, card | {"images": self.parametrisation.as_dict()})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads what `save` wrote; `path` may also be the run's folder, or `gallery:NAME` of the data in this package.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, not safetensors, or not distilled data.
        """
        path = located(path)
        path = path / "distilled.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no distilled data at {path}")
        card, tensors = read_tensors(path, FORMAT, "distilled data", check_card)
        tensors = {name: widened(tensor) for name, tensor in tensors.items()}
        initial, whitening = (
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            for prefix in (INITIAL, WHITENING)
        )
        try:
            parametrisation = images_of(card)
            missing = [n for n in (*parametrisation.names, "labels", "raw_learning_rates") if n not in tensors]
            if missing:
                raise ValueError(f"the file lacks {', '.join(missing)}")
            raw = {name: tensors[name] for name in parametrisation.names}
            images, stored = parametrisation.images(raw), None if "images" in raw else raw
            white = whitening_of(whitening, images.shape[2:].numel()) if whitening else None
            main = (images, whole(tensors["labels"]), tensors["raw_learning_rates"], card, initial or None)
            how = (order_of(card), augment_of(card), parametrisation, stored, white)
            data = cls(*main, tensors.get("soft_labels"), *how)
            inner_optimizer(card)  # which training asks for
            data._used.check()
            if "preprocessing" in card and data.preprocessing.image_shape != images.shape[2:]:
                raise ValueError(f"images {list(images.shape)} are not those of the card's preprocessing")
            data.order.check(images, data.labels, len(data.raw_learning_rates))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {error}") from error
        return data
