"""Group normalisation and average pooling, whatever the layout of activations."""

from typing import Any

import torch
from torch import Tensor, nn

from dd_lightning.unroll.layers import Layer, Tensors


class GroupNorm(Layer):
    """`nn.GroupNorm`: y = γ x̂ + β with x̂ = (x − mean) r and r = (variance + ε)^−½.

    Args:
        names: of γ and β; none without.
        pixels: the axes of a picture, beside that of the channels, which is 1.
        others: the axes that γ and β do not have.
    """

    def __init__(
        self, module: nn.GroupNorm, names: tuple[str, ...], pixels: tuple[int, ...], others: tuple[int, ...]
    ) -> None:
        self.names, self.groups, self.eps = names, module.num_groups, module.eps
        self.axes, self.others = (2, *(axis + 1 for axis in pixels)), others
        self.trailing = max(others) - 1

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1))

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(self.axes, keepdim=True)

    def _affine(self, weight: Tensor) -> Tensor:
        return weight[(..., *[None] * self.trailing)]

    def _scaled(self, w: Tensors, y: Tensor) -> Tensor:
        return y * self._affine(w[0]) if w else y

    def _centred(self, t: Tensor, x: Tensor, along: Tensor) -> Tensor:
        """t − mean(t) − x̂ mean(t x̂): the derivative of x̂, but for r; it is its own adjoint."""
        return torch.addcmul(t - self._mean(t), x, along, value=-1)

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        grouped = self._grouped(xs[0])
        variance, mean = torch.var_mean(grouped, self.axes, correction=0, keepdim=True)
        r = torch.rsqrt(variance + self.eps)
        x = (grouped - mean).mul_(r)
        y = x.flatten(1, 2)
        return (torch.addcmul(self._affine(w[1]), y, self._affine(w[0])) if w else y), (x, r)

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        x, r = saved
        dw = [(dy * x.flatten(1, 2)).sum(self.others), dy.sum(self.others)] if w else []
        if not wanted:
            return [None], dw
        d = self._grouped(self._scaled(w, dy))
        return [self._centred(d, x, self._mean(d * x)).mul_(r).flatten(1, 2)], dw

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        x, r = saved
        if txs[0] is None and not w:
            return None, None
        ty = self._affine(tw[0]) * x.flatten(1, 2) + self._affine(tw[1]) if w else None
        if txs[0] is None:
            return ty, None
        t = self._grouped(txs[0])
        along = self._mean(t * x)
        tx = self._centred(t, x, along).mul_(r)
        moved = self._scaled(w, tx.flatten(1, 2))
        return (moved if ty is None else ty.add_(moved)), (tx, along)

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        x, r = saved
        ey = torch.zeros_like(dy) if ey is None else ey
        d, e = self._grouped(self._scaled(w, dy)), self._grouped(self._scaled(w, ey))
        if w:
            e = e + self._grouped(dy * self._affine(tw[0]))
        ew = [(ey * x.flatten(1, 2)).sum(self.others), ey.sum(self.others)] if w else []
        along = self._mean(e * x)
        if tsaved is None:
            return [self._centred(e, x, along).mul_(r).flatten(1, 2)], ew
        tx, moved = tsaved
        if w:
            ew[0] += (dy * tx.flatten(1, 2)).sum(self.others)
        first = self._mean(d * x)
        ex = self._centred(e, x, along + self._mean(d * tx)).addcmul_(tx, first, value=-1)
        # ṙ = −r² mean(ẋ x̂)
        ex.addcmul_(self._centred(d, x, first), r * moved, value=-1)
        return [ex.mul_(r).flatten(1, 2)], ew
