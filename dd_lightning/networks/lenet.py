"""LeNet, the network of the paper's digits."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks.layers import MaxPool2d


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
