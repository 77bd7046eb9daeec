"""What every command shares: where its configuration lies, how it starts, and how it ends.

Nothing here imports torch or Lightning, which takes seconds: `--help`, a mistyped option and the completion of a shell
do not need them. What a command does is imported when its configuration is composed.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import dotenv
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dd_lightning.commands.errors import TRACEBACK, one_line, with_overrides
from dd_lightning.commands.help import register_help, unlisted
from dd_lightning.commands.keys import check_dashes, check_known, elsewhere, meant
from dd_lightning.commands.records import leave
from dd_lightning.commands.resolvers import SWEEP_FOLDER, register, task_overrides
from dd_lightning.commands.sweep import JOBS, run_job
from dd_lightning.system.processes import rank
from dd_lightning.system.signals import Interrupted, interrupted_at_once, interruption

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed wheel conf/ lies inside the package, in a checkout beside it.
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

Task = Callable[[DictConfig], Any]


register()
register_help(CONF)


def command(config_name: str) -> Callable[[], None]:
    """The entry point of a command: the function of that name in the module of that name.

    Bad input ends it with one line on stderr and exit code 1; `DD_TRACEBACK=1` or `debug=...` shows the traceback.
    In a multirun the other jobs are run first, and those that failed are listed. A signal ends it with one line, too,
    and the exit code that shells use.
    """
    program = f"dd-{config_name}" + (f" (process {rank()})" if rank() else "")

    def run(cfg: DictConfig) -> Any:
        return run_task(program, partial(imported, config_name), cfg)

    def main() -> None:
        check_dashes(program, sys.argv[1:])
        prepare()
        asks = not {"--help", "-h"}.isdisjoint(sys.argv)
        try:
            with interrupted_at_once(), unlisted() if asks else nullcontext():
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)()
        except BrokenPipeError:
            unheard(program)
        except (Interrupted, Exception) as error:
            if stop := interruption(error):
                if rank() == 0:
                    print(f"{program}: {advised(stop.message)}", file=sys.stderr)
                sys.exit(stop.code)
            if os.environ.get(TRACEBACK):
                raise
            sys.exit(f"{program}: error: {uncomposed(error, config_name)}")
        finally:
            for name in (SWEEP_FOLDER, JOBS):  # of this sweep alone
                os.environ.pop(name, None)

    return main


def imported(config_name: str, cfg: DictConfig) -> Any:
    """What a command does, whose settings are all read."""
    from dd_lightning.system.processor import tune_cpu

    tune_cpu()
    module = import_module(f"dd_lightning.commands.{config_name}")
    for name in ("pytorch_lightning", "lightning_fabric"):  # which set a level of their own when they are imported
        logging.getLogger(name).setLevel(logging.WARNING)
    check_known(cfg, CONF, config_name)
    return getattr(module, config_name)(cfg)


def uncomposed(error: BaseException, config_name: str) -> str:
    """What is wrong with a command line of which Hydra makes no configuration, or no folder."""
    message = one_line(error)
    said = sys.argv[1:]
    if unknown := re.match(r"Could not override '([\w.]+)'|Key '(\w+)' is not in struct", message):
        key = unknown[1] or unknown[2]
        message = f"there is no setting {key}{elsewhere(key, CONF) or meant(key, CONF, config_name, said)}"
    if message.startswith("Config group override must be a string"):
        given = [o for o in said if o.endswith("=null")]
        message = f"{given[-1] if given else message} is none of the group's options"
    if launcher := re.search(r"Could not (?:find|load) 'hydra/launcher/(joblib|submitit)", message):
        message = f"the launcher {launcher[1]} is not installed: pip install -e '.[{launcher[1]}]'"
    if message.startswith("hydra."):  # which Hydra makes of these before the task
        given = [o for o in said if o.lstrip("+").partition("=")[0] in ("name", "runs_dir")]
        message = re.sub(r"^hydra\.\w+\.dir: \w+ raised while resolving interpolation: ", "", message)
        message += f" (given: {', '.join(given)})" if given else ""
    return message


def unheard(program: str) -> None:
    """Ends the program where nothing reads what it prints, such as `dd-report | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be printed at the end
    sys.exit(128 + 13)  # as shells report SIGPIPE


def advised(message: str) -> str:
    """A message, whose promise that the same command goes on holds."""
    same = "the same command"
    return message.replace(same, f"{same} without resume=null") if "resume=null" in sys.argv else message


def prepare() -> None:
    """Settings of the whole process."""
    dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
    for name in ("DD_DATA_DIR", "DD_POPULATIONS_DIR", "DD_RUNS_DIR"):
        if name in os.environ:  # a shell expands ~, an .env file does not
            os.environ[name] = os.path.expanduser(os.environ[name])
    if os.getcwd() not in sys.path:  # a user's own network may lie here; nothing that is installed is hidden
        sys.path.append(os.getcwd())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has no arrows gets ? for them
            stream.reconfigure(errors="replace")
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")  # a log file need not be wrapped for a terminal
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us, and we print them
    warnings.filterwarnings(
        "ignore",
        message=".*LeafSpec.*|.*does not have many workers.*|.torch.jit.script. is deprecated.*"
        "|.*have overridden .transfer_batch_to_device.*|.*is smaller than the logging interval.*",
    )
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
        if stop := interruption(error):
            raise stop from None
        if cfg.get("traceback"):
            os.environ[TRACEBACK] = "1"
        if os.environ.get(TRACEBACK):
            raise
        message = one_line(error)
        if not isinstance(error, OSError | MemoryError | FloatingPointError):  # of a run, not of a setting
            message = with_overrides(message, task_overrides())
        if rank() == 0:
            leave(Path(HydraConfig.get().runtime.output_dir))
        sys.exit(f"{program}: error: {advised(message)}")


bench, distill, evaluate, export, gallery, linear, pack, pretrain, report = map(
    command, ("bench", "distill", "evaluate", "export", "gallery", "linear", "pack", "pretrain", "report")
)
