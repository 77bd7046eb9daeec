"""A small Vision Transformer for small pictures."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.system.checks import check_count


class Tokens(nn.Module):
    """A class token before the patches, and a position for each; drawn from N(0, 0.02²)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + patches, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch tokens width"]:
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions


class ViTSmall(nn.Module):
    """Dosovitskiy et al. (2021) with torch's encoder, layer norm first, no dropout.

    Args:
        in_channels: channels of the images.
        image_size: height and width in pixels, a multiple of `patch`.
        num_classes: number of logits.
        patch: height and width of a patch.
        width: of a token, a multiple of `heads`; twice as wide between the two linear layers of a block.
        depth: blocks.
        heads: of each attention.

    Raises:
        ValueError: a count below 1, or sizes that do not divide.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 10,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        check_count(patch=patch, width=width, depth=depth, heads=heads)
        if image_size % patch:
            raise ValueError(f"patch={patch} does not divide images of {image_size} pixels")
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.tokens = Tokens((image_size // patch) ** 2, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        tokens = self.tokens(self.patches(x).flatten(2).transpose(1, 2))
        return self.classifier(self.norm(self.blocks(tokens)[:, 0]))
