"""Which networks can be distilled for."""

import torch
from torch import Tensor, nn

from dd_lightning.networks.modes import training_without_dropout


def check_network(network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Refuses, before any work is done, a network that cannot be distilled for.

    Args:
        image_shape: (channels, height, width) of the data set's images.

    Raises:
        ValueError: the network does not take these images, does not return one logit per class, has state that
            training changes (such as BatchNorm's running statistics), or is random in training.
    """
    name = type(network).__name__
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"network {name} has no trainable parameters")
    like = next(network.parameters())
    shape = "×".join(map(str, image_shape))
    before = {key: value.clone() for key, value in network.named_buffers()}
    images = torch.linspace(-1, 1, 4 * image_shape[0] * image_shape[1] * image_shape[2])
    images = images.reshape(4, *image_shape).to(like.device, like.dtype)
    with torch.no_grad(), training_without_dropout(network):
        try:
            logits = network(images)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"network {name} does not take the data set's {shape} images: {message}") from error
        again = network(images)
    changed = [key for key, value in network.named_buffers() if not torch.equal(value, before[key])]
    network.load_state_dict(before, strict=False)
    if not isinstance(logits, Tensor) or logits.shape != (4, num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"network {name} returns {got} for 4 images; the data set's {num_classes} classes need [4, {num_classes}]"
        )
    if changed:
        raise ValueError(
            f"network {name} keeps state that training changes ({', '.join(changed[:3])}), which would leak from one "
            "sampled network to the next; use GroupNorm, or BatchNorm with track_running_stats=False"
        )
    if not torch.equal(logits, again):
        raise ValueError(f"network {name} is random in train mode; switch its randomness off")
