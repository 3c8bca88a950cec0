"""What a data folder says of its files: class folders, metadata beside the files, lists of the splits. No torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import show_path
from perceiver_cli.manifest import CONTENT, SPLIT_NAMES, ColumnError, Row, is_manifest, read_manifest, top_split


def rows_in(top: Path, notes: list[str], group_by: str | None = None) -> tuple[list[Row], bool]:
    """Return a row for every file of a data folder, paths below it, and whether there may be several labels a file.

    The first of these that there is: metadata.csv or metadata.jsonl with labels, beside the files that its column
    file_name names, in the folder or in each split's (Hugging Face's imagefolder and audiofolder); class folders,
    `split/class/file`, `class/split/file` (ModelNet's) or `class/file`; manifests named after splits (train.txt,
    val.csv). `group_by` is a column. What is passed over goes into `notes`.

    Raises:
        DataError: manifests that cannot be read, or no column to group by.
    """
    unlabelled: ColumnError | None = None
    try:
        if lists := metadata_in(top):
            return _listed(top, lists, notes, group_by)
    except ColumnError as error:
        unlabelled = error
    found = labelled_files(top, notes)
    if unlabelled is not None:
        if not found or group_by is not None:
            raise unlabelled
        notes.append(f"classes are folders: {unlabelled}")
    if found:
        if group_by is not None:
            raise DataError(
                f"{show_path(top)}: no column {show_path(group_by)}: classes are folders", "group by parent"
            )
        return found, False
    lists = split_lists(top)
    return _listed(top, lists, notes, group_by) if lists else ([], False)


@dataclass(frozen=True)
class _List:
    """A manifest in a data folder: the split of rows that name none; of metadata the folder that it lies in."""

    path: Path
    split: str = "train"
    beside: str | None = None


def _listed(top: Path, lists: list[_List], notes: list[str], group_by: str | None) -> tuple[list[Row], bool]:
    """Return the rows of manifests, and whether there may be several labels a file."""
    rows: list[Row] = []
    several = False
    for given in lists:
        found, multi_label = read_manifest(given.path, group_by=group_by, split=given.split, beside=given.beside)
        rows += found
        several = several or multi_label
    if lists[0].beside is not None:
        named = {path for row in rows for path in row.paths.values()} | {str(g.path.relative_to(top)) for g in lists}
        cut = len(os.path.join(os.fspath(top), ""))
        rest = Counter(suffix_of(path) for path in walk_files(top) if os.path.normpath(path[cut:]) not in named)
        if rest:
            notes.append(f"ignored {counted(rest.total(), 'file')} that no metadata names: {tally(rest)}")
    return rows, several


def metadata_in(top: Path) -> list[_List]:
    """Return the metadata files of a data folder and of the folders of its splits."""
    places = ["", *sorted(entry.name for entry in top.iterdir() if entry.is_dir() and top_split(entry.name))]
    lists = [_List(top / place / f"metadata{end}", beside=place) for place in places for end in (".csv", ".jsonl")]
    return [given for given in lists if given.path.is_file()]


def split_lists(top: Path) -> list[_List]:
    """Return the manifests in a folder that are named after a split."""
    found = ((path, SPLIT_NAMES.get(path.stem.lower())) for path in sorted(top.iterdir()) if is_manifest(path))
    return [_List(path, split) for path, split in found if split is not None and path.is_file()]


def labelled_files(top: Path, notes: list[str]) -> list[Row]:
    """Return a row for every file below class folders."""
    cut = len(os.fspath(top / "x")) - 1  # of what is before a name in it: nothing where it is "."

    def rows(folder: Path, split: str, name: str) -> list[Row]:
        return [Row({CONTENT: path[cut:]}, split, (name,)) for path in walk_files(folder)]

    folders = folders_in(top)
    splits = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    found: list[Row] = []
    if splits:
        outside = [folder.name for folder in folders if folder not in splits]
        if outside:
            notes.append(f"ignored folders beside the splits: {', '.join(map(show_path, outside))}")
        for split in splits:
            for label in folders_in(split):
                found += rows(label, SPLIT_NAMES[split.name.lower()], label.name)
        return found
    for label in folders:
        inside = folders_in(label)
        if inside and all(folder.name.lower() in SPLIT_NAMES for folder in inside):
            for split in inside:
                found += rows(split, SPLIT_NAMES[split.name.lower()], label.name)
        else:
            found += rows(label, "train", label.name)
    return found


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, sorted, without hidden ones and without following folder links."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    return [entry for entry in sorted(parent.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def parent(path: str) -> str:
    """Return the name of the folder that a file lies in."""
    return os.path.basename(os.path.dirname(path))


def suffix_of(path: str) -> str:
    """Return the suffix of a path in small letters, or "no suffix"."""
    return os.path.splitext(path)[1].lower() or "no suffix"


def tally(counter: Counter[str]) -> str:
    """Return the commonest names with their counts, for a message."""
    shown = ", ".join(f"{show_path(name)} {count}" for name, count in counter.most_common(5))
    return shown + (", ..." if len(counter) > 5 else "")
