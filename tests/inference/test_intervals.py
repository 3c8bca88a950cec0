"""Intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from perceiver_cli.inference.statistics import (
    calibration_error,
    calibration_gaps,
    figure_interval,
    share_interval,
)


@pytest.mark.parametrize("count", [7, 40, 100])
def test_the_interval_of_a_share_holds_the_true_share_19_times_of_20(count: int) -> None:
    hits = np.arange(count + 1)
    low, high = np.array([share_interval(k, count) for k in hits.tolist()]).T
    assert (low[1:] < hits[1:] / count).all()
    assert (high[:-1] > hits[:-1] / count).all()
    for share in np.linspace(0.01, 0.99, 99):
        held = binom.pmf(hits, count, share) @ ((low <= share) & (share <= high))
        assert held >= 0.95, share
    # And is no wider than that: a narrower one would miss more often at its own ends.
    for k in hits[1:].tolist():
        assert binom.sf(k - 1, count, low[k]) == pytest.approx(0.025)


def test_where_all_agree_the_interval_still_has_a_width() -> None:
    least = 0.025 ** (1 / 30)  # the share of which 30 of 30 are just no surprise
    assert share_interval(30, 30) == pytest.approx((least, 1.0))
    assert share_interval(0, 30) == pytest.approx((0.0, 1 - least))


def test_a_share_is_the_bootstrap_of_its_examples() -> None:
    hits = np.arange(200) < 150
    low, high = figure_interval(lambda times: float(times @ hits / 200), 200)
    assert (low, high) == pytest.approx(share_interval(150, 200), abs=0.012)


def test_19_of_20_intervals_of_a_mean_hold_the_mean() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        values = rng.exponential(1.0, 100)
        low, high = figure_interval(lambda times, values=values: float(times @ values / 100), 100, 200)  # type: ignore[misc]
        held += low <= 1.0 <= high
    assert 175 <= held <= 199


def test_the_interval_of_the_ece_is_around_it() -> None:
    """Resampling makes the ECE larger: without moving it back, the whole interval would lie above it."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 300)
    correct = rng.random(300) < confidence
    gaps = calibration_gaps(confidence, correct)
    assert gaps.shape == (300, 15)
    found = calibration_error(confidence, correct)
    draws = [np.abs(np.bincount(rng.integers(0, 300, 300), minlength=300) @ gaps).sum() / 300 for _ in range(500)]
    assert np.median(draws) > found * 1.1
    low, high = figure_interval(lambda times: float(np.abs(times @ gaps).sum() / 300), 300)
    assert low < found < high
