"""Memory formats: the order of a tensor's numbers in memory that is fastest."""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks.calls import run_with

_FORMATS: WeakKeyDictionary[nn.Module, torch.memory_format] = WeakKeyDictionary()


def memory_format(network: nn.Module, images: Float[Tensor, "batch c h w"]) -> torch.memory_format:
    """The format of images and weights that a network is fastest on: channels last, on CPUs, where it takes that."""
    if images.device.type != "cpu":
        return torch.contiguous_format
    if network not in _FORMATS:
        _FORMATS[network] = torch.channels_last
        try:
            with torch.no_grad():
                # With the weights too: of one channel alone, a format of the images does not reach what follows.
                weights = {name: channels_last(weight) for name, weight in network.named_parameters()}
                run_with(network, weights, images[:2].to(memory_format=torch.channels_last))
        except RuntimeError:  # such as a `view` of what channels last leaves scattered
            _FORMATS[network] = torch.contiguous_format
    return _FORMATS[network]


def channels_last(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A convolution's weight [..., in, h, w] in the format that CPUs compute in; others as they are."""
    on_cpu = weight.device.type == "cpu" and weight.ndim >= 4
    return weight.movedim(-3, -1).contiguous().movedim(-1, -3) if on_cpu else weight
