"""Windows joined into events: which classes a recording holds, each with its start and end. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from perceiver_cli.files import show_path

if TYPE_CHECKING:
    from perceiver_cli.inference.predictor import Prediction

EPSILON_S = 1e-6  # times of windows are rounded to this


@dataclass(frozen=True)
class TimedEvent:
    """A class in a part of an input, or an error. prob: its mean over the time in which it is the answer.

    names: those of the input's Prediction.
    """

    path: str
    start_s: float = 0.0
    end_s: float = 0.0
    label: str = ""
    prob: float = 0.0
    error: str | None = None
    names: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON line of this event."""
        line = {"path": self.path, **self.names}
        if self.error is not None:
            return line | {"error": self.error}
        return line | {"start_s": self.start_s, "end_s": self.end_s, "label": self.label, "prob": self.prob}


def merged(windows: Iterable[Prediction], max_gap_s: float = 0.0, min_length_s: float = 0.0) -> Iterator[TimedEvent]:
    """Yield the events of inputs, given the predictions of their windows in order; each input's by their start.

    Where windows overlap, the mean of their probabilities is the answer. An event is one class from the first to the
    last moment at which it is the answer: the most probable one unless it is below the `min_prob` of its windows; of
    several labels each that reaches its threshold. max_gap_s: an event goes on if its class is the answer again within
    this time. min_length_s: shorter events are left out. Memory holds the windows that overlap, and ended events that
    began after one that still goes on.
    """
    current: _Input | None = None
    for window in windows:
        if current is not None and not current.holds(window):
            yield from current.end()
            current = None
        error = window.error
        if error is None and window.start_s is None:
            error = f"{show_path(window.path)}: no time axis, so no events"
        if error is not None:
            yield TimedEvent(window.path, error=error, names=window.names)
            continue
        current = current or _Input(window, max_gap_s, min_length_s)
        yield from current.add(window)
    if current is not None:
        yield from current.end()


def end_of(window: Prediction) -> float:
    """Return the end of a window in seconds."""
    assert window.end_s is not None
    return window.end_s


@dataclass
class _Run:
    """A class that has been the answer without too long a gap."""

    start_s: float
    end_s: float
    weight: float  # the sum of probability times seconds
    length_s: float  # in which it is the answer


class _Input:
    """The windows of one input so far, and the events in them."""

    def __init__(self, first: Prediction, max_gap_s: float, min_length_s: float) -> None:
        self.path, self.names = first.path, first.names
        self.max_gap_s, self.min_length_s = max_gap_s, min_length_s
        self.windows: list[Prediction] = []  # those that reach beyond `at_s`
        self.at_s = 0.0  # events are known up to here
        self.runs: dict[str, _Run] = {}
        self.ended: list[TimedEvent] = []  # they wait for one that began before them and goes on

    def holds(self, window: Prediction) -> bool:
        """Return whether a window is a later one of this input."""
        return window.path == self.path and window.start_s is not None and window.start_s > self.at_s

    def add(self, window: Prediction) -> Iterator[TimedEvent]:
        """Take the next window; yield the events that are known to have ended."""
        assert window.start_s is not None
        self._settle(window.start_s)
        self.windows.append(window)
        yield from self._in_order()

    def end(self) -> Iterator[TimedEvent]:
        """Yield the remaining events at the end of the input."""
        self._settle(max((end_of(window) for window in self.windows), default=self.at_s))
        for label in [*self.runs]:
            self._close(label)
        yield from self._in_order()

    def _settle(self, until_s: float) -> None:
        """Take the answers up to a time: no later window begins before it."""
        ends = {end for window in self.windows if (end := end_of(window)) < until_s}
        for end_s in sorted(ends | {until_s}):
            covering = [window for window in self.windows if end_of(window) > self.at_s + EPSILON_S]
            if covering and end_s > self.at_s:
                self._answer(self.at_s, end_s, covering)
            self.at_s = end_s
        self.windows = [window for window in self.windows if end_of(window) > until_s + EPSILON_S]

    def _answer(self, start_s: float, end_s: float, covering: Sequence[Prediction]) -> None:
        """Take the answer in a part of the input, by the mean of the windows that cover it."""
        mean = replace(covering[0], probs=tuple(np.mean([window.probs for window in covering], axis=0).tolist()))
        self._close_before(start_s - self.max_gap_s)
        each = dict(zip(mean.classes, mean.probs, strict=True))
        answers = mean.labels if mean.thresholds else (mean.label,)
        for label in (name for name in answers if each.get(name, -1.0) >= mean.min_prob):  # not "unknown"
            run = self.runs.get(label)
            if run is None:
                run = self.runs[label] = _Run(start_s, end_s, 0.0, 0.0)
            run.end_s = end_s
            run.weight += each[label] * (end_s - start_s)
            run.length_s += end_s - start_s
        self._close_before(end_s - self.max_gap_s)

    def _close_before(self, time_s: float) -> None:
        """End the runs that stopped before a time."""
        for label in [name for name, run in self.runs.items() if run.end_s < time_s - EPSILON_S]:
            self._close(label)

    def _close(self, label: str) -> None:
        run = self.runs.pop(label)
        if run.end_s - run.start_s > self.min_length_s - EPSILON_S:
            times = round(run.start_s, 6), round(run.end_s, 6)
            prob = run.weight / run.length_s
            self.ended.append(TimedEvent(self.path, *times, label, prob, names=self.names))

    def _in_order(self) -> Iterator[TimedEvent]:
        """Yield ended events by their start, up to one that still goes on."""
        first_s = min((run.start_s for run in self.runs.values()), default=inf)
        self.ended.sort(key=lambda event: (event.start_s, event.label))
        while self.ended and self.ended[0].start_s <= first_s:
            yield self.ended.pop(0)
