"""The fastest gradient of a GD step for a network."""

import logging
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from dd_lightning.networks import Weights, run_with, training_without_dropout
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.unroll.gradients import AutogradGradient, Images, StepGradient
from dd_lightning.unroll.layered import LayeredGradient, PlainGradient, StackedGradient
from dd_lightning.unroll.layers import NARROW, UnsupportedLayerError

log = logging.getLogger(__name__)


def batched_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest for J networks at once: by layers, where the network has rules for them, else with `vmap`.

    Raises:
        ValueError: the network cannot be batched; naming the engine that can.
    """
    name = type(network).__name__
    try:
        return _tried(StackedGradient, network, theta, images)
    except UnsupportedLayerError as reason:
        log.info(f"{name} is batched with vmap, as there is no faster rule for {reason}")
    batched = AutogradGradient(network, batched=True)
    try:
        with torch.no_grad(), training_without_dropout(network):
            batched.logits(theta, images)
    except Exception as error:  # a forward in ordinary Python, which may do anything with what vmap gives it
        if is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"network {name} cannot be batched over initial weights ({message}); "
            "use unroll=functional, unroll=adjoint, or unroll=recompute unroll.batched=false"
        ) from error
    return batched


def single_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest for one network after the other: by layers, where there are rules for them, else by autograd."""
    try:
        return _tried(PlainGradient, network, theta, images)
    except UnsupportedLayerError as reason:
        log.debug(f"{type(network).__name__} is differentiated by autograd, as there is no faster rule for {reason}")
        return AutogradGradient(network, batched=False)


def first_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient:
    """The fastest where each network has its own images and nothing but ∇ℓ is wanted."""
    return narrow_gradient(network, theta, images) or single_gradient(network, theta, images)


def narrow_gradient(network: nn.Module, theta: Weights, images: Images) -> StepGradient | None:
    """By products over patches, where they are faster than torch's own kernels for a CPU, which narrow convolutions
    leave half empty; None elsewhere, or where the rules do not fit.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    narrow = all(module.in_channels * module.out_channels <= NARROW for module in convolutions)
    if images.device.type == "cpu" and convolutions and narrow:
        with suppress(UnsupportedLayerError):
            return _tried(StackedGradient, network, theta, images)
    return None


def real_gradient(network: nn.Module, single: dict[str, Tensor], images: Images) -> PlainGradient | None:
    """By layers, where one network sees a large minibatch, in the mode it is in; None where the rules do not fit.

    Without autograd, which takes every adjoint in the memory format of the forward, the fastest or not.
    """
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return None  # nothing but products
    single, images = {name: weight.detach() for name, weight in single.items()}, images[:2]
    try:
        rules = PlainGradient(network)
        _, found, of_images = rules.of_loss(single, images, _mixed, wanted=True)
        leaves = {"": images.detach(), **single}
        leaves = {name: value.requires_grad_() for name, value in leaves.items()}
        with torch.enable_grad():
            loss = _mixed(run_with(network, {n: v for n, v in leaves.items() if n}, leaves[""]))
        expected = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    except Exception as reason:  # as in `_tried`
        if is_out_of_memory(reason):
            raise
        return None
    assert of_images is not None
    return rules if _near({"": of_images, **found}, dict(zip(leaves, expected, strict=True)), 1e-3) else None


def _mixed(logits: Tensor) -> Tensor:
    """A loss in which every logit counts."""
    weights = torch.linspace(1, 2, logits.numel(), dtype=logits.dtype, device=logits.device)
    return (logits.square() * weights.view(logits.shape)).sum()


def _near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> bool:
    error = sum((found[name] - value).square().sum() for name, value in expected.items())
    return bool(error <= tolerance**2 * sum(value.square().sum() for value in expected.values()))


def _tried(
    rules: Callable[[nn.Module], LayeredGradient], network: nn.Module, theta: Weights, images: Images
) -> StepGradient:
    """By layers, if one network's gradient and its derivative are autograd's: a forward may do what no layer shows.

    Raises:
        UnsupportedLayerError: they are not, or cannot be had.
    """
    single = {name: weight[:1] for name, weight in theta.items()}
    try:
        layered = rules(network)
        found, expected = (_trial(one, single, images) for one in (layered, AutogradGradient(network, batched=False)))
    except UnsupportedLayerError:
        raise
    except Exception as reason:  # autograd is never worse than a rule that a forward does not fit
        if is_out_of_memory(reason):
            raise
        raise UnsupportedLayerError(f"layers that are put together unusually ({type(reason).__name__})") from reason
    # Second derivatives are rounded more.
    for one, other, tolerance in zip(found, expected, (1e-3, 1e-2), strict=True):
        if not _near(one, other, tolerance):
            raise UnsupportedLayerError("a forward that does more than its layers")
    return layered


def _trial(gradient: StepGradient, theta: Weights, images: Images) -> tuple[Weights, dict[str, Tensor]]:
    """∇ℓ, and its derivative in a direction in which every weight moves."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    theta = gradient.prepared(theta)
    found, tape = gradient(theta, images, labels, again=True)
    direction = {
        n: torch.linspace(-1, 1, w.numel(), dtype=w.dtype, device=w.device).view(w.shape) for n, w in theta.items()
    }
    product, of_images, _ = gradient.derivative(tape, direction)
    return found, {**product, "": of_images}
