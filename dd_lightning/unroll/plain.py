"""Layers of one network by torch's own kernels, with the four passes of `dd_lightning.unroll.layers`.

Activations are [batch, channel, height, width], channels last on CPUs, and [batch, feature]. A convolution that is wide
enough to keep a processor busy by itself gains nothing from other networks beside it, and patches only cost memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_lightning.networks import channels_last
from dd_lightning.unroll.layers import NARROW, Layer, LinearMap, Reshaped, Tensors, UnsupportedLayerError, pair
from dd_lightning.unroll.norms import GroupNorm


class Conv2d(Layer):
    """`nn.Conv2d`."""

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise UnsupportedLayerError(f"{name}, a convolution with padding by name or by {module.padding_mode}")
        self.names = (f"{name}.weight", f"{name}.bias") if module.bias is not None else (f"{name}.weight",)
        self.name, self.module = name, module
        options = module.stride, module.padding, module.dilation
        self._options = *map(list, options), False, [0] * len(module.padding), module.groups

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.module._conv_forward(x, weight, bias)

    def _adjoints(self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> list[Tensor | None]:
        """x̄, w̄ and b̄, those that are wanted."""
        bias = [weight.shape[0]] if wanted[2] else None
        backward = torch.ops.aten.convolution_backward
        if wanted[0] and x.device.type == "cpu" and weight.shape[:2].numel() <= NARROW:
            # Of a narrow convolution x̄ is faster in the default memory format, w̄ in channels last.
            shape = x.new_empty(x.shape)
            dx, *_ = backward(dy.contiguous(), shape, weight.contiguous(), None, *self._options, (True, False, False))
            dw = backward(dy, x, weight, bias, *self._options, (False, *wanted[1:])) if any(wanted[1:]) else [None] * 3
            return [dx, *dw[1:]]
        return list(backward(dy, x, weight, bias, *self._options, wanted))

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        x = channels_last(xs[0])
        return self._forward(x, *w), x

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        dx, *dw = self._adjoints(dy, saved, w[0], (wanted, True, len(w) > 1))
        return [dx], dw[: len(w)]  # type: ignore[return-value]

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        ty = self._forward(saved, *tw)
        if txs[0] is not None:
            ty += self._forward(txs[0], w[0])
        return ty, txs[0]

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        ex = self._adjoints(dy, saved, tw[0], (True, False, False))[0]
        ew = [torch.zeros_like(one) for one in w]
        if ey is not None:
            of_x, *found = self._adjoints(ey, saved, w[0], (True, True, len(w) > 1))
            ex, ew = ex + of_x, found[: len(w)]  # type: ignore[operator]
        if tsaved is not None:
            ew[0] = ew[0] + self._adjoints(dy, tsaved, w[0], (False, True, False))[1]  # type: ignore[operator]
        return [ex], ew  # type: ignore[return-value]


class MaxPool2d(Layer):
    """`nn.MaxPool2d`."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool) -> None:
        if indices:
            raise UnsupportedLayerError("max pooling with indices")
        self._options = *(list(pair(o)) for o in (kernel, stride or kernel, padding, dilation)), ceil_mode

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        y, chosen = torch.ops.aten.max_pool2d_with_indices(xs[0], *self._options)
        return y, (xs[0], chosen)

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        x, chosen = saved
        if not wanted:
            return [None], []
        return [torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *self._options, chosen)], []

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        if txs[0] is None:
            return None, None
        chosen = saved[1]
        return txs[0].flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape), None

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        return ([None], []) if ey is None else self.backward(w, saved, ey, True)


class LocalResponseNorm(Layer):
    """y = x t^−β with t = k + α/n Σ x² over neighbouring channels."""

    def __init__(self, size: int, alpha: float, beta: float, k: float) -> None:
        self.size, self.scale, self.beta, self.k = size, alpha / size, beta, k

    def _sum(self, x: Tensor, scale: float, transposed: bool = False) -> Tensor:
        """Over neighbouring channels, as a 1×1 convolution; `transposed` is its adjoint."""
        band = x.new_full((x.shape[1],) * 2, scale).triu(-(self.size // 2)).tril((self.size - 1) // 2)
        return F.conv2d(x, (band.T if transposed else band)[:, :, None, None])

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        x = xs[0]
        t = self._sum(x * x, self.scale).add_(self.k)
        p = torch.rsqrt(t * t.sqrt()) if self.beta == 0.75 else t**-self.beta
        return x * p, (x, t, p, p / t)

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        x, _, p, q = saved
        if not wanted:
            return [None], []
        return [torch.addcmul(p * dy, x, self._sum(dy * x * q, -2 * self.beta * self.scale, transposed=True))], []

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        x, t, p, q = saved
        tx = txs[0]
        if tx is None:
            return None, None
        tt = self._sum(x * tx, 2 * self.scale)
        tp = (q * tt).mul_(-self.beta)
        tq = (tp / t).mul_((self.beta + 1) / self.beta)
        return torch.addcmul(tx * p, x, tp), (tx, tp, tq)

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        x, _, p, q = saved
        if tsaved is None:
            return ([None], []) if ey is None else self.backward(w, saved, ey, True)
        tx, tp, tq = tsaved
        scale, xq = -2 * self.beta * self.scale, x * q
        u, tu = dy * xq, dy * torch.addcmul(tx * q, x, tq)
        ex = dy * tp
        if ey is not None:
            tu.addcmul_(ey, xq)
            ex.addcmul_(ey, p)
        ex.addcmul_(tx, self._sum(u, scale, transposed=True))
        return [ex.addcmul_(x, self._sum(tu, scale, transposed=True))], []


def flatten() -> Layer:
    """`nn.Flatten` of pictures to vectors."""
    return Reshaped(lambda x: x.flatten(1), lambda y, shape: channels_last(y.reshape(shape)))


def local_response_norm(module: nn.LocalResponseNorm) -> Layer:
    """`nn.LocalResponseNorm`."""
    return LocalResponseNorm(module.size, module.alpha, module.beta, module.k)


def group_norm(module: nn.GroupNorm, names: tuple[str, ...]) -> Layer:
    """`nn.GroupNorm`."""
    return GroupNorm(module, names, pixels=(2, 3), others=(0, 2, 3))


def avg_pool2d(module: nn.AvgPool2d) -> Layer:
    """`nn.AvgPool2d`."""
    sizes = (list(pair(o)) for o in (module.kernel_size, module.stride, module.padding))
    options = *sizes, module.ceil_mode, module.count_include_pad, module.divisor_override
    return LinearMap(module, lambda dy, x: torch.ops.aten.avg_pool2d_backward(dy, x, *options))
