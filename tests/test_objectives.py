"""Objectives: the loss against its definition, measures against counting by hand."""

import pytest
import torch
from conftest import SmallNet
from torch import nn

from dd_lightning.data import Pictures, Preprocessing
from dd_lightning.evaluation import Learner
from dd_lightning.init import RandomInit
from dd_lightning.networks import Predictions, predict, predictions
from dd_lightning.objectives import Classification, Poisoning
from dd_lightning.unroll import FunctionalUnroll


def test_poisoning_is_the_cross_entropy_of_modified_labels():
    """Eq. (10): labels of K become T; all else as it was."""
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 2, 1])
    modified = torch.tensor([0, 1, 3, 3, 3, 1])
    expected = -torch.log_softmax(logits, 2)[:, torch.arange(6), modified].mean()
    assert Poisoning(2, 3)(logits, labels).item() == pytest.approx(expected.item())
    assert labels.tolist() == [0, 1, 2, 3, 2, 1]
    assert Poisoning(2, 3)(logits, labels) != Classification()(logits, labels)


def test_every_picture_is_predicted():
    network, init = SmallNet(), RandomInit(per_step=3)
    weights = init.sample(network, 0)
    pictures = Pictures(torch.randint(0, 256, (50, 1, 6, 6), dtype=torch.uint8), torch.arange(50) % 3)
    preprocessing = Preprocessing(1, 6, [0.4], [0.3])
    found = predictions(network, weights, pictures.images, pictures.labels, preprocessing, batch_size=7)
    assert torch.equal(found.predicted, predict(network, weights, preprocessing(pictures.images)).argmax(2))
    assert (found.labels is pictures.labels, found.classes) == (True, 3)


def counted(tables, classes):
    """Predictions of networks of which so many pictures of each true class were predicted as each class."""
    cells = [[(t, p) for t, row in enumerate(table) for p, n in enumerate(row) for _ in range(n)] for table in tables]
    true, predicted = torch.tensor(cells).unbind(2)
    assert (true == true[0]).all()
    return Predictions(predicted, true[0], classes)


def test_measures_by_hand():
    found = counted([[[2, 6, 2], [0, 9, 1], [0, 0, 5]], [[10, 0, 0], [0, 10, 0], [0, 0, 5]]], classes=4)
    assert Classification().measures(found)["accuracy"].tolist() == [64, 100]
    measures = Poisoning(0, 1).measures(found)
    assert next(iter(measures)) == "accuracy_modified_labels"
    assert measures["accuracy_modified_labels"].tolist() == [80, 60]
    assert measures["accuracy_true_labels"].tolist() == [64, 100]
    assert measures["attack_share"].tolist() == [60, 0]
    assert [measures[f"accuracy_class_{c}"][0].item() for c in range(4)] == [20, 90, 100, 0]


def test_measures_of_many_classes_take_little_memory():
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 300_000))  # 720 GB, were they a table of true and predicted ones
    weights = {n: torch.zeros_like(p)[None] for n, p in network.named_parameters()}
    weights["1.bias"][0, 7] = 1
    pictures = Pictures(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([7, 299_999]))
    learner = Learner(network, RandomInit(), FunctionalUnroll(), Preprocessing(1, 1, [0.5], [0.5]), Classification())
    assert learner.judged(weights, pictures)["accuracy"].tolist() == [50]


@pytest.mark.parametrize(
    ("attack", "target", "message"),
    [(3, 3, "are both 3"), (-1, 2, "attack_class must be a class"), (1, 2.5, "target_class must be a class")],
)
def test_impossible_classes_are_refused(attack, target, message):
    with pytest.raises(ValueError, match=message):
        Poisoning(attack, target)


def test_a_class_that_the_data_set_lacks_is_refused():
    Poisoning(0, 9).check(10)
    with pytest.raises(ValueError, match="there is no target_class 10 among the classes 0 to 9"):
        Poisoning(0, 10).check(10)
