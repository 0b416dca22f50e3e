"""The study's scores on arrays made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("dicebear", reason="the [train] extra is not installed")

from bench.study import scoring
from ledits_min.weights.train_tiny.portraits import Pixels


def grey(level: int, count: int = 1, side: int = 32) -> Pixels:
    return np.full((count, side, side, 3), level, dtype=np.uint8)


def test_psnr_looks_only_where_it_is_told() -> None:
    a, b = grey(100), grey(100)
    b[0, :16] += 10
    where = np.zeros((1, 32, 32), dtype=bool)
    where[0, :8] = True
    assert scoring.psnr_each(a, b, where)[0] == pytest.approx(10 * np.log10(255**2 / 100))
    assert scoring.psnr_each(a, b)[0] == pytest.approx(10 * np.log10(255**2 / 50))
    assert scoring.psnr_each(a, b, ~where[:, ::-1])[0] < scoring.CEILING
    where[0] = False
    where[0, 20:] = True
    assert scoring.psnr_each(a, b, where)[0] == scoring.CEILING
    assert np.isnan(scoring.psnr_each(a, b, np.zeros_like(where))[0])


@pytest.mark.parametrize(("side", "margin"), [(64, 2), (128, 4)])
def test_the_changed_region_grows_with_the_picture(side: int, margin: int) -> None:
    before, ideal = grey(100, side=side), grey(100, side=side)
    ideal[0, 20, 20] = 200
    ideal[0, 40, 40] += scoring.LEVEL  # no more than antialiasing
    region = scoring.changed_region(before, ideal)[0]
    assert region.sum() == (2 * margin + 1) ** 2 and region[20 - margin, 20 + margin] and not region[40, 40]


def test_ssim_is_one_only_where_nothing_changed() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    b = a.copy()
    b[0, :, :24] = rng.integers(0, 256, (64, 24, 3), dtype=np.uint8)
    where = np.zeros((1, 64, 64), dtype=bool)
    where[0, :, :16] = True
    far = np.zeros_like(where)
    far[0, :, 40:] = True
    assert scoring.ssim_each(a, b, where)[0] < 0.3
    assert scoring.ssim_each(a, b, far)[0] == pytest.approx(1.0)


def test_wilson_knows_its_textbook_case() -> None:
    assert scoring.wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert scoring.wilson(0, 10)[0] == 0.0


def test_bootstrap_narrows_with_the_number_of_pictures_and_skips_missing_ones() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    few, many = scoring.bootstrap(values[:25]), scoring.bootstrap(values)
    assert many[0] < 3.0 < many[1] and few[1] - few[0] > 2.0 * (many[1] - many[0])
    assert scoring.bootstrap(np.where(np.arange(400) % 2, np.nan, 5.0)) == (5.0, 5.0)
    assert np.isnan(scoring.bootstrap(np.full(3, np.nan))).all()


def test_rank_correlation_sees_order_alone() -> None:
    scores = np.array([[0.1, 0.2, 9.0], [3.0, 2.0, -1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5]])
    rho = scoring.rank_correlation([0.0, 1.0, 5.0], scores)
    assert rho[:2].tolist() == [1.0, -1.0] and np.isnan(rho[2]) and rho[3] == pytest.approx(0.5)


def test_log_probability_keeps_order_where_the_probability_is_one() -> None:
    strong, stronger = torch.tensor([[50.0, 0.0, -1.0]]), torch.tensor([[60.0, 0.0, -1.0]])
    lower, upper = (scoring.log_probability([logits], [[0]])[0] for logits in (strong, stronger))
    assert lower < upper < 0.0
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    expected = logits.double().softmax(dim=1)[0, [0, 2]].sum().log()
    assert scoring.log_probability([logits], [[0, 2]])[0] == pytest.approx(float(expected))
    assert scoring.log_probability([logits, logits], [[0, 2], [0, 2]])[0] == pytest.approx(2 * float(expected))


def test_equal_fidelity_interpolates_and_never_extrapolates() -> None:
    fidelity, success = [20.0, 30.0, 40.0], [1.0, 0.9, 0.1]
    assert scoring.at_equal(fidelity, success, 35.0) == pytest.approx(0.5)
    assert scoring.at_equal(fidelity, success, 30.0) == 0.9
    assert scoring.at_equal(fidelity, success, 10.0) == 1.0
    assert scoring.at_equal(fidelity, success, 41.0) is None


@given(
    st.lists(st.tuples(st.floats(10, 50), st.floats(0, 1)), min_size=1, max_size=6),
    st.tuples(st.floats(10, 50), st.floats(0, 1)),
    st.floats(10, 50),
)
def test_another_point_never_makes_a_method_worse(
    points: list[tuple[float, float]], more: tuple[float, float], wanted: float
) -> None:
    without = scoring.at_equal([x for x, _ in points], [y for _, y in points], wanted)
    points.append(more)
    within = scoring.at_equal([x for x, _ in points], [y for _, y in points], wanted)
    assert without is None or (within is not None and within >= without - 1e-9)
