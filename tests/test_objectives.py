"""Objectives: the loss against its definition, measures against counting by hand."""

import pytest
import torch
from conftest import SmallNet

from dd_lightning.data import Pictures, Preprocessing
from dd_lightning.init import RandomInit
from dd_lightning.networks import confusion, predict
from dd_lightning.objectives import Classification, Poisoning


def test_poisoning_is_the_cross_entropy_of_modified_labels():
    """Eq. (10): labels of K become T; all else as it was."""
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 2, 1])
    modified = torch.tensor([0, 1, 3, 3, 3, 1])
    expected = -torch.log_softmax(logits, 2)[:, torch.arange(6), modified].mean()
    assert Poisoning(2, 3)(logits, labels).item() == pytest.approx(expected.item())
    assert labels.tolist() == [0, 1, 2, 3, 2, 1]
    assert Poisoning(2, 3)(logits, labels) != Classification()(logits, labels)


def test_confusion_counts_every_picture():
    network, init = SmallNet(), RandomInit(per_step=3)
    weights = init.sample(network, 0)
    pictures = Pictures(torch.randint(0, 256, (50, 1, 6, 6), dtype=torch.uint8), torch.arange(50) % 3)
    preprocessing = Preprocessing(1, 6, [0.4], [0.3])
    counts = confusion(network, weights, pictures.images, pictures.labels, preprocessing, batch_size=7)
    predicted = predict(network, weights, preprocessing(pictures.images)).argmax(2)
    for j, true, found in ((j, t, p) for j in range(3) for t in range(3) for p in range(3)):
        assert counts[j, true, found] == ((pictures.labels == true) & (predicted[j] == found)).sum()


def test_measures_by_hand():
    of_one = torch.tensor([[2, 6, 2], [0, 9, 1], [0, 0, 5]])
    counts = torch.stack([of_one, torch.diag(torch.tensor([10, 10, 5]))])
    assert Classification().measures(counts)["accuracy"].tolist() == [64, 100]
    measures = Poisoning(0, 1).measures(counts)
    assert next(iter(measures)) == "accuracy_modified_labels"
    assert measures["accuracy_modified_labels"].tolist() == [80, 60]
    assert measures["accuracy_true_labels"].tolist() == [64, 100]
    assert measures["attack_share"].tolist() == [60, 0]
    assert [measures[f"accuracy_class_{c}"][0].item() for c in range(3)] == [20, 90, 100]


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
