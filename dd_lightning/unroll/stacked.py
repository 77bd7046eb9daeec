"""Layers of J networks at once, for small batches of images that all networks share.

Activations are [init, channel, phase, height, width, batch] for pictures and [init, batch, feature] for vectors; the
first axis is 1 as long as they are the same for all networks. With the batch innermost a convolution is a matrix
product over patches that are runs of contiguous numbers, and the patches of the first layer are cut once for all
networks; with the features innermost a linear layer is one whose vectors fill a processor's registers, however few
they are. The phase axis is 1, but between the first convolution and the pooling that follows it: there it holds the
pixels of each pooling window, so that pooling is the maximum of contiguous slabs.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.unroll.layers import (
    Differentiated,
    Layer,
    LinearMap,
    Reshaped,
    Tensors,
    UnsupportedLayerError,
    largest,
    pair,
)
from dd_lightning.unroll.norms import GroupNorm
from dd_lightning.unroll.patches import Conv2d as Conv2d
from dd_lightning.unroll.patches import padded, unphased
from dd_lightning.unroll.products import bias_adjoint, biased


class MaxPool2d(Layer):
    """`nn.MaxPool2d`; as in torch, the first of equal pixels gets the gradient.

    Attributes:
        phased: whether the convolution before has laid out the windows.
        names: the bias of the convolution before, if it is left to this layer, which has fewer pixels to add it to.
    """

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool) -> None:
        if pair(dilation) != (1, 1) or ceil_mode or indices:
            raise UnsupportedLayerError("max pooling with dilation, ceil_mode or indices")
        self.kernel, self.stride, self.padding = pair(kernel), pair(stride or kernel), pair(padding)
        self.phased = False

    @property
    def tiles(self) -> bool:
        """Whether its windows neither overlap nor leave the picture."""
        return self.kernel == self.stride and not any(self.padding)

    def _windows(self, x: Float[Tensor, "init channel h w batch"]) -> list[Tensor]:
        (k, l), (a, b) = self.kernel, self.stride  # noqa: E741
        rows, columns = ((n - m) // s for n, m, s in zip(x.shape[2:4], self.kernel, self.stride, strict=True))
        return [x[:, :, i : i + a * rows + 1 : a, j : j + b * columns + 1 : b] for i in range(k) for j in range(l)]

    def _gather(self, x: Tensor, value: float) -> Float[Tensor, "init channel phase h w batch"]:
        if self.phased:
            return x
        return torch.stack(self._windows(padded(unphased(x), self.padding, value)), dim=2)

    def _scatter(self, chosen: Tensor, dy: Tensor, shape: torch.Size) -> Tensor:
        if self.phased:
            return chosen * dy
        (m, n), (height, width, batch) = self.padding, shape[3:]
        x = dy.new_zeros(*shape[:2], height + 2 * m, width + 2 * n, batch)
        for window, mask in zip(self._windows(x), chosen.unbind(2), strict=True):
            window.addcmul_(mask, dy[:, :, 0])
        return x[:, :, None, m : m + height, n : n + width]

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        y, chosen = largest(self._gather(xs[0], -torch.inf), dim=2)
        return biased(y[:, :, None], w), (chosen, xs[0].shape)

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        chosen, shape = saved
        return [self._scatter(chosen, dy, shape) if wanted else None], bias_adjoint(w, dy)

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        if txs[0] is None:
            return None, None
        return biased((self._gather(txs[0], 0.0) * saved[0]).sum(2, keepdim=True), tw), None

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        return self.backward(w, saved, torch.zeros_like(dy) if ey is None else ey, True)


def local_response_norm(module: nn.LocalResponseNorm) -> Layer:
    """`nn.LocalResponseNorm`."""

    def function(x: Tensor) -> Tensor:
        size = module.size
        padded = F.pad(x * x, (*(0,) * 8, size // 2, (size - 1) // 2))
        total = sum(padded.narrow(1, offset, x.shape[1]) for offset in range(size))
        return x / (module.k + module.alpha / size * total) ** module.beta

    return Differentiated(function)


def group_norm(module: nn.GroupNorm, names: tuple[str, ...]) -> Layer:
    """`nn.GroupNorm`."""
    return GroupNorm(module, names, pixels=(2, 3, 4), others=(2, 3, 4, 5))


def avg_pool2d(module: nn.AvgPool2d) -> Layer:
    """`nn.AvgPool2d`, without padding."""
    if pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override:
        raise UnsupportedLayerError("average pooling with padding, ceil_mode or divisor_override")
    (k, l), (a, b) = pair(module.kernel_size), pair(module.stride)  # noqa: E741

    def windows(x: Tensor) -> list[Tensor]:
        rows, columns = (x.shape[3] - k) // a, (x.shape[4] - l) // b
        return [x[..., i : i + a * rows + 1 : a, j : j + b * columns + 1 : b, :] for i in range(k) for j in range(l)]

    def adjoint(dy: Tensor, x: Tensor) -> Tensor:
        dx, share = x.new_zeros(dy.shape[0], *x.shape[1:]), dy / (k * l)
        for window in windows(dx):
            window.add_(share)
        return dx

    return LinearMap(lambda x: functools.reduce(torch.add, windows(x)).div_(k * l), adjoint)


def flatten() -> Layer:
    """`nn.Flatten` of pictures to vectors."""
    return Reshaped(lambda x: x.flatten(1, -2).mT.contiguous(), lambda y, shape: y.mT.reshape(-1, *shape[1:]))
