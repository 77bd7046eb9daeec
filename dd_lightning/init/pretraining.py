"""Training of well-optimized networks, many at once (Section 3.5): the populations that distilled data fine-tune."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap

from dd_lightning.data import OwnMinibatches, RealData
from dd_lightning.init.random import RandomInit
from dd_lightning.networks import (
    Weights,
    concatenated,
    count,
    frozen,
    predictions,
    run_with,
    split,
    stack,
    training_without_dropout,
)
from dd_lightning.system.checks import check_betas, check_choice, check_count, check_positive
from dd_lightning.system.processor import PRECISIONS, is_out_of_memory
from dd_lightning.system.seeding import Stream, derive_seed
from dd_lightning.unroll import first_gradient


@dataclass(frozen=True)
class Recipe:
    """How every network of a population is trained: Adam, its step size halved at intervals.

    Args:
        epochs: passes over the training pictures.
        lr: step size.
        halve_every: epochs after which the step size is halved.
        betas: of Adam.
        precision: of the gradients: float32, or bfloat16, which is faster on processors that have instructions for it.
            The weights are kept in float32.

    Raises:
        ValueError: a count below 1, a step size that is not positive, a beta outside 0 to 1, or another precision.
    """

    epochs: int
    lr: float
    halve_every: int
    betas: Sequence[float] = (0.5, 0.999)
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_count(epochs=self.epochs, halve_every=self.halve_every)
        check_positive(lr=self.lr)
        check_choice("precision", self.precision, PRECISIONS)
        check_betas(self.betas)


def train(
    network: nn.Module,
    weights: Weights,
    streams: Sequence[RealData],
    recipe: Recipe,
    on_epoch: Callable[[], None] = lambda: None,
) -> Weights:
    """Trains J networks at once, each on its own stream of minibatches.

    Args:
        network: the template. Runs in train mode with dropout off.
        weights: initial weights of the J networks.
        streams: of each network; they differ in their seed alone.
        on_epoch: called after every epoch.

    Returns:
        The trained weights.
    """
    minibatch, per_epoch = OwnMinibatches(streams), streams[0].batches_per_epoch
    gradient, dtype = _gradient(network, weights, minibatch(0)[0]), PRECISIONS[recipe.precision]
    flat, named = _flat(weights)
    flat.grad = torch.zeros_like(flat)
    gradients = named(flat.grad)
    # Elementwise, so that one Adam of all weights is an Adam of each.
    betas = (recipe.betas[0], recipe.betas[1])
    optimizer = torch.optim.Adam([flat], lr=recipe.lr, betas=betas, fused=True)
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.lr * 0.5 ** (epoch // recipe.halve_every)
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            images, labels = minibatch(step)
            for name, found in gradient(named(flat.to(dtype)), images.to(dtype), labels).items():
                gradients[name].copy_(found)
            optimizer.step()
        on_epoch()
    return named(flat)


def _flat(weights: Weights) -> tuple[Float[Tensor, "init flat"], Callable[[Tensor], Weights]]:
    """All weights of a network in a row, and what finds them there by name.

    Rows are as long as a whole number of vector registers: else the number of rows would say which weights an
    optimizer takes one by one, with another rounding.
    """
    shapes = {name: value.shape for name, value in weights.items()}
    lengths = [shape[1:].numel() for shape in shapes.values()]
    lengths.append(-sum(lengths) % 64)

    def named(flat: Tensor) -> Weights:
        parts = flat.split(lengths, dim=1)[:-1]
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    flat = next(iter(weights.values())).new_zeros(count(weights), sum(lengths))
    for name, value in named(flat).items():
        value.copy_(weights[name])
    return flat, named


def _gradient(
    network: nn.Module, theta: Weights, images: Float[Tensor, "init batch c h w"]
) -> Callable[[Weights, Tensor, Tensor], Weights]:
    """The gradient of each network's mean cross entropy on its own images: the fastest way for these."""
    if len(images) > 1 and images.device.type != "cpu":
        return partial(_gradient_of_many, network)
    alone = first_gradient(network, theta, images[0])

    def each(theta: Weights, images: Tensor, labels: Tensor) -> Weights:
        # One after the other: a CPU keeps at hand what it works on, and no network changes another's rounding.
        own = zip(split(theta, 1), images, labels, strict=True)
        found = [alone(alone.prepared(single), x, y, again=False)[0] for single, x, y in own]
        return concatenated(found)

    return each


def _gradient_of_many(
    network: nn.Module,
    theta: Weights,
    images: Float[Tensor, "init batch c h w"],
    labels: Int[Tensor, "init batch"],
) -> Weights:
    fixed = frozen(network)
    leaves = {name: theta[name].detach().requires_grad_() for name in theta if name not in fixed}
    logits = forward_own(network, theta | leaves, images)
    # The sum over networks of each network's mean: no network sees another's gradient.
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) * len(images)
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {name: torch.zeros_like(value) for name, value in theta.items()} | dict(zip(leaves, found, strict=True))


def forward_own(
    network: nn.Module, weights: Weights, images: Float[Tensor, "init batch c h w"]
) -> Float[Tensor, "init batch classes"]:
    """Logits of J networks in train mode with dropout off, each on its own images."""
    with training_without_dropout(network):
        return vmap(lambda single, own: run_with(network, single, own))(weights, images)


def train_networks(
    network: nn.Module,
    init: RandomInit,
    data: RealData,
    recipe: Recipe,
    indices: range,
    at_once: int = 1,
    on_epoch: Callable[[float], None] = lambda networks: None,
) -> tuple[Weights, Float[Tensor, " network"]]:
    """Trains and tests networks of a population, on the device of `data`.

    What a network draws follows from `(init.seed, index)`: which are trained together changes nothing on a CPU, and
    their rounding alone on a GPU.

    Args:
        network: the template, on the device of `data`.
        init: the distribution of the initial weights.
        indices: of the networks in their population.
        at_once: networks trained together.
        on_epoch: told how much was trained, in networks.

    Returns:
        The weights, and each network's accuracy in % on the test set.

    Raises:
        FloatingPointError: naming a network whose training diverged.
    """
    trained = []
    for start in range(indices.start, indices.stop, at_once):
        chunk = range(start, min(start + at_once, indices.stop))
        weights = stack([init.draw(network, Stream.PRETRAINING, index) for index in chunk])
        streams = [data.reseeded(derive_seed(init.seed, Stream.PRETRAINING, index)) for index in chunk]
        share = len(chunk) / recipe.epochs
        trained.append(train(network, weights, streams, recipe, lambda share=share: on_epoch(share)))
    weights = concatenated(trained)
    diverged = [i for row, i in enumerate(indices) if not all(v[row].isfinite().all() for v in weights.values())]
    if diverged:
        raise FloatingPointError(f"the weights of network {diverged[0]} are not finite; try a smaller recipe.lr")
    tested = predictions(network, weights, data.test.images, data.test.labels, data.preprocessing)
    return weights, tested.accuracy()


def check_batched(network: nn.Module, init: RandomInit, data: RealData) -> None:
    """Refuses a network that cannot be trained many at once.

    Raises:
        ValueError: naming the setting that trains it alone.
    """
    weights = stack([init.draw(network, Stream.PRETRAINING, index) for index in range(2)])
    images = data.preprocessing(data.train.images[:2]).expand(2, -1, -1, -1, -1)
    try:
        with torch.no_grad():
            forward_own(network, weights, images)
    except Exception as error:  # a forward in ordinary Python, which may do anything with what vmap gives it
        if is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"network {type(network).__name__} cannot be trained many at once ({message}); use at_once=1"
        ) from error
