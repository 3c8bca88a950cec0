"""From an example, a file or a record, to arrays, windows of time and views for the model. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from math import inf, isinf
from typing import Any

import numpy as np

from perceiver_cli.data.examples import Example
from perceiver_cli.data.inputs import Encoded, Input, brought, opened
from perceiver_cli.data.workers import in_order
from perceiver_cli.errors import AbsentError, DataError, PerceiverError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import modality, timed_modality
from perceiver_cli.preprocess.base import Array, ByteArray, Layout
from perceiver_cli.preprocess.live_sound import SOUND, Live
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.records.format import Stored

VIEW_SEED = 1
NOTED = 1 << 16  # maximum number of files whose length is remembered
LONG_CLIPS = 8  # clips; each visit of a longer file decodes one span, and nothing is kept
DROPOUT_STREAM = 1  # separates the random numbers of modality dropout from those of augmentation

View = dict[str, ByteArray]  # one model input of an example, by modality, without missing ones


@dataclass(frozen=True)
class Decoded:
    """The data of an example that is the same at every visit, by modality.

    arrays: decoded. long: sound and video too long to keep: each visit decodes a span. seconds: lengths on the time
    axis. ready: prepared arrays of records. notes: what decoders left out. whole_s: the length of a window's input.
    """

    arrays: Mapping[str, Array]
    long: Mapping[str, Input]
    seconds: Mapping[str, float]
    ready: Mapping[str, ByteArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    whole_s: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities that the example has, sorted."""
        return tuple(sorted(self.arrays.keys() | self.long.keys() | self.ready.keys()))

    @property
    def nbytes(self) -> int:
        """Memory of the arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


class Decoder:
    """Turns examples into arrays and arrays into views. Keeps arrays in memory up to a budget."""

    def __init__(self, specs: Mapping[str, InputSpec], limits: Limits, bad: Mapping[str, str] | None = None) -> None:
        self.asked_views: int | None = None  # views of an example in evaluation; None leaves it to the specs
        self.specs = dict(sorted(specs.items()))
        self.limits = limits
        self.bad: dict[str, str] = dict(bad or {})  # example id -> error
        self.notes: dict[str, str] = {}  # example id -> what was left out of it, of those that `preload` decoded
        self.decoded: dict[str, Decoded] = {}
        self._seconds: dict[tuple[str, object], float] = {}  # (modality, state of a file) -> its length
        self.timed = {name: timed for name in self.specs if (timed := timed_modality(name)) is not None}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a spawned worker, which decodes by itself: arrays would travel to each."""
        return {**self.__dict__, "decoded": {}}

    @property
    def layouts(self) -> dict[str, Layout]:
        """The shape of each modality's input."""
        return {name: modality(name).layout(spec) for name, spec in self.specs.items()}

    @property
    def num_views(self) -> int:
        """Number of views of an example in evaluation."""
        if self.asked_views is not None:
            return self.asked_views
        return max((modality(name).num_views(spec) for name, spec in self.specs.items()), default=1)

    def decode(self, example: Example) -> Decoded:
        """Return the decoded arrays of an example. Raises DataError if a file is bad or no modality is read here."""
        if example.id in self.decoded:
            return self.decoded[example.id]
        arrays: dict[str, Array] = {}
        long: dict[str, Input] = {}
        ready: dict[str, ByteArray] = {}
        inputs = self.inputs(example)
        for name, each in inputs.items():
            if each.is_prepared:
                ready[name] = each.prepared()
            elif self._is_long(name, each):
                long[name] = each
            else:
                arrays[name] = each.array()
        return Decoded(arrays, long, seconds_of(inputs), ready, notes_of(inputs))

    def _is_long(self, name: str, each: Input) -> bool:
        timed = self.timed.get(name)
        long_s = LONG_CLIPS * timed.clip_s(self.specs[name]) if timed is not None and timed.reads_spans else inf
        return (each.seconds or 0) > long_s

    def windows(
        self, example: Example, window_s: float, hop_s: float
    ) -> Iterator[tuple[tuple[float, float] | None, Decoded]]:
        """Yield ((start, end) in seconds, decoded arrays) of every window of an example.

        A modality without a time axis is the same in each window; an example without one is one window without time.
        Windows past the end of the shorter of sound and picture hold the longer alone; one without samples is left out,
        which the next notes. Raises DataError for a bad file, at once or after some windows.
        """
        inputs = self.inputs(example)
        if any(each.is_prepared for each in inputs.values()):
            raise DataError(f"{show_path(example.id)}: a prepared clip, which cannot be cut into windows")
        seconds = seconds_of(inputs)
        still = {name: each.array() for name, each in inputs.items() if name not in seconds}
        if not seconds:
            yield None, Decoded(still, {}, {})
            return
        gap_s: float | None = None  # where windows without samples began
        for at_once in zip_longest(*(inputs[name].windows(window_s, hop_s) for name in seconds)):
            moving = {name: window for name, window in zip(seconds, at_once, strict=True) if window is not None}
            start, _ = next(iter(moving.values()))  # sound comes first: frames are coarser
            whole_s = max(seconds.values())
            end = min(start + window_s, max(start, whole_s))
            if isinf(whole_s):  # sound that arrives: nothing but its samples tells its end
                end = start + len(moving[SOUND][1]) / self.timed[SOUND].steps_hz(self.specs[SOUND])
            moving = {name: each for name, each in moving.items() if self.timed[name].has_samples(each[1])}
            if not moving:
                gap_s = start if gap_s is None else gap_s
                continue
            notes = () if gap_s is None else (f"the windows from {gap_s:g} s on to this one have no samples",)
            arrays, gap_s = still | {name: array for name, (_, array) in moving.items()}, None
            yield (start, end), Decoded(arrays, {}, dict.fromkeys(moving, end - start), notes=notes, whole_s=whole_s)

    def inputs(self, example: Example) -> dict[str, Input]:
        """Return an example's inputs by modality, not decoded yet. Raises as `decode`."""
        if example.id in self.bad:
            raise DataError(self.bad[example.id])
        inputs: dict[str, Input] = {}
        absent: AbsentError | None = None
        for name, source in brought(example, self.specs).items():
            try:
                inputs[name] = self._opened(name, source)
            except AbsentError as error:
                absent = error
        if absent is not None and not inputs:
            raise absent
        return inputs

    def _opened(self, name: str, source: Source | Stored) -> Input:
        """Return one input. The length of a file is remembered: to open a container takes 1 ms."""
        each = opened(source, self.specs[name], self.limits)
        if name not in self.timed or not isinstance(each, Encoded):
            return each
        if isinstance(each.source.data, Live):
            return replace(each, seconds=inf)
        state = each.source.state()
        seconds = self._seconds.get((name, state))
        if seconds is None:
            seconds = self.timed[name].duration_s(each.source, self.limits, self.specs[name])
            if state is not None and len(self._seconds) < NOTED:
                self._seconds[name, state] = seconds
        return replace(each, seconds=seconds)

    def preload(self, examples: Sequence[Example], budget_bytes: int, workers: int) -> Iterator[int]:
        """Decode examples into memory until `budget_bytes` are full, note bad ones; yield the number done."""
        used = sum(decoded.nbytes for decoded in self.decoded.values())
        todo = [example for example in examples if example.id not in self.bad and example.id not in self.decoded]
        outcomes = zip(todo, in_order(self._outcome, todo, workers), strict=False)
        for done, (example, outcome) in enumerate(outcomes, start=len(examples) - len(todo) + 1):
            if isinstance(outcome, str):
                self.bad[example.id] = outcome
            else:
                self.decoded[example.id] = outcome
                if outcome.notes:
                    self.notes[example.id] = "; ".join(outcome.notes)
                used += outcome.nbytes
            yield done
            if used >= budget_bytes:
                return

    def _outcome(self, example: Example) -> Decoded | str:
        try:
            return self.decode(example)
        except PerceiverError as error:
            return str(error)

    def views(self, decoded: Decoded, seeds: tuple[int, ...] | None = None) -> list[View]:
        """Return one augmented view of an example with `seeds`, else the `num_views` views of evaluation.

        Sound and picture share one start in seconds, drawn from the time that both cover. Views that cannot differ, as
        of a sound from its first audible sample on, are one object.
        """
        names, rng = decoded.names, None
        if seeds is not None:
            rng = np.random.default_rng(seeds)
            dropout = {name: self.specs[name].dropout for name in names}
            names = kept(dropout, np.random.default_rng([*seeds, DROPOUT_STREAM]))
        starts = self.starts(decoded, rng)
        rngs = [rng] if rng is not None else [self._view_rng(place) for place in range(len(starts))]
        looks = list(zip(starts, rngs, strict=True))
        specs = self.specs if rng is not None or self.asked_views is None else self._viewed
        made = {
            (start_s, r): {name: self._prepare(name, specs[name], decoded, r, start_s) for name in names}
            for start_s, r in dict.fromkeys(looks)
        }
        return [made[look] for look in looks]

    @cached_property
    def _viewed(self) -> dict[str, InputSpec]:
        """The specs of the views that were asked for."""
        return {name: modality(name).viewed(spec) for name, spec in self.specs.items()}

    def _view_rng(self, place: int) -> np.random.Generator | None:
        """Return the random numbers of a view that was asked for; the first is that of one view alone."""
        return None if self.asked_views is None or place == 0 else np.random.default_rng([VIEW_SEED, place])

    def starts(self, decoded: Decoded, rng: np.random.Generator | None = None) -> list[float | None]:
        """Return the start of each view in seconds; None lets the modality choose, which is exact to the sample."""
        clips = [self.timed[name].clip_s(self.specs[name]) for name in decoded.seconds]
        count = 1 if rng is not None else self.num_views
        alone = len(clips) == 1 and not decoded.long
        itself = any(self.timed[name].starts_itself(self.specs[name]) for name in decoded.seconds)
        if not clips or (alone and (count == 1 or itself)):
            return [None] * count
        spare_s = max(0.0, min(decoded.seconds.values()) - max(clips))
        if rng is not None:
            return [float(rng.uniform(0, spare_s))]
        return [spare_s * (view + 0.5 * (count == 1)) / max(1, count - 1) for view in range(count)]

    def clip(self, name: str, decoded: Decoded, start_s: float | None) -> tuple[Array, float]:
        """Return the decoded array of the view from `start_s` on (None: the middle), and its start in seconds."""
        spec, seconds = self.specs[name], decoded.seconds[name]
        clip_s = self.timed[name].clip_s(spec)
        if name in decoded.long:
            start_s = max(0.0, seconds - clip_s) / 2 if start_s is None else start_s
            return decoded.long[name].array((start_s, clip_s)), start_s
        if start_s is None:
            start_s = self.timed[name].first_s(decoded.arrays[name], spec)
        rate_hz = self.timed[name].steps_hz(spec)
        return decoded.arrays[name][round(start_s * rate_hz) :][: max(1, round(clip_s * rate_hz))], start_s

    def _prepare(
        self, name: str, spec: InputSpec, decoded: Decoded, rng: np.random.Generator | None, start_s: float | None
    ) -> ByteArray:
        timed = self.timed.get(name)
        if name in decoded.ready:
            return decoded.ready[name]
        if timed is None:
            return modality(name).prepare(decoded.arrays[name], spec, rng)
        if name in decoded.long and rng is not None and start_s is not None:
            span_s = timed.span_s(spec)
            first_s = max(0.0, min(start_s, decoded.seconds[name] - span_s))
            return timed.prepare(decoded.long[name].array((first_s, span_s)), spec, rng, start_s - first_s)
        if name in decoded.long:
            return timed.prepare(self.clip(name, decoded, start_s)[0], spec, rng, 0.0)
        return timed.prepare(decoded.arrays[name], spec, rng, start_s)


def kept(dropout: Mapping[str, float], rng: np.random.Generator) -> tuple[str, ...]:
    """Return the modalities left when each is withheld with its probability; if none, the one with the highest draw."""
    draws = {name: rng.random() for name in sorted(dropout)}
    left = tuple(name for name, draw in draws.items() if draw >= dropout[name])
    return left or (max(draws, key=lambda name: draws[name]),)


def seconds_of(inputs: Mapping[str, Input]) -> dict[str, float]:
    """Return the length of each input that has a time axis."""
    return {name: each.seconds for name, each in inputs.items() if each.seconds is not None}


def notes_of(inputs: Mapping[str, Input]) -> tuple[str, ...]:
    """Return what the decoders of inputs left out, after they have decoded."""
    return tuple(note for each in inputs.values() if isinstance(each, Encoded) for note in each.source.notes)


def told_once(notes: Mapping[str, str]) -> tuple[str, ...]:
    """Return one line on the notes of many examples by their ids; none without notes."""
    if not notes:
        return ()
    name, note = next(iter(notes.items()))
    return (f"{counted(len(notes), 'file')} read in part, the first {show_path(name)}: {note}",)
