"""Which networks can be distilled for."""

import logging
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dd_lightning.networks.modes import evaluating, training_without_dropout
from dd_lightning.networks.predictions import BATCH
from dd_lightning.networks.weights import frozen
from dd_lightning.system.processor import is_out_of_memory

log = logging.getLogger(__name__)


def check_network(network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Refuses, before any work is done, a network that cannot be distilled for.

    Args:
        image_shape: (channels, height, width) of the data set's images.

    Raises:
        ValueError: the network does not take these images, does not return one logit per class, changes its images
            or its own state (such as BatchNorm's running statistics), or is random in training.
    """
    name = type(network).__name__
    frozen(network)
    like = next(network.parameters())
    images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    before = {key: value.clone() for key, value in _state(network).items() if not is_lazy(value)}
    logits, again = (_logits(network, images, training_without_dropout(network)) for _ in range(2))
    many, few = (_logits(network, part, evaluating(network)) for part in (images, images[:2]))
    changed = [key for key, value in _state(network).items() if not torch.equal(value, before.get(key, value))]
    for key in changed:
        _state(network)[key].data = before[key]
    for found in (logits, many):
        if not isinstance(found, Tensor) or found.shape != (4, num_classes):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            need = f"[4, {num_classes}]"
            raise ValueError(
                f"network {name} returns {got} for 4 images; the data set's {num_classes} classes need {need}"
            )
    if changed:
        raise ValueError(
            f"network {name} keeps state that its forward changes ({', '.join(changed[:3])}), which would leak from "
            "one sampled network to the next; use GroupNorm or InstanceNorm instead of BatchNorm"
        )
    if not torch.equal(logits, again):
        raise ValueError(f"network {name} is random in train mode; switch its randomness off")
    if not torch.allclose(many[:2], few, rtol=1e-2, atol=1e-3):
        log.warning(
            f"what network {name} predicts for a picture depends on the others beside it, such as by BatchNorm without "
            f"running statistics: tests take {BATCH} pictures at a time, and hold for that alone; use GroupNorm or "
            "InstanceNorm instead"
        )


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _logits(
    network: nn.Module, images: Float[Tensor, "batch c h w"], mode: AbstractContextManager[None]
) -> Float[Tensor, "batch classes"]:
    """What the network returns for images that it leaves as they are.

    Raises:
        ValueError: it does not take them, or changes them.
    """
    name, shape, own = type(network).__name__, "×".join(map(str, images.shape[1:])), images.clone()
    with torch.no_grad(), mode:
        try:
            logits, changes = network(own), own._version
        except Exception as error:  # whatever a user's forward raises
            if is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"network {name} does not take the data set's {shape} images: {message}") from error
    if changes or not torch.equal(own, images):
        raise ValueError(
            f"network {name} changes its images in place, which every step shares; make it copy them first"
        )
    return logits
