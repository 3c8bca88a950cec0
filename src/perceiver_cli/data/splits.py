"""The training and validation split of a run, saved in its folder, so that new files do not change it. No torch.

A split file is JSON lines: a header, the id and the split ("train" or "val") of each example, the sha256 of all lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import DataConfig, parse_fold
from perceiver_cli.data.catalog import Catalog
from perceiver_cli.errors import DataError, IntegrityError, UsageError, counted
from perceiver_cli.files import atomic_write, cause, open_file, parse_json, show_path, show_text
from perceiver_cli.preprocess.source import key_of

SPLIT_FILE = "split.jsonl"
FORMAT = 2
UNSEALED_FORMAT = 1  # version 0.1.0's: without a sha256
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

        Notes count the examples that the split does not name, which are left out, and the named ones that are missing.
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
            notes.append(f"{counted(len(self.keys) - num_known, 'example')} that it names are missing")
        split = catalog.split(examples, self.held[places], known)
        return replace(split, notes=(*catalog.notes, "; ".join(notes)))


def validated(catalog: Catalog, options: DataConfig) -> Catalog:
    """Return the catalog with the validation split that the options ask for: a fold, its own, or a share of train."""
    if options.fold is None:
        return catalog.hold_out(options.val_fraction)
    number, folds = parse_fold(options.fold)
    examples, grouped = catalog.merged(("train", "val")), catalog.group_by is not None
    keys, firsts = examples.columns(grouped=grouped)
    numbers = _fold_numbers(keys, firsts, folds)
    held = numbers == number - 1
    if not held.any() or held.all():
        unit = f"groups by {show_path(catalog.group_by or '')}" if grouped else "examples"
        raise DataError(f"{show_path(catalog.root)}: too few {unit} for {folds} folds", "pass fewer folds")
    return catalog.split(examples, held, np.ones(len(examples), bool))


def whole(catalog: Catalog) -> Catalog:
    """Return the catalog with all examples of train and val in train."""
    examples = catalog.merged(("train", "val"))
    return catalog.split(examples, np.zeros(len(examples), bool), np.ones(len(examples), bool))


def _fold_numbers(keys: NDArray[np.uint64], classes: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Return the fold of each example, from 0; examples of one key share theirs.

    Each class is spread evenly, and each example is in one fold. Only keys and classes decide, not the order. Large
    groups go first, each to the fold with the fewest examples of its first class, then with the fewest of all.
    """
    order = np.lexsort((classes, keys))
    groups, starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)
    own = classes[order][starts]
    of_class: dict[int, list[int]] = defaultdict(lambda: [0] * folds)
    totals = [0] * folds
    chosen = np.empty(len(groups), np.int64)
    for group in np.lexsort((groups, own, -sizes)).tolist():
        counts = of_class[int(own[group])]
        fold = min(range(folds), key=lambda f: (counts[f], totals[f], f))
        counts[fold] += int(sizes[group])
        totals[fold] += int(sizes[group])
        chosen[group] = fold
    return chosen[np.searchsorted(groups, keys)]


def save_split(path: Path, catalog: Catalog) -> None:
    """Write the training and validation split of a catalog, atomically. Raises ResourceError."""
    header = {"format": FORMAT, "classes": list(catalog.classes), "group_by": catalog.group_by}
    named = ((name, split) for split in ("train", "val") for name, _ in catalog.examples(split).named())
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for row in chain([header], ({"path": name, "split": split} for name, split in named)):
            line = json.dumps(row).encode() + b"\n"
            digest.update(line)
            file.write(line)
        file.write(json.dumps({"sha256": digest.hexdigest()}).encode() + b"\n")


def read_split(path: str | os.PathLike[str]) -> SavedSplit:
    """Return a split from `save_split`. Raises UsageError if it is unreadable, IntegrityError if damaged."""
    try:
        with open_file(path) as file:
            first = file.readline()
            header = parse_json(first)
            if header["format"] not in (FORMAT, UNSEALED_FORMAT):
                raise IntegrityError(f"{show_path(path)}: split of format {header['format']}, expected {FORMAT}")
            classes = tuple(str(name) for name in header["classes"])
            rows = _rows(file) if header["format"] == UNSEALED_FORMAT else _compared(file, first)
            pairs = np.fromiter(map(_pair, rows), [("key", np.uint64), ("held", np.bool_)])
    except OSError as error:
        raise UsageError(f"{show_path(path)}: cannot read the split: {cause(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{show_path(path)}: not the split of a run, or a damaged one: {error}") from error
    if not len(pairs):
        raise IntegrityError(f"{show_path(path)}: a split without examples")
    pairs = pairs[np.argsort(pairs["key"], kind="stable")]
    return SavedSplit(Path(path), classes, pairs["key"], pairs["held"])


def _rows(lines: Iterable[bytes]) -> Iterator[Any]:
    return map(parse_json, lines)


def _compared(lines: Iterable[bytes], first: bytes) -> Iterator[Any]:
    """Yield the rows after the first line. Raises ValueError unless the last line is the sha256 of all others."""
    digest, line = hashlib.sha256(), first
    for following in lines:
        if line is not first:
            yield parse_json(line)
        digest.update(line)
        line = following
    if parse_json(line) != {"sha256": digest.hexdigest()}:
        raise ValueError("its sha256 does not match its lines")


def _pair(row: Any) -> tuple[int, bool]:
    """Return the key of an example, and whether it is for validation. Raises ValueError, KeyError or TypeError."""
    if row["split"] not in ("train", "val") or not isinstance(row["path"], str):
        raise ValueError(f"split {show_text(str(row['split']))} of {show_text(str(row['path']))}")
    return key_of(row["path"]), row["split"] == "val"
