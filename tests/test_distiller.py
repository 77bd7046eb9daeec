"""Algorithm 1 under Lightning: what is learned, what a step does, stopping and resuming."""

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import SmallNet
from pytorch_lightning.callbacks import ModelCheckpoint

from dd_lightning.data import Packed, RealData
from dd_lightning.distilled import DistilledData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.evaluation.heldout import evaluate_held_out
from dd_lightning.init import FixedInit, RandomInit
from dd_lightning.networks import predict
from dd_lightning.objectives import Classification
from dd_lightning.sources import noise, real
from dd_lightning.system.seeding import Stream
from dd_lightning.training.callbacks import HeldOutEvaluation, LastGood, NonFiniteLossError
from dd_lightning.unroll import FunctionalUnroll, HigherUnroll


def build(path, init=None, unroll=None, learning_rate=0.1, rate_scale=1.0, config=None, form=None, weight_decay=0.0):
    torch.manual_seed(0)
    data = RealData(Packed(str(path), validation=10, **(form or {})), batch_size=16)
    data.setup()
    network = SmallNet(data.preprocessing.channels, data.preprocessing.image_size, data.num_classes)
    distiller = DatasetDistiller(
        noise(data, steps=2, epochs=2, learning_rate=learning_rate),
        network,
        init or RandomInit(per_step=2),
        unroll or FunctionalUnroll(),
        Classification(),
        lambda groups: torch.optim.AdamW(groups, lr=0.05, betas=(0.5, 0.999), weight_decay=weight_decay),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
        rate_scale,
        config,
    )
    return data, distiller


def trainer(folder, max_steps, *callbacks):
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        inference_mode=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )


def test_its_parameters_are_the_distilled_data_alone(packed):
    _, distiller = build(packed())
    assert {name for name, _ in distiller.named_parameters()} == {"images", "raw_learning_rates"}
    assert list(distiller.children()) == []


@pytest.mark.parametrize("unroll", [FunctionalUnroll(), HigherUnroll()])
def test_three_outer_steps_by_hand(packed, tmp_path, unroll):
    """Algorithm 1 written out, with its own Adam, gives the same distilled data."""
    data, distiller = build(packed(), unroll=unroll, rate_scale=0.5, weight_decay=2.0)
    by_hand = distiller.distilled.detach()
    by_hand.images.requires_grad_()
    by_hand.raw_learning_rates.requires_grad_()
    groups = [{"params": [by_hand.images]}, {"params": [by_hand.raw_learning_rates], "lr": 0.025}]
    optimizer = torch.optim.Adam(groups, lr=0.05, betas=(0.5, 0.999))
    for step in range(3):
        images, labels = data.minibatch(step)
        theta = FunctionalUnroll()(distiller.network, distiller.init.sample(distiller.network, step), by_hand.steps())
        losses = [F.cross_entropy(logits, labels) for logits in predict(distiller.network, theta, images)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        with torch.no_grad():
            by_hand.images.mul_(1 - 0.05 * 2.0)  # decoupled, and not of the learning rates
        optimizer.step()
    trainer(tmp_path, 3).fit(distiller, datamodule=data)
    torch.testing.assert_close(distiller.images.data, by_hand.images.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(distiller.raw_learning_rates.data, by_hand.raw_learning_rates.data, rtol=1e-4, atol=1e-5)


def test_distilling_teaches(packed, tmp_path):
    data, distiller = build(packed(), init=FixedInit())
    held_out = HeldOutEvaluation(networks=1, test_networks=1, every=100)
    before = held_out.test(distiller, distiller.distilled, data)
    trainer(tmp_path, 150).fit(distiller, datamodule=data)
    after = held_out.test(distiller, distiller.distilled, data)
    assert before.before == after.before
    assert after.mean > before.mean + 20


def test_validation_chooses_and_the_test_set_is_not_read(packed, tmp_path):
    data, distiller = build(packed())
    data.test = None
    held_out = HeldOutEvaluation(networks=3, every=2)
    fitting = trainer(tmp_path, 6, held_out)
    data.to = lambda device: None
    fitting.fit(distiller, datamodule=data)
    assert held_out.best is not None
    assert fitting.callback_metrics["heldout/accuracy_mean"] <= held_out.best["accuracy"]
    assert {"heldout/accuracy_before", "heldout/accuracy_std", "heldout/accuracy_low"} <= set(fitting.callback_metrics)


def test_checkpoints_are_chosen_on_validation_pictures_and_networks(packed, tmp_path):
    """The accuracy that chooses is of pictures that are neither distilled from nor tested on, with networks alike."""
    data, distiller = build(packed())
    data.validation.labels.copy_(2 - data.validation.labels)  # so that no other pictures have its accuracy
    trainer(tmp_path, 8, held_out := HeldOutEvaluation(networks=3, every=8)).fit(distiller, datamodule=data)
    accuracy = {}
    for stream in (Stream.HELD_OUT_VALIDATION, Stream.HELD_OUT_TEST):
        weights = list(distiller.init.held_out(distiller.network, 3, stream))
        for name in ("train", "validation", "test"):
            common = (distiller.distilled, getattr(data, name), data.preprocessing, FunctionalUnroll())
            accuracy[stream, name] = evaluate_held_out(distiller.network, weights, *common).mean
    assert held_out.best is not None
    assert held_out.best["networks"] == 3
    assert held_out.best["accuracy"] == pytest.approx(accuracy.pop((Stream.HELD_OUT_VALIDATION, "validation")))
    assert all(abs(held_out.best["accuracy"] - other) > 0.5 for other in accuracy.values())


@pytest.mark.parametrize("steps_before", [5, 9])
def test_a_resumed_run_ends_bit_for_bit_the_same(packed, tmp_path, steps_before):
    """From a checkpoint in the middle of a run, and from one that ended there."""
    path, form = packed(channels=3), {"crop_padding": 2, "flip": True}
    data, straight = build(path, form=form)
    trainer(tmp_path, 9).fit(straight, datamodule=data)
    data, first = build(path, form=form)
    checkpoint = ModelCheckpoint(tmp_path, filename="five", every_n_train_steps=5)
    trainer(tmp_path, steps_before, checkpoint).fit(first, datamodule=data)
    data, second = build(path, form=form)
    resumed = trainer(tmp_path, 9)
    resumed.fit(second, datamodule=data, ckpt_path=str(tmp_path / "five.ckpt"), weights_only=True)
    assert resumed.global_step == 9
    assert torch.equal(second.images, straight.images)
    assert torch.equal(second.raw_learning_rates, straight.raw_learning_rates)


def test_a_checkpoint_of_another_config_is_refused(packed, tmp_path):
    data, distiller = build(packed(), config={"seed": 0, "init.per_step": 2})
    trainer(tmp_path, 1, ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=1)).fit(
        distiller, datamodule=data
    )
    _, other = build(packed(), config={"seed": 0, "init.per_step": 4})
    with pytest.raises(ValueError, match=r"another config: init\.per_step \(2 there, 4 here\)"):
        trainer(tmp_path, 2).fit(other, datamodule=data, ckpt_path=str(tmp_path / "one.ckpt"), weights_only=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_data(packed, tmp_path):
    data, distiller = build(packed())
    finite = data.minibatch

    def poisoned(step):
        images, labels = finite(step)
        return images * (math.nan if step == 3 else 1), labels

    data.minibatch = poisoned
    with pytest.raises(NonFiniteLossError, match=r"nan at outer step 3, with learning rates 0\.\d+, 0\.\d+") as caught:
        trainer(tmp_path, 9, LastGood()).fit(distiller, datamodule=data)
    saved = DistilledData.load(tmp_path / "last_good.safetensors")
    assert str(tmp_path / "last_good.safetensors") in str(caught.value)
    assert saved.images.isfinite().all()
    # The good data are those of the last finite loss, which is one update back.
    data, again = build(data.dataset.path)
    trainer(tmp_path, 2).fit(again, datamodule=data)
    assert torch.equal(saved.images, again.images)


def test_initial_data(packed):
    data, _ = build(packed())
    start = noise(data, steps=3, images_per_class=2, std=0.5, learning_rate=[0.3, 0.2, 0.1])
    assert start.images.shape == (3, 6, 1, 12, 12)
    assert start.labels[1].tolist() == [0, 1, 2, 0, 1, 2]
    assert start.images.std().item() == pytest.approx(0.5, rel=0.05)
    assert start.learning_rates[:, 0].tolist() == pytest.approx([0.3, 0.2, 0.1])
    pictures = real(data, steps=3, images_per_class=2)
    every = data.preprocessing(data.train.images)
    for image, label in zip(pictures.images.flatten(0, 1), pictures.labels.flatten(), strict=True):
        same = (every == image).flatten(1).all(1).nonzero().flatten()
        assert label in data.train.labels[same]
    with pytest.raises(ValueError, match="training images, but 60 were asked for"):
        real(data, steps=30, images_per_class=2)
