"""The end of a run: the best distilled data, tested once, and the results."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dd_lightning.data import RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.evaluation import HeldOutResult
from dd_lightning.parametrisation import Bases
from dd_lightning.report.budgets import Point, draw_prefixes
from dd_lightning.report.picture import draw, draw_bases
from dd_lightning.system.atomic import write_json
from dd_lightning.system.processor import hardware
from dd_lightning.system.words import counted
from dd_lightning.training.callbacks import HeldOutEvaluation, log_picture, of_kind
from dd_lightning.training.growing import Growing
from dd_lightning.training.resuming import ResumeCheckpoint
from dd_lightning.training.tracking import log_distilled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What a run ends with.

    Attributes:
        distilled: the best by validation; its card says the test accuracy.
        test: the accuracy on the test set.
        validation: accuracy in % by which they were chosen, if there was an evaluation.
        networks_chose: how many networks it is of.
        prefixes: of a set that was grown, the test of the images of each stage.
    """

    distilled: DistilledData
    test: HeldOutResult
    validation: float | None
    networks_chose: int | None
    prefixes: dict[int, HeldOutResult] = field(default_factory=dict)

    @property
    def tested(self) -> dict[str, Any]:
        """The test, for `result.json` and the card."""
        return self.test.as_dict() | {"networks_chose": self.networks_chose}


def finish(trainer: pl.Trainer, distiller: DatasetDistiller, data: RealData) -> Finished:
    """Chooses the best distilled data by validation, and tests them once."""
    device = trainer.strategy.root_device
    validation, networks_chose = load_best(trainer, distiller)
    distiller.to(device)
    distiller.network.to(device)
    data.to(device)
    held_out = of_kind(trainer, HeldOutEvaluation) or HeldOutEvaluation()
    result = held_out.test(distiller, distiller.distilled.detach(), data)
    distilled, growing = distiller.distilled.detach().to("cpu"), of_kind(trainer, Growing)
    prefixes = {}
    if growing is not None:
        distilled = growing.grown(distilled)
        for n in growing.stages[:-1]:
            prefixes[n] = held_out.test(distiller, distilled.prefix(n).to(device), data)
        prefixes[growing.stages[-1]] = result
    finished = Finished(distilled, result, validation, networks_chose, prefixes)
    return replace(finished, distilled=distilled.with_card(accuracy=finished.tested))


def write_results(finished: Finished, trainer: pl.Trainer, data: RealData, folder: Path, about: dict[str, Any]) -> None:
    """Writes distilled data, picture and `result.json` into the run's folder, and logs the test.

    Args:
        about: the run: `name`, and what else belongs into `result.json`.
    """
    distilled, result = finished.distilled, finished.test
    distilled.save(folder / "distilled.safetensors")
    title = f"{about['name']}: {result}"
    draw(distilled, data.preprocessing, title, folder / "distilled.png", data.class_names)
    if distilled.raw_images is not None and isinstance(distilled.parametrisation, Bases):
        bases = distilled.parametrisation.enlarged(distilled.raw_images["bases"])
        draw_bases(bases, data.preprocessing, f"{about['name']}: {len(bases)} bases", folder / "bases.png")
    numbers = {n: distilled.prefix(n).stored_numbers for n in finished.prefixes}
    if finished.prefixes:
        points = [Point(n, numbers[n], tested.mean, tested.std) for n, tested in finished.prefixes.items()]
        draw_prefixes(points, about["name"], folder / "prefixes.png")
    resuming = of_kind(trainer, ResumeCheckpoint)
    content = about | {
        "test": finished.tested,
        "prefixes": [
            {"images_per_class": n, "stored_numbers": numbers[n]} | tested.as_dict()
            for n, tested in finished.prefixes.items()
        ],
        "validation_accuracy_mean": finished.validation,
        "learning_rates": distilled.learning_rates.tolist(),
        "outer_steps": trainer.global_step,
        "stopped_early": trainer.global_step < trainer.max_steps,
        "seconds_distilling": resuming.seconds if resuming else None,
        "hardware": hardware(),
        "card": distilled.card,
    }
    write_json(folder / "result.json", content)
    for logger in trainer.loggers:
        logger.log_metrics(result.metrics("test"), step=trainer.global_step)
    log_picture(trainer, folder / "distilled.png", trainer.global_step)
    log_distilled(trainer.loggers, folder, distilled.card)


def tell(finished: Finished, trainer: pl.Trainer, fixed: bool, folder: Path) -> None:
    """Says how well the distilled data do, and where they are.

    Args:
        fixed: whether they are for one fixed network.
    """
    result, images = finished.test, finished.distilled.images
    networks = "the fixed network" if fixed else counted(len(result.accuracies), "unseen network")
    count, chose = images.shape[0] * images.shape[1], ""
    if finished.networks_chose is not None:
        others = "the same network" if fixed else counted(finished.networks_chose, "other network")
        chose = f", chosen with {others} on validation pictures"
    log.info(f"test accuracy of {networks}, trained on {count} distilled images{chose}: {result}")
    for line in result.lines():
        log.info(f"  {line}")
    for n, tested in finished.prefixes.items():
        log.info(f"  the first {counted(n, 'image')} of each class: {tested}")
    where = os.path.relpath(folder)
    log.info(f"saved in {where}: distilled.safetensors, distilled.png, result.json")
    if trainer.global_step < trainer.max_steps:
        steps = f"{trainer.global_step} of {trainer.max_steps} outer steps"
        log.info(f"a callback stopped the run early, after {steps}; resume={where} goes on from there")


def load_best(trainer: pl.Trainer, distiller: DatasetDistiller) -> tuple[float | None, int | None]:
    """Leaves in the module the distilled data of the best held-out validation accuracy.

    Returns:
        That accuracy in %, and of how many networks it is, if there was an evaluation.
    """
    held_out = of_kind(trainer, HeldOutEvaluation)
    if held_out is None or held_out.best is None:
        return None, None
    distiller.load_state_dict(held_out.best["distilled"])
    return held_out.best["accuracy"], held_out.best.get("networks")  # which older checkpoints do not tell
