"""Lists of examples as files: CSV, TSV or JSONL with columns, or text with lines of PATH LABEL. No torch."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceiver_cli.config import InputSpec, Limits
from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.base import Source

CONTENT = ""  # in place of a modality's name: the content of the file decides which it belongs to
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PATH_COLUMNS = ("path", "file_name", "file", "filename")
LABEL_COLUMNS = ("labels", "label")
BESIDE = "_file_name"  # image_file_name, as Hugging Face's metadata name the files of several modalities
# What else such columns are called: not read, but named where there is no other.
LIKE_PATH = (*PATH_COLUMNS, "file_path", "source", "uri")
LIKE_LABEL = ("label", "labels", "class", "category", "target")
NEAR = 0.7  # least likeness (difflib's ratio) of a column to be named as the one that was meant
LINES = ".txt"  # of lines of PATH LABEL, as lists of Kinetics have them
MAX_MANIFEST_BYTES = 256 << 20


class ColumnError(DataError):
    """A manifest without a column that is needed."""


@dataclass(frozen=True)
class Row:
    """A row of a manifest, or a file of a folder.

    paths: as given, by modality, or one under CONTENT; none in a row whose cells are empty. split: "train", "val" or
    "test". labels: class names. group: what it shares with other rows that belong into one split; "" is itself alone.
    """

    paths: Mapping[str, str]
    split: str = "train"
    labels: tuple[str, ...] = ()
    group: str = ""


def is_manifest(path: str | os.PathLike[str], *, labelled: bool = True) -> bool:
    """Return whether a name ends as a manifest's does; without `labelled`, as one whose rows need no label."""
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
    """Return the rows of a manifest, and whether it has a column of several labels.

    Columns are `path`, or one for each modality (`image`, `audio`, ...) in which an empty cell is a missing modality;
    `label` or `labels`, which is needed only if `labelled` and holds several, separated by ; , or | (in JSONL also a
    list); and perhaps `split`. Others are not looked at, but for `group_by`, whose cells become the rows' groups. A
    text file has no columns: each line is a path and, after its last blank, a label.

    split: of rows that name none. beside: for metadata that lies with its files, their folder below that of the data;
    a row that names no split is then of the folder's that its file lies in, where that is one.

    Raises:
        DataError: not readable as its suffix says, or a row without a label. ColumnError: other columns; names them and
        the nearest to what is missing.
    """
    shown = show_path(path)
    suffix = Path(path).suffix.lower()
    with Source(os.fspath(path)).open(Limits(file_bytes=MAX_MANIFEST_BYTES)) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise DataError(f"{shown}: UTF-16, expected UTF-8")
    try:
        rows = MANIFESTS[suffix](text)
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{shown}: not a {suffix} manifest: {error}") from error
    columns = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    sources = _source_columns(columns)
    if not sources or (labelled and label_column is None):
        kinds = ", ".join(sorted(InputSpec.kinds))
        raise _wrong_columns(
            shown,
            columns,
            [like for like, found in ((LIKE_PATH, sources), (LIKE_LABEL, label_column or not labelled)) if not found],
            f"path or some of {kinds}" + (", then label or labels, and perhaps split" if labelled else ""),
        )
    if group_by is not None and group_by not in columns:
        raise _wrong_columns(shown, columns, [(group_by,)], f"{show_path(group_by)} to group by")
    found_rows = []
    for number, row in enumerate(rows, start=1):
        paths = {name: row[column] for name, column in sources.items() if row.get(column)}
        label, group = row.get(label_column or ""), row.get(group_by or "")
        if not all(isinstance(given, str) for given in paths.values()):
            raise DataError(f"{shown}: row {number} has a path that is not text")
        if labelled and label is None:
            raise DataError(f"{shown}: row {number} has no {label_column}")
        default = split
        if beside is not None:
            paths = {name: os.path.normpath(os.path.join(beside, given)) for name, given in paths.items()}
            default = next((folder for given in paths.values() if (folder := top_split(given))), split)
        named = str(row.get("split") or default).lower()
        if named not in SPLIT_NAMES:
            raise DataError(f"{shown}: row {number} has split {show_path(named)}, expected train, val or test")
        parts = label if isinstance(label, list) else re.split(r"[;,|]", str(label or ""))
        names = tuple(str(part).strip() for part in parts) if label_column == "labels" else (str(label or ""),)
        found_rows.append(
            Row(paths, SPLIT_NAMES[named], tuple(filter(None, names)), "" if group is None else str(group))
        )
    return found_rows, label_column == "labels"


def top_split(path: str) -> str | None:
    """Return the split that the first folder of a path is named after, None where it is another name."""
    return SPLIT_NAMES.get(Path(path).parts[0].lower()) if path else None


def _source_columns(columns: list[str]) -> dict[str, str]:
    """Return the column of each modality, or the one of paths under CONTENT; none where there are both or neither."""
    kinds = {kind: name for name in columns if (kind := name.removesuffix(BESIDE)) in InputSpec.kinds}
    paths = [name for name in PATH_COLUMNS if name in columns]
    if kinds and paths:
        return {}
    return kinds or ({CONTENT: paths[0]} if paths else {})


def _wrong_columns(shown: str, columns: list[str], missing: Iterable[Sequence[str]], expected: str) -> ColumnError:
    """Return the error of columns that are not the expected ones; missing: what each may look like, its name first."""
    near = []
    for names in missing:
        ranked = sorted((difflib.SequenceMatcher(None, c.lower(), n).ratio(), c) for c in columns for n in names)
        if ranked and ranked[-1][0] >= NEAR:
            near.append(f"{show_path(ranked[-1][1])} to {show_path(names[0])}")
    found = ", ".join(map(show_path, columns)) or "none"
    return ColumnError(
        f"{shown}: columns are {found}", f"expected {expected}" + (f"; rename {' and '.join(near)}" if near else "")
    )


def _json_lines(text: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines would cut at more than newlines
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is not an object")
    return rows


def _table(delimiter: str) -> Callable[[str], list[dict[str, Any]]]:
    def rows(text: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        for number, row in enumerate(found, start=1):
            if None in row:  # the reader's place for what is too much
                raise ValueError(f"row {number} has more cells than there are columns")
        return found

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
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".jsonl": _json_lines,
    LINES: _path_label_lines,
}
