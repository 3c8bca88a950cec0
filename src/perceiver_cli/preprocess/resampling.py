"""Makes samples even in time: finds gaps, interpolates between irregular times, changes rates. NumPy and SciPy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.time_columns import Floats

SAME_RATE = 0.01  # largest relative difference of two rates that count as the same
GAP = 1.5  # periods between two samples, above which samples are missing
REGULAR = 0.9  # a file is sampled evenly if this share of the steps between its times is one period
NEAR = 8.0  # longest gap that is interpolated, in periods of the file or the model, the longer of both
MOST_RESAMPLED = 100  # largest ratio between the rates of a file and of the model


def _period(times: Floats) -> float | None:
    """Return the usual seconds between two samples, or None if no time passes."""
    steps = np.diff(times)
    passing = steps[steps > 0]
    if not passing.size or not math.isfinite(float(times[-1] - times[0])):
        return None
    if len(passing) < REGULAR * len(steps):  # a clock too coarse to tell neighbours apart
        return float(times[-1] - times[0]) / len(steps)
    usual = float(np.median(passing))
    near = passing[(passing > 0.5 * usual) & (passing < GAP * usual)]
    return float(near.mean()) if near.size else usual


def rate_of(times: Floats) -> float | None:
    """Return the samples per second at times (T,) in seconds, or None if no time passes."""
    period = _period(times)
    return None if period is None or not math.isfinite(1 / period) else 1 / period


def at_rate(
    source: Source, values: Floats, times: Floats | None, own_hz: float, rate_hz: float, limits: Limits
) -> Floats:
    """Return values (T, channels) sampled evenly at `rate_hz`, NaN where samples are missing.

    own_hz: the rate of a file without times. Raises LimitError, and DataError for rates that are too different.
    """
    if times is not None and (rate := rate_of(times)) is not None:
        longest_s = NEAR * max(1 / rate, 1 / rate_hz)
        own_hz, values = rate, _evenly(source, values, times, 1 / rate, longest_s, limits)
    if abs(own_hz - rate_hz) <= SAME_RATE * rate_hz:
        return values
    return _resampled(source, values, own_hz, rate_hz, limits)


def _evenly(source: Source, values: Floats, times: Floats, period: float, longest_s: float, limits: Limits) -> Floats:
    """Return values at even times: moved to the nearest, or, where times are irregular, interpolated."""
    if (np.diff(times) == 0).mean() <= 1 - REGULAR:  # where a time stands twice, its last sample counts
        last = np.append(np.diff(times) > 0, True)
        values, times = values[last], times[last]
    steps = np.diff(times) / period
    count = float(times[-1] - times[0]) / period
    source.check_decoded(max(count, len(times)) * values.shape[1], 8, limits)
    near = (steps > 0.5) & (steps < GAP)
    if (steps == 0).any() or near.all():
        return values
    if near.mean() >= REGULAR:  # what lies between is a gap
        index = np.concatenate([[0], np.cumsum(np.maximum(1, np.rint(steps)).astype(np.int64))])
        source.check_decoded(float(index[-1]) * values.shape[1], 8, limits)
        even = np.full((int(index[-1]) + 1, values.shape[1]), np.nan)
        even[index] = values
        return even
    at = times[0] + period * np.arange(int(count) + 1)
    return np.stack([_interpolated(at, times, column, longest_s) for column in values.T], axis=1)


def _interpolated(at: Floats, times: Floats, column: Floats, longest_s: float) -> Floats:
    """Return a column between its times, NaN between neighbours that are farther apart than `longest_s`."""
    known = np.isfinite(column)
    if known.sum() < 2:
        return np.full(len(at), np.nan)
    times, column = times[known], column[known]
    right = np.searchsorted(times, at).clip(1, len(times) - 1)
    is_far = (times[right] - times[right - 1] > longest_s) | (at < times[0]) | (at > times[-1])
    return np.where(is_far & ~np.isin(at, times), np.nan, np.interp(at, times, column))


def _resampled(source: Source, values: Floats, own: float, rate: float, limits: Limits) -> Floats:
    """Return values at another rate, through a filter that keeps the frequencies that both rates can hold."""
    if not 1 / MOST_RESAMPLED <= rate / own <= MOST_RESAMPLED:
        fault = f"{source.shown}: {own:.4g} samples a second, the model reads {rate:g}"
        raise DataError(fault, f"expected at most {MOST_RESAMPLED} times more or fewer; see inputs.series.time_unit")
    ratio = Fraction(rate / own).limit_denominator(2 * MOST_RESAMPLED)
    count = -(-len(values) * ratio.numerator // ratio.denominator)
    source.check_decoded(float(count) * values.shape[1], 8, limits)
    from scipy.signal import resample_poly

    steps, there = np.arange(len(values)), np.isfinite(values)
    filled = np.zeros_like(values)
    for place in np.flatnonzero(there.any(axis=0)):
        filled[:, place] = np.interp(steps, steps[there[:, place]], values[there[:, place], place])
    even = resample_poly(filled, ratio.numerator, ratio.denominator, axis=0, padtype="line")
    nearest = np.rint(np.arange(count) / float(ratio)).astype(np.int64).clip(max=len(values) - 1)
    return np.where(there[nearest], even, np.nan)
