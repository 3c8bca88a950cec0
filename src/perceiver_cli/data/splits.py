"""The training and validation split of a run, saved in its folder, so that new files do not change it. No torch.

A split file is JSON lines: a header, then the id and the split, "train" or "val", of every example.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.data.catalog import Catalog
from perceiver_cli.errors import IntegrityError, UsageError, counted
from perceiver_cli.files import atomic_write, show_path
from perceiver_cli.preprocess.source import key_of

SPLIT_FILE = "split.jsonl"
FORMAT = 1
SAME = 0.5  # minimum share of a split's examples in data for the data to count as the same


@dataclass(frozen=True)
class SavedSplit:
    """The examples that a run trained on and validated on.

    classes: the run's. keys: hashes of the ids, sorted. held: whether each is in the validation split.
    """

    path: Path
    classes: tuple[str, ...]
    keys: NDArray[np.uint64]
    held: NDArray[np.bool_]

    def apply(self, catalog: Catalog) -> Catalog | None:
        """Return the catalog with this training and validation split, or None if the split is of other data.

        Notes count examples left out because the split does not name them, and named ones that are gone.
        """
        examples = catalog.merged(("train", "val"))
        keys = np.array([key_of(name) for name, _ in examples.named()], np.uint64)
        # An example may be listed several times, even in both splits: the second here is the second in the split file.
        number = np.arange(len(keys))
        first = np.maximum.accumulate(np.where(np.append(True, keys[1:] != keys[:-1])[: len(keys)], number, 0))
        places = (np.searchsorted(self.keys, keys) + number - first).clip(max=len(self.keys) - 1)
        known = self.keys[places] == keys
        num_known = int(known.sum())
        if num_known < SAME * len(self.keys):
            return None
        notes = [f"train and val are as saved in {show_path(self.path)}"]
        if num_known < len(keys):
            notes.append(f"left out {counted(len(keys) - num_known, 'example')} that it does not name")
        if num_known < len(self.keys):
            notes.append(f"{counted(len(self.keys) - num_known, 'example')} that it names are gone")
        split = catalog.split(examples, self.held[places], known)
        return replace(split, notes=(*catalog.notes, "; ".join(notes)))


def save_split(path: Path, catalog: Catalog) -> None:
    """Write the training and validation split of a catalog, atomically. Raises ResourceError."""
    header = {"format": FORMAT, "classes": list(catalog.classes), "group_by": catalog.group_by}
    with atomic_write(path) as file:
        file.write(json.dumps(header).encode() + b"\n")
        for split in ("train", "val"):
            for name, _ in catalog.examples(split).named():
                file.write(json.dumps({"path": name, "split": split}).encode() + b"\n")


def read_split(path: str | os.PathLike[str]) -> SavedSplit:
    """Return a split from `save_split`. Raises UsageError if it is unreadable, IntegrityError if damaged."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            if header["format"] != FORMAT:
                raise IntegrityError(f"{show_path(path)}: split of format {header['format']}, expected {FORMAT}")
            classes = tuple(str(name) for name in header["classes"])
            pairs = np.fromiter(_pairs(file), [("key", np.uint64), ("held", np.bool_)])
    except OSError as error:
        raise UsageError(f"{show_path(path)}: cannot read the split: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{show_path(path)}: not the split of a run: {error}") from error
    if not len(pairs):
        raise IntegrityError(f"{show_path(path)}: a split without examples")
    pairs = pairs[np.argsort(pairs["key"], kind="stable")]
    return SavedSplit(Path(path), classes, pairs["key"], pairs["held"])


def _pairs(lines: Iterator[bytes]) -> Iterator[tuple[int, bool]]:
    for row in map(json.loads, lines):
        if row["split"] not in ("train", "val"):
            raise ValueError(f"split {row['split']!r}")
        yield key_of(row["path"]), row["split"] == "val"
