"""dd-doctor: what is installed, what is there, and whether all engines work; one page for a bug report.

Prints no secrets. The exit code is 1 where something is broken. Folders are those of the commands: DD_DATA_DIR,
DD_POPULATIONS_DIR, DD_RUNS_DIR, from the environment or .env.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dotenv

from dd_lightning.system import installation
from dd_lightning.system.installation import BROKEN, NOTE, OK, Found, without_secrets

# All else is imported by the check that needs it: what cannot be imported is a finding.

LEAST_DISK = 2**30  # bytes


def device() -> Found:
    import torch
    import torchvision  # noqa: F401  # cannot be imported beside a torch that it was not built for

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return OK, f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, {memory:.0f} GiB"
    from dd_lightning.system.processor import hardware

    unseen = " (there is an NVIDIA driver, but torch sees no GPU)" if Path("/proc/driver/nvidia").exists() else ""
    return NOTE if unseen else OK, hardware() + unseen


def runs() -> Found:
    """Whether runs can be written, and how much of them."""
    folder = Path(os.environ.get("DD_RUNS_DIR", "runs"))
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=there):
        free = shutil.disk_usage(there).free
    text = f"{folder} can be written, {free / 2**30:.1f} GiB free"
    return (NOTE if free < LEAST_DISK else OK), text


def data_sets() -> Found:
    from dd_lightning.commands.launch import CONF
    from dd_lightning.data import Cub200, Voc2007

    folder = Path(os.environ.get("DD_DATA_DIR", "data"))
    names = [path.stem for path in sorted((CONF / "dataset").glob("*.yaml"))]
    unpacked = {"voc2007": Voc2007.tree, "cub200_2011": Cub200.tree}
    there = [name for name in names if name == "digits" or (folder / f"{name}.npz").is_file()]
    there += [name for name, tree in unpacked.items() if (folder / "download" / name / tree).is_dir()]
    missing = [name for name in names if name not in (*there, "packed", "folder")]
    text = f"in {folder}: {', '.join(there)}"
    return (NOTE, f"{text}; downloaded when used: {', '.join(missing)}") if missing else (OK, text)


def populations() -> Found:
    from dd_lightning.init import Population

    folder = Path(os.environ.get("DD_POPULATIONS_DIR", "populations"))
    found = [Population(path.parent) for path in sorted(folder.glob("*/card.json"))]
    there = [f"{one.path.name} ({one.count('train')} + {one.count('held_out')} networks)" for one in found]
    if not there:
        return NOTE, f"none in {folder}; dd-pretrain makes those that adaptation and poisoning need"
    return OK, f"in {folder}: {', '.join(there)}"


def engines() -> Found:
    """A tiny outer step with every engine, all of which must give the gradient of the first."""
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from dd_lightning.commands.launch import CONF
    from dd_lightning.training.cost import gradient

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inner = OmegaConf.load(CONF / "inner" / "gd.yaml")
    found = {}
    for path in sorted((CONF / "unroll").glob("*.yaml")):
        found[path.stem] = gradient(instantiate(OmegaConf.load(path), optimizer=inner), place)
    (_, first), *others = found.items()
    differing = [name for name, one in others if (one - first).norm() > 1e-8 * first.norm()]
    if differing or not first.norm() > 0:
        return BROKEN, f"not the gradient of {next(iter(found))}: {', '.join(differing) or 'it is 0'}"
    return OK, f"{', '.join(found)}: one gradient, on {place.type}"


CHECKS: dict[str, Callable[[], Found]] = {
    "python": installation.python,
    "packages": installation.packages,
    "extras": installation.extras,
    "device": device,
    "machine": installation.machine,
    "runs": runs,
    "data sets": data_sets,
    "populations": populations,
    "engines": engines,
    "W&B": installation.weights_and_biases,
}


def examined(check: Callable[[], Found]) -> Found:
    """What a check found; that it cannot be done is a finding, too."""
    try:
        return check()
    except Exception as error:
        return BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_all() -> list[str]:
    """Prints the page; the names of what is broken."""
    broken = []
    for name, check in CHECKS.items():
        mark, text = examined(check)
        print(f"{mark:6} {name:12} {without_secrets(text)}", flush=True)
        broken += [name] * (mark == BROKEN)
    return broken


def check_gpu(name: str) -> list[str]:
    """What the GPU paths promise, of the device of that name; the names of the lines that are broken."""
    import torch

    from dd_lightning.commands.gpu import prove

    if name == "cuda" and not torch.cuda.is_available():
        print(
            "torch sees no GPU here: nothing is checked (`dd-doctor --gpu cpu` goes through the same lines, in small)"
        )
        return []
    folder = Path(os.environ.get("DD_RUNS_DIR", "runs"), "gpu", time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    folder.mkdir(parents=True)
    broken = prove(name, folder)
    print(f"saved in {os.path.relpath(folder)}: gpu.json")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser("dd-doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    asked = "instead: all that the CUDA paths promise, on this device (cuda), in eight minutes"
    parser.add_argument("--gpu", nargs="?", const="cuda", metavar="DEVICE", help=asked)
    arguments = parser.parse_args()
    dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
    broken = check_all() if arguments.gpu is None else check_gpu(arguments.gpu)
    sys.exit(f"dd-doctor: broken: {', '.join(broken)}" if broken else 0)


if __name__ == "__main__":
    main()
