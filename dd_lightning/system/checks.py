"""Checks of what a user sets, with errors in the user's words."""

import difflib
import math
import re
from collections.abc import Iterable
from numbers import Integral


def check_count(**values: object) -> None:
    """Each value must be a whole number of at least 1.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_whole(**values: object) -> None:
    """Each value must be a whole number of at least 0.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")


def check_seed(seed: object) -> None:
    """What torch and Lightning take as a seed.

    Raises:
        ValueError: no whole number from 0 to below 2³².
    """
    check_whole(seed=seed)
    if seed >= 2**32:  # type: ignore[operator]
        raise ValueError(f"seed must be below 2³², not {seed}")


def check_bool(**values: object) -> None:
    """Each value must be true or false.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")


def check_threads(threads: object) -> None:
    """Torch crashes where it cannot start as many as it is told to.

    Raises:
        ValueError: no whole number from 1 to 1,024.
    """
    check_count(threads=threads)
    if threads > 1024:  # type: ignore[operator]
        raise ValueError(f"threads must be at most 1024, not {threads}")


def check_positive(**values: object) -> None:
    """Each value must be a finite number above 0.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not (0 < value < math.inf):
            raise ValueError(f"{name} must be a number above 0, not {value!r}")


def check_not_negative(**values: object) -> None:
    """Each value must be a finite number of at least 0.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not (0 <= value < math.inf):
            raise ValueError(f"{name} must be a number of at least 0, not {value!r}")


def check_betas(betas: object) -> None:
    """How much an average keeps: two numbers from 0 to below 1.

    Raises:
        ValueError: they are not.
    """
    numbers = list(betas) if isinstance(betas, Iterable) and not isinstance(betas, str) else [betas]
    kinds = all(isinstance(beta, int | float) and not isinstance(beta, bool) for beta in numbers)
    if len(numbers) != 2 or not kinds or not all(0 <= beta < 1 for beta in numbers):  # type: ignore[operator]
        raise ValueError(f"betas must be two numbers from 0 to below 1, not {numbers}")


def check_name(**values: object) -> None:
    """Each value becomes part of a file's name: no path to elsewhere.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        if not isinstance(value, str) or not re.fullmatch(r"\w[\w .+=-]*", value):
            raise ValueError(f"{name} must be letters, digits and any of ' .+=-_', not {value!r}")


def check_choice(name: str, value: object, choices: object) -> None:
    """`value` must be one of `choices`.

    Raises:
        ValueError: listing the valid choices.
    """
    if value not in list(choices):  # type: ignore[call-overload]
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, choices))}")  # type: ignore[call-overload]


def nearest(name: str, names: Iterable[str]) -> str:
    """A question for the most similar of some dotted names, one that ends alike if there is one; or nothing."""
    ends: dict[str, list[str]] = {}
    for known in sorted(names, key=len):
        ends.setdefault(known.rpartition(".")[2], []).append(known)
    likely = difflib.get_close_matches(name.rpartition(".")[2], ends, 1, 0.75)
    if not likely:
        return ""
    (found, *_) = difflib.get_close_matches(name, ends[likely[0]], 1, 0.0)
    return "" if found == name else f"; did you mean {found}?"
