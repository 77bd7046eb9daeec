"""Initial weights that are drawn (Section 3.2)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dd_lightning.init.interface import Init
from dd_lightning.networks import Weights, stack
from dd_lightning.system.checks import check_choice, check_count, check_positive
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

    Convolutions and linear layers follow `scheme`, with zero biases; other layers (norms) their own reset.

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
        """The weights of one network, which depend on the seed, the stream and the counters alone."""
        like = next(network.parameters())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed(self.seed, stream, *counters))
            return {
                name: value.to(like.device)
                for prefix, module in network.named_modules()
                for name, value in self._draw_module(prefix, module).items()
            }

    def _draw_module(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        own = dict(module.named_parameters(recurse=False))
        if not own:
            return {}
        # Drawn on the CPU, whatever the network's device, so that every device draws the same weights.
        drawn = {name: nn.Parameter(torch.empty_like(value, device="cpu")) for name, value in own.items()}
        if self.scheme != DEFAULT and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            draw, gain = SCHEMES[self.scheme]
            draw(drawn["weight"], gain=gain if self.gain is None else self.gain)
            if "bias" in drawn:
                drawn["bias"].zero_()
        else:
            if not hasattr(module, "reset_parameters"):
                raise ValueError(
                    f"cannot draw {'.'.join(filter(None, [prefix, next(iter(own))]))}: "
                    f"{type(module).__name__} has no reset_parameters()"
                )
            saved = module._parameters
            module._parameters = {name: drawn.get(name) for name in saved}
            try:
                module.reset_parameters()  # type: ignore[operator]
            finally:
                module._parameters = saved
        return {f"{prefix}.{name}" if prefix else name: value.detach() for name, value in drawn.items()}
