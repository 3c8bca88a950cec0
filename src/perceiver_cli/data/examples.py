"""Examples before they are read: one, a tuple of many, or rows of records that take no memory until needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.data.folders import parent
from perceiver_cli.data.manifest import EVERY, NOTHING
from perceiver_cli.preprocess.source import Source, key_of
from perceiver_cli.records.format import Stored
from perceiver_cli.records.shards import Shards, TextColumn


@dataclass(frozen=True)
class Example:
    """One example, not yet read.

    id: its path below the data folder, or the stem that its files share. sources: by modality, each optional. labels:
    class indices: one unless the data has several a row, none for an unknown class. group: examples of one group stay
    in one split; "" is no group. error: why it cannot be read, if that is known. place: its path if no source has it.
    passed: columns of a manifest or record that outputs repeat.
    """

    id: str
    sources: Mapping[str, Source | Stored]
    labels: tuple[int, ...] = ()
    group: str = ""
    error: str | None = field(default=None, compare=False)
    place: str = field(default="", compare=False)
    passed: Mapping[str, str] = field(default_factory=lambda: NOTHING, compare=False)

    @property
    def paths(self) -> dict[str, str]:
        """The path of each modality's file, as it can be opened; none for a record, a cell or bytes."""
        files = ((name, source) for name, source in self.sources.items() if isinstance(source, Source))
        return {name: source.name for name, source in files if not isinstance(source.data, bytes)}

    @property
    def path(self) -> str:
        """The path of its first file, as it can be opened; of a record, the path that was prepared, or its id."""
        return self.place or next(iter(self.paths.values()), self.id)

    @property
    def names(self) -> dict[str, Any]:
        """What every output says of an example beside its path: the id, the paths of several files, passed columns."""
        several = {"paths": self.paths} if len(set(self.paths.values())) > 1 else {}
        return {"id": self.id, **several, **self.passed}

    @property
    def files(self) -> set[str]:
        """The names of its files; its id for a record, or without a file."""
        return {*self.paths.values()} or {self.id}

    @cached_property
    def key(self) -> int:
        """A hash of the id, for seeds and splits."""
        return key_of(self.id)


PAUSE = Example("", {})  # in a stream of examples: no more have arrived yet, so the batch is not waited for


class Examples(Sequence[Example]):
    """The examples of one split, in order. A subclass may answer for all of them without making each."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._examples = tuple(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nothing slices: see `where`
        return self._examples[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield id and labels of each example."""
        return ((example.id, example.labels) for example in self)

    def filed(self) -> Iterator[tuple[str, tuple[int, ...], Collection[str]]]:
        """Yield id, labels and files of each example."""
        return ((example.id, example.labels, example.files) for example in self)

    def counts(self, num_classes: int) -> list[int]:
        """Return the number of examples of each class."""
        counter = Counter(chain.from_iterable(example.labels for example in self))
        return [counter[label] for label in range(num_classes)]

    def columns(self, *, grouped: bool = False) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the key (if `grouped`, of the group) and the first label of each example, -1 for none."""
        keys = [key_of(example.group) if example.group else example.key for example in self]
        labels = [example.labels[0] if example.labels else -1 for example in self]
        return np.array(keys, np.uint64), np.array(labels, np.int64)

    def where(self, mask: NDArray[np.bool_]) -> Examples:
        """Return the examples at which the mask is set."""
        return Examples(example for example, chosen in zip(self, mask.tolist(), strict=True) if chosen)

    def merged(self, others: Sequence[Examples]) -> Examples:
        """Return these examples and others of the same class, sorted by id."""
        return Examples(sorted(chain(self, *others), key=lambda example: example.id))

    def errors(self) -> dict[str, str]:
        """Return the known errors of examples, by id."""
        return {example.id: example.error for example in self if example.error is not None}


class Records(Examples):
    """Rows of shards as examples, made when needed: a million of them take no memory.

    label_classes: the class of each of the shards' names, -1 for none. groups: a column, the group of each row; without
    one, that is the folder in its id. passed: see `pass_columns` of the configuration.
    """

    def __init__(
        self,
        shards: Shards,
        rows: NDArray[np.int64],
        label_classes: NDArray[np.int64],
        modalities: Sequence[str],
        groups: TextColumn | None = None,
        passed: Sequence[str] = (),
    ) -> None:
        self.shards, self.rows, self.label_classes, self.modalities = shards, rows, label_classes, modalities
        self.groups, self.passed = groups, passed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        row = int(self.rows[index])
        name, error = self.shards.id(row), self.shards.errors.get(row)
        stored, labels = self.shards.stored(row, name, self.modalities), self._labels(row)
        group = "" if self.groups is None else self.groups.of(row)
        if not self.passed:
            return Example(name, stored, labels, group, error)
        facts = self.shards.facts(row)
        return Example(name, stored, labels, group, error, facts.path, passed_on(facts.columns, self.passed))

    def _with(self, rows: NDArray[np.int64]) -> Records:
        return Records(self.shards, rows, self.label_classes, self.modalities, self.groups, self.passed)

    def _labels(self, row: int) -> tuple[int, ...]:
        classes = {int(self.label_classes[label]) for label in self.shards.label_indices(row)}
        return tuple(sorted(classes - {-1}))

    def named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((self.shards.id(row), self._labels(row)) for row in self.rows.tolist())

    def filed(self) -> Iterator[tuple[str, tuple[int, ...], Collection[str]]]:
        return ((name, labels, (name,)) for name, labels in self.named())

    def counts(self, num_classes: int) -> list[int]:
        chosen = np.zeros(len(self.shards), bool)
        chosen[self.rows] = True
        flat = np.repeat(chosen, np.diff(self.shards.columns["label_ends"], prepend=0))
        classes = self.label_classes[self.shards.columns["labels"][flat]]
        counts: list[int] = np.bincount(classes + 1, minlength=num_classes + 1).tolist()
        return counts[1:]

    def columns(self, *, grouped: bool = False) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        firsts = np.full(len(self.shards), -1)
        ends = self.shards.columns["label_ends"]
        counts = np.diff(ends, prepend=0)
        one = counts == 1
        firsts[one] = self.label_classes[self.shards.columns["labels"][ends[one] - 1]]
        for row in np.flatnonzero(counts > 1).tolist():
            firsts[row] = next(iter(self._labels(row)), -1)
        keys = self.shards.columns["keys"][self.rows]
        if grouped:
            groups, each = self.groups, ((row, self.shards.id(row)) for row in self.rows.tolist())
            names = ((parent(name) if groups is None else groups.of(row)) or name for row, name in each)
            keys = np.array([key_of(name) for name in names], np.uint64)
        return keys, firsts[self.rows]

    def where(self, mask: NDArray[np.bool_]) -> Records:
        return self._with(self.rows[mask])

    def merged(self, others: Sequence[Examples]) -> Records:
        rows = np.concatenate([self.rows, *(other.rows for other in others if isinstance(other, Records))])
        return self._with(np.array(sorted(rows.tolist(), key=self.shards.id), np.int64))

    def errors(self) -> dict[str, str]:
        rows = set(self.rows.tolist()) if self.shards.errors else set()
        return {self.shards.id(row): error for row, error in self.shards.errors.items() if row in rows}


def passed_on(columns: Mapping[str, str], names: Sequence[str]) -> Mapping[str, str]:
    """Return the columns of these names, or all if one is EVERY."""
    return columns if EVERY in names else {name: columns[name] for name in names if name in columns}
