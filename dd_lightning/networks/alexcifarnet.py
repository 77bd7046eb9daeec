"""AlexCifarNet, the paper's network for CIFAR10."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks.layers import LocalResponseNorm


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
