"""Many networks of one architecture, run from their weights.

A network here is a template: its own weights are never trained. Its weights live in a `Weights` dictionary, in which
every tensor has a leading axis over the J sampled networks.
"""

import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks.calls import run_with
from dd_lightning.networks.formats import memory_format
from dd_lightning.networks.modes import evaluating
from dd_lightning.networks.stem import stem_of

Weights = dict[str, Float[Tensor, "init ..."]]


def frozen(network: nn.Module) -> frozenset[str]:
    """The names of the weights that stay as they were drawn: those that the template has with requires_grad=False.

    Raises:
        ValueError: all do.
    """
    requires_grad = {name: p.requires_grad for name, p in network.named_parameters()}
    if not any(requires_grad.values()):
        raise ValueError(f"network {type(network).__name__} has no trainable parameters")
    return frozenset(name for name, required in requires_grad.items() if not required)


def stack(many: list[dict[str, Tensor]]) -> Weights:
    """One `Weights` of the weights of J single networks; of a single one a view."""
    if len(many) == 1:
        return {name: value[None] for name, value in many[0].items()}
    return {name: torch.stack([one[name] for one in many]) for name in many[0]}


def unstack(weights: Weights) -> list[dict[str, Tensor]]:
    """The J single networks in `weights`."""
    # unbind, because the gradient of indexing J times would be J tensors of the size of all.
    return [
        dict(zip(weights, single, strict=True)) for single in zip(*(v.unbind() for v in weights.values()), strict=True)
    ]


def concatenated(parts: Sequence[Weights]) -> Weights:
    """The networks of all parts; the inverse of `split`."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def count(weights: Weights) -> int:
    """J, the number of networks."""
    return len(next(iter(weights.values())))


def split(weights: Weights, size: int) -> list[Weights]:
    """The networks in parts of about the same number, of at most `size`."""
    parts = zip(*(value.tensor_split(-(-count(weights) // size)) for value in weights.values()), strict=True)
    return [dict(zip(weights, part, strict=True)) for part in parts]


def forward_each(
    network: nn.Module, weights: Weights, images: Float[Tensor, "batch c h w"]
) -> Float[Tensor, "init batch classes"]:
    """Logits of the J networks on the same images, one network after the other, in the mode the template is in."""
    return torch.stack([run_with(network, single, images) for single in unstack(weights)])


def predict(
    network: nn.Module, weights: Weights, images: Float[Tensor, "batch c h w"]
) -> Float[Tensor, "init batch classes"]:
    """Logits of the J networks on the same images, in eval mode."""
    format = memory_format(network, images)
    images = images.to(memory_format=format)
    with evaluating(network):
        stem = stem_of(network, images, format)
        if stem is None:
            return forward_each(network, weights, images)
        logits = []
        for part in split(weights, stem.networks):
            features = stem({name: part.pop(name) for name in stem.names}, images)
            for single, one in zip(unstack(part), stem.inputs(features), strict=True):
                logits.append(run_with(stem.tail, single, one))
        return torch.stack(logits)


def class_name(network: nn.Module) -> str:
    """The importable name of a network's class; of one of ours by its package, wherever in it the class lies."""
    kind = type(network)
    package = kind.__module__.rpartition(".")[0]
    public = package.startswith("dd_lightning.") and getattr(sys.modules[package], kind.__qualname__, None) is kind
    return f"{package if public else kind.__module__}.{kind.__qualname__}"
