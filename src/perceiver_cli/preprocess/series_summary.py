"""A summary of each recording, from which the options of series are chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.recordings import Recording
from perceiver_cli.preprocess.resampling import rate_of
from perceiver_cli.preprocess.time_columns import Floats

CONSTANT = 1e-12  # a channel with a smaller std, relative to its mean, counts as constant


class Summary(NamedTuple):
    """The facts of a recording that settle options. rate_hz: None without times; seconds: between its times.

    statistics: (channels, 3): number of values, mean, variance.
    """

    names: tuple[str, ...]
    is_named: bool
    num_samples: int
    rate_hz: float | None
    seconds: float
    statistics: Floats

    @classmethod
    def of(cls, recording: Recording) -> Summary:
        """Return the summary of a recording."""
        times, values = recording.times, recording.values
        rate = None if times is None else rate_of(times)
        there = np.isfinite(values)
        count = there.sum(axis=0)
        filled = np.where(there, values, 0.0)
        mean = filled.sum(axis=0) / count.clip(min=1)
        variance = np.square(np.where(there, values - mean, 0.0)).sum(axis=0) / count.clip(min=1)
        seconds = 0.0 if times is None or rate is None else float(times[-1] - times[0]) + 1 / rate
        return cls(
            recording.names, recording.is_named, len(values), rate, seconds, np.stack([count, mean, variance], 1)
        )

    def length_s(self, own_hz: float) -> float:
        """Return its length in seconds. own_hz: its rate if it has no times."""
        return self.seconds if self.rate_hz is not None else self.num_samples / own_hz

    @property
    def changing(self) -> list[str]:
        """The names of the channels whose values differ."""
        _, mean, variance = self.statistics.T
        return [name for name, changes in zip(self.names, variance > (CONSTANT * mean) ** 2, strict=True) if changes]


def channels_of(each: Sequence[Summary]) -> tuple[str, ...]:
    """Return the channels that half of the recordings have and that change within one. Raises DataError for none."""
    counts = Counter(name for one in each for name in one.names)
    changing = {name for one in each for name in one.changing}
    names = tuple(name for name, count in counts.items() if 2 * count >= len(each) and name in changing)
    if not names:
        raise DataError(
            "no column of the series changes within a file", "name others: --set inputs.series.channels=[...]"
        )
    return names
