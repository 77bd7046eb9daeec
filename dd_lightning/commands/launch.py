"""What every command shares: where its configuration lies, how it starts, and how it ends."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dotenv
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dd_lightning.commands.errors import TRACEBACK, one_line, with_overrides
from dd_lightning.commands.keys import check_dashes, check_known, meant
from dd_lightning.commands.records import leave
from dd_lightning.commands.resolvers import register, task_overrides
from dd_lightning.commands.sweep import run_job
from dd_lightning.system.processes import rank
from dd_lightning.system.processor import tune_cpu
from dd_lightning.system.signals import Interrupted, interrupted_at_once

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed wheel conf/ lies inside the package, in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

Task = Callable[[DictConfig], Any]

register()


def command(config_name: str, task: Task) -> Callable[[], None]:
    """The entry point of a command.

    Bad input ends it with one line on stderr and exit code 1; `DD_TRACEBACK=1` or `debug=...` shows the traceback.
    In a multirun the other jobs are run first, and those that failed are listed. A signal ends it with one line, too,
    and the exit code that shells use.
    """
    program = f"dd-{config_name}" + (f" (process {rank()})" if rank() else "")

    def run(cfg: DictConfig) -> Any:
        return run_task(program, checked, cfg)

    def checked(cfg: DictConfig) -> Any:
        check_known(cfg, CONF, config_name)
        return task(cfg)

    def main() -> None:
        check_dashes(program, sys.argv[1:])
        prepare()
        try:
            with interrupted_at_once():
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)()
        except Interrupted as stop:
            if rank() == 0:
                print(f"{program}: {stop.message}", file=sys.stderr)
            sys.exit(stop.code)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            message = one_line(error)
            if unknown := re.match(r"Could not override '([\w.]+)'|Key '(\w+)' is not in struct", message):
                key = unknown[1] or unknown[2]
                message = f"there is no setting {key}{meant(key, CONF, config_name, sys.argv[1:])}"
            if message.startswith("hydra."):  # which Hydra makes of these before the task
                given = [o for o in sys.argv[1:] if o.lstrip("+").partition("=")[0] in ("name", "runs_dir")]
                message += f" (given: {', '.join(given)})" if given else ""
            sys.exit(f"{program}: error: {message}")

    return main


def prepare() -> None:
    """Settings of the whole process."""
    dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")  # a log file need not be wrapped for a terminal
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, and we print them
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.*|.*does not have many workers.*|.torch.jit.script. is deprecated.*"
    )
    tune_cpu()
    logging.raiseExceptions = bool(os.environ.get(TRACEBACK))  # e.g. where the disk of the log file is full


def run_task(program: str, task: Task, cfg: DictConfig) -> Any:
    """Runs a command's task on its composed configuration; in a sweep as one of its jobs."""
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
            if rank() == 0:
                leave(Path(HydraConfig.get().runtime.output_dir))
        sys.exit(f"{program}: error: {message}")
