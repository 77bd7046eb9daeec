"""Initial weights that are drawn (Section 3.2)."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dd_lightning.init.interface import Init
from dd_lightning.networks import Weights, stack
from dd_lightning.system.checks import check_choice, check_count, check_positive
from dd_lightning.system.processor import is_out_of_memory
from dd_lightning.system.seeding import Stream, derive_seed


def _kaiming_normal(weight: Tensor, gain: float) -> None:
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    nn.init.normal_(weight, 0.0, gain / math.sqrt(fan_in))


SCHEMES: dict[str, tuple[Callable[..., Any], float]] = {  # with the gain of each
    "xavier_normal": (nn.init.xavier_normal_, 1.0),
    "xavier_uniform": (nn.init.xavier_uniform_, 1.0),
    "kaiming_normal": (_kaiming_normal, math.sqrt(2.0)),
    "orthogonal": (nn.init.orthogonal_, 1.0),
}

DEFAULT = "default"  # torch's own reset_parameters()


class RandomInit(Init):
    """Initial weights drawn anew for every outer step: Xavier normal with zero biases in the paper.

    Convolutions, linear layers and the matrices of attention follow `scheme`, with zero biases; other modules (norms,
    and any of a user with a `reset_parameters()`) their own reset. Parameters that neither is for, such as a class
    token, stay at the value that the network came with, and so do those that are frozen (`requires_grad_(False)`).

    Args:
        scheme: a name in `SCHEMES`, or `default` for torch's own initialisation.
        gain: multiplies the scheme's standard deviation; None is the scheme's own (1, for kaiming_normal √2).
        per_step: J, the number of initial weights per outer step.
        seed: of all draws.

    Raises:
        ValueError: unknown scheme, a gain that is not positive or not used, J below 1.
    """

    def __init__(
        self, scheme: str = "xavier_normal", gain: float | None = None, per_step: int = 1, seed: int = 0
    ) -> None:
        check_choice("scheme", scheme, [*SCHEMES, DEFAULT])
        check_count(per_step=per_step)
        if gain is not None:
            check_positive(gain=gain)
            if scheme == DEFAULT:
                raise ValueError("scheme default has no gain; leave gain=null or choose another scheme")
        self.scheme, self.gain, self.per_step, self.seed = scheme, gain, per_step, seed

    def sample(self, network: nn.Module, step: int, rank: int = 0, world: int = 1) -> Weights:
        return stack([self.draw(network, Stream.INIT, step, j) for j in range(rank, self.per_step, world)])

    def held_out(self, network: nn.Module, count: int, stream: Stream) -> Iterator[dict[str, Tensor]]:
        return (self.draw(network, stream, index) for index in range(count))

    def num_held_out(self, count: int) -> int:
        return count

    def check(self, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
        # A parameter that the scheme cannot draw is refused by its name.
        self.draw(network, Stream.INIT, 0, 0)

    def draw(self, network: nn.Module, stream: Stream, *counters: int) -> dict[str, Tensor]:
        """The weights of one network; what is drawn depends on the seed, the stream and the counters alone."""
        own, drawn = dict(network.named_parameters()), _copy(network)
        device = next(iter(own.values())).device
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed(self.seed, stream, *counters))
            for prefix, module in _inside_out(drawn, "", set()):
                self._draw_module(prefix, module)
        return {
            name: value.detach().to(device) if own[name].requires_grad else own[name].detach().clone()
            for name, value in drawn.named_parameters()
        }

    def _draw_module(self, prefix: str, module: nn.Module) -> None:
        parametrized = parametrize.is_parametrized(module)
        own = list(module.named_parameters(prefix, recurse=parametrized))
        if not any(p.requires_grad for _, p in own) and (own or self.scheme != DEFAULT):
            return  # frozen, or made of others alone, whose own draws only torch's own initialisation may change
        try:
            (self._reset_parametrized if parametrized else self._reset)(module)
        except Exception as error:  # whatever a user's own reset raises
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            names = sorted((name for name, _ in own), key=lambda name: "parametrizations." not in name)
            raise ValueError(f"cannot draw {names[0] if names else prefix or 'this network'}: {message}") from error

    def _reset_parametrized(self, module: nn.Module) -> None:
        """Draws over what parametrizations made, and takes it apart into their parameters again."""
        before = {name: value.clone() for name, value in module.named_buffers()}
        with parametrize.cached():
            self._reset(module)
            values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        for name, value in values.items():
            setattr(module, name, value)
        changed = [name for name, value in module.named_buffers() if not torch.equal(value, before[name])]
        if changed:
            raise ValueError(f"its parametrization keeps a part of it in the buffer {changed[0]}, which is not drawn")

    def _reset(self, module: nn.Module) -> None:
        """Draws a module's own weights; those that no rule or reset is for stay as they are."""
        ours = self.scheme != DEFAULT and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if not ours and reset is not None:
            reset()
        if self.scheme == DEFAULT:
            return
        draw, gain = SCHEMES[self.scheme]
        for matrix in _matrices(module):
            draw(matrix, gain=gain if self.gain is None else self.gain)
        if ours and module.bias is not None:
            module.bias.zero_()  # type: ignore[operator]


def _matrices(module: nn.Module) -> list[Tensor]:
    """The weights of a module that schemes are for."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return [module.weight]
    if not isinstance(module, nn.MultiheadAttention):
        return []
    if module.in_proj_weight is not None:  # three in one
        return list(module.in_proj_weight.chunk(3))
    return [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]


def _inside_out(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, after those that it is made of: a reset may change what they drew, as attention's does."""
    for name, child in module.named_children():
        if child not in seen:
            yield from _inside_out(child, f"{prefix}.{name}" if prefix else name, seen)
    seen.add(module)
    yield prefix, module


_COPIES: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()  # on the CPU, of those elsewhere


def _copy(network: nn.Module) -> nn.Module:
    """A copy on the CPU, whatever the network's device, so that every device draws the same weights.

    Raises:
        ValueError: there can be none.
    """
    for prefix, module in network.named_modules():
        layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not parametrize.is_parametrized(module)
        if layer and "weight" not in module._parameters:  # made by a hook, from parameters with other names
            made_from = next((name for name in module._parameters if name.startswith("weight")), "weight")
            name = f"{prefix}.{made_from}" if prefix else made_from
            raise ValueError(
                f"cannot draw {name}: a hook makes the layer's weight from it; use torch.nn.utils.parametrizations"
            )
    try:
        if all(p.device.type == "cpu" for p in network.parameters()):
            return copy.deepcopy(network)
        state = [(p.data_ptr(), p._version) for p in network.parameters()]
        if network not in _COPIES or _COPIES[network][0] != state:
            _COPIES[network] = state, copy.deepcopy(network).cpu()
        return copy.deepcopy(_COPIES[network][1])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"network {type(network).__name__} cannot be copied to draw its weights ({message})"
        ) from error
