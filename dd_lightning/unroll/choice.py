"""The fastest gradient of a GD step for a network."""

import logging
from contextlib import suppress

import torch
from torch import nn

from dd_lightning.networks import LANES, Weights, training_without_dropout
from dd_lightning.unroll.gradients import AutogradGradient, Images, StepGradient
from dd_lightning.unroll.layered import LayeredGradient, PlainGradient, StackedGradient
from dd_lightning.unroll.layers import UnsupportedLayerError

log = logging.getLogger(__name__)


def batched_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest for J networks at once: by layers, where the network has rules for them, else with `vmap`.

    Raises:
        ValueError: the network cannot be batched; naming the engine that can.
    """
    name = type(network).__name__
    try:
        return _tried(StackedGradient(network), theta, images)
    except UnsupportedLayerError as reason:
        log.info(f"{name} is batched with vmap, as there is no faster rule for {reason}")
    batched = AutogradGradient(network, batched=True)
    try:
        with torch.no_grad(), training_without_dropout(network):
            batched.logits(theta, images)
    except (RuntimeError, NotImplementedError) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"network {name} cannot be batched over initial weights ({message}); "
            "use unroll=functional, unroll=adjoint, or unroll=recompute unroll.batched=false"
        ) from error
    return batched


def single_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest for one network after the other: by layers, where there are rules for them, else by autograd."""
    try:
        return _tried(PlainGradient(network), theta, images)
    except UnsupportedLayerError as reason:
        log.debug(f"{type(network).__name__} is differentiated by autograd, as there is no faster rule for {reason}")
        return AutogradGradient(network, batched=False)


def first_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest where each network has its own images and nothing but ∇ℓ is wanted.

    Convolutions that are narrow leave torch's own kernels for a CPU half empty; products over patches do not.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if images.device.type == "cpu" and all(module.out_channels <= LANES // 2 for module in convolutions):
        with suppress(UnsupportedLayerError):
            return _tried(StackedGradient(network), theta, images)
    return single_gradient(network, theta, images)


def _tried(gradient: LayeredGradient, theta: Weights, images: Images) -> StepGradient:
    """The same, if one network's gradient is that of autograd: a forward may do what its layers do not show.

    Raises:
        UnsupportedLayerError: it is not.
    """
    single = {name: weight[:1] for name, weight in theta.items()}
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    expected, _ = AutogradGradient(gradient.network, batched=False)(single, images, labels, again=False)
    try:
        found, _ = gradient(single, images, labels, again=False)
        error = sum((found[name] - value).square().sum() for name, value in expected.items())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError) as reason:
        raise UnsupportedLayerError(f"layers that are put together unusually ({type(reason).__name__})") from reason
    if not error <= 1e-6 * sum(value.square().sum() for value in expected.values()):
        raise UnsupportedLayerError("a forward that does more than its layers")
    return gradient
