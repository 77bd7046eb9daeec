"""Sets that grow: what every stage learns, prefixes, whole runs that are killed in the middle of a stage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from test_distiller import trainer
from test_resuming import ANY, RUN, Killed, at_step, killed, same

from dd_lightning import DistilledData
from dd_lightning.data import Packed, RealData
from dd_lightning.distiller import DatasetDistiller
from dd_lightning.init import RandomInit
from dd_lightning.objectives import Classification
from dd_lightning.parametrisation import LearnedLabels
from dd_lightning.sources import noise, random_subsets
from dd_lightning.training import Growing
from dd_lightning.unroll import FunctionalUnroll, ShuffledOrder

GROW = ("grow=stages", "grow.stages=[1,2]", "window=random")


def distil(path, folder, max_steps, stages=None, fraction=0.0, prefix=None, optimizer=torch.optim.Adam):
    """A run from three images of each class, or the first of them; and its growing callback."""
    torch.manual_seed(0)
    data = RealData(Packed(str(path), validation=10), batch_size=16)
    data.setup()
    start = replace(noise(data, epochs=1, images_per_class=3, learning_rate=0.1), order=ShuffledOrder(4))
    start = start if prefix is None else start.first(prefix)
    before = start.detach()  # of which the module shares no tensor
    labels = LearnedLabels()
    raw = labels.raw(start.labels, 3, None)
    distiller = DatasetDistiller(
        replace(start, soft_labels=raw),
        SmallNet(1, 12, 3),
        RandomInit(per_step=1),
        FunctionalUnroll(),
        Classification(),
        lambda groups: optimizer(groups, lr=0.05),
        lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, 4),
        labels=labels,
        raw_labels=raw,
    )
    growing = [Growing(stages, fraction)] if stages else []
    fitting = trainer(folder, max_steps, *growing)
    fitting.fit(distiller, datamodule=data)
    return distiller, before, fitting


def test_a_first_stage_is_a_run_of_its_own_and_can_stay_as_it_is(packed, tmp_path):
    path = packed()
    alone, start, _ = distil(path, tmp_path, 4, prefix=1)
    grown, whole, fitting = distil(path, tmp_path, 8, [1, 3])
    of_alone = (alone.images, alone.raw_labels)
    assert not torch.equal(alone.images, start.images)
    for one, other in zip(of_alone, (grown.images, grown.raw_labels), strict=True):
        assert torch.equal(one, other[:, :3])
    assert (grown.images[:, 3:] != whole.images[:, 3:]).flatten(2).any(2).all()
    growing = fitting.callbacks[0]
    assert growing.rates["1"] == alone.raw_learning_rates.tolist()
    assert growing.rates["3"] == grown.raw_learning_rates.tolist() != growing.rates["1"]
    prefix = growing.grown(grown.distilled.detach()).prefix(1)
    assert torch.equal(prefix.images, alone.images)
    assert torch.equal(prefix.soft_labels, alone.raw_labels)
    assert torch.equal(prefix.raw_learning_rates, alone.raw_learning_rates)


def test_images_of_earlier_stages_go_a_fraction_of_their_step(packed, tmp_path):
    """With plain gradient descent as the outer optimizer, in the only outer step of the second stage."""
    path = packed()
    first, *_ = distil(path, tmp_path, 1, [3], optimizer=torch.optim.SGD)
    runs = [distil(path, tmp_path, 2, [1, 3], f, optimizer=torch.optim.SGD)[0] for f in (0.0, 0.3, 1.0)]
    for of in (lambda d: d.images, lambda d: d.raw_labels):
        frozen, slow, full = (of(run) for run in runs)
        assert not torch.equal(frozen[:, :3], full[:, :3])
        torch.testing.assert_close(slow[:, :3] - frozen[:, :3], 0.3 * (full - frozen)[:, :3], rtol=1e-3, atol=1e-6)
        assert torch.equal(frozen[:, 3:], full[:, 3:])
    assert not torch.equal(first.images, runs[0].images)


def test_every_stage_has_an_optimizer_and_a_schedule_of_its_own(packed, tmp_path):
    _, _, fitting = distil(packed(), tmp_path, 6, [1, 3])  # of 3 outer steps each
    optimizer = fitting.optimizers[0]
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    expected = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * 3 / 4))) / 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(float(expected), rel=1e-4)


def test_stages_are_equally_long_and_the_last_takes_the_rest():
    growing = Growing([1, 2, 5], 0.25)
    assert [growing.stage(step, 10) for step in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    places = torch.tensor([[1, 1, 2, 2, 3, 6]])
    assert growing.scale(places, 0).tolist() == [[1, 1, 0, 0, 0, 0]]
    assert growing.scale(places, 1).tolist() == [[0.25, 0.25, 1, 1, 0, 0]]
    assert growing.scale(places, 2).tolist() == [[0.25, 0.25, 0.25, 0.25, 1, 0]]


def test_prefixes_are_the_first_images_of_each_class(tmp_path):
    labels = torch.tensor([[0, 1, 1, 0, 1, 0]])
    data = DistilledData.create(torch.arange(6.0).view(1, 6, 1, 1, 1), labels)
    data = replace(data, order=ShuffledOrder(5, images_per_class=2), soft_labels=torch.rand(1, 6, 2))
    assert data.places.tolist() == [[1, 1, 2, 2, 3, 3]]
    data = data.with_card(stages={"1": [[0.5]], "2": [[0.6]], "3": data.raw_learning_rates.tolist()})
    data.save(tmp_path / "d.safetensors")
    cut = DistilledData.load(tmp_path / "d.safetensors").prefix(2)
    assert cut.images.flatten().tolist() == [0, 1, 2, 3]
    assert cut.labels.tolist() == [[0, 1, 1, 0]]
    assert torch.equal(cut.soft_labels, data.soft_labels[:, :4])
    assert cut.raw_learning_rates.item() == pytest.approx(0.6)
    assert cut.card["stored_numbers"] == cut.stored_numbers == 4 + 8 + 1
    cut.save(tmp_path / "cut.safetensors")
    assert DistilledData.load(tmp_path / "cut.safetensors").order == ShuffledOrder(5)  # all there are
    with pytest.raises(ValueError, match="4 images a class were never a stage; those are 1, 2, 3"):
        data.prefix(4)
    with pytest.raises(ValueError, match="these data were not grown"):
        cut.prefix(1)


@pytest.fixture(autouse=True)
def toy(packed):
    return packed(channels=3)


def test_a_growing_run_goes_on_bit_for_bit_and_its_prefixes_are_tested(run, monkeypatch):
    lines = (*RUN, *ANY, "grow=stages", "grow.stages=[1,3]", "window=random", "augment=flip_rotate")
    code, error, folder = run("distill", *lines, "name=straight")
    assert (code, error) == (0, "")
    for step in (5, 7):  # the second stage begins with outer step 5; checkpoints are after 3, 4, 6, 8, 9
        at_step(monkeypatch, step, killed)
        with pytest.raises(Killed):
            run("distill", *lines, "name=killed")
    assert run("distill", *lines, "name=killed")[:2] == (0, "")
    other = next(Path("runs", "killed").iterdir())
    assert same(folder, other)
    results = [json.loads((place / "result.json").read_text()) for place in (folder, other)]
    assert results[0]["prefixes"] == results[1]["prefixes"]
    assert [prefix["images_per_class"] for prefix in results[0]["prefixes"]] == [1, 3]
    assert results[0]["prefixes"][1]["accuracies"] == results[0]["test"]["accuracies"]
    assert (folder / "prefixes.png").stat().st_size > 1000
    log = (folder / "dd-distill.log").read_text()
    assert "the first 1 image of each class: " in log
    where = (f"distilled.path={folder}", "networks=3", "network._target_=conftest.SmallNet")
    code, error, cut = run("evaluate", *where, "distilled.images_per_class=1")
    assert (code, error) == (0, "")
    tested = json.loads((cut / "result.json").read_text())["test"]["accuracies"]
    assert tested == pytest.approx(results[0]["prefixes"][0]["accuracies"])
    with pytest.raises(ValueError, match="2 images a class were never a stage; those are 1, 3"):
        DistilledData.load(folder).prefix(2)
    code, error, subsets = run("evaluate", *where, "distilled=random_subsets", "distilled.sets=2")
    assert (code, error) == (0, "")
    assert len(json.loads((subsets / "result.json").read_text())["test"]["accuracies"]) == 6
    data = RealData(Packed("toy.npz", validation=10), batch_size=16)
    data.setup()
    with pytest.raises(ValueError, match="images_per_class=4, but no class has more than 3"):
        random_subsets(data, str(folder), images_per_class=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("grow.stages=[2,1]",), "grow: stages must grow, such as [1,2,5,10], not [2, 1]"),
        (("grow.stages=[]",), "grow: stages must grow"),
        (("grow.stages=[0,1]",), "grow: stages[0] must be a whole number of at least 1, not 0"),
        (("grow.fraction=2",), "grow: fraction must be from 0 to 1, not 2"),
        (("trainer.max_steps=1",), "grow: 2 stages need as many outer steps, but trainer.max_steps=1"),
        (("images=bases",), "grow: bases are shared by all images"),
        (("budget.images_per_class=2",), "grow: the stages decide how many images there are"),
    ],
)
def test_stages_that_cannot_be(run, line, message):
    code, error, _ = run("distill", *RUN, *ANY, *GROW, *line)
    assert code == 1
    assert message in error
    assert error.count("\n") <= 1


@pytest.mark.parametrize("source", ["average_real", "learned"])
def test_images_that_are_settled_already_do_not_grow(run, source):
    code, error, _ = run("distill", *RUN, *GROW[:2], f"distilled={source}")
    assert code == 1
    assert "grow: how many images there are is settled already; start from distilled=noise" in error
