"""From a path to rows: class folders, metadata beside the files, manifests, tars of records. No torch."""

from __future__ import annotations

import csv
import difflib
import errno
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from perceiver_cli import preprocess
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import cannot_read, parse_json, show_path, status_of
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.shards import tar_files


def rows_in(top: Path, notes: list[str], group_by: str | None = None) -> tuple[list[Row], bool]:
    """Return a row for every file of a data folder, its path below the folder, and whether the data is multi-label.

    Rows come from the first of: metadata.csv or metadata.jsonl with labels and file_name, in the folder or in each
    split's (Hugging Face's imagefolder and audiofolder); class folders, `split/class/file`, `class/split/file`
    (ModelNet's) or `class/file`; manifests named after splits (train.txt, val.csv). `group_by` is a column. `notes`
    gets a line for ignored files. Raises DataError for an unreadable manifest or one without that column.
    """
    unlabelled: ColumnError | None = None
    try:
        if described := _by_metadata(top, notes, group_by):
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
    read = [read_manifest(path, group_by=group_by, split=split) for path, split in named if split and path.is_file()]
    return [row for rows, _ in read for row in rows], any(several for _, several in read)


def _by_metadata(top: Path, notes: list[str], group_by: str | None) -> tuple[list[Row], bool] | None:
    """Return the rows of the metadata in a data folder and its split folders, or None without metadata."""
    places = ["", *(folder.name for folder in folders_in(top) if top_split(folder.name))]
    paths = {Path(place, f"metadata{end}"): place for place in places for end in (".csv", ".jsonl")}
    paths = {path: place for path, place in paths.items() if (top / path).is_file()}
    if not paths:
        return None
    read = [read_manifest(top / path, group_by=group_by, beside=place) for path, place in paths.items()]
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


SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PATH_COLUMNS = ("path", "file_name", "file", "filename")
LABEL_COLUMNS = ("labels", "label")
BESIDE = "_file_name"  # image_file_name: Hugging Face's columns for files of several modalities
# Other usual names of such columns: not read, but an error suggests renaming them.
LIKE_PATH = (*PATH_COLUMNS, "file_path", "source", "uri")
LIKE_LABEL = ("label", "labels", "class", "category", "target")
NEAR = 0.7  # minimum similarity (difflib's ratio) of a column for the error to suggest it
LINES = ".txt"  # lines of PATH LABEL, as in the lists of Kinetics
MAX_MANIFEST_BYTES = 256 << 20


class ColumnError(DataError):
    """A manifest without a required column."""


@dataclass(frozen=True)
class Row:
    """A row of a manifest, or a file of a folder.

    path: its one file, of a modality known by content; or columns: a path by modality. A row with empty cells has
    neither. split: "train", "val" or "test". labels: class names. group: rows of one group stay in one split; "" is no
    group. file: its one file, if its content is known.
    """

    path: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    labels: tuple[str, ...] = ()
    group: str = ""
    file: File | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all its files, as named."""
        return (self.path,) if self.path else tuple(self.columns.values())

    def looked_at(self, folder: str) -> File:
        """Return its one file, at a path below a folder, with the kinds of its content."""
        return self.file or looked_at(Source(os.path.join(folder, self.path)), self.path)

    def below(self, folder: str) -> Row:
        """Return the row with the folder before its paths."""
        columns = {name: os.path.join(folder, path) for name, path in self.columns.items()}
        return replace(self, path=self.path and os.path.join(folder, self.path), columns=columns)


def is_manifest(path: str | os.PathLike[str], *, labelled: bool = True) -> bool:
    """Return whether a path has a manifest's suffix; without `labelled`, of one that needs no labels."""
    suffix = Path(path).suffix.lower()
    return suffix in MANIFESTS and (labelled or suffix != LINES)


def read_manifest(
    path: str | os.PathLike[str],
    *,
    labelled: bool = True,
    group_by: str | None = None,
    split: str = "train",
    beside: str | None = None,
) -> tuple[list[Row], bool]:
    """Return the rows of a manifest, and whether the data is multi-label: it has a column `labels`.

    Columns: `path`, or one for each modality (`image`, `audio`, ...), where an empty cell is a missing modality;
    `label`, or `labels` separated by ; , or | (in JSONL also a list), required if `labelled`; optionally `split` and
    `group_by`. A text file has lines instead: a path, a blank and a label.

    split: default of rows without a split. beside: folder of the metadata below the data folder; a split folder of the
    file's path then gives the default. Raises DataError for a file that contradicts its suffix or a row without a
    label; ColumnError for missing columns, with the most similar ones.
    """
    shown, rows = show_path(path), _cells_in(path)
    columns = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    path_columns = _path_columns(columns)
    missing: list[Sequence[str]] = [] if path_columns else [LIKE_PATH]
    missing += [LIKE_LABEL] if labelled and label_column is None else []
    if missing:
        kinds = ", ".join(sorted(preprocess.names()))
        expected = f"path or some of {kinds}" + (", then label or labels, and perhaps split" if labelled else "")
        raise _wrong_columns(shown, columns, missing, expected)
    if group_by is not None and group_by not in columns:
        raise _wrong_columns(shown, columns, [(group_by,)], f"{show_path(group_by)} to group by")
    read = []
    for number, cells in enumerate(rows, start=1):
        paths: dict[str, str] = {name: cell for name, column in path_columns.items() if (cell := cells.get(column))}
        label, group = cells.get(label_column or ""), cells.get(group_by or "")
        if not all(isinstance(path, str) for path in paths.values()):
            raise DataError(f"{shown}: row {number} has a path that is not text")
        if labelled and label is None:
            raise DataError(f"{shown}: row {number} has no {label_column}")
        own = split
        if beside is not None:
            paths = {name: os.path.normpath(os.path.join(beside, path)) for name, path in paths.items()}
            own = next((folder for path in paths.values() if (folder := top_split(path))), split)
        own = str(cells.get("split") or own).lower()
        if own not in SPLIT_NAMES:
            raise DataError(f"{shown}: row {number} has split {show_path(own)}, expected train, val or test")
        several = label if isinstance(label, list) else re.split(r"[;,|]", str(label or ""))
        labels = [str(each).strip() for each in several] if label_column == "labels" else [str(label or "")]
        named, only = tuple(filter(None, labels)), paths.pop("", "")
        read.append(Row(only, paths, SPLIT_NAMES[own], named, "" if group is None else str(group)))
    return read, label_column == "labels"


def _cells_in(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the cells of each row of a manifest by column."""
    shown, suffix = show_path(path), Path(path).suffix.lower()
    with Source(os.fspath(path)).open(Limits(file_bytes=MAX_MANIFEST_BYTES)) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise DataError(f"{shown}: UTF-16, expected UTF-8")
    try:
        return MANIFESTS[suffix](text)
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{shown}: not a {suffix} manifest: {error}") from error


def top_split(path: str) -> str | None:
    """Return the split that the first folder of a path names, or None for another name."""
    return SPLIT_NAMES.get(Path(path).parts[0].lower()) if path else None


def _path_columns(columns: list[str]) -> dict[str, str]:
    """Return the column of each modality, or the column of paths under ""; empty if the manifest has both."""
    by_modality = {kind: name for name in columns if (kind := name.removesuffix(BESIDE)) in preprocess.names()}
    paths = [name for name in PATH_COLUMNS if name in columns]
    if paths and by_modality:
        return {}
    return {"": paths[0]} if paths else by_modality


def _wrong_columns(shown: str, columns: list[str], missing: Iterable[Sequence[str]], expected: str) -> ColumnError:
    """Return the error of missing columns; each has its name and similar names."""
    near = []
    for names in missing:
        ranked = sorted((difflib.SequenceMatcher(None, c.lower(), n).ratio(), c) for c in columns for n in names)
        if ranked and ranked[-1][0] >= NEAR:
            near.append(f"{show_path(ranked[-1][1])} to {show_path(names[0])}")
    present = ", ".join(map(show_path, columns)) or "none"
    advice = f"; rename {' and '.join(near)}" if near else ""
    return ColumnError(f"{shown}: columns are {present}", f"expected {expected}{advice}")


def _json_lines(text: str) -> list[dict[str, Any]]:
    rows = [parse_json(line) for line in text.split("\n") if line.strip()]  # splitlines also cuts at U+2028
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is not an object")
    return rows


def _table(text: str, delimiter: str = ",") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    for number, row in enumerate(rows, start=1):
        if None in row:  # DictReader's key for extra cells
            raise ValueError(f"row {number} has more cells than columns")
    return rows


def _path_label_lines(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.strip().rsplit(maxsplit=1)
        if len(words) == 1:
            raise ValueError(f"line {number} is {show_path(words[0])}, expected PATH LABEL")
        if words:
            rows.append({"path": words[0], "label": words[1]})
    return rows


MANIFESTS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    ".csv": _table,
    ".tsv": partial(_table, delimiter="\t"),
    ".jsonl": _json_lines,
    LINES: _path_label_lines,
}


@dataclass(frozen=True)
class File:
    """A file with known kinds. path: as named. error: why it cannot be read, if that is known."""

    path: str
    source: Source
    error: DataError | None = None

    def among(self, allowed: Container[str]) -> str | None:
        """Return the nearest allowed kind: a video may also be read for its sound."""
        return next((kind for kind in self.source.kinds if kind in allowed), None)


def looked_at(source: Source, path: str | None = None) -> File:
    """Return a source as a file with the kinds of its content; unknown content gives an error and no kinds."""
    path = source.name if path is None else path
    try:
        return File(path, detected(source))
    except DataError as error:
        return File(path, source, error)


Labels = Literal["needed", "optional", "ignored"]


@dataclass(frozen=True)
class Listing:
    """The contents of a path: rows of files, or tars of records.

    folder: the base of the rows' paths. by_stem: files of one stem may make one example. multi_label: an example may
    have several labels. notes: messages about ignored files.
    """

    rows: Iterable[Row] = ()
    tars: tuple[str, ...] = ()
    folder: str = ""
    by_stem: bool = True
    multi_label: bool = False
    notes: tuple[str, ...] = ()


def listed(path: str | os.PathLike[str], labels: Labels = "needed", group_by: str | None = None) -> Listing:
    """Return the listing of a folder, a manifest, tars of records, or one file. Every path is expanded here.

    labels: "needed": class folders (see `rows_in`) or a manifest with labels; "optional": the same, else all files of a
    folder, no records; "ignored": every file of a folder, sorted by name. group_by: a column of the manifest. Raises
    DataError for a pattern without a match, an unreadable manifest, or, if labels are needed, another file.
    """
    name = os.fspath(path)
    file = None if labels == "needed" or os.path.isdir(name) else looked_at(Source(name))
    if file is not None and file.source.kinds:  # also a table of numbers: it is a point cloud, not a manifest
        return Listing([Row(name, file=file)])
    if labels != "optional" and (tars := tar_files(name)) is not None:
        return Listing(tars=tuple(tars))
    if os.path.isdir(name):
        notes: list[str] = []
        rows, multi_label = rows_in(Path(name), notes, group_by) if labels != "ignored" else ([], False)
        cut = len(os.path.join(name, ""))
        every = (Row(each[cut:]) for each in walk_files(name)) if labels != "needed" else ()
        return Listing(rows or every, folder=name, multi_label=multi_label, notes=tuple(notes))
    if is_manifest(name, labelled=labels != "ignored") and os.path.isfile(name):
        rows, multi_label = read_manifest(name, labelled=labels == "needed", group_by=group_by)
        return Listing(rows, folder=os.path.dirname(name), by_stem=False, multi_label=multi_label)
    if file is not None:
        return Listing([Row(name, file=file)])
    fault = "no such folder" if status_of(name) is None else "neither a folder nor a manifest"
    raise DataError(f"{show_path(path)}: {fault}", f"expected a folder of class folders, or {', '.join(MANIFESTS)}")
