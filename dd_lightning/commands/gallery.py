"""dd-gallery: the distilled data that come with the package; and, for those who make it, adding to them."""

import json
import logging
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import load_file

from dd_lightning.commands.launch import command
from dd_lightning.distilled import DistilledData
from dd_lightning.report.runs import record
from dd_lightning.system.checks import check_name
from dd_lightning.system.gallery import GALLERY, PREFIX, entries, narrowed
from dd_lightning.system.tensors import write_tensors

log = logging.getLogger(__name__)

ELSEWHERE = ("runs_dir", "data_dir", "populations_dir", "logger", "hydra", "resume", "threads", "callbacks.progress")
LOST = 0.05  # points of accuracy that 16 bits may cost
LIMIT = 4 * 2**20  # bytes of the whole gallery


def gallery(cfg: DictConfig) -> None:
    """Lists the gallery; with `add` puts the data of a run into it.

    Raises:
        FileNotFoundError, ValueError: the run has no data, or is not known well enough to be made again.
    """
    if cfg.add is not None:
        check_name(entry=cfg.entry)
        commit = head() if cfg.commit is None else str(cfg.commit)  # one of digits is a number to Hydra
        check_name(commit=commit)
        add(Path(str(cfg.add)), cfg.entry, commit)
    for name in entries():
        data = DistilledData.load(PREFIX + name)
        test, choice = (
            data.card.get("accuracy", {}),
            {g: data.card[g]["choice"] for g in ("dataset", "network", "init")},
        )
        spread = f" ± {test['accuracy_std']:.2f}" if test["networks"] > 1 else ""
        log.info(
            f"{PREFIX}{name}: {data.labels.numel()} images, {', '.join(choice.values())} init: "
            f"{test['accuracy_mean']:.2f}{spread} %"
        )


def add(run: Path, name: str, commit: str) -> None:
    """Puts the data of a run into the gallery, in 16 bits if they are as good so, with the accuracy they then have."""
    known = made_by(run) | {"commit": commit}
    source = run / "distilled.safetensors"
    card = DistilledData.load(source).card
    if not {"accuracy_mean", "networks"} <= card.get("accuracy", {}).keys():
        raise ValueError(f"{run} was not tested")
    card.get("dataset", {}).pop("data_dir", None)  # of the machine that made it
    tensors = load_file(source)
    with tempfile.TemporaryDirectory() as folder:
        for bits, stored in (("16", narrowed(tensors)), ("32", tensors)):
            path = Path(folder, f"{bits}.safetensors")
            write_tensors(path, stored, card)
            size, test = path.stat().st_size, tested(path, card["accuracy"]["networks"])
            lost = card["accuracy"]["accuracy_mean"] - test["accuracy_mean"]
            log.info(f"{name} in {bits} bits, {size:,} bytes: {test['accuracy_mean']:.2f} % ({-lost:+.2f})")
            if lost <= LOST:
                break
        else:
            raise ValueError(f"{run} is tested otherwise than when it was made; see the numbers above")
    others = sum(path.stat().st_size for path in GALLERY.glob("*.safetensors") if path.stem != name)
    if others + size > LIMIT:
        raise ValueError(f"the gallery would be larger than {LIMIT:,} bytes")
    write_tensors(GALLERY / f"{name}.safetensors", stored, card | {"gallery": known, "accuracy": test})


def made_by(run: Path) -> dict[str, Any]:
    """The command and the seed of a run."""
    folder = run / ".hydra"
    if not all((folder / f"{name}.yaml").is_file() for name in ("overrides", "config")):
        raise FileNotFoundError(f"{folder} does not say how the run was made")
    overrides = map(str, record(folder / "overrides.yaml", list))
    kept = [o for o in overrides if not o.lstrip("+").startswith(ELSEWHERE)]
    seed = record(folder / "config.yaml", dict).get("seed")
    return {"command": " ".join(["dd-distill", *kept]), "seed": seed, "torch": version("torch")}


def head() -> str:
    """The commit of the source that runs.

    Raises:
        ValueError: it lies in no git repository.
    """
    line = ["git", "-C", str(GALLERY.parent), "rev-parse", "HEAD"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("say which commit made the run: commit=HASH")
    return done.stdout.strip()


def tested(path: Path, networks: int) -> dict[str, Any]:
    """What `dd-evaluate` finds for a file; it writes beside it."""
    folder = path.with_suffix("")
    line = [sys.executable, "-m", "dd_lightning.commands.evaluate", f"distilled.path={path}"]
    subprocess.run([*line, f"networks={networks}", f"hydra.run.dir={folder}"], check=True)
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["test"]


main = command("gallery")

if __name__ == "__main__":
    main()
