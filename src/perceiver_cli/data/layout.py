"""From the paths in a data folder or an archive to labels and splits: which folders are classes. No torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from perceiver_cli.data.account import FLAT
from perceiver_cli.data.manifest import SPLIT_NAMES, Row, top_split
from perceiver_cli.errors import counted
from perceiver_cli.files import show_path

NAMED = 10  # class folders named in a note
Rest = dict[str, str | None]  # the files without a row: why each has none; None if it only lacks a label


def by_folder(entries: Iterable[tuple[str, bool]], notes: list[str]) -> tuple[list[Row], Rest]:
    """Return a row for every file below class folders, and the rest of the files.

    Layouts are `split/class/file`, `class/split/file` (ModelNet's) and `class/file`. entries: paths with slashes on any
    system, each with whether it is a folder; files of archives come without their folders. A folder that holds only
    one folder, of its own name, stands for that one: archives unpack so. `notes` says which class folders hold no
    file, and what may be no classes.
    """
    known = list(entries)
    doubled = {name for name, own in _inside(known, set()).items() if own == {name}}
    inside = _inside(known, doubled)
    splits = _splits(inside, notes)
    if splits and (beside := sorted(inside.keys() - splits.keys())):
        notes.append(f"ignored folders beside the splits: {_some(beside)}")
    parted = {name for name, own in inside.items() if _is_parted(own)}
    placed = {path: _row(path, doubled, splits, parted) for path, is_folder in known if not is_folder}
    rows = [row for row in placed.values() if isinstance(row, Row)]
    expected = set().union(*(inside[name] for name in splits)) if splits else set(inside)
    if rows and (missing := sorted(expected.difference(label for row in rows for label in row.labels))):
        notes.append(f"{counted(len(missing), 'class folder')} without a file: {_some(missing)}")
    first, *others = inside.values() if not splits and not parted and len(inside) > 1 else [set[str]()]
    if len(first) > 1 and all(own == first for own in others):
        same = f"each class folder holds the folders {_some(sorted(first))}"
        notes.append(f"{same}: if these are the classes, pass one of {_some(sorted(inside))}")
    return rows, {path: row for path, row in placed.items() if not isinstance(row, Row)}


def _is_parted(folders: set[str]) -> bool:
    """Return whether the folders in a class folder are splits: all of them, or two different ones among others."""
    splits = [top_split(name) for name in folders]
    return bool(splits) and (None not in splits or len({*splits} - {None}) > 1)


def _inside(entries: Iterable[tuple[str, bool]], doubled: set[str]) -> dict[str, set[str]]:
    """Return the names of the folders in each folder at the top."""
    inside: dict[str, set[str]] = {}
    for path, is_folder in entries:
        folders = _parts(path, doubled) if is_folder else _parts(path, doubled)[:-1]
        if folders:
            inside.setdefault(folders[0], set()).update(folders[1:2])
    return inside


def _parts(path: str, doubled: set[str]) -> list[str]:
    """Return the names in a path; of a folder in `doubled` and the one in it, which has the same name, only one."""
    parts = path.split("/")
    return parts[1:] if parts[0] in doubled and parts[:1] == parts[1:2] else parts


def _some(names: list[str]) -> str:
    """Return the first NAMED names."""
    return ", ".join(map(show_path, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _row(path: str, doubled: set[str], splits: Mapping[str, str], parted: set[str]) -> Row | str | None:
    """Return the row of a file, or why it has none."""
    first, *others = _parts(path, doubled)
    if not others:
        return FLAT
    if splits:
        if first not in splits:
            return "beside the splits"
        return Row(path, split=splits[first], labels=(others[0],)) if len(others) > 1 else None
    if first in parted:
        split = top_split(others[0]) if len(others) > 1 else None
        return Row(path, split=split, labels=(first,)) if split else "beside the splits"
    return Row(path, labels=(first,))


def _splits(inside: Mapping[str, set[str]], notes: list[str]) -> dict[str, str]:
    """Return the split of each folder at the top that is one: it has a split's name, and class folders are in it.

    The folders beside such a split are no classes. Without a class folder in any of them, folders of these names are
    classes like their neighbours: "train" is a vehicle. So is a single one among neighbours that all have folders.
    Folders that name two splits alike (train2017, val2017) are no classes even if they hold files alone.
    """
    alike = _alike(inside)
    named = {name: split for name in inside if (split := top_split(name))} | alike
    others = inside.keys() - named.keys()
    alone = len(named) == 1 and len(others) > 1 and all(inside[name] for name in others)
    if not named or not others or alike or (any(inside[name] for name in named) and not alone):
        return named
    how = "like the folders beside it" if alone else "as it holds no class folder"
    notes += [f"{show_path(name)} is a class {how}" for name in sorted(named)]
    return {}


def _alike(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each folder whose name differs from that of another split in this word and in numbers alone.

    Such are "Training set" and "Test set", seg_train and seg_test, train-clean-100 and dev-clean; not bullet_train.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for name in names:
        words = [word.lower() for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))]
        splits = [word for word in words if word in SPLIT_NAMES]
        if len(splits) == 1:
            groups[tuple(word for word in words if word not in SPLIT_NAMES)][name] = SPLIT_NAMES[splits[0]]
    found: dict[str, str] = {}
    for group in groups.values():
        decorated = any(top_split(name) is None for name in group)
        found |= group if decorated and len(set(group.values())) > 1 else {}
    return found
