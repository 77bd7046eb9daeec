"""ConvNet, the network of the tables that followed the paper (Gidaris & Komodakis, 2018)."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks.norms import NORMS
from dd_lightning.system.checks import check_choice, check_count

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}
POOLINGS: dict[str, Callable[[int], nn.Module]] = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


class ConvNet(nn.Module):
    """Blocks of a 3×3 convolution, norm, activation and 2×2 pooling; then one linear layer.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels; 28 is padded to 32.
        num_classes: number of logits.
        width: channels of every convolution.
        depth: number of blocks; 3 for 28 and 32 pixels, 4 for 64.
        norm: instance (as published), group (of four), layer, or none; with affine weights.
        activation: relu, leaky_relu or sigmoid.
        pooling: average or max.

    Raises:
        ValueError: an unknown choice, or an image that is too small for so many blocks.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        activation: str = "relu",
        pooling: str = "average",
    ) -> None:
        super().__init__()
        check_count(width=width, depth=depth)
        for name, value, choices in (
            ("norm", norm, NORMS),
            ("activation", activation, ACTIVATIONS),
            ("pooling", pooling, POOLINGS),
        ):
            check_choice(name, value, choices)
        if norm == "group" and width % 4:
            raise ValueError(f"norm=group needs a width that four divides, not {width}")
        padding = 3 if image_size == 28 else 1
        side = (image_size + 2 * (padding - 1)) // 2**depth
        if side < 1:
            raise ValueError(f"depth={depth} needs images of at least {2**depth} pixels, not {image_size}")
        channels = [in_channels, *[width] * depth]
        self.blocks = nn.Sequential(
            *(
                layer
                for i in range(depth)
                for layer in (
                    nn.Conv2d(channels[i], width, 3, padding=1 if i else padding),
                    NORMS[norm](width),
                    ACTIVATIONS[activation](),
                    POOLINGS[pooling](2),
                )
            )
        )
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.blocks(x).flatten(1))
