"""Layers of J networks at once, for small batches of images that all networks share.

Activations are [init, channel, phase, height, width, batch] for pictures and [init, feature, batch] for vectors; the
first axis is 1 as long as they are the same for all networks. With the batch innermost a convolution is one matrix
product over patches that are runs of contiguous numbers, and the patches of the first layer are cut once for all
networks. The phase axis is 1, but between the first convolution and the pooling that follows it: there it holds the
pixels of each pooling window, so that pooling is the maximum of contiguous slabs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.unroll.layers import (
    Differentiated,
    Layer,
    Reshaped,
    Size,
    Tensors,
    UnsupportedLayerError,
    largest,
    pair,
)


def _product(weight: Float[Tensor, "init out inner"], x: Float[Tensor, "init inner columns"]) -> Tensor:
    """weight @ x of all J networks, in one product where they share x."""
    return (weight.flatten(0, 1) @ x[0]).unflatten(0, weight.shape[:2]) if len(x) == 1 else torch.bmm(weight, x)


def _weight_adjoint(
    dy: Float[Tensor, "init out columns"], x: Float[Tensor, "init inner columns"], to: Tensor | None = None
) -> Tensor:
    """dy @ xᵀ, added in place to what is given."""
    if to is not None:
        return to.baddbmm_(dy, x.transpose(1, 2))
    if len(x) == 1:
        return (dy.flatten(0, 1) @ x[0].T).unflatten(0, dy.shape[:2])
    return torch.bmm(dy, x.transpose(1, 2))


def _input_adjoint(weight: Tensor, dy: Tensor, shared: bool, to: Tensor | None = None) -> Tensor:
    """weightᵀ @ dy, added in place to what is given; summed over the networks where they share the input."""
    if shared:
        weight, dy = weight.flatten(0, 1)[None], dy.flatten(0, 1)[None]
    weight = weight.transpose(1, 2)
    return torch.bmm(weight, dy) if to is None else to.baddbmm_(weight, dy)


class Affine(Layer):
    """y = w x + b of vectors; a convolution is the same of patches."""

    def __init__(self, name: str, bias: bool) -> None:
        self.names = (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)

    def gather(self, x: Tensor) -> Float[Tensor, "init inner columns"]:
        return x

    def scatter(self, columns: Float[Tensor, "init inner columns"], like: Tensor) -> Tensor:
        """The adjoint of `gather`."""
        return columns

    def shaped(self, y: Float[Tensor, "init out columns"], x: Tensor) -> Tensor:
        return y

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        columns = self.gather(xs[0])
        y = _product(w[0].flatten(2), columns)
        if len(w) > 1:
            y += w[1][..., None]
        return self.shaped(y, xs[0]), [xs[0], columns]

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        x, columns = saved
        if len(columns) > 1:
            saved[1] = None  # patches that all networks share are few and kept; those of each are cut again
        dy = dy.flatten(2)
        dx = self.scatter(_input_adjoint(w[0].flatten(2), dy, len(x) == 1), x) if wanted else None
        return [dx], self._weights(w, _weight_adjoint(dy, columns), dy)

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        x, columns = saved
        columns = self.gather(x) if columns is None else columns
        y = _product(tw[0].flatten(2), columns)
        tcolumns = None if txs[0] is None else self.gather(txs[0])
        if tcolumns is not None:
            y.baddbmm_(w[0].flatten(2), tcolumns)
        if len(w) > 1:
            y += tw[1][..., None]
        return self.shaped(y, x), (columns, tcolumns)

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        (x, _), (columns, tcolumns) = saved, tsaved
        dy, shared = dy.flatten(2), len(x) == 1
        ex = _input_adjoint(tw[0].flatten(2), dy, shared)
        if ey is None:
            ew, ey = torch.zeros_like(tw[0]).flatten(2), torch.zeros_like(dy)
        else:
            ey = ey.flatten(2)
            ex = _input_adjoint(w[0].flatten(2), ey, shared, to=ex)
            ew = _weight_adjoint(ey, columns)
        if tcolumns is not None:
            ew = _weight_adjoint(dy, tcolumns, to=ew)
        return [self.scatter(ex, x)], self._weights(w, ew, ey)

    def _weights(self, w: Tensors, weight: Tensor, y: Tensor) -> Tensors:
        return [weight.view_as(w[0]), y.sum(2)][: len(w)]


class Linear(Affine):
    """`nn.Linear`."""


class Conv2d(Affine):
    """`nn.Conv2d`, as a matrix product over patches.

    Args:
        pooling: of the layer that follows, whose windows become phases; (1, 1) for none.
    """

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        super().__init__(name, module.bias is not None)
        if module.groups != 1 or pair(module.dilation) != (1, 1) or isinstance(module.padding, str):
            raise UnsupportedLayerError(f"{name}, a convolution with groups, dilation or padding by name")
        if module.padding_mode != "zeros":
            raise UnsupportedLayerError(f"{name}, a convolution that pads with {module.padding_mode}")
        self.kernel, self.stride, self.padding = map(pair, (module.kernel_size, module.stride, module.padding))
        self.pooling: Size = (1, 1)

    def _out(self, height: int, width: int) -> list[int]:
        sides = zip((height, width), self.padding, self.kernel, self.stride, self.pooling, strict=True)
        return [((n + 2 * p - k) // s + 1) // q for n, p, k, s, q in sides]

    def _patches(self, x: Float[Tensor, "init channel h w batch"], out: list[int]) -> tuple[list[int], list[int]]:
        """Shape and strides of the view [init, channel, *kernel, *pooling, *out, batch] of x; entries share memory."""
        by_init, by_channel, by_row, by_column, _ = x.stride()
        (a, b), (p, q) = self.stride, self.pooling
        shape = [*x.shape[:2], *self.kernel, p, q, *out, x.shape[4]]
        strides = [by_init, by_channel, by_row, by_column, a * by_row, b * by_column]
        return shape, [*strides, a * p * by_row, b * q * by_column, 1]

    def gather(self, x: Tensor) -> Tensor:
        out = self._out(*x.shape[3:5])
        x = _padded(_unphased(x), self.padding)
        return x.as_strided(*self._patches(x, out)).reshape(*x.shape[:1], x.shape[1] * math.prod(self.kernel), -1)

    def scatter(self, columns: Tensor, like: Tensor) -> Tensor:
        (height, width, batch), (m, n) = like.shape[3:], self.padding
        padded = columns.new_zeros(*like.shape[:2], height + 2 * m, width + 2 * n, batch)
        shape, strides = self._patches(padded, self._out(height, width))
        parts = columns.view(shape)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                place = [*shape[:2], *shape[4:]], [*strides[:2], *strides[4:]], i * strides[2] + j * strides[3]
                padded.as_strided(*place).add_(parts[:, :, i, j])
        return padded[:, :, None, m : m + height, n : n + width]

    def shaped(self, y: Tensor, x: Tensor) -> Tensor:
        return y.unflatten(2, (math.prod(self.pooling), *self._out(*x.shape[3:5]), x.shape[5]))


def _unphased(x: Tensor) -> Float[Tensor, "init channel h w batch"]:
    if x.shape[2] != 1:
        raise AssertionError("phases are for pooling alone")
    return x.squeeze(2)


def _padded(x: Tensor, padding: Size, value: float = 0.0) -> Tensor:
    if any(padding):
        return F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=value)
    return x.contiguous()


class MaxPool2d(Layer):
    """`nn.MaxPool2d`; as in torch, the first of equal pixels gets the gradient."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool) -> None:
        if pair(dilation) != (1, 1) or ceil_mode or indices:
            raise UnsupportedLayerError("max pooling with dilation, ceil_mode or indices")
        self.kernel, self.stride, self.padding = pair(kernel), pair(stride or kernel), pair(padding)
        self.phased = False  # whether the convolution before has laid out the windows

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
        return torch.stack(self._windows(_padded(_unphased(x), self.padding, value)), dim=2)

    def _scatter(self, phases: Tensor, shape: torch.Size) -> Tensor:
        if self.phased:
            return phases
        (m, n), (height, width, batch) = self.padding, shape[3:]
        padded = phases.new_zeros(*shape[:2], height + 2 * m, width + 2 * n, batch)
        for window, phase in zip(self._windows(padded), phases.unbind(2), strict=True):
            window += phase
        return padded[:, :, None, m : m + height, n : n + width]

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        y, chosen = largest(self._gather(xs[0], -torch.inf), dim=2)
        return y[:, :, None], (chosen, xs[0].shape)

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        chosen, shape = saved
        return [self._scatter(chosen * dy, shape) if wanted else None], []

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        if txs[0] is None:
            return None, None
        return (self._gather(txs[0], 0.0) * saved[0]).sum(2, keepdim=True), None

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        return self.backward(w, saved, ey, ey is not None) if ey is not None else ([None], [])


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

    def function(x: Tensor, *affine: Tensor) -> Tensor:
        grouped = x.unflatten(1, (module.num_groups, -1))
        variance, mean = torch.var_mean(grouped, (2, 3, 4, 5), correction=0, keepdim=True)
        y = ((grouped - mean) * torch.rsqrt(variance + module.eps)).flatten(1, 2)
        weight, bias = (a[..., None, None, None, None] for a in affine) if affine else (1.0, 0.0)
        return y * weight + bias

    return Differentiated(function, names)


def avg_pool2d(module: nn.AvgPool2d) -> Layer:
    """`nn.AvgPool2d`, without padding."""
    if pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override:
        raise UnsupportedLayerError("average pooling with padding, ceil_mode or divisor_override")
    (k, l), (a, b) = pair(module.kernel_size), pair(module.stride)  # noqa: E741
    return Differentiated(lambda x: x.unfold(3, k, a).unfold(4, l, b).mean((-1, -2)))


def flatten() -> Layer:
    """`nn.Flatten` of pictures to vectors."""
    return Reshaped(lambda x: x.flatten(1, -2))
