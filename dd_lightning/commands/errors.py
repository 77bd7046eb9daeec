"""Errors in a user's words: one line, with the setting that it is about."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dd_lightning.commands.keys import named_values
from dd_lightning.system.checks import nearest

TRACEBACK = "DD_TRACEBACK"

# Errors whose messages are for users.
EXPECTED = (
    ValueError,
    OSError,
    FloatingPointError,
    MemoryError,
    HydraException,
    OmegaConfBaseException,
)
LIGHTNINGS = "MisconfigurationException"  # too, by name: Lightning takes seconds to import

# Where settings of an older layout of the package name what lies elsewhere now.
MOVED = {
    "callbacks": "training",
    "loggers": "training",
    "resuming": "training",
    "pretraining": "init",
    "baselines": "evaluation",
}


def one_line(error: BaseException, prefix: str = "") -> str:
    """An error as a user reads it: the innermost message, with the config key where it is known."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        prefix = _key(error) or prefix
        error = error.__cause__
    # Hydra lists the valid options one a line, indented, and then where it searched.
    text = str(error).partition("Config search path")[0].replace("\n\t", " ")
    lines = [line.strip() for line in text.splitlines()]
    message = "; ".join(line for line in lines if line and not line.startswith(("full_key: ", "object_type=")))
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if several := re.match(r"Ambiguous value for argument '(.*?)=(.*?)'", message):
        return f"{several[1]}={several[2]}: a sweep over values needs -m; a list is {several[1]}=[{several[2]}]"
    if isinstance(error, OSError) and error.strerror:
        message = of_system(error)
    prefix = _key(error) or prefix
    if old := re.search(rf"Error lo\w+ (?:target )?'dd_lightning\.({'|'.join(MOVED)})\.(\w+)'", message):
        room = "sources" if old[1] == "baselines" and old[2][0].islower() else MOVED[old[1]]
        message = f"dd_lightning.{old[1]}.{old[2]} is of an older layout; it is dd_lightning.{room}.{old[2]} now"
    if "Could not find 'hydra/sweeper/optuna'" in message:
        message = "Optuna is not installed: pip install -e '.[optuna]'"
    if option := re.search(r"Could not find '((?!hydra)[\w/]+)/([^/']+)'; Available options in \S+: (.*)", message):
        known = option[3].split()
        message = f"{option[1]} has no option {option[2]}{nearest(option[2], known)} ({', '.join(known)})"
    extra = re.search(r"unexpected keyword argument '(\w+)'", message)
    if prefix and extra:  # such as what an experiment sets for another option of this group
        message += f"; leave it out with ~{prefix.removesuffix(': ')}.{extra[1]}"
    if not prefix and not isinstance(error, EXPECTED) and type(error).__name__ != LIGHTNINGS:
        message = f"{type(error).__name__}: {message} (set {TRACEBACK}=1 for the traceback)"
    return prefix + message


def of_system(error: OSError) -> str:
    """What the system refuses, and where."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot write{where} ({error.strerror}); once there is room, the same command goes on"
    return f"{error.strerror}:{where}" if where else str(error.strerror)


def unreadable(override: str) -> str:
    """What is wrong with a part of the command line, and how it is written."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override} is no setting; one is written with =, such as {override}=VALUE"
    if any(value.count(one) != value.count(other) for one, other in ("[]", "{}", "()")):
        return f"{override}: a bracket is missing; a list is {key}=[1,2]"
    return f"{override} cannot be read; a text with special characters has quotes inside quotes: {key}='\"text\"'"


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors in the block, which uses a setting for the first time, name it.

    Raises:
        ValueError: beginning with `key`.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(one_line(error, f"{key}: ")) from error


def check_resolved(cfg: DictConfig) -> None:
    """Refuses a configuration in which a value is missing or cannot be interpolated.

    Raises:
        ValueError: naming its key.
    """
    for key in cfg:
        full_key = cfg._get_full_key(key)
        try:
            value = cfg[key]
        except OmegaConfBaseException as error:
            raise ValueError(unresolved(cfg, full_key, str(error).partition("\n")[0])) from error
        if isinstance(value, DictConfig):
            check_resolved(value)


def unresolved(cfg: DictConfig, key: str, message: str) -> str:
    """What is wrong with a value that cannot be had; one that is another setting's, such as is left out, is told so."""
    root = cfg._get_root()
    raw = dict(named_values(cast(dict[str, Any], OmegaConf.to_container(root, resolve=False))))
    of_another = re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(key)))
    if of_another is None or of_another[1] in raw:
        return f"{key}: {message}"
    alike = [one for one, value in raw.items() if value == raw[key]]
    given = " ".join(f"{one}=VALUE" for one in alike)
    return f"{' and '.join(alike)}: the value is that of {of_another[1]}, which is not there; give {given}"


def with_overrides(message: str, overrides: list[str]) -> str:
    """The message, and what the command line says of the config group that it names, if it does not name the key."""
    keys = {override: override.lstrip("+~").partition("=")[0].split(".") for override in overrides}
    groups = re.match(r"([\w, ]+)(?=: |\.)", message)
    given = [o for o in overrides if len(keys[o]) > 1 and groups and keys[o][0] in groups[1].split(", ")]
    if len(given) != 1 or any(re.search(rf"(^|\W){re.escape(keys[o][-1])}(\W|$)", message) for o in given):
        return message
    return f"{message} (given: {', '.join(given)})"


def _key(error: BaseException) -> str:
    """The config key that Hydra or OmegaConf names in their messages' last lines."""
    found = re.search(r"^\s*full_key: (\S+)$", str(error), re.MULTILINE)
    return f"{found[1]}: " if found else ""
