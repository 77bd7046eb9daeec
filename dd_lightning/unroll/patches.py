"""Convolutions of J networks at once, as matrix products over patches.

Of a convolution with a vertical stride of 1, patches are one pixel high: those of the rows below lie further along the
same rows of numbers, so that each row of the kernel is a product with a part of them. They are as many times fewer as
the kernel is high, and stay where a processor has them at hand.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_lightning.networks import LANES
from dd_lightning.unroll.layers import Layer, Size, Tensors, UnsupportedLayerError, pair
from dd_lightning.unroll.products import bias_adjoint, biased, every, input_adjoint, product, weight_adjoint


class Conv2d(Layer):
    """`nn.Conv2d`.

    Where pooling follows, the phases are more columns of the product, or, if that leaves most of a processor's vector
    unit empty, more rows: of wider patches, with zeros in the matrix.

    Attributes:
        pooling: of the layer that follows, whose windows become phases; (1, 1) for none.
    """

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        self.names = (f"{name}.weight", f"{name}.bias") if module.bias is not None else (f"{name}.weight",)
        if module.groups != 1 or pair(module.dilation) != (1, 1) or isinstance(module.padding, str):
            raise UnsupportedLayerError(f"{name}, a convolution with groups, dilation or padding by name")
        if module.padding_mode != "zeros":
            raise UnsupportedLayerError(f"{name}, a convolution that pads with {module.padding_mode}")
        self.kernel, self.stride, self.padding = map(pair, (module.kernel_size, module.stride, module.padding))
        self.channels, self.pooling = module.out_channels, (1, 1)

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        columns, matrices = self._gather(xs, w[0].shape[0]), self._matrices(w[:1], xs[0])
        return biased(self._product(matrices, columns, xs[0]), w[1:]), [xs[0], columns, matrices]

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        x, columns, matrices = saved
        rows = self._flat(dy, x)
        dw = [self._weights([(rows, columns)], w[0], x), *bias_adjoint(w[1:], dy)]
        if not wanted:
            return [None], dw
        # Patches of the images are few and kept; those of later layers are cut again, and leave their memory to x̄'s.
        saved[1] = columns = None
        return [self._inputs(matrices, rows, x)], dw

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        (x, columns, _), tx = saved, txs[0]
        matrices = self._matrices([tw[0], w[0]], x)
        if tx is None:
            columns = self._gather([x], w[0].shape[0]) if columns is None else columns
            own = [one[:, :, : columns.shape[1]] for one in matrices]
            return biased(self._product(own, columns, x), tw[1:]), (matrices, columns, None)
        both = self._gather([x, tx], w[0].shape[0])
        return biased(self._product(matrices, both, x), tw[1:]), (matrices, *both.chunk(2, dim=1))

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        x, (matrices, columns, tcolumns) = saved[0], tsaved
        ey = torch.zeros_like(dy) if ey is None else ey
        rows, erows = self._flat(dy, x), self._flat(ey, x)
        pairs = [(erows, columns)] if tcolumns is None else [(erows, columns), (rows, tcolumns)]
        ew = [self._weights(pairs, w[0], x), *bias_adjoint(w[1:], ey)]
        # A row of tW lies beside that of W.
        both = torch.stack([rows, erows], 2).flatten(1, 2)
        return [self._inputs([one.reshape(one.shape[0], both.shape[1], -1) for one in matrices], both, x)], ew

    def _flat(self, dy: Tensor, x: Tensor) -> Float[Tensor, "init rows columns"]:
        phases = math.prod(self.pooling) if self._widened(dy.shape[0], x) else 1
        return dy.reshape(dy.shape[0], self.channels * phases, -1)

    def _product(self, matrices: Sequence[Tensor], columns: Tensor, x: Tensor) -> Tensor:
        y = None
        for matrix, part in zip(matrices, self._parts(columns, x), strict=True):
            y = product(matrix, part, to=y)
        assert y is not None
        phases, out = math.prod(self.pooling), self._out(*x.shape[3:5])
        return y.view(y.shape[0], self.channels, phases, *out, x.shape[5])

    def _weights(self, pairs: list[tuple[Tensor, Tensor]], weight: Tensor, x: Tensor) -> Tensor:
        """w̄, a sum over adjoints and their patches."""
        found: list[Tensor | None] = [None] * (self.kernel[0] if self._by_rows else 1)
        for rows, columns in pairs:
            parts = self._parts(columns, x)
            found = [weight_adjoint(rows, part, to) for part, to in zip(parts, found, strict=True)]
        matrices = [one.mT for one in found if one is not None]
        if self._widened(weight.shape[0], x):
            return self._kernels(matrices[0].reshape(self._wide(weight))).sum((2, 3))
        shape = *weight.shape[:3], weight.shape[3] // len(matrices), weight.shape[4]
        return torch.cat([one.reshape(shape) for one in matrices], dim=3)

    def _inputs(self, matrices: Sequence[Tensor], rows: Tensor, x: Tensor) -> Tensor:
        """x̄."""
        shared = x.shape[0] == 1
        if not self._by_rows:
            return self._scatter(input_adjoint(matrices[0], rows, shared), x, rows.shape[0])
        total = self._height(x) * self._out(*x.shape[3:5])[1] * x.shape[5]
        columns = rows.new_zeros(x.shape[0], matrices[0].shape[2], total)
        for matrix, part in zip(matrices, self._parts(columns, x), strict=True):
            input_adjoint(matrix, rows, shared, to=part)
        return self._scatter(columns, x, rows.shape[0])

    @property
    def _by_rows(self) -> bool:
        """Whether patches are one pixel high."""
        return self.kernel[0] > 1 and self.stride[0] == 1 and self.pooling == (1, 1)

    def _widened(self, networks: int, x: Tensor) -> bool:
        if self.pooling == (1, 1) or x.device.type != "cpu":
            return False
        return self.channels * (networks if x.shape[0] == 1 else 1) * math.prod(self.pooling) <= LANES

    def _height(self, x: Tensor) -> int:
        return x.shape[3] + 2 * self.padding[0]

    def _out(self, height: int, width: int) -> Size:
        return _out(height, width, self.padding, self.kernel, self.stride, self.pooling)

    def _cut(self, networks: int, x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
        """Height and width of patches, and the phases that have patches of their own."""
        return (self._window(), (1, 1)) if self._widened(networks, x) else (self.kernel, self.pooling)

    def _window(self) -> list[int]:
        """Height and width of what all phases of one output read."""
        return [k + (q - 1) * s for k, s, q in zip(self.kernel, self.stride, self.pooling, strict=True)]

    def _matrices(self, weights: Tensors, x: Tensor) -> Sequence[Float[Tensor, "init rows inner"]]:
        """The weights as a matrix for each part of the patches; those of each row of a kernel follow each other."""
        if self._widened(weights[0].shape[0], x):
            wide = [weight.new_zeros(self._wide(weight)) for weight in weights]
            for one, weight in zip(wide, weights, strict=True):
                self._kernels(one).copy_(weight[:, :, None, None])
            weights = [one.flatten(3).flatten(1, 2) for one in wide]
        together = torch.stack(weights, 2) if len(weights) > 1 else weights[0].unsqueeze(2)
        return together.movedim(4, 0).flatten(3).unbind() if self._by_rows else [together.flatten(2)]

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

    def _parts(self, columns: Tensor, x: Tensor) -> Sequence[Float[Tensor, "init inner columns"]]:
        """What each row of the kernel reads of the patches."""
        if not self._by_rows:
            return [columns]
        rows, cols = self._out(*x.shape[3:5])
        run, strides = cols * x.shape[5], columns.stride()
        shape = self.kernel[0], *columns.shape[:2], rows * run
        return columns.as_strided(shape, (run, *strides), columns.storage_offset()).unbind()

    def _gather(self, xs: Sequence[Tensor], networks: int) -> Float[Tensor, "init inner columns"]:
        """The patches of all of xs."""
        views = [self._view(padded(unphased(x), self.padding), networks, x) for x in xs]
        inner = math.prod(views[0].shape[1 : 3 if self._by_rows else 4])
        if len(views) == 1:
            return views[0].reshape(views[0].shape[0], inner, -1)
        columns = xs[0].new_empty(xs[0].shape[0], len(xs), *views[0].shape[1:])
        for part, view in zip(columns.unbind(1), views, strict=True):
            part.copy_(view)
        return columns.view(columns.shape[0], len(xs) * inner, -1)

    def _view(self, padded: Float[Tensor, "init channel h w batch"], networks: int, x: Tensor) -> Tensor:
        """Patches that overlap in memory."""
        out = self._out(*x.shape[3:5])
        *outer, by_row, by_column, by_image = padded.stride()
        (a, b), (p, q) = self.stride, self.pooling
        if self._by_rows:
            shape = [*padded.shape[:2], self.kernel[1], padded.shape[2], out[1], padded.shape[4]]
            return padded.as_strided(shape, [*outer, by_column, by_row, b * by_column, by_image])
        kernel, phases = self._cut(networks, x)
        shape = [*padded.shape[:2], *kernel, *phases, *out, padded.shape[4]]
        strides = [*outer, by_row, by_column, a * by_row, b * by_column, a * p * by_row, b * q * by_column, by_image]
        return padded.as_strided(shape, strides)

    def _scatter(self, columns: Tensor, like: Tensor, networks: int) -> Tensor:
        """The adjoint of `_gather`."""
        (height, width, batch), (m, n), b, q = like.shape[3:], self.padding, self.stride[1], self.pooling[1]
        cols = self._out(height, width)[1]
        # Rows first: whole rows of patches are longer runs of contiguous numbers.
        if self._by_rows:
            by_row = columns.view(*like.shape[:2], self.kernel[1], 1, self._height(like), cols, batch)
        else:
            by_row = self._rows_added(columns, like, networks)
        x = columns.new_zeros(*like.shape[:2], height + 2 * m, width + 2 * n, batch)
        for j, part in enumerate(by_row.unbind(2)):
            for c, phase in enumerate(part.unbind(2)):
                every(x, 3, j + b * c, b * q, cols).add_(phase)
        return x[:, :, None, m : m + height, n : n + width]

    def _rows_added(self, columns: Tensor, like: Tensor, networks: int) -> Tensor:
        """Patches [init, channel, column, phase, h, w, batch] that are one pixel high, of higher ones."""
        a, p = self.stride[0], self.pooling[0]
        (k, l), phases = self._cut(networks, like)  # noqa: E741
        rows, cols = self._out(*like.shape[3:5])
        parts = columns.view(*like.shape[:2], k, l, *phases, rows, cols, like.shape[5])
        by_row = columns.new_zeros(*like.shape[:2], l, phases[1], self._height(like), cols, like.shape[5])
        for i, part in enumerate(parts.unbind(2)):
            for r, phase in enumerate(part.unbind(3)):
                every(by_row, 4, i + a * r, a * p, rows).add_(phase)
        return by_row


@cache
def _out(height: int, width: int, padding: Size, kernel: Size, stride: Size, pooling: Size) -> Size:
    """Height and width of what comes out, counted in windows of the pooling."""
    sides = zip((height, width), padding, kernel, stride, pooling, strict=True)
    rows, columns = (((n + 2 * p - k) // s + 1) // q for n, p, k, s, q in sides)
    return rows, columns


def unphased(x: Tensor) -> Float[Tensor, "init channel h w batch"]:
    if x.shape[2] != 1:
        raise AssertionError("phases are for pooling alone")
    return x.squeeze(2)


def padded(x: Tensor, padding: Size, value: float = 0.0) -> Tensor:
    if any(padding):
        return F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=value)
    return x.contiguous()
