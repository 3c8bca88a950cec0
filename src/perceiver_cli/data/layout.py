"""From the paths in a data folder or an archive to labels and splits: which folders are classes. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from perceiver_cli.data.manifest import Row, top_split
from perceiver_cli.errors import counted
from perceiver_cli.files import show_path

NAMED = 10  # class folders named in a note
Rest = dict[str, str | None]  # the files without a row: why each has none; None if it only lacks a label


def by_folder(entries: Iterable[tuple[str, bool]], notes: list[str]) -> tuple[list[Row], Rest]:
    """Return a row for every file below class folders, and the rest of the files.

    Layouts are `split/class/file`, `class/split/file` (ModelNet's) and `class/file`. entries: paths with slashes on any
    system, each with whether it is a folder; files of archives come without their folders. `notes` says which class
    folders hold no file.
    """
    files: list[str] = []
    inside: dict[str, set[str]] = {}  # the names of the folders in each folder at the top
    for path, is_folder in entries:
        folders = path.split("/") if is_folder else path.split("/")[:-1]
        if folders:
            inside.setdefault(folders[0], set()).update(folders[1:2])
        if not is_folder:
            files.append(path)
    splits = _splits(inside, notes)
    if splits and (beside := sorted(inside.keys() - splits.keys())):
        notes.append(f"ignored folders beside the splits: {_some(beside)}")
    parted = {name for name, own in inside.items() if own and all(map(top_split, own))}
    placed = {path: _row(path, splits, parted) for path in files}
    rows = [row for row in placed.values() if isinstance(row, Row)]
    expected = set().union(*(inside[name] for name in splits)) if splits else set(inside)
    if rows and (missing := sorted(expected.difference(label for row in rows for label in row.labels))):
        notes.append(f"{counted(len(missing), 'class folder')} without a file: {_some(missing)}")
    return rows, {path: row for path, row in placed.items() if not isinstance(row, Row)}


def _some(names: list[str]) -> str:
    """Return the first NAMED names."""
    return ", ".join(map(show_path, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _row(path: str, splits: Mapping[str, str], parted: set[str]) -> Row | str | None:
    """Return the row of a file, or why it has none."""
    first, *others = path.split("/")
    if not others:
        return "in no class folder"
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
    """
    named = {name: split for name in inside if (split := top_split(name))}
    others = inside.keys() - named.keys()
    alone = len(named) == 1 and len(others) > 1 and all(inside[name] for name in others)
    if not named or not others or (any(inside[name] for name in named) and not alone):
        return named
    is_class = "are classes: no class folder is in them" if not alone else "is a class like the folders beside it"
    notes.append(f"{', '.join(map(show_path, sorted(named)))} {is_class}")
    return {}
