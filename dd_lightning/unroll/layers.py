"""What a layer is to the engines that keep no graph, and the layers that do not care how activations are laid out.

Every layer has four passes. With ȳ = ∂ℓ/∂y the adjoint of the first-order pass and a dot for the derivative in a
direction θ̇ of weights: x → y, ȳ → (x̄, w̄), ẋ → ẏ and ȳ̇ → (x̄̇, w̄̇). The last two are a Hessian-vector product, as
forward over reverse (Pearlmutter, 1994), which needs no graph and half of the work of reverse over reverse.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vjp

Size = tuple[int, int]
Tensors = list[Tensor]
NARROW = 128  # input times output channels of a convolution that leaves torch's own kernels for a CPU half empty
_relu_mask = torch.ops.aten.threshold_backward  # (x, y, 0): x where y > 0


class UnsupportedLayerError(Exception):
    """A layer, or an option of it, that has no rule here."""


def pair(value: int | tuple[int, ...] | list[int]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def largest(phases: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum along a dimension, and a mask of where it is; of equal numbers the first, as in torch's pooling."""
    y = functools.reduce(torch.maximum, phases.unbind(dim))
    chosen = torch.empty_like(phases)
    (first, *rest), (*masks, last) = phases.unbind(dim), chosen.unbind(dim)
    if not masks:
        return y, last.fill_(1).unsqueeze(dim)
    torch.eq(first, y, out=masks[0])
    torch.ne(first, y, out=last)  # where none before is the largest
    for phase, mask in zip(rest, masks[1:], strict=False):
        last -= torch.eq(phase, y, out=mask).mul_(last)
    return y, chosen


class Layer(ABC):
    """One layer of J networks.

    Attributes:
        names: its weights, as arguments `w` of the passes.
    """

    names: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        """y, and what the other passes need."""

    @abstractmethod
    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        """x̄ of every input (if wanted), w̄ of every weight."""

    @abstractmethod
    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        """ẏ, and what the last pass needs; None stands for 0."""

    @abstractmethod
    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        """x̄̇ of every input, w̄̇ of every weight; `dy` is ȳ and `ey` is ȳ̇."""


class ReLU(Layer):
    """`nn.ReLU`."""

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        y = F.relu(xs[0])
        return y, y

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        return [_relu_mask(dy, saved, 0) if wanted else None], []

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        return (None if txs[0] is None else _relu_mask(txs[0], saved, 0)), None

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        return [None if ey is None else _relu_mask(ey, saved, 0)], []


class Linear(Layer):
    """`nn.Linear`, of vectors [batch, feature] of one network or [init, batch, feature] of many."""

    def __init__(self, name: str, bias: bool) -> None:
        self.names = (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        x = xs[0]
        if x.ndim == 3 and len(x) < len(w[0]):  # the same for all networks
            x = x.expand(len(w[0]), -1, -1)
        return self._product(w, x), x

    def _product(self, w: Tensors, x: Tensor) -> Tensor:
        if len(w) == 1:
            return _product(x, w[0].mT)
        return torch.addmm(w[1], x, w[0].T) if x.ndim == 2 else torch.baddbmm(w[1].unsqueeze(1), x, w[0].mT)

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        return [_product(dy, w[0]) if wanted else None], [_product(dy.mT, saved), dy.sum(-2)][: len(w)]

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        ty = self._product(tw, saved)
        return (ty if txs[0] is None else _product(txs[0], w[0].mT, ty)), txs[0]

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        ey = torch.zeros_like(dy) if ey is None else ey
        ex, ew = _product(ey, w[0], _product(dy, tw[0])), _product(ey.mT, saved)
        if tsaved is not None:
            _product(dy.mT, tsaved, ew)
        return [ex], [ew, ey.sum(-2)][: len(w)]


def _product(a: Tensor, b: Tensor, to: Tensor | None = None) -> Tensor:
    """a @ b, added in place to what is given; `matmul` would take as long for its views as for the product."""
    if to is None:
        return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)
    return to.addmm_(a, b) if a.ndim == 2 else to.baddbmm_(a, b)


class LinearMap(Layer):
    """A linear function of activations, such as average pooling.

    Args:
        function: the map.
        adjoint: of ȳ, for what is kept of x.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor, Any], Tensor]) -> None:
        self.function, self.adjoint = function, adjoint

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        return self.function(xs[0]), xs[0]

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        return [self.adjoint(dy, saved) if wanted else None], []

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        return (None if txs[0] is None else self.function(txs[0])), None

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        return [None if ey is None else self.adjoint(ey, saved)], []


class Reshaped(LinearMap):
    """The same numbers in another shape, such as flattened; of x its shape is kept alone."""

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        return self.function(xs[0]), xs[0].shape


class Differentiated(Layer):
    """Any other function of activations and weights, differentiated by `torch.func`."""

    def __init__(self, function: Callable[..., Tensor], names: tuple[str, ...] = ()) -> None:
        self.function, self.names = function, names

    def forward(self, w: Tensors, xs: Tensors) -> tuple[Tensor, Any]:
        return self.function(*xs, *w), xs

    def backward(self, w: Tensors, saved: Any, dy: Tensor, wanted: bool) -> tuple[list[Tensor | None], Tensors]:
        adjoints = list(vjp(self.function, *saved, *w)[1](dy))
        return adjoints[: len(saved)], adjoints[len(saved) :]  # type: ignore[return-value]

    def tangent(self, w: Tensors, saved: Any, tw: Tensors, txs: list[Tensor | None]) -> tuple[Tensor | None, Any]:
        if not tw and all(t is None for t in txs):
            return None, None
        tangents = (*(torch.zeros_like(x) if t is None else t for x, t in zip(saved, txs, strict=True)), *tw)
        return jvp(self.function, (*saved, *w), tangents)[1], tangents

    def backward_tangent(
        self, w: Tensors, saved: Any, tw: Tensors, tsaved: Any, dy: Tensor, ey: Tensor | None
    ) -> tuple[list[Tensor | None], Tensors]:
        primals = (*saved, *w)
        tangents = tuple(torch.zeros_like(p) for p in primals) if tsaved is None else tsaved
        ey = torch.zeros_like(dy) if ey is None else ey
        adjoint = lambda *a: vjp(self.function, *a[:-1])[1](a[-1])  # noqa: E731
        adjoints = list(jvp(adjoint, (*primals, dy), (*tangents, ey))[1])
        return adjoints[: len(saved)], adjoints[len(saved) :]


ELEMENTWISE: dict[Any, Callable[..., Tensor]] = {
    **{f: f for f in (F.tanh, torch.tanh, torch.sigmoid, F.sigmoid, F.gelu, F.silu, F.elu, F.leaky_relu, F.softplus)},
    **{f: f for f in (operator.add, torch.add)},
}
ELEMENTWISE_MODULES = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus)
