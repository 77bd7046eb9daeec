"""Train and eval mode, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def _modes_restored(network: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode (train or eval) it came in."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def training_without_dropout(network: nn.Module) -> Iterator[None]:
    """Train mode with dropout off (Section S-1); afterwards every module is in the mode it came in.

    Attention is by plain products: torch's faster kernels have no second derivatives, which unrolls need.
    """
    # Attention and recurrent layers drop out by a rate of their own, without a layer for it.
    own = {m: m.dropout for m in network.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)}
    with _modes_restored(network), sdpa_kernel(SDPBackend.MATH):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        try:
            for module in own:
                module.dropout = 0.0
            yield
        finally:
            for module, rate in own.items():
                module.dropout = rate


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it came in."""
    with _modes_restored(network):
        network.eval()
        yield
