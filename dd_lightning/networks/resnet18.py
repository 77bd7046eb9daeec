"""ResNet18 for small pictures."""

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dd_lightning.networks.norms import NORMS, check_normed


class ResNet18(nn.Module):
    """He et al. (2016) with torchvision's blocks, and the stem for small pictures: one 3×3 convolution, no pooling.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels, at least 16.
        num_classes: number of logits.
        width: channels of the first of four stages, a multiple of four; 64 as published.
        norm: instance, group (of four), layer, or none; with affine weights.

    Raises:
        ValueError: an unknown norm, another width, or an image that is too small.
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
        if image_size < 16:
            raise ValueError(f"ResNet18 needs images of at least 16 pixels, not {image_size}")
        of_stages = [width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for before, channels in zip([width, *of_stages], of_stages, strict=False):
            stride, shortcut = 1, None
            if channels != before:
                stride = 2
                shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), NORMS[norm](channels))
            blocks.append(BasicBlock(before, channels, stride, shortcut, norm_layer=NORMS[norm]))
            blocks.append(BasicBlock(channels, channels, norm_layer=NORMS[norm]))
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), NORMS[norm](width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
