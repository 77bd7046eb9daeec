"""Faults around a run: full disks, folders that vanish, services out of reach, odd data."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dd_lightning import DistilledData
from dd_lightning.data import Preprocessing
from dd_lightning.report.picture import figure
from dd_lightning.training.loggers import CSVLogger
from dd_lightning.unroll import Unroll

TOY = ("dataset=packed", "dataset.path=toy.npz", "dataset.validation=10", "network=custom", "batch_size=16")
TOY += ("network._target_=conftest.SmallNet", "unroll=functional", "trainer.max_steps=6", "callbacks.resume.every=2")
TOY += ("callbacks.held_out.every=3", "callbacks.held_out.networks=1", "callbacks.held_out.test_networks=1")
TOY += ("trainer.log_every_n_steps=1",)


@pytest.mark.parametrize("full_at", ["checkpoints", "pictures", "csv", "distilled.safetensors", "result.json"])
def test_a_full_disk_ends_a_run_that_goes_on_later(run, monkeypatch, packed, full_at):
    packed()
    code, _, straight = run("distill", *TOY)
    assert code == 0
    with monkeypatch.context() as patch:
        fill(patch, full_at)
        code, error, folder = run("distill", *TOY)
    assert code == 1
    assert error.startswith(f"dd-distill: error: cannot write to {folder} (No space left on device)")
    assert error.rstrip().endswith("the same command goes on from the last checkpoint")
    assert not list(folder.glob("*.safetensors")) or full_at == "result.json"
    assert run("distill", *TOY) == (0, "", None)
    assert torch.equal(DistilledData.load(straight).images, DistilledData.load(folder).images)


def fill(patch, part):
    """No bytes can be written any more to files with `part` in their path, once the run is on its way."""
    import io
    import os

    fsync, real_open = os.fsync, io.open

    def full(file, *args, **kwargs):
        path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        if part.split(".")[0] in path.rpartition("runs/")[2] and "last-000002" not in path:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return fsync(file)

    def open_unless_full(file, mode="r", *args, **kwargs):
        if part == "csv" and "metrics.csv" in str(file) and mode.startswith("a"):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real_open(file, mode, *args, **kwargs)

    patch.setattr(os, "fsync", full)
    patch.setattr("builtins.open", open_unless_full)


def test_a_folder_that_vanishes_is_made_again(run, monkeypatch, packed):
    from dd_lightning.distiller import DatasetDistiller

    packed()
    training_step = DatasetDistiller.training_step

    def removing(self, *args):
        if self.global_step == 3:
            shutil.rmtree("runs")
        return training_step(self, *args)

    monkeypatch.setattr(DatasetDistiller, "training_step", removing)
    code, error, folder = run("distill", *TOY)
    assert (code, error) == (0, "")
    assert DistilledData.load(folder).card["accuracy"]
    assert (folder / "csv" / "version_0" / "metrics.csv").stat().st_size


def test_wandb_out_of_reach_is_said_and_the_run_goes_on_offline(run, monkeypatch, packed, capfd):
    import wandb

    packed()
    init = wandb.init

    def unreachable(*args, mode="online", **kwargs):
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return init(*args, mode=mode, **kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_MODE", "online")
    code, _, folder = run("distill", *TOY, "logger=wandb")
    assert code == 0
    said = "W&B cannot be reached (no route to host); going on offline: `wandb sync` uploads the run later"
    assert said in (folder / "dd-distill.log").read_text()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def arrays(classes, each=1, size=12):
    labels = np.tile(np.arange(classes), each)
    images = np.random.default_rng(0).integers(0, 255, (len(labels), size, size)).astype(np.uint8)
    return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}


def test_one_image_of_each_class(run, packed):
    packed(**arrays(3))
    code, error, _ = run("distill", *TOY, "dataset.validation=1")
    assert code == 1
    assert "(0: the training part)" in error
    code, error, folder = run("distill", *TOY, "dataset.validation=0", "distilled=real")
    assert (code, error) == (0, "")
    assert json.loads((folder / "result.json").read_text())["validation_accuracy_mean"] is not None


def test_one_class_is_refused(run, packed):
    packed(**arrays(1, each=60))
    code, error, _ = run("distill", *TOY)
    assert code == 1
    assert "data set toy has one class" in error


def test_a_thousand_classes(run, monkeypatch, packed):
    check, tried = Unroll.check, []
    monkeypatch.setattr(Unroll, "check", lambda self, *args: check(self, *args) or tried.append(len(args[2])))
    packed(**arrays(1000, each=2, size=6))
    code, error, folder = run("distill", *TOY, "dataset.validation=0", "trainer.max_steps=1", "callbacks.pictures=null")
    assert (code, error) == (0, "")
    assert DistilledData.load(folder).images.shape == (1, 1000, 1, 6, 6)
    assert tried == [100]
    assert (folder / "distilled.png").stat().st_size


@pytest.mark.parametrize("shape", [(1, 1000), (300, 10)])
def test_pictures_of_many_images_stay_drawable(shape):
    steps, classes = shape
    data = DistilledData.create(torch.randn(steps, classes, 1, 4, 4), torch.arange(classes).expand(steps, -1))
    fig = figure(data, Preprocessing(1, 4, [0.5], [0.5]), "many")
    assert max(fig.get_size_inches() * fig.dpi) < 2**13
    assert f"of {steps * classes} images" in fig.get_suptitle()


@pytest.mark.parametrize("values", ["dataset.mean=[nan] dataset.std=[1]", "dataset.mean=[0] dataset.std=[inf]"])
def test_normalisation_that_is_not_finite_is_refused(run, packed, values):
    packed()
    code, error, _ = run("distill", *TOY, *values.split())
    assert code == 1
    assert "dataset: mean and std must be finite" in error


def test_distilled_data_that_are_not_finite_are_refused(run, packed):
    packed()
    data = DistilledData.create(torch.full((1, 3, 1, 12, 12), torch.nan), torch.arange(3)[None])
    data.save("bad.safetensors")
    code, error, _ = run("distill", *TOY, "distilled=learned", "distilled.path=bad.safetensors")
    assert code == 1
    assert "bad.safetensors: images holds values that are not finite numbers" in error
    assert not Path("last_good.safetensors").exists()


def test_a_new_column_of_metrics_costs_no_row_on_a_full_disk(tmp_path, monkeypatch):
    logger = CSVLogger(str(tmp_path), name="csv", version=0)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    before, whole = path.read_bytes(), csv.DictWriter.writerows

    def full(self, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", full)
        logger.log_metrics({"b": 2.0}, step=1)
        with pytest.raises(OSError, match="No space"):
            logger.save()
    assert path.read_bytes() == before
    assert csv.DictWriter.writerows is whole
    logger.save()
    assert path.read_text().split() == ["a,b,step", "1.0,,0", ",2.0,1"]


def test_rows_that_were_cut_are_dropped_when_a_run_goes_on(tmp_path):
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    cut = "heldout/accuracy_mean,step,train/loss\n,0,1.0\n,1,2.0\n50.0,2,\n,2,3.,3,4.0\n,3,\n,2.0,1\n,4"
    path.write_text(cut)
    CSVLogger(str(tmp_path), name="csv", version=0).rewind(2)
    assert path.read_text().split() == ["heldout/accuracy_mean,step,train/loss", ",0,1.0", ",1,2.0", "50.0,2,"]
