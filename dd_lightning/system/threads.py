"""How long a thread that waits for others keeps its core busy."""

import os

# OpenMP's threads spin between the layers of a network, by default for milliseconds. On a machine with other work they
# then spin while the one they wait for has no core. So many turns outlast a layer, but not much more: fewer cost time
# on a quiet machine, more on a busy one.
SPINS = 20_000


def yield_soon() -> None:
    """Bounds the spinning of this process and those that it starts; a user's own setting wins.

    The library reads it once, when torch is loaded: call it before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
