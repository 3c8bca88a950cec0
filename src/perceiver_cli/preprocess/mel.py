"""The mel scale of HTK, and its filters."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from perceiver_cli.preprocess.sound_files import Samples


def mel_of(hz: float) -> float:
    """Return a frequency on the mel scale."""
    return 2595 * math.log10(1 + hz / 700)


def fft_size(window: int) -> int:
    """Return the length of the Fourier transform of a window: the next power of two."""
    return 1 << max(1, (window - 1).bit_length())


@lru_cache(maxsize=8)
def mel_filters(rate_hz: int, window: int, num_mels: int, min_hz: float) -> tuple[Samples, list[tuple[int, Samples]]]:
    """Return the periodic Hann window (window,), and the HTK mel filters with equal areas (Slaney).

    Each filter is (first bin of the power spectrum, weights from there on). The window gives a full-scale sine power 1.
    A narrow triangle is widened to one bin of the Fourier transform on either side, so that no filter is empty.
    """
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window) if window > 1 else np.ones(1)
    taper /= taper.sum() / 2
    bin_hz = rate_hz / fft_size(window)
    low, high = (mel_of(hz) for hz in (min_hz, rate_hz / 2))
    edges = 700 * (10 ** (np.linspace(low, high, num_mels + 2) / 2595) - 1)
    hz = np.arange(fft_size(window) // 2 + 1) * bin_hz
    filters = []
    for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        left, right = min(left, centre - bin_hz), max(right, centre + bin_hz)
        triangle = np.minimum((hz - left) / (centre - left), (right - hz) / (right - centre)).clip(0)
        inside = np.flatnonzero(triangle)
        weights = triangle[inside[0] : inside[-1] + 1] * (2 * bin_hz / (right - left))
        filters.append((int(inside[0]), weights.astype(np.float32)))
    return taper.astype(np.float32), filters
