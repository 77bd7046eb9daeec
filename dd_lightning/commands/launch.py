"""What every command shares: where its configuration lies, and errors in one line."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dotenv
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dd_lightning.commands.sweep import run_job
from dd_lightning.cpu import tune_cpu
from dd_lightning.interruption import Interrupted, interrupted_at_once
from dd_lightning.processes import rank
from dd_lightning.resolvers import register, task_overrides

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed wheel conf/ lies inside the package, in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

TRACEBACK = "DD_TRACEBACK"

register()


# Errors whose messages are for users.
EXPECTED = (
    ValueError,
    OSError,
    FloatingPointError,
    MemoryError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)


def one_line(error: BaseException, prefix: str = "") -> str:
    """An error as a user reads it: the innermost message, with the config key where it is known."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        prefix = _key(error) or prefix
        error = error.__cause__
    # Hydra lists the valid options one a line, indented, and then where it searched.
    text = str(error).partition("Config search path")[0].replace("\n\t", " ")
    lines = [line.strip() for line in text.splitlines()]
    message = "; ".join(line for line in lines if line and not line.startswith(("full_key: ", "object_type=")))
    prefix = f"{error.override}: " if isinstance(error, OverrideParseException) else _key(error) or prefix
    extra = re.search(r"unexpected keyword argument '(\w+)'", message)
    if prefix and extra:  # such as what an experiment sets for another option of this group
        message += f"; leave it out with ~{prefix.removesuffix(': ')}.{extra[1]}"
    if not prefix and not isinstance(error, EXPECTED):
        message = f"{type(error).__name__}: {message} (set {TRACEBACK}=1 for the traceback)"
    return prefix + message


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
            raise ValueError(f"{full_key}: {str(error).partition(chr(10))[0]}") from error
        if isinstance(value, DictConfig):
            check_resolved(value)


def with_overrides(message: str, overrides: list[str]) -> str:
    """The message, and what the command line says of the config group that it names, if it does not name the key."""
    keys = {override: override.lstrip("+~").partition("=")[0].split(".") for override in overrides}
    group = re.split(r"\W", message)[0]
    values = [o for o in overrides if len(keys[o]) > 1]
    given = [o for o in values if keys[o][0] == group] or values or overrides
    if not given or any(re.search(rf"(^|\W){re.escape(keys[o][-1])}(\W|$)", message) for o in given):
        return message
    return f"{message} (given: {', '.join(given)})"


def _key(error: BaseException) -> str:
    """The config key that Hydra or OmegaConf names in their messages' last lines."""
    found = re.search(r"^\s*full_key: (\S+)$", str(error), re.MULTILINE)
    return f"{found[1]}: " if found else ""


def command(config_name: str, task: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """The entry point of a command.

    Bad input ends it with one line on stderr and exit code 1; `DD_TRACEBACK=1` or `debug=...` shows the traceback.
    In a multirun the other jobs are run first, and those that failed are listed. A signal ends it with one line, too,
    and the exit code that shells use.
    """
    program = f"dd-{config_name}" + (f" (process {rank()})" if rank() else "")

    def run_task(cfg: DictConfig) -> Any:
        if rank():
            logging.getLogger().setLevel(logging.WARNING)  # the first process says it
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return run_job(task, cfg, one_line)
        try:
            return task(cfg)
        except Exception as error:
            if cfg.get("traceback"):
                os.environ[TRACEBACK] = "1"
            if os.environ.get(TRACEBACK):
                raise
            message = one_line(error)
            if not isinstance(error, OSError | MemoryError | FloatingPointError):  # of a run, not of a setting
                message = with_overrides(message, task_overrides())
            sys.exit(f"{program}: error: {message}")

    def main() -> None:
        dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
        if not sys.stdout.isatty():
            os.environ.setdefault("COLUMNS", "160")  # a log file need not be wrapped for a terminal
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, and we print them
        warnings.filterwarnings(
            "ignore", message=".*LeafSpec.*|.*does not have many workers.*|.torch.jit.script. is deprecated.*"
        )
        tune_cpu()
        logging.raiseExceptions = bool(os.environ.get(TRACEBACK))  # e.g. where the disk of the log file is full
        try:
            with interrupted_at_once():
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run_task)()
        except Interrupted as stop:
            if rank() == 0:
                print(f"{program}: {stop.message}", file=sys.stderr)
            sys.exit(stop.code)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            message = one_line(error)
            if message.startswith("hydra."):  # which Hydra makes of these before the task
                given = [o for o in sys.argv[1:] if o.lstrip("+").partition("=")[0] in ("name", "runs_dir")]
                message += f" (given: {', '.join(given)})" if given else ""
            sys.exit(f"{program}: error: {message}")

    return main
