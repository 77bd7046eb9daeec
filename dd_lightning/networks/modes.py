"""Train and eval mode, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
    """Train mode with dropout off (Section S-1); afterwards every module is in the mode it came in."""
    with _modes_restored(network):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        yield


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it came in."""
    with _modes_restored(network):
        network.eval()
        yield
