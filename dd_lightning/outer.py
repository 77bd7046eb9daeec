"""The outer loss: trained networks on real pictures (Algorithm 1, line 7)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_lightning.networks import (
    Stem,
    Weights,
    count,
    evaluating,
    memory_format,
    run_with,
    split,
    stack,
    stem_of,
    unstack,
)
from dd_lightning.system.checks import check_choice, check_count
from dd_lightning.system.processor import PRECISIONS
from dd_lightning.unroll import PlainGradient, real_gradient

LossesAndGradient = tuple[list[Tensor], Weights]


class OuterLoss:
    """Mean objective of J trained networks on one real minibatch, in eval mode.

    Only first derivatives are needed here, so each network's gradient is taken at once, and its graph is gone before
    the next network's is made: memory does not grow with J. Networks with a narrow first convolution share it. On a CPU
    layers that have rules need no graph at all.

    Args:
        objective: of logits [init, batch, classes] and labels [batch]; a mean over both.
        precision: of the networks' layers: float32 (what the weights are in), or bfloat16 by autocast, which moves the
            gradient by less than the choice of the minibatch does and halves the time.
        piece: real images that a network takes at a time: fewer take less memory, and give the same gradient, which
            is a mean over images; they may wait in the CPU's memory. None: all at once.
    """

    def __init__(
        self,
        objective: Callable[[Tensor, Tensor], Tensor],
        precision: str = "float32",
        piece: int | None = None,
    ) -> None:
        check_choice("precision", precision, PRECISIONS)
        if piece is not None:
            check_count(piece=piece)
        self.objective, self.dtype, self.piece = objective, PRECISIONS[precision], piece
        self._known: tuple[nn.Module, PlainGradient | None] | None = None  # a loss mostly meets one network

    def __call__(
        self, network: nn.Module, theta: Weights, images: Float[Tensor, "batch c h w"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        with evaluating(network):
            stem = None
            if self.piece is None:
                format = memory_format(network, images)
                images = images.to(memory_format=format)
                stem = stem_of(network, images, format) if count(theta) > 1 else None
            if stem is None:
                gradients = partial(self._gradients, network, images, labels)
            else:
                gradients = partial(self._stemmed_gradients, stem, images, labels)
            return _MeanLoss.apply(gradients, list(theta), *theta.values())  # type: ignore[return-value]

    def _gradients(self, network: nn.Module, images: Tensor, labels: Tensor, theta: Weights) -> LossesAndGradient:
        """Each network by itself."""
        found = [self._in_pieces(network, single, images, labels) for single in unstack(theta)]
        losses, gradients = zip(*found, strict=True)
        return list(losses), stack([dict(zip(theta, gradient, strict=True)) for gradient in gradients])

    def _in_pieces(
        self, network: nn.Module, single: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One network's loss and gradient; each piece counts by its number of images."""
        if self.piece is None:
            return self._gradient(network, single, images, labels)
        device = next(iter(single.values())).device
        loss, total = torch.zeros((), device=device), tuple(map(torch.zeros_like, single.values()))
        for part, of_part in zip(images.split(self.piece), labels.split(self.piece), strict=True):
            part = part.to(device)
            part = part.to(memory_format=memory_format(network, part))
            found, gradient = self._gradient(network, single, part, of_part.to(device))
            share = len(part) / len(images)
            loss = loss + share * found
            for one, other in zip(total, gradient, strict=True):
                one.add_(other, alpha=share)
        return loss, total

    def _stemmed_gradients(self, stem: Stem, images: Tensor, labels: Tensor, theta: Weights) -> LossesAndGradient:
        """A few networks' stems at once, then each network's tail."""
        losses, gradients = [], []
        for part in split(theta, stem.networks):
            of_stem = {name: part.pop(name).detach().requires_grad_() for name in stem.names}
            with torch.enable_grad(), self._autocast(images):
                features = stem(of_stem, images)
            tails, adjoints = [], []
            for single, one in zip(unstack(part), stem.inputs(features.detach()), strict=True):
                loss, (*gradient, adjoint) = self._gradient(stem.tail, single, one.requires_grad_(), labels)
                losses.append(loss)
                tails.append(dict(zip(single, gradient, strict=True)))
                adjoints.append(adjoint)
            found = torch.autograd.grad(features, list(of_stem.values()), torch.cat(adjoints, dim=1))
            gradients.append(stack(tails) | dict(zip(of_stem, found, strict=True)))
        return losses, {name: torch.cat([part[name] for part in gradients]) for name in theta}

    def _gradient(
        self, network: nn.Module, single: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One network's loss, and its gradient with respect to the weights and, where they require one, the images."""
        if rules := self._rules(network, single, images):
            images, wanted = images.detach(), images.requires_grad
            loss, gradient, adjoint = rules.of_loss(
                rules.prepared(single), images, lambda logits: self.objective(logits[None], labels), wanted
            )
            return loss, (*gradient.values(), *([] if adjoint is None else [adjoint]))
        leaves = {name: value.detach().requires_grad_() for name, value in single.items()}
        with torch.enable_grad():
            with self._autocast(images):
                logits = run_with(network, leaves, images)
            loss = self.objective(logits.to(next(iter(single.values())).dtype)[None], labels)
        inputs = [*leaves.values(), *([images] if images.requires_grad else [])]
        return loss.detach(), torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)

    def _rules(self, network: nn.Module, single: dict[str, Tensor], images: Tensor) -> PlainGradient | None:
        if images.device.type != "cpu" or self.dtype != torch.float32:
            return None
        if self._known is None or self._known[0] is not network:
            self._known = network, real_gradient(network, single, images)
        return self._known[1]

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)


class _MeanLoss(torch.autograd.Function):
    """Mean of a loss over J networks, with its gradient taken on the way."""

    @staticmethod
    def forward(
        ctx: Any, gradients: Callable[[Weights], LossesAndGradient], names: list[str], *theta: Tensor
    ) -> Tensor:
        losses, gradient = gradients(dict(zip(names, theta, strict=True)))
        ctx.save_for_backward(*(gradient[name] for name in names))
        return torch.stack(losses).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(gradient * (grad / len(gradient)) for gradient in ctx.saved_tensors)
