"""Held-out evaluation against training and testing by hand."""

import pytest
import torch
from conftest import SmallNet
from scipy import stats

from dd_lightning.data import Pictures, Preprocessing
from dd_lightning.distilled import DistilledData
from dd_lightning.evaluation.heldout import HeldOutResult, evaluate_held_out
from dd_lightning.init import RandomInit
from dd_lightning.system.seeding import Stream
from dd_lightning.unroll import FunctionalUnroll, Momentum


def test_equals_training_and_testing_by_hand():
    network, init = SmallNet(), RandomInit(seed=4)
    pictures = Pictures(torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8), torch.arange(40) % 3)
    preprocessing = Preprocessing(1, 6, [0.4], [0.3])
    data = DistilledData.create(torch.randn(2, 3, 1, 6, 6), torch.arange(3).expand(2, 3), 2, 0.5)
    data.card["inner"] = {"choice": "momentum", "momentum": 0.9}
    done = []
    result = evaluate_held_out(
        network,
        init.held_out(network, 5, Stream.HELD_OUT_TEST),
        data,
        pictures,
        preprocessing,
        FunctionalUnroll(Momentum()),
        per_step=True,
        chunk=2,
        on_progress=done.append,
    )
    assert result.accuracies.shape == (5, 5)
    assert done == [2, 2, 1]
    images = preprocessing(pictures.images)
    for weights, row in zip(init.held_out(network, 5, Stream.HELD_OUT_TEST), result.accuracies, strict=True):
        single = SmallNet()
        single.load_state_dict(weights)
        before = (single.eval()(images).argmax(1) == pictures.labels).float().mean() * 100
        data.train(single)
        after = (single.eval()(images).argmax(1) == pictures.labels).float().mean() * 100
        assert row[0].item() == pytest.approx(before.item())
        assert row[-1].item() == pytest.approx(after.item())


def test_statistics():
    values = torch.tensor([80.0, 90.0, 85.0, 95.0])
    result = HeldOutResult(torch.stack([torch.full((4,), 10.0), values], 1))
    assert (result.before, result.mean) == (10, 87.5)
    assert result.std == pytest.approx(values.std().item())
    half = stats.t.ppf(0.975, 3) * values.std().item() / 2
    assert result.interval == pytest.approx((87.5 - half, 87.5 + half))
    assert HeldOutResult(torch.tensor([[10.0, 93.0]])).interval == (93, 93)
    assert str(result) == "10.00 % → 87.50 ± 6.45 %"
