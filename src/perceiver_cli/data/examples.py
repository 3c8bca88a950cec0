"""One example, and records as examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.data.listing import parent
from perceiver_cli.preprocess.source import Source, key_of
from perceiver_cli.records.shards import Shards


@dataclass(frozen=True)
class Example:
    """One input, not yet read.

    id: its path below the data folder, or the stem that its files share; sources: by modality, any of which may be
    missing, or one under CONTENT; labels: class indices, one unless the data says several, none where the class is not
    known; group: what it shares with others of its split, "" for nothing.
    """

    id: str
    sources: Mapping[str, Source]
    labels: tuple[int, ...] = ()
    group: str = ""

    @cached_property
    def key(self) -> int:
        """A number made from the id alone, for seeds and splits."""
        return key_of(self.id)


class Records(Sequence[Example]):
    """Rows of shards as examples, each made when it is asked for: a million of them take no memory.

    places: by name of a label in the shards, the class that it is, -1 for none.
    """

    def __init__(
        self, shards: Shards, rows: NDArray[np.int64], places: NDArray[np.int64], modalities: Sequence[str]
    ) -> None:
        self.shards, self.rows, self.places, self.modalities = shards, rows, places, modalities

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Records: ...
    def __getitem__(self, place: int | slice) -> Example | Records:
        if isinstance(place, slice):
            return self.chosen(self.rows[place])
        row = int(self.rows[place])
        name = self.shards.id(row)
        return Example(name, self.shards.places(row, name, self.modalities), self._labels(row))

    def chosen(self, rows: NDArray[np.int64]) -> Records:
        """Return other rows of the same shards."""
        return Records(self.shards, rows, self.places, self.modalities)

    def named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield id and labels of each example."""
        return ((self.shards.id(row), self._labels(row)) for row in self.rows.tolist())

    def _labels(self, row: int) -> tuple[int, ...]:
        found = {int(self.places[place]) for place in self.shards.label_indices(row)}
        return tuple(sorted(found - {-1}))

    def tally(self, num_classes: int) -> list[int]:
        """Return the number of examples of each class."""
        chosen = np.zeros(len(self.shards), bool)
        chosen[self.rows] = True
        flat = np.repeat(chosen, np.diff(self.shards.columns["label_ends"], prepend=0))
        found: list[int] = np.bincount(
            self.places[self.shards.columns["labels"][flat]] + 1, minlength=num_classes + 1
        ).tolist()
        return found[1:]

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the key and the first label of each example, -1 for none."""
        firsts = np.full(len(self.shards), -1)
        ends = self.shards.columns["label_ends"]
        counts = np.diff(ends, prepend=0)
        one = counts == 1
        firsts[one] = self.places[self.shards.columns["labels"][ends[one] - 1]]
        for row in np.flatnonzero(counts > 1).tolist():
            firsts[row] = next(iter(self._labels(row)), -1)
        return self.shards.columns["keys"][self.rows], firsts[self.rows]


def named(examples: Sequence[Example]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield id and labels of each example."""
    return examples.named() if isinstance(examples, Records) else ((e.id, e.labels) for e in examples)


def columns_of(
    examples: Sequence[Example], group_by: str | None = None
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the key (with groups, of its group) and the first label of each example, -1 for none."""
    if isinstance(examples, Records):
        keys, labels = examples.columns()
        if group_by is not None:
            keys = np.array([key_of(parent(name) or name) for name, _ in examples.named()], np.uint64)
        return keys, labels
    firsts = [example.labels[0] if example.labels else -1 for example in examples]
    found = [key_of(example.group) if example.group else example.key for example in examples]
    return np.array(found, np.uint64), np.array(firsts, np.int64)


def chosen(examples: Sequence[Example], mask: NDArray[np.bool_]) -> Sequence[Example]:
    if isinstance(examples, Records):
        return examples.chosen(examples.rows[mask])
    return tuple(example for example, chosen in zip(examples, mask.tolist(), strict=True) if chosen)
