"""From a manifest to rows: CSV, TSV, JSONL, or lines of PATH LABEL. No torch."""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from perceiver_cli import preprocess
from perceiver_cli.config import DataConfig
from perceiver_cli.errors import DataError
from perceiver_cli.files import parse_json, show_path
from perceiver_cli.preprocess.detection import File, looked_at
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

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
NO_OPTIONS = DataConfig()


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

    def looked_at(self, folder: str, wanted: str | None = None) -> File:
        """Return its one file, at a path below a folder, with the kinds of its content; see `looked_at`."""
        if self.file is not None and (self.file.source.kinds or wanted is None):
            return self.file
        return looked_at(Source(os.path.join(folder, self.path)), self.path, wanted)

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
    options: DataConfig = NO_OPTIONS,
    *,
    labelled: bool = True,
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
    shown, rows, group_by = show_path(path), _cells_in(path), options.group_by
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
