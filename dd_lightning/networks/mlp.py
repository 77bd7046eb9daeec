"""A multilayer perceptron."""

from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.system.checks import check_count


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels.
        num_classes: number of logits.
        width: units of every hidden layer.
        depth: number of hidden layers.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(
        self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10, width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        check_count(width=width, depth=depth)
        units = [in_channels * image_size * image_size, *[width] * depth]
        hidden = (layer for i in range(depth) for layer in (nn.Linear(units[i], units[i + 1]), nn.ReLU()))
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        return self.layers(x)
