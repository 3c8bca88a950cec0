"""Lists of examples as files: CSV, TSV or JSONL with a column `path`, or one for each modality. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping
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
MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """A row of a manifest, or a file of a folder.

    paths: as given, by modality, or one under CONTENT; none in a row whose cells are empty. split: "train", "val" or
    "test". labels: class names.
    """

    paths: Mapping[str, str]
    split: str = "train"
    labels: tuple[str, ...] = ()


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Return whether a name ends as a manifest's does."""
    return Path(path).suffix.lower() in MANIFESTS


def read_manifest(path: str | os.PathLike[str], *, labelled: bool = True) -> tuple[list[Row], bool]:
    """Return the rows of a manifest, and whether it has a column of several labels.

    Columns are `path`, or one for each modality (`image`, `audio`, ...) in which an empty cell is a missing modality;
    `label` or `labels`, which is needed only if `labelled` and holds several, separated by ; , or | (in JSONL also a
    list); and perhaps `split`. Others are not looked at.

    Raises:
        DataError: not readable as its suffix says, a row without a label, or other columns, which are named.
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
    columns = list(dict.fromkeys(name for row in rows for name in row))
    label_column = next((name for name in ("labels", "label") if name in columns), None)
    sources = _source_columns(columns)
    if not sources or (labelled and label_column is None):
        found = ", ".join(show_path(str(name)) for name in columns) or "none"
        kinds = ", ".join(sorted(InputSpec.kinds))
        raise DataError(
            f"{shown}: columns are {found}",
            f"expected path or some of {kinds}" + (", then label or labels, and perhaps split" if labelled else ""),
        )
    found_rows = []
    for number, row in enumerate(rows, start=1):
        paths = {name: row[column] for name, column in sources.items() if row.get(column)}
        label, split = row.get(label_column or ""), str(row.get("split") or "train").lower()
        if not all(isinstance(given, str) for given in paths.values()):
            raise DataError(f"{shown}: row {number} has a path that is not text")
        if labelled and label is None:
            raise DataError(f"{shown}: row {number} has no {label_column}")
        if split not in SPLIT_NAMES:
            raise DataError(f"{shown}: row {number} has split {show_path(split)}, expected train, val or test")
        parts = label if isinstance(label, list) else re.split(r"[;,|]", str(label or ""))
        names = tuple(str(part).strip() for part in parts) if label_column == "labels" else (str(label or ""),)
        found_rows.append(Row(paths, SPLIT_NAMES[split], tuple(filter(None, names))))
    return found_rows, label_column == "labels"


def _source_columns(columns: list[str]) -> dict[str, str]:
    """Return the column of each modality, or the one of paths under CONTENT; none where there are both or neither."""
    kinds = {name: name for name in columns if name in InputSpec.kinds}
    paths = [name for name in PATH_COLUMNS if name in columns]
    if kinds and paths:
        return {}
    return kinds or ({CONTENT: paths[0]} if paths else {})


def _json_lines(text: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is not an object")
    return rows


def _table(delimiter: str) -> Callable[[str], list[dict[str, Any]]]:
    def rows(text: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
        for number, row in enumerate(found, start=1):
            if None in row:  # the reader's place for what is too much
                raise ValueError(f"row {number} has more cells than there are columns")
        return found

    return rows


MANIFESTS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".jsonl": _json_lines,
}
