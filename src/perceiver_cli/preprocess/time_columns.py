"""Columns of times: which names mean time, in which unit numbers are, and dates and clocks as seconds."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["number", "time", "clock", "words"]  # of a column's cells; a clock counts from midnight or a start

UNIT = (
    r"(?P<s>s|secs?|seconds?)|(?P<ms>ms|msecs?|millis?|milliseconds?)"
    r"|(?P<us>[uµμ]s|[uµμ]secs?|micros?|microseconds?)|(?P<ns>ns|nsecs?|nanos?|nanoseconds?)"
)
PLAIN = r"datetime|(?:time|date)(?:[ _-]?stamps?|s)?|ts?|(?:epoch|unix|elapsed)(?:[ _-]?time(?:[ _-]?stamps?)?)?"
NAME = re.compile(PLAIN)
MEASURED = re.compile(rf"(?P<name>{PLAIN})?[ ,_\-\[(/]*(?:{UNIT})[\])]?")
LEAST_LETTERS = 3  # of a unit that alone is the name of a column of times
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
EPOCHS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))  # a count since 1970 that is at least this, and its unit in seconds
CLOCK = re.compile(r"(\d{1,3}):([0-5]?\d):([0-5]?\d(?:[.,]\d{1,9})?)")
DAY_S = 86400.0


def is_time(name: str) -> bool:
    """Return whether a column of this name holds times."""
    word = name.strip().lower()
    return NAME.fullmatch(word) is not None or _unit_of(word) is not None


def _unit_of(word: str) -> str | None:
    """Return the unit that a name ends with, None for one that only looks like it."""
    found = None if NAME.fullmatch(word) else MEASURED.fullmatch(word)
    return found.lastgroup if found and (found["name"] or len(word) >= LEAST_LETTERS) else None


def scale_of(name: str, times: Floats, unit: str) -> float:
    """Return the seconds of one unit of a column of times: by `unit`, by its name, or by the size of the numbers."""
    if unit == "auto":
        unit = _unit_of(name.strip().lower()) or unit
    if unit != "auto":
        return SECONDS[unit]
    first = np.nanmin(np.abs(times)) if np.isfinite(times).any() else 0.0
    return next((seconds for least, seconds in EPOCHS if first >= least), 1.0)


def may_be_times(name: str, column: Floats) -> bool:
    """Return whether numbers below a name of times can be some: T may be a temperature, seconds those of a minute.

    Numbers that fall below a name that says time are a fault of the file, which the reader should know.
    """
    steps = np.diff(column[np.isfinite(column)])
    word = name.strip().lower()
    if len(word) == 1:
        return bool((steps > 0).all())
    return NAME.match(word) is not None or bool((steps >= 0).all())


def seconds_of_date(cell: str) -> float | None:
    """Return a date and time in ISO 8601 in seconds; without a zone it is taken as UTC."""
    with suppress(ValueError, OverflowError):
        date = datetime.fromisoformat(cell.replace("/", "-", 2))
        return (date.replace(tzinfo=UTC) if date.tzinfo is None else date).timestamp()
    return None


def seconds_of_clock(cell: str) -> float | None:
    """Return hours, minutes and seconds, as in 10:00:05.25, in seconds."""
    if (found := CLOCK.fullmatch(cell)) is None:
        return None
    hours, minutes, seconds = found.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def are_days(column: Floats) -> bool:
    """Return whether all times are midnights, several rows of a day: dates without their clock."""
    known = column[np.isfinite(column)]
    return bool((np.diff(known) == 0).any() and (known % DAY_S == 0).all())


def past_midnight(clock: Floats) -> Floats:
    """Return the times of a clock with a day added where it begins again."""
    known = np.isfinite(clock)
    times = clock.copy()
    times[known] += DAY_S * np.concatenate([[0], np.cumsum(np.diff(clock[known]) < -DAY_S / 2)])[: known.sum()]
    return times
