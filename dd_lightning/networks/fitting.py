"""Saved weights that go into a network by their names: all of them, or none."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names of a network's weights


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts saved weights into a network that has these parameters and no others, wrapped or not.

    Raises:
        ValueError: the names or shapes that differ; nothing is loaded.
    """
    given = {_unwrapped(name): value for name, value in weights.items()}
    differing = differences(network, {name: tuple(value.shape) for name, value in given.items()})
    if differing:
        raise ValueError(f"the weights do not fit this {type(network).__name__}: {differing}")
    # A name may come twice, of weights that modules share; and buffers need not be among the weights.
    network.load_state_dict(
        {name: given[_unwrapped(name)] for name in network.state_dict() if _unwrapped(name) in given}, strict=False
    )


def differences(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> str:
    """What differs between saved weights, by name, and a network's parameters; empty where nothing does."""
    own = {_unwrapped(name): None if is_lazy(p) else tuple(p.shape) for name, p in network.named_parameters()}
    return differing(own, shapes, {_unwrapped(name) for name in network.state_dict()})


def differing(
    own: Mapping[str, Sequence[int] | None], given: Mapping[str, Sequence[int]], optional: Iterable[str] = ()
) -> str:
    """What differs between a network's shapes and given ones, by name.

    Args:
        own: None for a shape that is not known yet.
        optional: names that the network has, and that need not be given.
    """
    lacking, unknown = own.keys() - given.keys(), given.keys() - own.keys() - set(optional)
    found = [("it lacks", unknown), ("it has, and they lack,", lacking)]
    wrong = [
        f"{name} is {list(shape)}, and {list(own[name] or ())} here"
        for name, shape in given.items()
        if own.get(name) is not None and own[name] != tuple(shape)
    ]
    texts = [f"{what} {_some(sorted(names))}" for what, names in found if names]
    return "; ".join([*texts, *([_some(wrong)] if wrong else [])])


def digest_of(network: nn.Module, without: Collection[str] = ()) -> str:
    """A hash of a network's weights and buffers by their names, wrapped or not, but for those `without`."""
    left_out, found = {_unwrapped(name) for name in without}, hashlib.blake2b(digest_size=16)
    state = {_unwrapped(name): value for name, value in network.state_dict().items()}
    for name in sorted(state.keys() - left_out):
        value = state[name].detach().cpu()
        # Those of a network in double precision are the same weights.
        value = (value.float() if value.is_floating_point() else value).contiguous()
        found.update(f"{name} {list(value.shape)}".encode())
        found.update(value.numpy().data)
    return found.hexdigest()


def completed(network: nn.Module, weights: Mapping[str, Tensor], others: Any) -> dict[str, Tensor]:
    """Saved weights of some layers with the network's own of all others, which are those that they were saved for.

    Args:
        others: of what they are, in words (`of`), and their hash (`content`).

    Raises:
        ValueError: the network has other weights.
    """
    others = others if isinstance(others, Mapping) else {}  # a card is data from elsewhere
    own = {_unwrapped(name): name for name in network.state_dict()}
    given = {own[_unwrapped(name)]: value for name, value in weights.items() if _unwrapped(name) in own}
    if len(given) < len(weights) or digest_of(network, without=given.keys()) != others.get("content"):
        raise ValueError(f"they start from {others.get('of')}, and this network has other weights (network.weights)")
    return {name: value.detach() for name, value in network.state_dict().items()} | given


def _unwrapped(name: str) -> str:
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _some(texts: Iterable[str], count: int = 3) -> str:
    texts = list(texts)
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")
