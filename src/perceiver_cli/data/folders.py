"""From a data folder to rows: class folders, and metadata beside the files. No torch."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from perceiver_cli.config import DataConfig
from perceiver_cli.data.manifest import NO_OPTIONS, SPLIT_NAMES, ColumnError, Row, is_manifest, read_manifest, top_split
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import cannot_read, show_path


def rows_in(top: Path, notes: list[str], options: DataConfig = NO_OPTIONS) -> tuple[list[Row], bool]:
    """Return a row for every file of a data folder, its path below the folder, and whether the data is multi-label.

    Rows come from the first of: metadata.csv or metadata.jsonl with labels and file_name, in the folder or in each
    split's (Hugging Face's imagefolder and audiofolder); class folders, `split/class/file`, `class/split/file`
    (ModelNet's) or `class/file`; manifests named after splits (train.txt, val.csv). `options` name columns. `notes`
    gets a line for ignored files. Raises DataError for an unreadable manifest or one without that column.
    """
    unlabelled: ColumnError | None = None
    group_by = options.group_by
    try:
        if described := _by_metadata(top, notes, options):
            return described
    except ColumnError as error:
        unlabelled = error
    rows = _by_folder(top, notes)
    if unlabelled is not None:
        if not rows or group_by is not None:
            raise unlabelled
        notes.append(f"classes are folders: {unlabelled}")
    if rows and group_by is not None:
        raise DataError(f"{show_path(top)}: no column {show_path(group_by)}: classes are folders", "group by parent")
    if rows:
        return rows, False
    named = ((path, SPLIT_NAMES.get(path.stem.lower())) for path in sorted(top.iterdir()) if is_manifest(path))
    read = [read_manifest(path, options, split=split) for path, split in named if split and path.is_file()]
    return [row for rows, _ in read for row in rows], any(several for _, several in read)


def _by_metadata(top: Path, notes: list[str], options: DataConfig) -> tuple[list[Row], bool] | None:
    """Return the rows of the metadata in a data folder and its split folders, or None without metadata."""
    places = ["", *(folder.name for folder in folders_in(top) if top_split(folder.name))]
    paths = {Path(place, f"metadata{end}"): place for place in places for end in (".csv", ".jsonl")}
    paths = {path: place for path, place in paths.items() if (top / path).is_file()}
    if not paths:
        return None
    read = [read_manifest(top / path, options, beside=place) for path, place in paths.items()]
    named = {path for rows, _ in read for row in rows for path in row.paths} | set(map(str, paths))
    cut = len(os.path.join(os.fspath(top), ""))
    rest = Counter(suffix_of(path) for path in walk_files(top) if os.path.normpath(path[cut:]) not in named)
    if rest:
        notes.append(f"ignored {counted(rest.total(), 'file')} that no metadata names: {tally(rest)}")
    return [row for rows, _ in read for row in rows], any(several for _, several in read)


def _by_folder(top: Path, notes: list[str]) -> list[Row]:
    """Return a row for every file below class folders."""
    cut = len(os.fspath(top / "x")) - 1  # length of the prefix of paths in it: 0 if it is "."
    folders = folders_in(top)
    splits = {folder: split for folder in folders if (split := top_split(folder.name))}
    places: list[tuple[Path, str, str]] = []  # folder, split, class
    if splits:
        places = [(label, split, label.name) for folder, split in splits.items() for label in folders_in(folder)]
        if outside := [show_path(folder.name) for folder in folders if folder not in splits]:
            notes.append(f"ignored folders beside the splits: {', '.join(outside)}")
    else:
        for label in folders:
            inside = {folder: top_split(folder.name) or "" for folder in folders_in(label)}
            inside = inside if inside and all(inside.values()) else {label: "train"}
            places += [(folder, split, label.name) for folder, split in inside.items()]
    return [
        Row(path[cut:], split=split, labels=(name,)) for folder, split, name in places for path in walk_files(folder)
    ]


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, sorted, without hidden files and without following links.

    Raises DataError for a folder that cannot be listed: its files would be missing in silence.
    """

    def unlisted(error: OSError) -> None:
        raise cannot_read(error.filename, error) from error

    for parent, folders, names in os.walk(folder, onerror=unlisted):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden folders. Raises DataError if it cannot be listed."""

    def is_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link to itself leads nowhere, like a link to a missing file
                return False
            raise

    try:
        with os.scandir(parent) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry)]
    except OSError as error:
        raise cannot_read(error.filename or parent, error) from error
    return [parent / name for name in sorted(names)]


def contents_of(folder: Path) -> str:
    """Return the numbers of folders and files in a folder, for a message; the count of files ends at 10,001."""
    suffixes = Counter(map(suffix_of, islice(walk_files(folder), 10_001)))
    counts = f"{counted(len(folders_in(folder)), 'folder')} and {counted(suffixes.total(), 'file')}"
    return counts + (f" ({tally(suffixes)})" if suffixes else "")


def parent(path: str) -> str:
    """Return the name of the folder that a file lies in."""
    return os.path.basename(os.path.dirname(path))


def suffix_of(path: str) -> str:
    """Return the suffix of a path in lower case, or "no suffix"."""
    return os.path.splitext(path)[1].lower() or "no suffix"


def tally(counter: Counter[str]) -> str:
    """Return the five most common names with their counts, for a message."""
    shown = ", ".join(f"{show_path(name)} {count}" for name, count in counter.most_common(5))
    return shown + (", ..." if len(counter) > 5 else "")
