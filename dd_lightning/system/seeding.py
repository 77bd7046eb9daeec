"""Random numbers that depend on what they are for, never on what was drawn before.

Initial weights, minibatches and augmentations are drawn from `(seed, stream, counters)`. So a resumed run, or one
on another number of devices, draws the same numbers at the same outer step.
"""

from enum import IntEnum

import numpy as np
import torch

from dd_lightning.system.checks import check_whole


class Stream(IntEnum):
    """What the random numbers are for; streams never share numbers."""

    INIT = 0
    HELD_OUT_VALIDATION = 1
    HELD_OUT_TEST = 2
    MINIBATCH = 3
    AUGMENTATION = 4
    DISTILLED = 5
    SPLIT = 6
    PRETRAINING = 7
    BASELINE = 8
    WINDOW = 9
    ORDER = 10
    AUGMENT_DISTILLED = 11
    AUGMENT_REAL = 12
    POOL = 13
    ORDINARY = 14


def derive_seed(seed: int, stream: Stream, *counters: int) -> int:
    """A 63-bit seed for `counters` of a stream, e.g. (outer step, index).

    Raises:
        ValueError: `seed` is not a whole number of at least 0.
    """
    check_whole(seed=seed)
    state = np.random.SeedSequence(seed, spawn_key=(int(stream), *counters)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def generator(seed: int, stream: Stream, *counters: int) -> torch.Generator:
    """A CPU generator for `counters` of a stream, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *counters))
