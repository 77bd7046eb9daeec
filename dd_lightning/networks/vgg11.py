"""VGG11 for small pictures."""

from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks.norms import NORMS, check_normed

BLOCKS = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # of each block the convolutions, in multiples of the width


class VGG11(nn.Module):
    """Configuration A of Simonyan & Zisserman (2015), a norm after every convolution, one linear layer at the end.

    The two hidden linear layers of the original are for 224 pixels; tables of distilled data leave them out.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels, at least 32, or 28, which is padded to 32.
        num_classes: number of logits.
        width: channels of the first convolution, a multiple of four; 64 as published.
        norm: instance, group (of four), layer, or none; with affine weights.

    Raises:
        ValueError: an unknown norm, another width, or an image that is too small for five poolings.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        width: int = 64,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        check_normed(width, norm)
        padding = 3 if image_size == 28 else 1
        side = (image_size + 2 * (padding - 1)) // 2 ** len(BLOCKS)
        if side < 1:
            raise ValueError(f"VGG11 needs images of at least 28 pixels, not {image_size}")
        layers: list[nn.Module] = []
        channels = in_channels
        for block in BLOCKS:
            for multiple in block:
                layers.append(nn.Conv2d(channels, multiple * width, 3, padding=1 if layers else padding))
                channels = multiple * width
                layers += [NORMS[norm](channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * side * side, num_classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.blocks(x).flatten(1))
