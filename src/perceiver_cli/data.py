"""Examples, where they come from, and the batches they become.

Nothing here depends on how many workers read: the order of examples and their augmentation are pure functions of
(seed, epoch, example id), so a run that is cut and resumed sees exactly what an uninterrupted one would have seen.
A file that cannot be read is reported; no other example ever takes its place.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from perceiver_cli.config import InputSpec, Limits
from perceiver_cli.encoding import Segment
from perceiver_cli.errors import DataError, PerceiverError, ResourceError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import detect, formats, modality
from perceiver_cli.preprocess.base import Array, Layout, Source

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PROBES = 64  # files looked at to find the modality and to settle "auto" options
PRELOAD_CHUNK = 16  # files per message between the decoding processes


@dataclass(frozen=True)
class Example:
    """One input, not yet read. id: its path below the data folder; sources: by modality; label: class index."""

    id: str
    sources: Mapping[str, Source]
    label: int | None = None

    @cached_property
    def key(self) -> int:
        """A number made from the id alone, for seeds and splits."""
        return int.from_bytes(hashlib.sha256(self.id.encode("utf-8", "surrogateescape")).digest()[:8], "little")


@dataclass(frozen=True)
class Catalog:
    """What a data folder holds: examples by split, class names in order, and what was left out and why."""

    root: str
    modality: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    bad: Mapping[str, str] = field(default_factory=dict)  # example id -> error, known without decoding
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of every split, id and class: what a run was trained on."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for example in self.splits[split]:
                digest.update(f"{split}\0{example.id}\0{example.label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def counts(self, split: str) -> dict[str, int]:
        """Return the number of examples of each class in a split."""
        found = Counter(example.label for example in self.splits.get(split, ()))
        return {name: found[index] for index, name in enumerate(self.classes)}

    def hold_out(self, fraction: float) -> Catalog:
        """Return the catalog with a validation split: its own, or a stratified share of train chosen by hash of id.

        From each class the examples with the smallest hash go, so that adding files moves few of the old ones. Test
        examples are never touched.
        """
        if "val" in self.splits or fraction == 0 or "train" not in self.splits:
            return self
        by_class: dict[int | None, list[Example]] = defaultdict(list)
        for example in self.splits["train"]:
            by_class[example.label].append(example)
        held = {
            example.id
            for examples in by_class.values()
            if len(examples) > 1
            for example in sorted(examples, key=lambda e: e.key)[: max(1, round(fraction * len(examples)))]
        }
        train = tuple(e for e in self.splits["train"] if e.id not in held)
        val = tuple(e for e in self.splits["train"] if e.id in held)
        splits = {**self.splits, "train": train, "val": val}
        return Catalog(self.root, self.modality, self.classes, splits, self.bad, self.notes)


# ---------------------------------------------------------------- folders


def scan_folder(root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Catalog:
    """Return the catalog of a folder: `split/class/file`, `class/split/file` (ModelNet's) or `class/file`.

    The modality is the one that most of the probed files belong to, by content. With `classes` (of a model), labels
    are matched by name; examples of other classes get the label None.

    Raises:
        DataError: no such folder, or no usable files in it; says what was looked for and what was found.
    """
    top = Path(root)
    if not top.is_dir():
        what = "not a folder" if top.exists() else "no such folder"
        raise DataError(
            f"{show_path(root)}: {what}", "expected a folder of class folders: split/class/file or class/file"
        )
    notes: list[str] = []
    found = _labelled_files(top, notes)
    if not found:
        raise _nothing_usable(top)
    kind = _majority_modality([path for path, _, _ in found])
    if kind is None:
        raise _nothing_usable(top)

    def identity(path: str) -> str:
        return path[len(os.fspath(top)) :].lstrip(os.sep)

    # A file of another kind is bad if it carries the suffix of a usable one (a truncated .png), else just not data.
    other: list[tuple[str, str, str, str]] = []
    usable: list[tuple[str, str, str]] = []
    for path, split, name in found:
        problem = _sniff_problem(path, kind)
        (usable.append((path, split, name)) if problem is None else other.append((path, split, name, problem)))
    suffixes = {_suffix(path) for path, _, _ in usable}
    bad: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    for path, split, name, problem in other:
        if _suffix(path) in suffixes:
            bad[identity(path)] = problem
            usable.append((path, split, name))
        else:
            ignored[_suffix(path) or "no suffix"] += 1
    if ignored:
        notes.append(f"ignored {sum(ignored.values())} files that are not {kind}: {_tally(ignored)}")

    train_names = {name for _, split, name in usable if split == "train"} or {name for _, _, name in usable}
    names = tuple(classes) if classes is not None else tuple(sorted(train_names))
    index = {name: i for i, name in enumerate(names)}
    strangers = Counter(name for _, _, name in usable if name not in index)
    if strangers:
        known = "the model's classes" if classes is not None else "the training classes"
        notes.append(f"{sum(strangers.values())} files of classes not among {known}: {_tally(strangers)}")
    splits: dict[str, list[Example]] = defaultdict(list)
    for path, split, name in usable:
        splits[split].append(Example(identity(path), {kind: Source(path)}, index.get(name)))
    ordered = {split: tuple(sorted(examples, key=lambda e: e.id)) for split, examples in splits.items()}
    return Catalog(os.fspath(root), kind, names, ordered, bad, tuple(notes))


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, sorted, without hidden ones and without following folder links."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def _labelled_files(top: Path, notes: list[str]) -> list[tuple[str, str, str]]:
    """Return (path, split, class) of every file below class folders."""
    folders = [entry for entry in sorted(top.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    splits = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    if splits:
        outside = [folder.name for folder in folders if folder not in splits]
        if outside:
            notes.append(f"ignored folders beside the splits: {', '.join(map(show_path, outside))}")
        return [
            (path, SPLIT_NAMES[split.name.lower()], label.name)
            for split in splits
            for label in sorted(split.iterdir())
            if label.is_dir() and not label.name.startswith(".")
            for path in walk_files(label)
        ]
    found = []
    for label in folders:
        inside = [entry for entry in sorted(label.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
        if inside and all(entry.name.lower() in SPLIT_NAMES for entry in inside):
            found += [
                (path, SPLIT_NAMES[entry.name.lower()], label.name) for entry in inside for path in walk_files(entry)
            ]
        else:
            found += [(path, "train", label.name) for path in walk_files(label)]
    return found


def _majority_modality(paths: list[str]) -> str | None:
    votes: Counter[str] = Counter()
    stride = max(1, len(paths) // PROBES)
    for path in [*paths[::stride], *paths[: PROBES * 4]]:
        try:
            votes[detect(Source(path))] += 1
        except DataError:
            continue
        if votes.total() >= PROBES:
            break
    return votes.most_common(1)[0][0] if votes else None


def _sniff_problem(path: str, kind: str) -> str | None:
    source = Source(path)
    try:
        if modality(kind).sniff(source.head(), path):
            return None
    except DataError as error:
        return str(error)
    return f"{source.shown}: not {kind} by its content"


def _nothing_usable(top: Path) -> DataError:
    suffixes: Counter[str] = Counter()
    folders = sum(1 for entry in top.iterdir() if entry.is_dir())
    for count, path in enumerate(walk_files(top)):
        suffixes[_suffix(path) or "no suffix"] += 1
        if count == 10_000:
            break
    found = f"{folders} folders and {suffixes.total()} files" + (f" ({_tally(suffixes)})" if suffixes else "")
    return DataError(
        f"{show_path(top)}: no usable files: found {found}",
        f"expected class/file or split/class/file with {formats()}",
    )


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _tally(counter: Counter[str]) -> str:
    shown = ", ".join(f"{show_path(name)} {count}" for name, count in counter.most_common(5))
    return shown + (", ..." if len(counter) > 5 else "")


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Batch:
    """What the model is given at once.

    segments: by modality; labels: (B,) class index, -1 where unknown; examples: in the same order; bad: (position in
    the task, example, error) of those that could not be read and are therefore missing from the tensors.
    """

    segments: Mapping[str, Segment]
    labels: Tensor
    examples: tuple[Example, ...]
    bad: tuple[tuple[int, Example, str], ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the data loader when training on a GPU)."""
        segments = {name: segment.pin_memory() for name, segment in self.segments.items()}
        return Batch(segments, self.labels.pin_memory(), self.examples, self.bad)


@dataclass(frozen=True)
class Task:
    """What a worker turns into one batch: examples, and for training the (seed, epoch) of each augmentation."""

    examples: tuple[Example, ...]
    seeds: tuple[tuple[int, int], ...] | None = None


class Reader(Dataset[Batch]):
    """Turns tasks into batches. Keeps decoded arrays in memory up to a budget; workers share them after the fork."""

    def __init__(self, specs: Mapping[str, InputSpec], limits: Limits, bad: Mapping[str, str] | None = None) -> None:
        self.specs = dict(specs)
        self.limits = limits
        self.bad: dict[str, str] = dict(bad or {})  # example id -> error
        self._decoded: dict[str, dict[str, Array]] = {}

    @property
    def layouts(self) -> dict[str, Layout]:
        """The shape of each modality's input."""
        return {name: modality(spec.modality).layout(spec) for name, spec in self.specs.items()}

    def decode(self, example: Example) -> dict[str, Array]:
        """Return the decoded arrays of an example. Raises DataError where a file is bad."""
        if example.id in self._decoded:
            return self._decoded[example.id]
        if example.id in self.bad:
            raise DataError(self.bad[example.id])
        return {name: self._load(spec, example.sources[name]) for name, spec in self.specs.items()}

    def _load(self, spec: InputSpec, source: Source) -> Array:
        wanted = modality(spec.modality)
        if not wanted.sniff(source.head(), source.name):
            raise DataError(f"{source.shown}: {detect(source)} by its content, expected {spec.modality}")
        return wanted.load(source, spec, self.limits)

    def preload(self, examples: Sequence[Example], budget_bytes: int, workers: int) -> Iterator[int]:
        """Decode examples once, keep what fits in `budget_bytes`, note the bad; yield how many are done.

        Stops when the budget is full: the rest is decoded on every visit, and its bad files are found then.
        """
        used = sum(array.nbytes for arrays in self._decoded.values() for array in arrays.values())
        todo = [example for example in examples if example.id not in self.bad and example.id not in self._decoded]
        done = len(examples) - len(todo)
        for example, outcome in _decode_all(self, todo, workers):
            if isinstance(outcome, str):
                self.bad[example.id] = outcome
            else:
                self._decoded[example.id] = outcome
                used += sum(array.nbytes for array in outcome.values())
            done += 1
            yield done
            if used >= budget_bytes:
                return

    def __getitem__(self, task: Task) -> Batch:
        """Return the batch of a task; examples that cannot be read are in `bad` instead."""
        rows: dict[str, list[Any]] = {name: [] for name in self.specs}
        good: list[Example] = []
        bad: list[tuple[int, Example, str]] = []
        for position, example in enumerate(task.examples):
            rng = None if task.seeds is None else np.random.default_rng([*task.seeds[position], example.key])
            try:
                raw = self.decode(example)
                arrays = {
                    name: modality(spec.modality).prepare(raw[name], spec, rng) for name, spec in self.specs.items()
                }
            except DataError as error:
                bad.append((position, example, str(error)))
                continue
            good.append(example)
            for name, array in arrays.items():
                rows[name].append(array)
        segments = {}
        for name, arrays_of in rows.items():
            if not arrays_of:
                continue
            positions = None
            if arrays_of[0].positions is not None:
                positions = torch.from_numpy(np.stack([array.positions for array in arrays_of]))
            segments[name] = Segment(torch.from_numpy(np.stack([array.values for array in arrays_of])), positions)
        labels = torch.tensor([-1 if e.label is None else e.label for e in good], dtype=torch.long)
        return Batch(segments, labels, tuple(good), tuple(bad))

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


def _unchanged(batch: Batch) -> Batch:
    return batch


def _worker_died(workers: int) -> ResourceError:
    return ResourceError(f"one of {workers} data workers died, most likely for want of memory", "try --workers 0")


_reader: Reader | None = None  # of a decoding process, inherited by the fork


def _decode_all(
    reader: Reader, examples: Sequence[Example], workers: int
) -> Iterator[tuple[Example, dict[str, Array] | str]]:
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


def _decode_one(example: Example) -> tuple[Example, dict[str, Array] | str]:
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


def resolve_specs(specs: Mapping[str, InputSpec], examples: Sequence[Example], limits: Limits) -> dict[str, InputSpec]:
    """Return the specs with every "auto" settled by a sample of the examples."""
    probes = sorted(examples, key=lambda e: e.key)[:PROBES]
    return {
        name: modality(spec.modality).resolve(spec, [probe.sources[name] for probe in probes], limits)
        for name, spec in specs.items()
    }
