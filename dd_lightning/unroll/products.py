"""Products of J networks' matrices with columns that all share, or each its own; their adjoints, and strides."""

import torch
from jaxtyping import Float
from torch import Tensor

from dd_lightning.unroll.layers import Tensors


def product(
    weight: Float[Tensor, "init rows inner"], x: Float[Tensor, "init inner columns"], to: Tensor | None = None
) -> Float[Tensor, "init rows columns"]:
    """weight @ x, added in place to what is given; in one product where the networks share x."""
    if x.shape[0] == weight.shape[0]:
        return torch.bmm(weight, x) if to is None else to.baddbmm_(weight, x)
    rows = weight.flatten(0, 1)
    if to is None:
        return torch.mm(rows, x[0]).view(*weight.shape[:2], -1)
    return to.flatten(0, 1).addmm_(rows, x[0]).view(to.shape)


def weight_adjoint(
    dy: Float[Tensor, "init rows columns"], x: Float[Tensor, "init inner columns"], to: Tensor | None = None
) -> Float[Tensor, "init inner rows"]:
    """x @ dyᵀ, added in place to what is given: the transposed adjoint, because matrices that begin long are faster."""
    if to is not None:
        return to.baddbmm_(x, dy.mT)
    if x.shape[0] == dy.shape[0]:
        return torch.bmm(x, dy.mT)
    return (x[0] @ dy.flatten(0, 1).T).unflatten(1, dy.shape[:2]).transpose(0, 1)


def input_adjoint(
    weight: Float[Tensor, "init rows inner"], dy: Tensor, shared: bool, to: Tensor | None = None
) -> Float[Tensor, "init inner columns"]:
    """weightᵀ @ dy, added in place to what is given; summed over the networks where they share the input."""
    if shared and weight.shape[0] > 1:
        weight, dy = weight.flatten(0, 1).unsqueeze(0), dy.flatten(0, 1).unsqueeze(0)
    return torch.bmm(weight.mT, dy) if to is None else to.baddbmm_(weight.mT, dy)


def biased(y: Float[Tensor, "init feature ..."], bias: Tensors) -> Tensor:
    """y + b in place, if there is a bias."""
    for b in bias:
        y.add_(b.reshape(*b.shape, *(1,) * (y.ndim - 2)))
    return y


def bias_adjoint(bias: Tensors, dy: Float[Tensor, "init feature ..."]) -> Tensors:
    return [dy.flatten(2).sum(2) for _ in bias]


def every(x: Tensor, dim: int, start: int, step: int, length: int) -> Tensor:
    """x[..., start::step, ...], of a contiguous x; with less overhead than slicing."""
    shape, strides = list(x.shape), list(x.stride())
    offset, shape[dim], strides[dim] = start * strides[dim], length, step * strides[dim]
    return x.as_strided(shape, strides, offset)
