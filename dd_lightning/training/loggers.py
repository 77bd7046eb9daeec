"""Loggers that an interrupted run goes on with."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning import loggers as lightning
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from dd_lightning.system.atomic import write_bytes
from dd_lightning.system.processes import rank
from dd_lightning.training.tracking import mlflow_logger, wandb_logger


class _Appending(ExperimentWriter):
    """Lightning's writer, without its deletion of what an earlier process wrote."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._read_keys()

    def _read_keys(self) -> None:
        """Columns are those of the file."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        pass

    def save(self) -> None:
        os.makedirs(self.log_dir, exist_ok=True)  # the folder may have been removed
        try:
            super().save()
        except BaseException:
            self._read_keys()  # Lightning saves once more when a run fails, and counts new columns as written
            raise

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning's empties the file first, and what is in it is lost where the process or the disk ends then."""
        with Path(self.metrics_file_path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        write_rows(Path(self.metrics_file_path), fieldnames, rows)


class CSVLogger(lightning.CSVLogger):
    """Lightning's, which keeps one file for a run however often it is interrupted."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Appending(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    def rewind(self, step: int) -> None:
        """Drops what an earlier process logged after outer step `step`: it is logged again."""
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        if not path.is_file():
            return
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            keys = list(reader.fieldnames or [])
            whole = (row for row in reader if is_whole(row))  # those that a full disk cut are not
            # Lightning numbers the steps of its own metrics from 0, the others count those done.
            rows = [row for row in whole if step and int(row["step"]) + bool(row.get("train/loss")) <= step]
        write_rows(path, keys, rows)


def is_whole(row: dict[str, str]) -> bool:
    return None not in row and None not in row.values() and row.get("step", "").isdecimal()


def write_rows(path: Path, keys: list[str], rows: list[dict[str, str]]) -> None:
    """A table, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, keys)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def make_logger(make: Callable[..., Logger], config: dict[str, Any], folder: Path, step: int) -> Logger:
    """A logger that goes on after outer step `step` of the run in `folder`.

    Args:
        make: the logger's class with its settings, a `functools.partial`.
        config: the whole configuration, for loggers that keep it.
    """
    kind = make.func  # type: ignore[attr-defined]
    if kind is WandbLogger:
        return wandb_logger(make, config, folder)  # type: ignore[arg-type]
    if kind is MLFlowLogger:
        return mlflow_logger(make, config, folder)  # type: ignore[arg-type]
    logger = make(purge_step=step + 1) if kind is TensorBoardLogger and step else make()
    if isinstance(logger, CSVLogger) and rank() == 0:
        logger.rewind(step)
    return logger
