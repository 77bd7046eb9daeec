"""Section 3.3, property by property."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dd_lightning.linear import (
    LinearData,
    closed_step,
    distil,
    exact,
    expected_excess,
    lower_bound,
    minimiser,
    random_data,
    reach,
    unrolled_step,
)

DIMENSIONS, SEEDS = st.integers(1, 12), st.integers(0, 2**20)
quick = settings(max_examples=40, deadline=None)


def vector(length, seed):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(DIMENSIONS, st.integers(1, 20), st.floats(1e-3, 10), SEEDS)
def test_equation_6_is_one_unrolled_step(dimension, count, rate, seed):
    distilled, theta_0 = random_data(count, dimension, seed), vector(dimension, seed + 1)
    closed, unrolled = closed_step(theta_0, distilled, rate), unrolled_step(theta_0, distilled, rate)
    torch.testing.assert_close(closed, unrolled, rtol=1e-11, atol=1e-11)


@quick
@given(DIMENSIONS, SEEDS, st.floats(0.1, 1e3))
def test_the_exact_construction_reaches_the_minimum_from_anywhere(dimension, seed, far):
    real = random_data(dimension + 10, dimension, seed)
    distilled, rate = exact(real)
    assert distilled.inputs.shape == (dimension, dimension)
    theta_1 = closed_step(far * vector(dimension, seed + 1), distilled, rate)
    torch.testing.assert_close(theta_1, minimiser(real), rtol=1e-9, atol=1e-9)
    theta = theta_1.requires_grad_()
    (gradient,) = torch.autograd.grad(real.loss(theta), theta)
    assert gradient.abs().max() < 1e-8


@quick
@given(DIMENSIONS, st.integers(1, 15), st.floats(0.01, 2), SEEDS)
def test_the_expected_loss_is_the_mean_over_initial_weights(dimension, count, rate, seed):
    """±√D eᵢ have mean 0 and covariance I, as N(0, I) has; the loss is quadratic, so no more matters."""
    real, distilled = random_data(dimension + 5, dimension, seed), random_data(count, dimension, seed + 1)
    axes = dimension**0.5 * torch.eye(dimension, dtype=torch.float64)
    least = real.loss(minimiser(real))
    losses = [real.loss(closed_step(theta_0, distilled, rate)) - least for theta_0 in [*axes, *-axes]]
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(expected_excess(real, distilled, rate), expected, rtol=1e-8, atol=1e-8)


@quick
@given(st.integers(2, 8), st.integers(1, 7), SEEDS, st.floats(0.01, 2))
def test_no_distilled_data_fall_below_the_bound(dimension, count, seed, rate):
    real = random_data(dimension + 10, dimension, seed)
    distilled = random_data(min(count, dimension - 1), dimension, seed + 1)
    assert expected_excess(real, distilled, rate) >= lower_bound(real, len(distilled.targets)) - 1e-12


def test_eigenvectors_show_that_the_first_part_of_the_bound_is_tight():
    """With targets of θ* = 0, the M largest eigenvectors reach the bound."""
    real = random_data(50, 5)
    real = LinearData(real.inputs, torch.zeros_like(real.targets))
    vectors = torch.linalg.eigh(real.inputs.T @ real.inputs / 50).eigenvectors.flip(1)
    for count in range(1, 6):
        distilled = LinearData(vectors[:, :count].T, torch.zeros(count, dtype=torch.float64))
        assert expected_excess(real, distilled, count).item() == pytest.approx(lower_bound(real, count), abs=1e-10)


def test_fewer_than_d_cannot_and_d_can():
    real = random_data(60, 5)
    least = real.loss(minimiser(real)).item()
    for one in reach(real, range(1, 8), iterations=300, restarts=2):
        if one.distilled_count < 5:
            assert one.excess > one.lower_bound > 0.01 * least
        else:
            assert one.excess < 1e-8 * least
            assert one.lower_bound == 0


def test_optimisation_finds_the_bound_where_it_is_tight():
    real = random_data(50, 4)
    real = LinearData(real.inputs, torch.zeros_like(real.targets))
    for count in (1, 2, 3):
        found = expected_excess(real, distil(real, count, 300), count).item()
        assert found == pytest.approx(lower_bound(real, count), rel=1e-6)


def test_the_command_writes_table_and_figures(run):
    code, error, folder = run("linear", "dimension=3", "count=20", "beyond=1", "iterations=50", "restarts=1")
    assert (code, error) == (0, "")
    content = json.loads((folder / "linear.json").read_text())
    assert [row["distilled_count"] for row in content["rows"]] == [1, 2, 3, 4]
    assert content["difference_eq6_unroll"] < 1e-12
    assert content["exact_above_minimum"] < 1e-9
    assert (folder / "linear.png").stat().st_size > 1000
    assert (folder / "linear.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("wrong", ["dimension=0", "count=3", "beyond=0", "restarts=0"])
def test_impossible_settings_in_one_line(run, wrong):
    code, error, _ = run("linear", wrong)
    assert code == 1
    assert wrong.partition("=")[0] in error
    assert "Traceback" not in error
