"""From examples to batches: decoding, memory, windows in time, missing modalities, order, mixing.

Nothing here depends on how many workers read: the order of examples and their augmentation are pure functions of
(seed, epoch, example id), so a run that is cut and resumed sees exactly what an uninterrupted one would have seen.
A file that cannot be read is reported; no other example ever takes its place.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from perceiver_cli.catalog import Example, brought
from perceiver_cli.config import AudioSpec, InputSpec, Limits, VideoSpec
from perceiver_cli.encoding import Segment
from perceiver_cli.errors import AbsentError, DataError, PerceiverError, ResourceError
from perceiver_cli.preprocess import expected, modality
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Source, TimedModality

PRELOAD_CHUNK = 16  # files per message between the decoding processes
LONG_CLIPS = 8  # clips; of a longer file only the span that is looked at is decoded, and nothing is kept
DROPOUT_STREAM = 1  # tells the random numbers of withholding a modality from those of augmentation


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Batch:
    """What the model is given at once.

    segments: by modality, those that any example has; each example has `num_views` rows, one after another.
    labels: (B,) class index, -1 where there is none, or (B, classes) of 0 and 1 where examples may have several.
    examples: in the same order. bad: (position in the task, example, error) of those that could not be read and are
    therefore missing from the tensors. used: by example, the modalities that there are of it, sorted.
    """

    segments: Mapping[str, Segment]
    labels: Tensor
    examples: tuple[Example, ...]
    bad: tuple[tuple[int, Example, str], ...] = ()
    used: tuple[tuple[str, ...], ...] = ()
    num_views: int = 1

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the data loader when training on a GPU)."""
        segments = {name: segment.pin_memory() for name, segment in self.segments.items()}
        return replace(self, segments=segments, labels=self.labels.pin_memory())


@dataclass(frozen=True)
class Task:
    """What a worker turns into one batch: examples, and for training the (seed, epoch) of each augmentation."""

    examples: tuple[Example, ...]
    seeds: tuple[tuple[int, int], ...] | None = None


Row = dict[str, ByteArray]  # of one view of an example, by modality; those that are missing are not in it


@dataclass(frozen=True)
class Decoded:
    """An example as it is kept: all that does not change from visit to visit.

    arrays: by modality. long: sources of sound and video too long to keep, of which each visit decodes a span.
    seconds: the length of each modality with a time axis.
    """

    arrays: Mapping[str, Array]
    long: Mapping[str, Source]
    seconds: Mapping[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities that the example has, sorted."""
        return tuple(sorted(self.arrays.keys() | self.long.keys()))

    @property
    def nbytes(self) -> int:
        """Bytes of memory, of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class Reader(Dataset[Batch]):
    """Turns tasks into batches. Keeps decoded arrays in memory up to a budget; workers share them after the fork."""

    def __init__(
        self,
        specs: Mapping[str, InputSpec],
        limits: Limits,
        bad: Mapping[str, str] | None = None,
        multi_label_classes: int = 0,
    ) -> None:
        self.specs = dict(sorted(specs.items()))
        self.limits = limits
        self.multi_label_classes = multi_label_classes  # 0: one label an example
        self.bad: dict[str, str] = dict(bad or {})  # example id -> error
        self._decoded: dict[str, Decoded] = {}
        self.timed: dict[str, TimedModality[Any]] = {
            name: kind for name in self.specs if isinstance(kind := modality(name), TimedModality)
        }

    @property
    def layouts(self) -> dict[str, Layout]:
        """The shape of each modality's input."""
        return {name: modality(name).layout(spec) for name, spec in self.specs.items()}

    @property
    def num_views(self) -> int:
        """In how many windows an example is looked at in evaluation."""
        timed = (spec for spec in self.specs.values() if isinstance(spec, AudioSpec | VideoSpec))
        return max((spec.eval_windows for spec in timed), default=1)

    def decode(self, example: Example) -> Decoded:
        """Return the decoded arrays of an example: of the modalities that it has, at least one.

        Raises:
            DataError: a file is bad, or there is nothing of what is read here.
        """
        if example.id in self._decoded:
            return self._decoded[example.id]
        sources, seconds = self._sources(example)
        arrays: dict[str, Array] = {}
        long: dict[str, Source] = {}
        for name, source in sources.items():
            spec = self.specs[name]
            if name in seconds and seconds[name] > LONG_CLIPS * self.timed[name].clip_s(spec):
                long[name] = source
            else:
                arrays[name] = modality(name).load(source, spec, self.limits)
        return Decoded(arrays, long, seconds)

    def windows(
        self, example: Example, window_s: float, hop_s: float
    ) -> Iterator[tuple[tuple[float, float] | None, Decoded]]:
        """Yield ((start, end) in seconds, what is decoded of it) of every window of an example, as if it were a file.

        What has no time axis is the same in each; without anything that has, there is one window and no time. Where
        sound and picture are not of one length, the rest of the longer is without the other.

        Raises:
            DataError: a file is bad, at once or only after some windows.
        """
        sources, seconds = self._sources(example)
        still = {
            name: modality(name).load(source, self.specs[name], self.limits)
            for name, source in sources.items()
            if name not in seconds
        }
        if not seconds:
            yield None, Decoded(still, {}, {})
            return
        streams = (
            self.timed[name].windows(sources[name], self.specs[name], self.limits, window_s, hop_s) for name in seconds
        )
        end_s = max(seconds.values())
        for parts in zip_longest(*streams):
            moving = {name: part for name, part in zip(seconds, parts, strict=True) if part is not None}
            start, _ = next(iter(moving.values()))  # of the sound where there is some: frames are coarser
            end = min(start + window_s, max(end_s, start))
            arrays = still | {name: array for name, (_, array) in moving.items()}
            yield (start, end), Decoded(arrays, {}, dict.fromkeys(moving, end - start))

    def _sources(self, example: Example) -> tuple[dict[str, Source], dict[str, float]]:
        """Return the source of each modality that an example has, and the seconds of those with a time axis."""
        if example.id in self.bad:
            raise DataError(self.bad[example.id])
        sources = brought(example, self.specs)
        seconds: dict[str, float] = {}
        absent: AbsentError | None = None
        for name, source in list(sources.items()):
            expected(source, name)
            if name in self.timed:
                try:
                    seconds[name] = self.timed[name].duration_s(source, self.limits)
                except AbsentError as error:
                    absent = error
                    del sources[name]
        if absent is not None and not sources:
            raise absent
        return sources, seconds

    def preload(self, examples: Sequence[Example], budget_bytes: int, workers: int) -> Iterator[int]:
        """Decode examples once, keep what fits in `budget_bytes`, note the bad; yield how many are done.

        Stops when the budget is full: the rest is decoded on every visit, and its bad files are found then.
        """
        used = sum(decoded.nbytes for decoded in self._decoded.values())
        todo = [example for example in examples if example.id not in self.bad and example.id not in self._decoded]
        done = len(examples) - len(todo)
        for example, outcome in _decode_all(self, todo, workers):
            if isinstance(outcome, str):
                self.bad[example.id] = outcome
            else:
                self._decoded[example.id] = outcome
                used += outcome.nbytes
            done += 1
            yield done
            if used >= budget_bytes:
                return

    def views(self, decoded: Decoded, seeds: tuple[int, ...] | None = None) -> list[Row]:
        """Return what the model sees of an example: with `seeds`, one augmented view; else `num_views` of evaluation.

        Sound and picture share their window: one time in seconds, drawn once from where there are both, is given to
        both.
        """
        names, rng = decoded.names, None
        if seeds is not None:
            rng = np.random.default_rng(seeds)
            dropout = {name: self.specs[name].dropout for name in names}
            names = kept(dropout, np.random.default_rng([*seeds, DROPOUT_STREAM]))
        return [
            {name: self._prepare(name, decoded, rng, start_s) for name in names}
            for start_s in self.starts(decoded, rng)
        ]

    def starts(self, decoded: Decoded, rng: np.random.Generator | None = None) -> list[float | None]:
        """Return the seconds at which each view begins; None leaves it to the modality, which knows its samples."""
        clips = [self.timed[name].clip_s(self.specs[name]) for name in decoded.seconds]
        count = 1 if rng is not None else self.num_views
        if not clips or (count == 1 and len(clips) == 1 and not decoded.long):
            return [None] * count
        spare_s = max(0.0, min(decoded.seconds.values()) - max(clips))
        if rng is not None:
            return [float(rng.uniform(0, spare_s))]
        return [spare_s * (view + 0.5 * (count == 1)) / max(1, count - 1) for view in range(count)]

    def _prepare(
        self, name: str, decoded: Decoded, rng: np.random.Generator | None, start_s: float | None
    ) -> ByteArray:
        spec, timed = self.specs[name], self.timed.get(name)
        if timed is None:
            return modality(name).prepare(decoded.arrays[name], spec, rng)
        if name in decoded.long:
            assert start_s is not None
            span = timed.load(decoded.long[name], spec, self.limits, (start_s, timed.clip_s(spec)))
            return timed.prepare(span, spec, rng, 0.0)
        return timed.prepare(decoded.arrays[name], spec, rng, start_s)

    def __getitem__(self, task: Task) -> Batch:
        """Return the batch of a task; examples that cannot be read are in `bad` instead."""
        rows: list[Row] = []
        good: list[Example] = []
        bad: list[tuple[int, Example, str]] = []
        for position, example in enumerate(task.examples):
            seeds = None if task.seeds is None else (*task.seeds[position], example.key)
            try:
                views = self.views(self.decode(example), seeds)
            except DataError as error:
                bad.append((position, example, str(error)))
                continue
            good.append(example)
            rows += views
        views_each = len(rows) // len(good) if good else 1
        used = tuple(tuple(row) for row in rows[::views_each])
        return Batch(collate(rows), self._labels(good), tuple(good), tuple(bad), used, views_each)

    def _labels(self, examples: Sequence[Example]) -> Tensor:
        if not self.multi_label_classes:
            return torch.tensor([e.labels[0] if e.labels else -1 for e in examples], dtype=torch.long)
        labels = torch.zeros(len(examples), self.multi_label_classes)
        for row, example in enumerate(examples):
            labels[row, list(example.labels)] = 1.0
        return labels

    def batches(self, tasks: Iterable[Task], workers: int = 0, *, pin: bool = False) -> Iterator[Batch]:
        """Yield the batch of each task, in order, read ahead by `workers` processes (0: in this one).

        Raises:
            ResourceError: a worker died, usually for want of memory.
        """
        loader: DataLoader[Batch] = DataLoader(
            self,
            sampler=tasks,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]  # one task is one batch
            pin_memory=pin,
            multiprocessing_context="fork" if workers else None,
        )
        try:
            yield from loader
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, ConnectionError) or "DataLoader worker" in str(error):
                raise _worker_died(workers) from error
            raise


def kept(dropout: Mapping[str, float], rng: np.random.Generator) -> tuple[str, ...]:
    """Return the modalities of an example that are left when each is withheld with its probability: at least one.

    Where all would go, the one with the highest draw stays.
    """
    draws = {name: rng.random() for name in sorted(dropout)}
    left = tuple(name for name, draw in draws.items() if draw >= dropout[name])
    return left or (max(draws, key=lambda name: draws[name]),)


def collate(rows: Sequence[Row]) -> dict[str, Segment]:
    """Return a segment for each modality that any of the rows has; where one lacks it, zeros that the mask hides."""
    segments = {}
    for name in sorted({name for row in rows for name in row}):
        found = [row.get(name) for row in rows]
        first = next(array for array in found if array is not None)
        values = [np.zeros_like(first.values) if array is None else array.values for array in found]
        positions = None
        if first.positions is not None:
            blank = np.zeros_like(first.positions)
            places = [blank if array is None or array.positions is None else array.positions for array in found]
            positions = torch.from_numpy(np.stack(places))
        mask = torch.tensor([[array is not None] for array in found])
        segments[name] = Segment(torch.from_numpy(np.stack(values)), positions, None if mask.all() else mask)
    return segments


def _unchanged(batch: Batch) -> Batch:
    return batch


def _worker_died(workers: int) -> ResourceError:
    return ResourceError(f"one of {workers} data workers died, most likely for want of memory", "try --workers 0")


_reader: Reader | None = None  # of a decoding process, inherited by the fork


def _decode_all(reader: Reader, examples: Sequence[Example], workers: int) -> Iterator[tuple[Example, Decoded | str]]:
    global _reader
    _reader = reader
    if workers == 0 or len(examples) < 4 * PRELOAD_CHUNK:
        yield from map(_decode_one, examples)
        return
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            try:
                yield from pool.map(_decode_one, examples, chunksize=PRELOAD_CHUNK)
            except GeneratorExit:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise _worker_died(workers) from error


def _decode_one(example: Example) -> tuple[Example, Decoded | str]:
    assert _reader is not None
    try:
        return example, _reader.decode(example)
    except PerceiverError as error:
        return example, str(error)


# ---------------------------------------------------------------- mixing


@dataclass(frozen=True)
class Mixed:
    """A batch in which each example is mixed with another: labels of both, and the share of the first (0..1)."""

    segments: Mapping[str, Segment]
    labels: Tensor
    other_labels: Tensor
    share: float


def mix(batch: Batch, mixup: float, cutmix: float, rng: np.random.Generator) -> Mixed:
    """Return a batch mixed with itself in reverse order: MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    `mixup` and `cutmix` are the parameters of the Beta distribution that the share is drawn from, 0 for never; with
    both set, one of the two is drawn for the batch. CutMix pastes a box along the first two axes of a grid.
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup))
    box = (rng.random(), rng.random(), (1 - share) ** 0.5)  # centre and side, in shares of each axis
    segments = {}
    for name, segment in batch.segments.items():
        values, other = segment.values, segment.values.flip(0)
        if not cut:
            segments[name] = Segment(share * values.float() + (1 - share) * other.float(), segment.positions)
            continue
        spans = []
        for axis, center in enumerate(box[:2], start=1):
            length = values.shape[axis]
            first, last = (round(length * min(1.0, max(0.0, center + half * box[2]))) for half in (-0.5, 0.5))
            spans.append(slice(first, last))
        values = values.clone()
        values[:, spans[0], spans[1]] = other[:, spans[0], spans[1]]
        segments[name] = Segment(values, segment.positions)
        pasted = (spans[0].stop - spans[0].start) * (spans[1].stop - spans[1].start)
        share = 1 - pasted / (values.shape[1] * values.shape[2])  # as it came out at the borders
    return Mixed(segments, batch.labels, batch.labels.flip(0), share)


# ---------------------------------------------------------------- order


def training_tasks(examples: Sequence[Example], batch_size: int, seed: int, start: int, stop: int) -> Iterator[Task]:
    """Yield the tasks of batches `start` to `stop` of an endless stream of shuffled epochs.

    Batches are always full: one that reaches the end of an epoch goes on into the next, so every example is seen
    once per epoch whatever the batch size. Batch k depends on nothing but (seed, k) and the ids.
    """
    count = len(examples)
    epoch, order = -1, np.empty(0, dtype=np.int64)
    for batch in range(start, stop):
        chosen: list[Example] = []
        seeds: list[tuple[int, int]] = []
        for position in range(batch * batch_size, (batch + 1) * batch_size):
            if position // count != epoch:
                epoch = position // count
                order = np.random.default_rng([seed, epoch]).permutation(count)
            chosen.append(examples[order[position % count]])
            seeds.append((seed, epoch))
        yield Task(tuple(chosen), tuple(seeds))


def ordered_tasks(examples: Iterable[Example], batch_size: int) -> Iterator[Task]:
    """Yield the tasks of an evaluation: examples in the order given, without augmentation."""
    chunk: list[Example] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == batch_size:
            yield Task(tuple(chunk))
            chunk = []
    if chunk:
        yield Task(tuple(chunk))


def class_weights(counts: Sequence[int], power: float) -> Tensor:
    """Return loss weights (classes,): inverse frequency to a power, with mean 1 over the examples."""
    frequency = torch.tensor(counts, dtype=torch.float64).clamp_min(1)
    weights = frequency.pow(-power)
    return (weights * frequency.sum() / (weights * frequency).sum()).float()
