"""Saved weights that go into a network by their names: all of them, or none."""

from collections.abc import Iterable, Mapping, Sequence

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
    known = own.keys() | {_unwrapped(name) for name in network.state_dict()}
    found = [("it lacks", shapes.keys() - known), ("it has, and they lack,", own.keys() - shapes.keys())]
    wrong = [
        f"{name} is {list(shape)}, and {list(own[name] or ())} here"
        for name, shape in shapes.items()
        if own.get(name) is not None and own[name] != tuple(shape)
    ]
    texts = [f"{what} {_some(sorted(names))}" for what, names in found if names]
    return "; ".join([*texts, *([_some(wrong)] if wrong else [])])


def _unwrapped(name: str) -> str:
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _some(texts: Iterable[str], count: int = 3) -> str:
    texts = list(texts)
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")
