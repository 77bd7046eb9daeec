"""Networks, and how to run many of them from their weights.

A network here is a template: its own weights are never trained. Its weights live in a `Weights` dictionary, in which
every tensor has a leading axis over the J sampled networks.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from dd_lightning.stem import stem_of

Weights = dict[str, Float[Tensor, "init ..."]]


class MaxPool2d(nn.MaxPool2d):
    """torch's layer, as slow as a convolution on a CPU: without gradients the maximum of slices is faster."""

    def forward(self, input: Tensor) -> Tensor:
        size = self.kernel_size
        tiles = size == self.stride and not self.padding and not self.ceil_mode and self.dilation == 1
        if torch.is_grad_enabled() or not tiles or not isinstance(size, int) or input.device.type != "cpu":
            return F.max_pool2d(input, size, self.stride, self.padding, self.dilation, self.ceil_mode)
        rows, columns = (size * (n // size) for n in input.shape[-2:])
        y = functools.reduce(torch.maximum, [input[..., i:rows:size, :] for i in range(size)])
        return functools.reduce(torch.maximum, [y[..., i:columns:size] for i in range(size)])


class LeNet(nn.Module):
    """LeNet (LeCun et al., 1998) with ReLU and max pooling, 6-16-120-84.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels; 28 is padded to the 32 of the original.
        num_classes: number of logits.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        super().__init__()
        if image_size < 16:
            raise ValueError(f"LeNet needs images of at least 16 pixels, not {image_size}")
        padding = 2 if image_size == 28 else 0
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=padding)
        self.pool = MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        side = ((image_size + 2 * padding - 4) // 2 - 4) // 2
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        # Pooling and ReLU commute; ReLU has a quarter of the work after the pool.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch's layer with the sum over neighbouring channels as a 1×1 convolution: several times faster on a CPU."""

    def forward(self, input: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        channels = input.shape[1]
        band = input.new_full((channels, channels), self.alpha / self.size)
        band = band.triu(-(self.size // 2)).tril((self.size - 1) // 2)
        total = F.conv2d(input * input, band[:, :, None, None], input.new_full((channels,), self.k))
        if self.beta == 0.75:  # without a general power, which takes several times as long
            return input * torch.rsqrt(total * total.sqrt())
        return input * total**-self.beta


class AlexCifarNet(nn.Module):
    """The CIFAR10 network of Krizhevsky (2012): two 5×5 convolutions with local response normalisation, 384-192.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels.
        num_classes: number of logits.
    """

    def __init__(self, in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.norm = LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        side = ((image_size + 1) // 2 + 1) // 2
        self.fc1 = nn.Linear(64 * side * side, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, num_classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        x = self.norm(F.relu(self.pool(self.conv1(x))))  # pooling and ReLU commute
        x = self.pool(self.norm(F.relu(self.conv2(x))))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@contextmanager
def _modes_restored(network: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode (train or eval) it came in."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def training_without_dropout(network: nn.Module) -> Iterator[None]:
    """Train mode with dropout off (Section S-1); afterwards every module is in the mode it came in."""
    with _modes_restored(network):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        yield


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it came in."""
    with _modes_restored(network):
        network.eval()
        yield


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
    return torch.stack([functional_call(network, single, (images,)) for single in unstack(weights)])


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
                logits.append(functional_call(stem.tail, single, (one,)))
        return torch.stack(logits)


_FORMATS: WeakKeyDictionary[nn.Module, torch.memory_format] = WeakKeyDictionary()


def memory_format(network: nn.Module, images: Float[Tensor, "batch c h w"]) -> torch.memory_format:
    """The format of many real images that a network is fastest on: channels last, on CPUs, where it takes that."""
    if images.device.type != "cpu":
        return torch.contiguous_format
    if network not in _FORMATS:
        _FORMATS[network] = torch.channels_last
        try:
            with torch.no_grad():
                network(images[:2].to(memory_format=torch.channels_last))
        except RuntimeError:  # such as a `view` of what channels last leaves scattered
            _FORMATS[network] = torch.contiguous_format
    return _FORMATS[network]


def channels_last(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A convolution's weight [..., in, h, w] in the format that CPUs compute in; others as they are."""
    on_cpu = weight.device.type == "cpu" and weight.ndim >= 4
    return weight.movedim(-3, -1).contiguous().movedim(-1, -3) if on_cpu else weight


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
