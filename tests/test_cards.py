"""Cards of distilled data: what is missing, added or of another kind is refused by its name, when the file is read."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SmallNet

from dd_lightning import DistilledData
from dd_lightning.data import FlipRotate
from dd_lightning.distilled import FORMAT
from dd_lightning.parametrisation import Bases
from dd_lightning.report.export import explained
from dd_lightning.system.tensors import read_tensors, write_tensors
from dd_lightning.unroll import ShuffledOrder

CARD = {
    "dataset": {"choice": "packed", "target": "dd_lightning.data.Packed", "name": "toy"},
    "network": {"choice": "custom", "target": "conftest.SmallNet"},
    "init": {"choice": "random"},
    "objective": {"choice": "classification"},
    "inner": {"choice": "adam", "target": "t", "betas": [0.9, 0.999], "eps": 1e-8},
    "augment": {"choice": "flip_rotate", "target": "t", "degrees": 15.0},
    "preprocessing": {"channels": 1, "image_size": 6, "mean": [0.5], "std": [0.5]},
    "stages": {"1": [[0.1]], "2": [[0.2]]},
    "accuracy": {"accuracy_mean": 50.0, "accuracy_std": 1.0, "networks": 3, "networks_chose": None},
}
VALUES = [None, "text", 3, -1.5, [], {"a": 1}, True, float("nan"), ["x"], "missing"]


@pytest.fixture
def file(tmp_path):
    """Everything that a file can hold."""
    bases, labels = Bases(4, 2), torch.arange(3).repeat(2)[None]
    raw = bases.raw(torch.zeros(1, 6, 1, 6, 6), torch.Generator().manual_seed(0))
    data = DistilledData.create(bases.images(raw), labels)
    data = replace(data, card=CARD, order=ShuffledOrder(2, 1), augment=FlipRotate(15.0), parametrisation=bases)
    data = replace(data, raw_images=raw, soft_labels=torch.rand(1, 6, 3))
    data.save(tmp_path / "data.safetensors")
    return tmp_path / "data.safetensors"


def use(path):
    """All that is read of a card, but by commands."""
    data = DistilledData.load(path)
    data.train(SmallNet())
    data.dataset()
    explained(data, "")
    if "stages" in data.card:
        data.prefix(1)


def places(node, prefix=()):
    for key, value in node.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


def changed(card, place, value):
    card = copy.deepcopy(card)
    node = card
    for key in place[:-1]:
        node = node[key]
    if value == "missing":
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return card


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_any_entry_of_another_kind(file, value):
    card, tensors = read_tensors(file, FORMAT, "distilled data")
    use(file)
    refused = set()
    for place in places(card):
        write_tensors(file, tensors, changed(card, place, value))
        try:
            use(file)
        except ValueError as error:
            assert place[0].rstrip("s") in str(error) or "data.safetensors" in str(error)  # noqa: PT017
            refused.add(place[0])
    assert refused >= {"format", "preprocessing"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("class_names", 5), ("class_names", [1, 2]), ("other_initial_weights", 5), ("other_initial_weights", {})],
)
def test_an_entry_that_few_files_have_is_checked_too(file, key, value):
    card, tensors = read_tensors(file, FORMAT, "distilled data")
    write_tensors(file, tensors, card | {key: value})
    with pytest.raises(ValueError, match=f"the card's {key} are"):
        DistilledData.load(file)


def test_entries_that_nothing_reads_are_kept(file):
    card, tensors = read_tensors(file, FORMAT, "distilled data")
    more = changed(changed(card, ("new",), [1]), ("preprocessing", "new"), {"a": 1})
    write_tensors(file, tensors, more)
    use(file)
    assert DistilledData.load(file).card["new"] == [1]


OTHER_TENSORS = {
    "missing": None,
    "empty": lambda t: t[:0],
    "whole": lambda t: t.long(),
    "half": lambda t: t.half(),
    "bool": lambda t: t.bool(),
    "nan": lambda t: torch.full_like(t.float(), torch.nan),
    "flat": lambda t: t.flatten(),
    "deeper": lambda t: t[None],
    "twice": lambda t: torch.cat([t, t]),
    "negative": lambda t: -t - 5,
    "scalar": lambda t: t.flatten()[0],
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "bytes": lambda t: t.to(torch.uint8),
}


@pytest.mark.parametrize("change", OTHER_TENSORS)
def test_any_tensor_of_another_kind(file, change):
    card, tensors = read_tensors(file, FORMAT, "distilled data")
    for name, tensor in tensors.items():
        other = {} if change == "missing" else {name: OTHER_TENSORS[change](tensor)}
        write_tensors(file, {n: t for n, t in tensors.items() if n != name} | other, card)
        try:
            use(file)
        except ValueError as error:
            assert "data.safetensors" in str(error)  # noqa: PT017
