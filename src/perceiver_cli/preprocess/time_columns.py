"""Columns of times: how they are named, the unit of their numbers, dates and clock times in seconds."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["number", "time", "clock", "words"]  # of a column's cells; a clock time counts from midnight or a start

UNIT = (
    r"(?P<s>s|secs?|seconds?)|(?P<ms>ms|msecs?|millis?|milliseconds?)"
    r"|(?P<us>[uµμ]s|[uµμ]secs?|micros?|microseconds?)|(?P<ns>ns|nsecs?|nanos?|nanoseconds?)"
)
PLAIN = r"datetime|(?:time|date)(?:[ _-]?stamps?|s)?|ts?|(?:epoch|unix|elapsed)(?:[ _-]?time(?:[ _-]?stamps?)?)?"
NAME = re.compile(PLAIN)
MEASURED = re.compile(rf"(?P<name>{PLAIN})?[ ,_\-\[(/]*(?:{UNIT})[\])]?")
LEAST_LETTERS = 3  # of a unit that can be the whole name of a column of times
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
EPOCHS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))  # a count since 1970 that is at least this, and its unit in seconds
CLOCK = re.compile(r"(\d{1,3}):([0-5]?\d):([0-5]?\d(?:[.,]\d{1,9})?)")
DAY_S = 86400.0


def is_time(name: str) -> bool:
    """Return whether this is a usual name for a column of times."""
    word = name.strip().lower()
    return NAME.fullmatch(word) is not None or _unit_of(word) is not None


def _unit_of(word: str) -> str | None:
    """Return the unit at the end of a name, or None if it only looks like one."""
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
    """Return whether the numbers of a column that is named like times can be times.

    T may be a temperature, and seconds may begin anew each minute: such numbers fall. In a column whose name says time,
    falling numbers are an error of the file, which the reader of the file reports.
    """
    steps = np.diff(column[np.isfinite(column)])
    word = name.strip().lower()
    if len(word) == 1:
        return bool((steps > 0).all())
    return NAME.match(word) is not None or bool((steps >= 0).all())


def seconds_of_date(cell: str) -> float | None:
    """Return a date or time in ISO 8601 as seconds since 1970, UTC without a zone; None for other text."""
    with suppress(ValueError, OverflowError):
        date = datetime.fromisoformat(cell.replace("/", "-", 2))
        return (date.replace(tzinfo=UTC) if date.tzinfo is None else date).timestamp()
    return None


def seconds_of_clock(cell: str) -> float | None:
    """Return a clock time, such as 10:00:05.25, in seconds; None for other text."""
    if (found := CLOCK.fullmatch(cell)) is None:
        return None
    hours, minutes, seconds = found.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def are_days(column: Floats) -> bool:
    """Return whether times are days without a clock: all are midnights, and some days have several rows."""
    known = column[np.isfinite(column)]
    return bool((np.diff(known) == 0).any() and (known % DAY_S == 0).all())


def past_midnight(clock: Floats) -> Floats:
    """Return clock times with a day added each time that the clock begins anew."""
    known = np.isfinite(clock)
    times = clock.copy()
    times[known] += DAY_S * np.concatenate([[0], np.cumsum(np.diff(clock[known]) < -DAY_S / 2)])[: known.sum()]
    return times
