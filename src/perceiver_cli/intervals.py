"""How sure a figure is, given how few examples it was measured on: bootstrap intervals (Efron 1979). NumPy only.

An interval is (low, high) and holds 95 % of what the figure is on sets of examples drawn, with replacement, from those
that there are. The draws are seeded: the same examples give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

OUTSIDE = 0.05  # share of the draws that an interval leaves out
RESAMPLES = 1000
SEED = 0


def of_share(hits: int, count: int) -> Interval:
    """Return the interval of hits / count. The hits of a resample are binomial, so they are drawn at once.

    Where all examples agree so does every resample, which says nothing of the next example: there the other end is the
    share at which so many of a kind are just no surprise (Clopper and Pearson 1934).
    """
    if hits in (0, count):
        least = (OUTSIDE / 2) ** (1 / count)
        return (least, 1.0) if hits else (0.0, 1 - least)
    return _middle(np.random.default_rng(SEED).binomial(count, hits / count, RESAMPLES) / count)


def of_figure(figure: Callable[[Floats], float], count: int, resamples: int = RESAMPLES) -> Interval:
    """Return the interval of a figure, which is a function of how often each of `count` examples counts.

    Drawing twice what is there once moves some figures as a whole: the ECE is larger on every resample. The interval is
    moved back by as much, so that the median of the draws is where the figure is.
    """
    rng = np.random.default_rng(SEED)
    times = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(resamples))
    draws = [figure(one.astype(np.float64)) for one in times]
    low, high = _middle(np.array(draws))
    moved = figure(np.ones(count)) - float(np.median(draws))
    return low + moved, high + moved


def _middle(draws: NDArray[Any]) -> Interval:
    low, high = np.quantile(draws, (OUTSIDE / 2, 1 - OUTSIDE / 2))
    return float(low), float(high)
