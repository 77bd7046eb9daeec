"""Classifiers that torchvision publishes, with ImageNet weights and a last layer for other classes."""

from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision import models

from dd_lightning.networks.fitting import differing, digest_of
from dd_lightning.system.checks import nearest

DEFAULT = "default"
IMAGENET = 1000  # classes


class TorchvisionNetwork(nn.Module):
    """A classifier of torchvision, whose last layer is replaced by one of weights 0 and biases 1 (Section S-1).

    It stays in eval mode: dropout is off, and BatchNorm keeps the statistics that it came with, as in fine-tuning on
    few pictures. All weights train.

    Args:
        name: as torchvision lists them: alexnet, resnet18, squeezenet1_1, …
        weights: `default` for torchvision's ImageNet weights, which are downloaded once; a file of a state dictionary
            (.safetensors, or what `torch.save` writes), with any last layer or none; None draws them as torchvision
            does.
        in_channels: of the images; the published ones take 3.
        image_size: height and width in pixels.
        num_classes: number of logits.

    Attributes:
        head: the name of the last layer.
        weights: `default`, or the name of the file; None where they were drawn.
        source: which weights these are, in words; None where they were drawn.
        content: a hash of all weights but the last layer's; None where they were drawn.

    Raises:
        ValueError: torchvision has no such classifier, the file is no state dictionary or of another network, or the
            images do not fit.
        FileNotFoundError: there is no such file, or nothing can be downloaded.
    """

    def __init__(
        self,
        name: str = "alexnet",
        weights: str | None = DEFAULT,
        in_channels: int = 3,
        image_size: int = 224,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        names = models.list_models(module=models)
        if name not in names:
            raise ValueError(f"torchvision has no classifier {name!r}{nearest(str(name), names)}")
        if in_channels != 3:
            raise ValueError(f"{name} takes pictures of 3 channels, not {in_channels}: dataset.channels=3")
        # `module`, as of wrappers elsewhere: weights go by torchvision's own names.
        self.module = _published(name) if weights == DEFAULT else models.get_model(name, weights=None)
        head = head_of(self.module, name)
        if weights is not None and weights != DEFAULT:
            _load(self.module, head, Path(weights).expanduser(), name)
        if weights is not None and hasattr(self.module, "transform_input"):
            # To the normalisation that these weights were made for.
            self.module.transform_input = True  # type: ignore[assignment]
        self.module.set_submodule(head, _new_head(self.module.get_submodule(head), num_classes))
        self.head = f"module.{head}"
        self.weights = None if weights is None else Path(weights).name  # what is said of them travels with data
        self.source = None if weights is None else f"{name} with weights {self.weights}"
        self.content = None if weights is None else digest_of(self, without=self.of_head)
        self.train()
        _check_size(self, name, image_size)

    @property
    def of_head(self) -> set[str]:
        """The names of the last layer's weights."""
        return {f"{self.head}.{name}" for name, _ in self.get_submodule(self.head).named_parameters()}

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        return self.module(x)


def head_of(network: nn.Module, name: str) -> str:
    """The name of the last layer of a classifier of ImageNet's classes: a linear one or a convolution.

    Raises:
        ValueError: there is none.
    """
    outputs = {
        prefix: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for prefix, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    found = [prefix for prefix, count in outputs.items() if count == IMAGENET]
    if not found:
        raise ValueError(f"{name} has no layer of {IMAGENET} outputs that could be replaced")
    return found[-1]


def _new_head(old: nn.Module, num_classes: int) -> nn.Module:
    """A layer that takes what the old one took; its logits are all 1 (or 0, without biases), so that a first GD step
    moves this layer alone."""
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        options: Any = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        new = nn.Conv2d(old.in_channels, num_classes, bias=old.bias is not None, **options)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    nn.init.zeros_(new.weight)
    if new.bias is not None:
        nn.init.ones_(new.bias)
    return new


def _published(name: str) -> nn.Module:
    """With the weights that torchvision takes for the best.

    Raises:
        FileNotFoundError: they are not here, and cannot be downloaded.
    """
    weights: Any = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    try:
        # First without running code: the builder, which knows older names of weights, reads the same file again.
        weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        return models.get_model(name, weights=weights, progress=False)
    except Exception as error:  # of the network, the disk, or a file that was cut
        message = " ".join(str(error).split())[:160] or type(error).__name__
        raise FileNotFoundError(
            f"the weights of {name} could not be downloaded from {weights.url} ({message}); "
            "give a file of them: network.weights=FILE"
        ) from error


def _load(network: nn.Module, head: str, path: Path, name: str) -> None:
    """Puts a file's weights into the network, but for its last layer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no state dictionary, or one of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file of weights at {path}; say where it is: network=torchvision network.name={name} "
            "network.weights=FILE"
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reads what is no such file
        message = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path} is no state dictionary, or would run code when read ({message})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dictionary of tensors by name")
    given, own = (
        {n: v for n, v in one.items() if not n.startswith(f"{head}.") and not n.endswith("num_batches_tracked")}
        for one in (state, network.state_dict())
    )
    found = differing({n: tuple(v.shape) for n, v in own.items()}, {n: tuple(v.shape) for n, v in given.items()})
    if found:
        raise ValueError(f"{path} holds the weights of another network than {name}: {found}")
    network.load_state_dict(given, strict=False)


def _check_size(network: TorchvisionNetwork, name: str, image_size: int) -> None:
    """Raises a ValueError where the network does not take pictures of that size."""
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        message = " ".join(str(error).split())[:160]
        raise ValueError(f"{name} does not take pictures of {image_size} pixels ({message})") from error
