"""From examples to batches: the order of training examples, reading, missing modalities.

An example comes from `catalog` (a file, or a record by `examples.Records`), becomes inputs (`inputs.opened`), arrays
(`decoder.Decoder.decode`) and views (`Decoder.views`), and here segments of a batch (`Reader`, `collate`).

Order and augmentation are pure functions of (seed, epoch, example id), whatever the number of workers: a resumed run
sees the same batches as an uninterrupted one. An unreadable file is reported; no other example takes its place.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat
from math import prod
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from perceiver_cli.data.decoder import Decoder, View
from perceiver_cli.data.examples import PAUSE, Example
from perceiver_cli.data.workers import (
    WATCH_S,
    begin_worker,
    check_files,
    check_sockets,
    kill_all,
    start_method,
    starting_workers,
    watched,
    worker_died,
)
from perceiver_cli.errors import DataError, PerceiverError
from perceiver_cli.malloc import check_room
from perceiver_cli.model.encoding import Segment
from perceiver_cli.preprocess.base import Array, ByteArray
from perceiver_cli.preprocess.spec import InputSpec, Limits

AHEAD = 2  # batches that a worker reads in advance


@dataclass(frozen=True)
class Batch:
    """One batch for the model.

    segments: by modality; each example has `num_views` adjacent rows. labels: (B,) class indices, -1 for none, or
    (B, classes) of 0 and 1 for multi-label data. examples: in the same order. bad: (position in the task, example,
    error) of unreadable examples, which have no rows. used: the modalities of each example, sorted. notes: what was
    left out of each example.
    """

    segments: Mapping[str, Segment]
    labels: Tensor
    examples: tuple[Example, ...]
    bad: tuple[tuple[int, Example, str], ...] = ()
    used: tuple[tuple[str, ...], ...] = ()
    num_views: int = 1
    notes: tuple[tuple[str, ...], ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the data loader when training on a GPU)."""
        segments = {name: segment.pin_memory() for name, segment in self.segments.items()}
        return replace(self, segments=segments, labels=self.labels.pin_memory())

    def own(self) -> Batch:
        """Return a copy of the batch in this process's own memory."""
        return replace(self, segments={name: segment.clone() for name, segment in self.segments.items()})


@dataclass(frozen=True)
class Task:
    """The examples of one batch, and for training the (seed, epoch) of each augmentation."""

    examples: tuple[Example, ...]
    seeds: tuple[tuple[int, int], ...] | None = None


class Reader(Decoder, Dataset[Batch]):
    """Turns tasks into batches; forked workers share the arrays decoded before the fork."""

    def __init__(
        self,
        specs: Mapping[str, InputSpec],
        limits: Limits,
        bad: Mapping[str, str] | None = None,
        multi_label_classes: int = 0,
    ) -> None:
        super().__init__(specs, limits, bad)
        self._shared = SharedMemory()
        self.multi_label_classes = multi_label_classes  # 0: one label per example

    def __getitem__(self, task: Task) -> Batch:
        """Return the batch of a task, with its unreadable examples in `bad`."""
        views: list[list[View]] = []
        good: list[Example] = []
        notes: list[tuple[str, ...]] = []
        bad: list[tuple[int, Example, str]] = []
        for position, example in enumerate(task.examples):
            seeds = None if task.seeds is None else (*task.seeds[position], example.key)
            try:
                decoded = self.decode(example)
                views.append(self.views(decoded, seeds))
            except DataError as error:
                bad.append((position, example, str(error)))
                continue
            good.append(example)
            notes.append(decoded.notes)
        if all(view is each[0] for each in views for view in each):
            views = [each[:1] for each in views]
        used = tuple(tuple(each[0]) for each in views)
        rows, views_each = list(chain.from_iterable(views)), max(map(len, views), default=1)
        shared = None if get_worker_info() is None else self._shared.next()
        return Batch(collate(rows, shared), self.labels(good), tuple(good), tuple(bad), used, views_each, tuple(notes))

    def labels(self, examples: Sequence[Example]) -> Tensor:
        """Return the labels of examples, as in a Batch."""
        if not self.multi_label_classes:
            return torch.tensor([e.labels[0] if e.labels else -1 for e in examples], dtype=torch.long)
        labels = torch.zeros(len(examples), self.multi_label_classes)
        for row, example in enumerate(examples):
            labels[row, list(example.labels)] = 1.0
        return labels

    def batches(self, tasks: Iterable[Task], workers: int = 0, *, pin: bool = False) -> Iterator[Batch]:
        """Yield the batch of each task, read by `workers` processes (0: this one).

        A task without examples brings those before it to an end: its own batches are empty. Raises ResourceError if a
        process dies.
        """
        if workers:
            check_room()
            check_files(workers)
            check_sockets()
        loader: DataLoader[Batch] = DataLoader(
            self,
            sampler=_pushed(tasks, AHEAD * workers),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            collate_fn=_whole,
            pin_memory=pin,
            timeout=WATCH_S if workers else 0,
            multiprocessing_context=start_method() if workers else None,
            worker_init_fn=begin_worker if workers else None,
        )
        if not workers:
            yield from loader
            return
        others, processes = multiprocessing.active_children(), list[BaseProcess]()
        batches: Iterator[Batch] | None = None
        try:
            with starting_workers():
                batches = iter(loader)
            processes += (process for process in multiprocessing.active_children() if process not in others)
            with watched(processes):
                for batch in _received(batches, processes):
                    yield batch if pin else batch.own()  # the next batch may overwrite its slot
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, ConnectionError) or "DataLoader worker" in str(error):
                kill_all(processes)
                raise worker_died(workers) from error
            raise
        finally:
            batches = None  # the loader asks its workers to end
            kill_all(processes)


def _pushed(tasks: Iterable[Task], ahead: int) -> Iterator[Task]:
    """Yield tasks, and those without examples as often as it takes to get the batches before them from workers.

    torch's loader gives a batch only after it has taken the task `ahead` places later, for which it waits.
    """
    for task in tasks:
        yield from repeat(task, 1 if task.examples else ahead)


def _received(batches: Iterator[Batch], processes: Sequence[BaseProcess]) -> Iterator[Batch]:
    """Yield the batches of a loader with a timeout. Raises ConnectionError if one of its processes dies.

    torch would raise the error from a signal handler, wherever the main thread is: in a step, or where it is lost.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if in_main_thread and hasattr(signal, "SIGCHLD") else None
    if handler is not None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        while all(process.is_alive() for process in processes):
            try:
                yield next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
            except (EOFError, ConnectionError):  # a worker died while an array of it was received
                break
        kill_all(processes)  # before torch's handler is back, which would raise for each of them
        raise ConnectionError("a data worker died")
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _whole(batch: Any) -> Any:
    """Return a batch as it is: one task is one batch. A spawned worker finds the function by its name."""
    return batch


class SharedMemory:
    """Slots in shared memory, used in turn, in which a worker returns its batches: one for each batch in progress.

    Slots are reused, because fresh shared pages for a batch of clips take longer than decoding a clip.
    """

    def __init__(self) -> None:
        self._slots: list[dict[str, torch.UntypedStorage]] = [{} for _ in range(AHEAD + 1)]

    def next(self) -> SharedMemory:
        """Advance to the next slot."""
        self._slots.append(self._slots.pop(0))
        return self

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in this slot."""
        num_bytes, slot = max(1, prod(shape) * dtype.itemsize), self._slots[0]
        if name not in slot or slot[name].nbytes() < num_bytes:
            slot[name] = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=dtype).set_(slot[name], 0, shape)  # type: ignore[call-overload,no-any-return]


def collate(rows: Sequence[View], shared: SharedMemory | None = None) -> dict[str, Segment]:
    """Return a segment for each modality that any row has; a row without it gets zeros, hidden by the mask."""
    segments = {}
    for name in sorted({name for row in rows for name in row}):
        first = next(row[name] for row in rows if name in row)
        zeros = None if first.positions is None else np.zeros_like(first.positions)
        blank = ByteArray(np.zeros_like(first.values), zeros)
        arrays = [row.get(name, blank) for row in rows]
        values = _stacked([array.values for array in arrays], name, shared)
        positions = [array.positions for array in arrays if array.positions is not None]
        stacked = _stacked(positions, f"{name} positions", shared) if positions else None
        mask = torch.tensor([[name in row] for row in rows])
        segments[name] = Segment(values, stacked, None if mask.all() else mask)
    return segments


def _stacked(arrays: Sequence[Array], name: str, shared: SharedMemory | None) -> Tensor:
    """Return (B, ...) of arrays (...)."""
    if shared is None:
        return torch.from_numpy(np.stack(arrays))
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    stacked = shared.tensor(name, (len(arrays), *arrays[0].shape), dtype)
    np.stack(arrays, out=stacked.numpy())
    return stacked


def training_tasks(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    every: int = 1,
    own: range = range(1),
) -> Iterator[Task]:
    """Yield the tasks of batches `start` to `stop` of an endless stream of shuffled epochs.

    Batches are always full: a batch may span epochs. Batch k depends on the seed, k and the ids alone.
    every, own: of each `every` batches in turn, those to yield.
    """
    count = len(examples)
    order = lru_cache(1)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(count))
    for batch in (batch for batch in range(start, stop if own else start) if batch % every in own):
        places = [divmod(position, count) for position in range(batch * batch_size, (batch + 1) * batch_size)]
        chosen = tuple(examples[order(epoch)[place]] for epoch, place in places)
        yield Task(chosen, tuple((seed, epoch) for epoch, _ in places))


def ordered_tasks(examples: Iterable[Example], batch_size: int) -> Iterator[Task]:
    """Yield the tasks of an evaluation: examples in the given order, without augmentation.

    At a PAUSE the examples so far are a task, and one without examples follows.
    """
    chunk: list[Example] = []
    try:
        for example in examples:
            chunk += () if example is PAUSE else (example,)
            if len(chunk) == batch_size or (example is PAUSE and chunk):
                yield Task(tuple(chunk))
                chunk = []
            if example is PAUSE:
                yield Task(())
    except PerceiverError:  # such as a stream cut short: the examples before it still get answers
        if chunk:
            yield Task(tuple(chunk))
        raise
    if chunk:
        yield Task(tuple(chunk))
