"""A pool of networks that are trained on, instead of a prefix at every outer step (Zhou, Nezhadarya, Ba, 2022)."""

from typing import Any

import torch

from dd_lightning.networks import Weights, stack, unstack
from dd_lightning.system.checks import check_count
from dd_lightning.system.seeding import Stream, generator
from dd_lightning.unroll.optimizers import State, unstack_state


class Pool:
    """Networks of different ages. Each goes on where its last window ended, and is drawn anew after T inner steps.

    Args:
        networks: in the pool.
        length: M, inner steps by which a window makes a network older.
        total: T.
        seed: of which networks an outer step takes.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, networks: int, length: int, total: int, seed: int) -> None:
        check_count(networks=networks)
        self.networks, self.length, self.total, self.seed = networks, length, total, seed
        self._slots: list[tuple[int, Weights, State] | None] = [None] * networks  # age, one network, its state
        self._taken: list[int] = []

    def take(self, outer_step: int, theta_0: Weights, state_0: State) -> tuple[Weights, State]:
        """As many networks as θ₀ has: from the pool, or new ones of θ₀. The pool has at least as many."""
        fresh = unstack(theta_0)
        states = unstack_state(state_0, len(fresh))
        order = torch.randperm(self.networks, generator=generator(self.seed, Stream.POOL, outer_step))
        self._taken = order[: len(fresh)].tolist()
        for place, theta, state in zip(self._taken, fresh, states, strict=True):
            slot = self._slots[place]
            if slot is None or slot[0] + self.length > self.total:
                self._slots[place] = (0, theta, state)
        _, thetas, states = zip(*(self._slots[place] for place in self._taken), strict=True)  # type: ignore[misc]
        return stack(list(thetas)), stack(list(states))

    def put(self, theta: Weights, state: State) -> None:
        """The networks that were taken, after their window."""
        after = unstack({name: value.detach() for name, value in theta.items()})
        states = unstack_state(state, len(after))
        for place, single, own in zip(self._taken, after, states, strict=True):
            age = self._slots[place][0]  # type: ignore[index]
            self._slots[place] = (age + self.length, single, own)

    def state_dict(self) -> dict[str, Any]:
        slots = [slot and {"age": slot[0], "theta": slot[1], "state": slot[2]} for slot in self._slots]
        return {"slots": slots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        slots = state_dict["slots"]
        self._slots = [slot and (slot["age"], slot["theta"], slot["state"]) for slot in slots]
