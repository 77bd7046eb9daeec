"""Layers of J networks at once, for small batches of images that all networks share.

Activations are [init, channel, phase, height, width, batch] for pictures and [init, feature, batch] for vectors; the
first axis is 1 as long as they are the same for all networks. With the batch innermost a convolution is one matrix
product over patches that are runs of contiguous numbers, and the patches of the first layer are cut once for all
networks. The phase axis is 1, but between the first convolution and the pooling that follows it: there it holds the
pixels of each pooling window, so that pooling is the maximum of contiguous slabs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks import LANES
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
from dd_lightning.unroll.products import bias_adjoint, biased, every, input_adjoint, product, weight_adjoint


class Affine(Layer):
    """y = w x + b of vectors; a convolution is the same of patches."""

    def __init__(self, name: str, bias: bool) -> None:
        self.names = (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)

    def matrix(self, weight: Tensor, x: Tensor) -> Float[Tensor, "init rows inner"]:
        """The weights as a matrix, for the columns of x."""
        return weight

    def matrix_adjoint(self, matrix: Float[Tensor, "init rows inner"], weight: Tensor) -> Tensor:
        return matrix

    def gather(self, x: Tensor, weight: Tensor) -> Float[Tensor, "init inner columns"]:
        return x

    def scatter(self, columns: Float[Tensor, "init inner columns"], like: Tensor, weight: Tensor) -> Tensor:
        """The adjoint of `gather`."""
        return columns

    def shaped(self, y: Float[Tensor, "init rows columns"], x: Tensor, weight: Tensor) -> Tensor:
        return y

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        x = xs[0]
        columns = self.gather(x, w[0])
        y = product(self.matrix(w[0], x), columns)
        return biased(self.shaped(y, x, w[0]), w[1:]), [x, columns]

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        x, columns = saved
        matrix = self.matrix(w[0], x)
        rows = dy.reshape(*matrix.shape[:2], -1)
        dw = self._weights(w, weight_adjoint(rows, columns), dy)
        if not wanted:
            return [None], dw
        # Patches of the images are few and kept; those of later layers are cut again, and leave their memory to x̄'s.
        saved[1] = columns = None
        return [self.scatter(input_adjoint(matrix, rows, len(x) == 1), x, w[0])], dw

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        x, columns = saved
        columns = self.gather(x, w[0]) if columns is None else columns
        tcolumns = None if txs[0] is None else self.gather(txs[0], w[0])
        y = product(self.matrix(tw[0], x), columns)
        if tcolumns is not None:
            y.baddbmm_(self.matrix(w[0], x), tcolumns)
        return biased(self.shaped(y, x, w[0]), tw[1:]), (columns, tcolumns)

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        (x, _), (columns, tcolumns) = saved, tsaved
        matrix, shared = self.matrix(w[0], x), len(x) == 1
        ey = torch.zeros_like(dy) if ey is None else ey
        rows, erows = (one.reshape(*matrix.shape[:2], -1) for one in (dy, ey))
        ew = weight_adjoint(erows, columns)
        if tcolumns is not None:
            ew = weight_adjoint(rows, tcolumns, to=ew)
        ex = input_adjoint(self.matrix(tw[0], x), rows, shared)
        ex = input_adjoint(matrix, erows, shared, to=ex)
        return [self.scatter(ex, x, w[0])], self._weights(w, ew, ey)

    def _weights(self, w: Tensors, matrix: Tensor, dy: Tensor) -> Tensors:
        return [self.matrix_adjoint(matrix.mT, w[0]), *bias_adjoint(w[1:], dy)]


class Linear(Affine):
    """`nn.Linear`."""


class Conv2d(Affine):
    """`nn.Conv2d`, as a matrix product over patches.

    Where pooling follows, the phases are more columns of the product, or, if that leaves most of a processor's vector
    unit empty, more rows: of wider patches, with zeros in the matrix.

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

    def _widened(self, x: Tensor, weight: Tensor) -> bool:
        rows = weight.shape[1] * (len(weight) if len(x) == 1 else 1)
        return x.device.type == "cpu" and self.pooling != (1, 1) and rows * math.prod(self.pooling) <= LANES

    def _out(self, height: int, width: int) -> list[int]:
        sides = zip((height, width), self.padding, self.kernel, self.stride, self.pooling, strict=True)
        return [((n + 2 * p - k) // s + 1) // q for n, p, k, s, q in sides]

    def _cut(self, x: Tensor, weight: Tensor) -> tuple[Sequence[int], Sequence[int]]:
        """Height and width of patches, and the phases that have patches of their own."""
        return (self._window(), (1, 1)) if self._widened(x, weight) else (self.kernel, self.pooling)

    def _window(self) -> list[int]:
        """Height and width of what all phases of one output read."""
        return [k + (q - 1) * s for k, s, q in zip(self.kernel, self.stride, self.pooling, strict=True)]

    def matrix(self, weight: Tensor, x: Tensor) -> Tensor:
        if not self._widened(x, weight):
            return weight.flatten(2)
        wide = weight.new_zeros(self._wide(weight))
        self._kernels(wide).copy_(weight[:, :, None, None])
        return wide.flatten(3).flatten(1, 2)

    def matrix_adjoint(self, matrix: Tensor, weight: Tensor) -> Tensor:
        if matrix.shape[1] == weight.shape[1]:
            return matrix.reshape(weight.shape)
        return self._kernels(matrix.reshape(self._wide(weight))).sum((2, 3))

    def _wide(self, weight: Tensor) -> Sequence[int]:
        """The shape of the matrix of widened patches: a row for each channel and phase."""
        return [*weight.shape[:2], math.prod(self.pooling), weight.shape[2], *self._window()]

    def _kernels(
        self, wide: Float[Tensor, "init out phase channel h w"]
    ) -> Float[Tensor, "init out phase_row phase_column channel kernel_h kernel_w"]:
        """Where the kernel lies in the window of each phase."""
        (a, b), (p, q) = self.stride, self.pooling
        *outer, by_phase, by_channel, by_row, by_column = wide.stride()
        shape = [*wide.shape[:2], p, q, wide.shape[3], *self.kernel]
        phase = [q * by_phase + a * by_row, by_phase + b * by_column]
        return wide.as_strided(shape, [*outer, *phase, by_channel, by_row, by_column], wide.storage_offset())

    def gather(self, x: Tensor, weight: Tensor) -> Tensor:
        (kernel, phases), out = self._cut(x, weight), self._out(*x.shape[3:5])
        x = _padded(_unphased(x), self.padding)
        *outer, by_row, by_column, by_image = x.stride()
        (a, b), (p, q) = self.stride, self.pooling
        shape = [*x.shape[:2], *kernel, *phases, *out, x.shape[4]]
        strides = [*outer, by_row, by_column, a * by_row, b * by_column, a * p * by_row, b * q * by_column, by_image]
        return x.as_strided(shape, strides).reshape(len(x), math.prod(shape[1:4]), -1)

    def scatter(self, columns: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        (height, width, batch), (m, n), (a, b), (p, q) = like.shape[3:], self.padding, self.stride, self.pooling
        (k, l), phases = self._cut(like, weight)  # noqa: E741
        rows, cols = self._out(height, width)
        parts = columns.view(*like.shape[:2], k, l, *phases, rows, cols, batch)
        # Rows first: whole rows of patches are longer runs of contiguous numbers.
        by_row = columns.new_zeros(*like.shape[:2], l, phases[1], height + 2 * m, cols, batch)
        for i, part in enumerate(parts.unbind(2)):
            for r, phase in enumerate(part.unbind(3)):
                every(by_row, 4, i + a * r, a * p, rows).add_(phase)
        padded = columns.new_zeros(*like.shape[:2], height + 2 * m, width + 2 * n, batch)
        for j, part in enumerate(by_row.unbind(2)):
            for c, phase in enumerate(part.unbind(2)):
                every(padded, 3, j + b * c, b * q, cols).add_(phase)
        return padded[:, :, None, m : m + height, n : n + width]

    def shaped(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        out = self._out(*x.shape[3:5])
        return y.view(*weight.shape[:2], math.prod(self.pooling), *out, x.shape[5])


def _unphased(x: Tensor) -> Float[Tensor, "init channel h w batch"]:
    if x.shape[2] != 1:
        raise AssertionError("phases are for pooling alone")
    return x.squeeze(2)


def _padded(x: Tensor, padding: Size, value: float = 0.0) -> Tensor:
    if any(padding):
        return F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=value)
    return x.contiguous()


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
        return torch.stack(self._windows(_padded(_unphased(x), self.padding, value)), dim=2)

    def _scatter(self, chosen: Tensor, dy: Tensor, shape: torch.Size) -> Tensor:
        if self.phased:
            return chosen * dy
        (m, n), (height, width, batch) = self.padding, shape[3:]
        padded = dy.new_zeros(*shape[:2], height + 2 * m, width + 2 * n, batch)
        for window, mask in zip(self._windows(padded), chosen.unbind(2), strict=True):
            window.addcmul_(mask, dy[:, :, 0])
        return padded[:, :, None, m : m + height, n : n + width]

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
