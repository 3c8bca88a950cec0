"""Statistics of scores and labels: temperature, thresholds, calibration error, average precision, intervals.

A temperature divides all logits (Guo et al. 2017): probabilities change, their order does not. With several labels an
example, each class also has a threshold above which it is an answer. Only functions import SciPy, because it is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, log, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.model.checkpoint import DEFAULT_THRESHOLD

Floats = NDArray[np.float64]
BINS = 15  # of equal width in 0..1, as in Guo et al.
TEMPERATURES = (0.05, 20.0)  # limits; the best temperature of a model without mistakes is 0
ANSWERED = (0.9, 0.75, 0.5)  # shares of inputs that keep their answer, see `selective`
MIN_PROB_STEPS = 1000  # in 0..1
MIN_PROB = 1e-12  # makes the logit of a probability of 0 or 1 finite


def fit_temperature(logits: Floats, targets: NDArray[Any], smoothing: float = 0.0) -> float:
    """Return the temperature that gives logits (n, classes) the lowest cross-entropy.

    targets: (n,) class indices, or (n, classes) of 0 and 1 with several labels an example. Cross-entropy is convex in
    1 / temperature, with the slope mean(expected logit - true logit); the best temperature is the root of the slope.

    smoothing: share of each target that is spread over all classes. Without it, answers that are all right have no best
    temperature: the lowest is always better.
    """
    from scipy.optimize import brentq
    from scipy.special import expit, softmax

    def slope(log_sharpness: float) -> float:
        sharp = logits * exp(log_sharpness)
        if targets.ndim == 2:
            return float(((expit(sharp) - targets * (1 - smoothing) - smoothing / 2) * logits).mean())
        weights = softmax(sharp, axis=1)
        true = (1 - smoothing) * logits[np.arange(len(logits)), targets] + smoothing * logits.mean(axis=1)
        return float(((weights * logits).sum(axis=1) - true).mean())

    low, high = (-log(temperature) for temperature in reversed(TEMPERATURES))
    if slope(low) > 0:
        return TEMPERATURES[1]
    return exp(-brentq(slope, low, high, xtol=1e-14)) if slope(high) > 0 else TEMPERATURES[0]


def fit_thresholds(probs: Floats, targets: NDArray[Any]) -> tuple[float, ...]:
    """Return for each class the threshold with the highest F1 on probs and targets (n, classes) of 0 and 1.

    It lies halfway, in logits, between the last probability above it and the first below it. Among equal F1 the highest
    threshold wins; a class without examples keeps DEFAULT_THRESHOLD.
    """
    from scipy.special import expit, logit

    thresholds = []
    for p, t in zip(probs.T, targets.T, strict=True):
        order = np.argsort(-p, kind="stable")
        p, t = p[order], t[order]
        cut = np.flatnonzero(np.append(p[1:] < p[:-1], True))  # a threshold fits after each of these
        f1 = 2 * np.cumsum(t)[cut] / (cut + 1 + t.sum())
        if not t.any():
            thresholds.append(DEFAULT_THRESHOLD)
            continue
        last = cut[np.argmax(f1)]
        edges = np.array([p[last], p[last + 1] if last + 1 < len(p) else 0.0])
        thresholds.append(float(expit(logit(edges.clip(MIN_PROB, 1 - MIN_PROB)).mean())))
    return tuple(thresholds)


@dataclass(frozen=True)
class Bin:
    """Probabilities in one bin: their number, their mean, and the share that is right."""

    count: int
    confidence: float
    correct: float


def reliability(confidence: Floats, correct: NDArray[Any]) -> tuple[Bin | None, ...]:
    """Return the BINS of a reliability diagram, of equal width in 0..1, None for an empty bin; () if there is NaN.

    Arguments as in `calibration_error`.
    """
    if not np.isfinite(confidence).all():
        return ()
    bins = _bins(confidence.reshape(-1))
    columns = (np.bincount(bins, weights, BINS) for weights in (None, confidence.reshape(-1), correct.reshape(-1)))
    return tuple(Bin(int(n), c / n, t / n) if n else None for n, c, t in np.stack([*columns], axis=1).tolist())


@dataclass(frozen=True)
class Selective:
    """A smallest probability of an answer (--min-prob): the share of inputs that keep one, and their accuracy."""

    min_prob: float
    answered: float
    accuracy: float


def selective(prob: Floats, correct: NDArray[Any]) -> tuple[Selective, ...]:
    """Return the smallest probabilities at which about each share of ANSWERED keeps its answer, the lowest first.

    prob, correct: (n,) of the first answers. Each is rounded down to a thousandth, and its figures are those of the
    rounded one. One at which all keep their answer is left out: a model that is sure of everything has none.
    """
    if not len(prob) or not np.isfinite(prob).all():
        return ()
    rising, count = np.sort(prob), len(prob)
    ends = (floor(rising[count - ceil(count * share)] * MIN_PROB_STEPS) / MIN_PROB_STEPS for share in ANSWERED)
    kept = {end: prob >= end for end in ends}
    return tuple(
        Selective(end, float(own.mean()), float(correct[own].mean())) for end, own in kept.items() if not own.all()
    )


def calibration_error(confidence: Floats, correct: NDArray[Any]) -> float:
    """Return the expected calibration error (ECE): mean |share correct - mean confidence| over BINS, by their counts.

    confidence: probabilities (n,), or (n, k) with several labels; correct: 0 and 1 in the same shape. NaN if a
    confidence is NaN.
    """
    if not np.isfinite(confidence).all():
        return nan
    return float(np.abs(calibration_gaps(confidence, correct).sum(axis=0)).sum() / confidence.size)


def calibration_gaps(confidence: Floats, correct: NDArray[Any]) -> Floats:
    """Return (n, BINS), the sum of correct - confidence by example and bin. Arguments as in `calibration_error`."""
    count = len(confidence)
    places = _bins(confidence).reshape(count, -1) + BINS * np.arange(count)[:, None]
    weights = (correct - confidence).reshape(-1)
    return np.asarray(np.bincount(places.reshape(-1), weights, BINS * count).reshape(count, BINS), np.float64)


def _bins(confidence: Floats) -> NDArray[np.int64]:
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def average_precisions(scores: Floats, targets: NDArray[Any]) -> Callable[[Floats], Floats]:
    """Return a function from weights (n,), one for each example, to the average precision (classes,) of each class.

    scores, targets: (n, classes). Transposed by mistake they gave the first version of the paper 44.9 mAP on AudioSet
    (its appendix F). Examples with equal scores are ranked as one: precision is read at the last of them. A class is
    NaN if its examples have no weight.
    """
    classes = []
    for score, target in zip(scores.T, targets.T, strict=True):
        order = np.argsort(-score, kind="stable").astype(np.int32)
        ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)  # the last of each score
        hits = np.flatnonzero(target[order] > 0)
        ends = ends[np.searchsorted(ends, hits)]  # the last with each hit's score
        classes.append((order, order[hits], ends, np.searchsorted(hits, ends, side="right") - 1))

    def figure(weights: Floats) -> Floats:
        averages = np.full(len(classes), nan)
        for k, (order, hits, ends, last_hits) in enumerate(classes):
            gains = weights[hits]
            right = np.cumsum(gains)
            if len(hits) and right[-1] > 0:
                above = np.cumsum(weights[order])[ends]
                averages[k] = gains @ (right[last_hits] / np.where(above > 0, above, 1)) / right[-1]
        return averages

    return figure


Interval = tuple[float, float]

INSIDE = 0.95  # share of the draws inside an interval
RESAMPLES = 1000
SEED = 0


def share_interval(hits: int, count: int) -> Interval:
    """Return the exact 95 % interval of the share hits / count (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, count).proportion_ci(INSIDE, "exact")
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of the mean that runs of other seeds would have (Student's t)."""
    from scipy.stats import t

    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(t.ppf(0.5 + INSIDE / 2, len(values) - 1)) * spread
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def paired_chance(right: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Return the probability that equally good models answer the same examples at least as unequally.

    Only examples that exactly one model answers right count (McNemar's exact test).
    """
    from scipy.stats import binomtest

    alone, other_alone = int((right & ~other).sum()), int((other & ~right).sum())
    return float(binomtest(alone, alone + other_alone, 0.5).pvalue) if alone + other_alone else 1.0


def figure_interval(figure: Callable[[Floats], float], count: int, resamples: int = RESAMPLES) -> Interval:
    """Return the bootstrap interval of a figure, a function of how often each of `count` examples is drawn."""
    rng = np.random.default_rng(SEED)
    times = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(resamples))
    draws = [figure(one.astype(np.float64)) for one in times]
    low, median, high = np.quantile(draws, (0.5 - INSIDE / 2, 0.5, 0.5 + INSIDE / 2)).tolist()
    # Resampling biases some figures: the ECE is larger on every resample. The interval is moved back by the bias, so
    # that the median of the draws is the figure itself.
    moved = figure(np.ones(count)) - median
    return low + moved, high + moved
