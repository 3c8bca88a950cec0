"""What turns a trained model's scores into honest probabilities and decisions; fitted on validation, NumPy only.

A temperature divides all logits (Guo et al. 2017): probabilities change, their order does not. With several labels an
example, each class also has the threshold above which it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.model.checkpoint import DEFAULT_THRESHOLD

Floats = NDArray[np.float64]
BINS = 15  # of equal width in 0..1, as in Guo et al.
TEMPERATURES = (0.05, 20.0)  # least and most: a model that is right every time would ask for 0
HALVINGS = 60
MIN_PROB = 1e-12  # so that the logit of a probability of 0 or 1 is finite


def fit_temperature(logits: Floats, targets: NDArray[Any]) -> float:
    """Return the temperature that gives logits (n, classes) the least cross-entropy.

    targets: (n,) class indices, or (n, classes) of 0 and 1 with several labels an example. Cross-entropy is convex in
    1 / temperature; its slope there is mean(expected logit - true logit), whose sign is searched for the zero.
    """

    def slope(sharpness: float) -> float:
        if targets.ndim == 2:
            return float(((sigmoid(logits * sharpness) - targets) * logits).mean())
        weights = softmax(logits * sharpness)
        return float(((weights * logits).sum(axis=1) - logits[np.arange(len(logits)), targets]).mean())

    low, high = (-log(temperature) for temperature in reversed(TEMPERATURES))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(exp(middle)) > 0 else (middle, high)
    return exp(-(low + high) / 2)


def fit_thresholds(probs: Floats, targets: NDArray[Any]) -> tuple[float, ...]:
    """Return for each class the threshold with the highest F1 on probs and targets (n, classes) of 0 and 1.

    It lies halfway, in logits, between the last probability that is in and the first that is out. Of equally good ones
    the highest is taken; a class without examples keeps DEFAULT_THRESHOLD.
    """
    thresholds = []
    for p, t in zip(probs.T, targets.T, strict=True):
        order = np.argsort(-p, kind="stable")
        p, t = p[order], t[order]
        cut = np.flatnonzero(np.append(p[1:] < p[:-1], True))  # after each of these, a threshold fits
        f1 = 2 * np.cumsum(t)[cut] / (cut + 1 + t.sum())
        if not t.any():
            thresholds.append(DEFAULT_THRESHOLD)
            continue
        last = cut[np.argmax(f1)]
        below = p[last + 1] if last + 1 < len(p) else 0.0
        thresholds.append(float(sigmoid((logit(p[last]) + logit(below)) / 2)))
    return tuple(thresholds)


@dataclass(frozen=True)
class Bin:
    """Probabilities that fell into one bin: how many, their mean, and the share of them that came true."""

    count: int
    confidence: float
    correct: float


def reliability(confidence: Floats, correct: NDArray[Any]) -> tuple[Bin | None, ...]:
    """Return the reliability diagram: BINS of equal width in 0..1, None where one is empty.

    confidence, correct: as of the ECE. Nothing where a confidence is not a number.
    """
    if not np.isfinite(confidence).all():
        return ()
    bins = _bins(confidence.reshape(-1))
    columns = (np.bincount(bins, weights, BINS) for weights in (None, confidence.reshape(-1), correct.reshape(-1)))
    return tuple(Bin(int(n), c / n, t / n) if n else None for n, c, t in np.stack([*columns], axis=1).tolist())


def calibration_error(confidence: Floats, correct: NDArray[Any]) -> float:
    """Return the expected calibration error (ECE): mean |share correct - mean confidence| over BINS, by their counts.

    confidence: (n,) probabilities, or (n, k) of several each; correct: of 0 and 1, in the same shape. Not a number
    where a confidence is none.
    """
    if not np.isfinite(confidence).all():
        return nan
    return float(np.abs(calibration_gaps(confidence, correct).sum(axis=0)).sum() / confidence.size)


def calibration_gaps(confidence: Floats, correct: NDArray[Any]) -> Floats:
    """Return (n, BINS): for each of n examples and bin, the sum of correct - confidence. Arguments as of the ECE."""
    count = len(confidence)
    places = _bins(confidence).reshape(count, -1) + BINS * np.arange(count)[:, None]
    weights = (correct - confidence).reshape(-1)
    return np.asarray(np.bincount(places.reshape(-1), weights, BINS * count).reshape(count, BINS), np.float64)


def _bins(confidence: Floats) -> NDArray[np.int64]:
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def softmax(logits: Floats) -> Floats:
    """Return probabilities (n, classes) that sum to 1."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def sigmoid(logits: Any) -> Any:
    """Return the probability of each logit, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def logit(prob: Any) -> Any:
    """Return the logit of a probability; of 0 and 1 a finite one."""
    prob = np.clip(prob, MIN_PROB, 1 - MIN_PROB)
    return np.log(prob / (1 - prob))


Interval = tuple[float, float]

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
