"""Windows: which inner steps are differentiated (Feng, Vedantam, Kempe, 2024)."""

from dataclasses import dataclass

import torch

from dd_lightning.system.checks import check_count, check_whole
from dd_lightning.system.seeding import Stream, generator

RANDOM, END, POOL = "random", "end", "pool"


@dataclass(frozen=True)
class Window:
    """M inner steps after N without a graph; the outer loss is taken after N + M.

    Attributes:
        length: M; None differentiates all T.
        start: N: `random`, uniform from `minimum` to T − M; `end`, T − M; or a number. Or `pool`: networks go on where
            their last window ended, so that there are no steps before.
        minimum: the smallest N that is drawn.
        networks: in the pool.

    Raises:
        ValueError: a length or pool below 1, or another start.
    """

    length: int | None = None
    start: int | str = 0
    minimum: int = 0
    networks: int = 10

    def __post_init__(self) -> None:
        check_whole(minimum=self.minimum)
        check_count(networks=self.networks)
        if self.length is not None:
            check_count(length=self.length)
        if self.start not in (RANDOM, END, POOL):
            if isinstance(self.start, str):
                raise ValueError(f"start must be random, end, pool or a number, not {self.start!r}")
            check_whole(start=self.start)

    def check(self, total: int) -> None:
        """Refuses a window that T inner steps do not hold.

        Raises:
            ValueError: saying why.
        """
        length = self.length or total
        if length > total:
            raise ValueError(f"length={length} is more than the {total} inner steps there are")
        if not isinstance(self.start, str) and self.start + length > total:
            raise ValueError(f"start={self.start} and length={length} go beyond the {total} inner steps there are")
        if self.start == RANDOM and self.minimum + length > total:
            raise ValueError(f"minimum={self.minimum} and length={length} go beyond the {total} inner steps there are")

    @property
    def full(self) -> bool:
        """Whether all inner steps are differentiated."""
        return self.length is None

    def place(self, total: int, seed: int, outer_step: int) -> range:
        """The inner steps that are differentiated at an outer step: a function of (seed, outer step) alone."""
        length = self.length or total
        if self.start == RANDOM:
            random = generator(seed, Stream.WINDOW, outer_step)
            start = int(torch.randint(self.minimum, total - length + 1, (), generator=random))
        else:  # of a network in a pool, how old it is decides nothing but when it ends
            start = {END: total - length, POOL: 0}.get(str(self.start), self.start)
        return range(int(start), int(start) + length)
