"""Intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from perceiver_cli.inference import statistics
from perceiver_cli.inference.statistics import calibration_error, calibration_gaps


def test_the_interval_of_a_share_is_about_that_of_theory() -> None:
    for hits, count in ((80, 100), (700, 1000), (3, 40)):
        exact = binomtest(hits, count).proportion_ci(method="wilson")
        found = statistics.of_share(hits, count)
        assert found == pytest.approx((exact.low, exact.high), abs=0.4 / np.sqrt(count))
        assert found[0] < hits / count < found[1]
    assert statistics.of_share(80, 100) == statistics.of_share(80, 100)


def test_where_all_agree_the_interval_still_has_a_width() -> None:
    exact = binomtest(30, 30).proportion_ci(method="exact")
    assert statistics.of_share(30, 30) == pytest.approx((exact.low, 1.0))
    assert statistics.of_share(0, 30) == pytest.approx((0.0, 1 - exact.low))


def test_a_share_is_the_bootstrap_of_its_examples() -> None:
    hits = np.arange(200) < 150
    low, high = statistics.of_figure(lambda times: float(times @ hits / 200), 200)
    assert (low, high) == pytest.approx(statistics.of_share(150, 200), abs=0.012)


def test_19_of_20_intervals_of_a_mean_hold_the_mean() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        values = rng.exponential(1.0, 100)
        low, high = statistics.of_figure(lambda times, values=values: float(times @ values / 100), 100, 200)  # type: ignore[misc]
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
    low, high = statistics.of_figure(lambda times: float(np.abs(times @ gaps).sum() / 300), 300)
    assert low < found < high
