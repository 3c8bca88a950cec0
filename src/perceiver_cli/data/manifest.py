"""From a manifest to rows: CSV, TSV, JSON, or lines of PATH LABEL. No torch."""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perceiver_cli import preprocess
from perceiver_cli.config import ANY, AUTO, NONE, REST, DataConfig
from perceiver_cli.data.cells import LINES, SUFFIXES, Cells, as_label, decoded, read_cells
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.detection import File, looked_at
from perceiver_cli.preprocess.source import HEAD_BYTES, Source
from perceiver_cli.preprocess.table import inferred

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PATH_COLUMNS = ("path", "file_name", "file", "filename", "file_path", "filepath")
LABEL_COLUMNS = ("labels", "label")
# Other usual names of a column of labels: one is read if there is no other.
LIKE_LABEL = ("class", "category", "target", "class_name", "label_name")
BESIDE = "_file_name"  # image_file_name: Hugging Face's columns for files of several modalities
# Other usual names of columns of paths, which could also hold something else: an error suggests naming them.
LIKE_PATH = (*PATH_COLUMNS, "source", "uri", "image_path", "filename_path")
NEAR = 0.7  # minimum similarity (difflib's ratio) of a column for the error to suggest it
LIKE_NOTHING = ("nan", "null", "none", "n/a", "<na>")  # what programs write for a missing value
SEVERAL = re.compile(r"[;,|]")  # separates the labels in a cell
NAMED = 5  # columns in a note
NOTHING: Mapping[str, Any] = {}  # shared by all rows without cells that are inputs or passed
EVERY = "*"  # in `pass_columns`
ID = "id"  # passed, it takes the place of an example's own id
NO_OPTIONS = DataConfig()
# What labels a command wants of a manifest. needed: of every row for training and validation; scored: rows without one
# are left out; optional: of rows that have one; ignored: none.
Labels = Literal["needed", "scored", "optional", "ignored"]
NEEDED = ("needed", "scored")


class ColumnError(DataError):
    """A manifest without a required column."""


@dataclass(frozen=True)
class Row:
    """A row of a manifest, or a file of a folder.

    path: its one file, of a modality known by content; or columns: a path by modality. A row with empty cells has
    neither. split: "train", "val" or "test". labels: class names. group: rows of one group stay in one split; "" is no
    group. file: its one file, if its content is known. source: its one file, if it is in an archive.
    cells: by modality, inputs that are cells of the row itself. passed: cells of `pass_columns`, by column.
    """

    path: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    labels: tuple[str, ...] = ()
    group: str = ""
    file: File | None = None
    source: Source | None = None
    cells: Mapping[str, Source] = field(default_factory=dict)
    passed: Mapping[str, str] = field(default_factory=lambda: NOTHING)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all its files, as named."""
        return (self.path,) if self.path else tuple(self.columns.values())

    def names(self, folder: str) -> tuple[str, ...]:
        """Return the names of its sources, at paths below a folder."""
        own = tuple(os.path.join(folder, path) for path in self.paths) if self.source is None else (self.source.name,)
        return own or tuple(source.name for source in self.cells.values())

    def looked_at(self, folder: str, wanted: str | None = None) -> File:
        """Return its one file, at a path below a folder, with the kinds of its content; see `looked_at`."""
        if self.file is not None and (self.file.source.kinds or wanted is None or not self.file.source.is_table):
            return self.file
        return looked_at(self.source or Source(os.path.join(folder, self.path)), self.path, wanted)

    def below(self, folder: str) -> Row:
        """Return the row with the folder before its paths."""
        row = self.with_paths(partial(os.path.join, folder))
        return row if row.file is None else replace(row, file=replace(row.file, path=row.path))

    def of(self, table: str) -> Row:
        """Return the row with cells that name its table: "train.csv: row 1"."""
        cells = {name: replace(source, name=f"{table}: {source.name}") for name, source in self.cells.items()}
        return replace(self, cells=cells)

    def with_paths(self, change: Callable[[str], str]) -> Row:
        """Return the row with each path changed."""
        columns = {name: change(path) for name, path in self.columns.items()}
        return replace(self, path=self.path and change(self.path), columns=columns)


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest. multi_label: an example may have several labels. notes: how its columns are used.

    unlabelled: the paths of rows that are left out because they have no label. columns: the kinds of the columns whose
    cells are inputs.
    """

    rows: list[Row]
    multi_label: bool
    notes: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Roles:
    """The columns that are read. paths: by modality, or under "" for files of any. cells: the kind of each."""

    paths: Mapping[str, str]
    label: str | None
    split: str | None
    group: str | None
    cells: Mapping[str, str] = field(default_factory=dict)
    passed: tuple[str, ...] = ()

    def note(self, columns: Sequence[str]) -> str | None:
        """Return what each of the columns is used for, None if their names say it and all are used."""
        used = [(name or ANY, column) for name, column in self.paths.items()]
        used += [(kind, column) for column, kind in self.cells.items()]
        used += [(role, str(getattr(self, role))) for role in ("label", "split", "group") if getattr(self, role)]
        known = {column for _, column in used} | {*self.passed}
        rest = [name for name in dict.fromkeys(columns) if name not in known]
        plain = (ANY, "file_name", "labels", *(role for role, _ in used), *(role + BESIDE for role, _ in used))
        if not rest and not self.cells and all(column in plain for _, column in used):
            return None
        by_role: dict[str, list[str]] = defaultdict(list)
        for role, column in used:
            by_role[role].append(column)
        note = ", ".join(f"{role} from {_listed(columns_)}" for role, columns_ in by_role.items())
        if not rest:
            return note
        return f"{note}; {counted(len(rest), 'column')} not used: {_listed(rest)}"


def is_manifest(path: str | os.PathLike[str], *, labelled: bool = True) -> bool:
    """Return whether a path has a manifest's suffix; without `labelled`, the suffix of one that needs no labels."""
    suffix = Path(path).suffix.lower()
    return suffix in SUFFIXES and (labelled or suffix != LINES)


def suffix_of_rows(data: bytes, columns: Collection[str], *, is_json: bool = False) -> str | None:
    """Return the suffix of a manifest without a name by its first bytes, None for other bytes.

    JSON begins with a bracket, and its first bytes name one of the columns, unless `is_json`: then all JSON is rows.
    The first line of a CSV names one of them.
    """
    head = ""
    with suppress(ValueError):  # UTF-16 that is none
        head = decoded(data[:HEAD_BYTES]).lstrip()
    if head.startswith(("{", "[")):
        return ".jsonl" if is_json or any(f'"{name}"' in head for name in columns) else None
    cells = {_plain(cell.strip().strip('"')) for cell in re.split(r"[,;\t|]", re.split(r"[\r\n]", head)[0])}
    return ".csv" if cells & set(map(_plain, columns)) else None


def read_manifest(
    path: str | os.PathLike[str] | Source,
    options: DataConfig = NO_OPTIONS,
    labels: Labels = "needed",
    *,
    suffix: str | None = None,
    split: str = "train",
    beside: str | None = None,
) -> Manifest:
    """Return the rows of a manifest; see `manifest_of`.

    suffix: of bytes without a name. Raises DataError for a file that contradicts its suffix, and as `manifest_of`.
    """
    source = path if isinstance(path, Source) else Source(os.fspath(path))

    def fits(columns: list[str]) -> bool:
        paths = {*_path_columns(Cells(columns, []), options).values(), *(options.columns or {})} - {REST}
        return paths <= set(columns) and (bool(paths) or options.columns is not None)

    return manifest_of(read_cells(source, fits, suffix), source.shown, options, labels, split=split, beside=beside)


def manifest_of(
    cells: Cells,
    shown: str,
    options: DataConfig = NO_OPTIONS,
    labels: Labels = "needed",
    *,
    split: str = "train",
    beside: str | None = None,
    first: int = 1,
) -> Manifest:
    """Return the rows of a manifest's cells; it is multi-label if its labels are a column `labels`, or lists.

    Columns, by `options` or by their usual names: `path`, or one for each modality (`image`, `audio`, ...), where an
    empty cell is a missing modality; `label`, or `labels` separated by ; , or | (in JSON also a list); optionally
    `split` and the option `group_by`. A text file has lines instead: a path, a blank and a label.

    shown: its name in errors. split: default of rows without a split. beside: folder of the metadata below the data
    folder; a split folder of the file's path then gives the default. first: the number of the first row. Raises
    DataError for a row without a needed label; ColumnError for missing columns, with the most similar ones.
    """
    roles = _roles(shown, cells, options, labels)
    is_several = roles.label is not None and (
        _plain(roles.label) == "labels" or any(isinstance(row.get(roles.label), list) for row in cells.rows)
    )
    beside = beside if options.root is None else None
    rows, unlabelled, left_out = [], 0, list[str]()
    inputs = _by_modality(roles.cells)
    for number, of_row in enumerate(cells.rows, start=first):
        try:
            own, passed = _inputs(of_row, inputs, number), {name: _text(of_row.get(name)) for name in roles.passed}
            row = _row(of_row, roles, is_several, split, beside, cells=own or NOTHING, passed=passed or NOTHING)
        except ValueError as error:
            raise DataError(f"{shown}: row {number} has {error}") from error
        if roles.label is not None and not row.labels and not is_several:
            if labels == "needed" and row.split != "test":
                fault = f"{shown}: row {number} has no label: its column {show_path(roles.label)} is empty"
                raise DataError(fault, "fill it in, or remove the row")
            unlabelled += 1
            if labels in ("needed", "scored"):
                left_out += row.paths or tuple(source.name for source in row.cells.values())[:1]
                continue
        rows.append(row)
    if unlabelled and not rows:
        raise DataError(f"{shown}: no row has a label: column {show_path(roles.label or '')} is empty")
    notes = [roles.note(cells.columns), *cells.notes]
    if unlabelled:
        left = ", left out" if labels in ("needed", "scored") else ""
        where = show_path(roles.label or "")
        notes.append(f"{unlabelled:,} of {counted(len(cells.rows), 'row')} without a label in {where}{left}")
    return Manifest(rows, is_several, tuple(filter(None, notes)), tuple(left_out), roles.cells)


def _row(of_row: Mapping[str, Any], roles: Roles, is_several: bool, split: str, beside: str | None, **more: Any) -> Row:
    """Return the row of these cells, and with `more` of its fields. Raises ValueError with the cell that is wrong."""
    paths: dict[str, str] = {name: cell for name, column in roles.paths.items() if (cell := of_row.get(column))}
    if not all(isinstance(path, str) for path in paths.values()):
        raise ValueError("a path that is not text")
    paths = {name: path for name, path in paths.items() if path.strip()}
    if beside is not None:
        paths = {name: os.path.normpath(os.path.join(beside, path)) for name, path in paths.items()}
        split = next((folder for path in paths.values() if (folder := top_split(path))), split)
    own = as_label(of_row.get(roles.split)).lower() if roles.split is not None else ""
    if own and own not in SPLIT_NAMES:
        raise ValueError(f"split {show_path(own)}, expected train, val or test")
    label = None if roles.label is None else of_row.get(roles.label)
    several = label if isinstance(label, list) else SEVERAL.split(as_label(label)) if is_several else [label]
    try:
        named = tuple(filter(None, map(as_label, several)))
    except ValueError as error:
        raise ValueError(f"a label that is {error}, expected text or a number") from error
    group = "" if roles.group is None else as_label(of_row.get(roles.group))
    return Row(paths.pop("", ""), paths, SPLIT_NAMES[own or split], named, group, **more)


def _by_modality(kinds: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Return the columns, with their kinds, whose cells each modality reads."""
    owners, columns = preprocess.cell_kinds() if kinds else {}, defaultdict[str, list[tuple[str, str]]](list)
    for column, kind in kinds.items():
        columns[owners[kind]].append((column, kind))
    return columns


def _inputs(cells: Mapping[str, Any], columns: Mapping[str, list[tuple[str, str]]], number: int) -> dict[str, Source]:
    """Return the inputs, by modality, that are cells of a row."""
    each = {
        name: preprocess.modality(name).of_cells([(column, kind, cells.get(column)) for column, kind in own])
        for name, own in columns.items()
    }
    return {name: Source(f"row {number}", data, (name,)) for name, data in each.items() if data is not None}


def _text(cell: Any) -> str:
    """Return a cell as text, of JSON also a list or an object."""
    return cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell)


def top_split(path: str) -> str | None:
    """Return the split that the first folder of a path names, or None for another name."""
    return SPLIT_NAMES.get(Path(path).parts[0].lower()) if path else None


def alike(classes: Iterable[str]) -> list[str]:
    """Return notes on doubtful classes: two that differ only in case or blanks, or one called "nan"."""
    looks: dict[str, dict[str, None]] = defaultdict(dict)
    for name in classes:
        look = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        looks[re.sub(r"^(-?\d+)\.0+$", r"\1", look)][name] = None
    groups = [" and ".join(map(show_path, names)) for names in looks.values() if len(names) > 1]
    notes = [f"classes that differ only in case, blanks or the like: {', '.join(groups[:NAMED])}"] if groups else []
    empty = [name for names in looks.values() for name in names if name.lower() in LIKE_NOTHING]
    return notes + ([f"{', '.join(map(show_path, empty))} is a class like any other"] if empty else [])


# ---------------------------------------------------------------- columns


def _listed(names: Sequence[str]) -> str:
    """Return the first names of columns."""
    return ", ".join(map(show_path, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _roles(shown: str, cells: Cells, options: DataConfig, labels: Labels) -> Roles:
    """Return the columns to read. Raises ColumnError for a missing one, DataError for one that stands twice."""
    columns, label = cells.columns, None
    if labels != "ignored":
        label = _column(columns, LABEL_COLUMNS, LIKE_LABEL) if options.label_column is None else options.label_column
    paths = _path_columns(cells, options)
    split = None if labels == "ignored" else _column(columns, ("split",))
    others = {*paths.values(), label, split, options.group_by}
    free = [column for column in columns if column not in others]
    inputs = _cell_columns(cells, options.columns, free, infer=not paths and labels != "ignored")
    is_named = bool(paths or inputs or options.columns)
    missing: list[tuple[str, Sequence[str]]] = [] if is_named else [("--path-column", LIKE_PATH)]
    is_needed = labels in ("needed", "scored")
    missing += [("--label-column", (*LABEL_COLUMNS, *LIKE_LABEL))] if is_needed and label is None else []
    if missing:
        kinds = ", ".join(sorted(preprocess.names()))
        expected = f"path or some of {kinds}" + (", then label or labels, and perhaps split" if is_needed else "")
        raise _wrong_columns(shown, columns, missing, expected, paths.values())
    taken = {*paths.values(), label, ANY}
    passed = [name for name in columns if name in options.pass_columns or (EVERY in options.pass_columns and name)]
    passed = [name for name in dict.fromkeys(passed) if name not in taken]
    roles = Roles(paths, label, split, options.group_by, inputs, tuple(passed))
    named = [("--path-column", column) for column in (options.path_column or {}).values()]
    if is_needed or not inputs:  # a model answers from the columns that are there
        named += [("--column", column) for column in (options.columns or {}) if column != REST]
    named += [("--label-column", label or ""), ("--group-by", options.group_by or "")]
    named += [("--pass", column) for column in options.pass_columns if column not in (EVERY, ID)]
    for option, name in named:
        if name and name not in columns:
            raise _wrong_columns(shown, columns, [(option, (name,))], f"{show_path(name)} for {option}")
    for name in filter(None, (*paths.values(), *inputs, roles.label, roles.split, roles.group)):
        if columns.count(name) > 1:
            raise DataError(f"{shown}: {columns.count(name)} columns {show_path(name)}", "rename all but one")
    return roles


def _path_columns(cells: Cells, options: DataConfig) -> dict[str, str]:
    """Return the column of each modality, or the column of paths under ""; empty if the manifest has both.

    A modality whose name is a word of tables has the column of that name only if its cells are files, and there is no
    column of paths.
    """
    wanted = options.path_column
    if wanted and ANY in wanted:
        return {"": wanted[ANY]}
    path = None if wanted else _column(cells.columns, PATH_COLUMNS)
    free = [column for column in cells.columns if column not in (options.columns or {})]
    by_modality = {}
    for kind in map(preprocess.modality, preprocess.names()):
        column = _column(free, (*(() if kind.cells else (kind.name,)), kind.name + BESIDE))
        if column and not (kind.is_common_word and (path or not _are_files(cells, column, kind.suffixes))):
            by_modality[kind.name] = column
    by_modality |= wanted or {}
    if path and by_modality:
        return {}
    return {"": path} if path else by_modality


def _are_files(cells: Cells, column: str, suffixes: Collection[str]) -> bool:
    """Return whether half of the cells of a column that are not empty are names of files with these suffixes."""
    names = [name for row in cells.rows if (name := _text(row.get(column)).strip())]
    return 2 * sum(os.path.splitext(name)[1].lower() in suffixes for name in names) >= len(names)


def _cell_columns(
    cells: Cells, wanted: Mapping[str, str] | None, free: Sequence[str], *, infer: bool
) -> dict[str, str]:
    """Return the kind of each column whose cells are inputs: as `wanted`, or, to `infer`, of all that are `free`."""
    kinds = dict(wanted or ({REST: AUTO} if infer else {}))
    kinds = {column: kinds.get(column, kinds.get(REST, NONE)) for column in dict.fromkeys([*kinds, *free])}
    inputs = {}
    for column, kind in kinds.items():
        found = inferred(column, [row.get(column) for row in cells.rows]) if kind == AUTO else kind
        if column in cells.columns and found not in (None, NONE):
            inputs[column] = str(found)
    return inputs


def _column(columns: Iterable[str], names: Sequence[str], others: Sequence[str] = ()) -> str | None:
    """Return the column of the first of `names`, else the only column of `others`, else None."""
    columns = list(dict.fromkeys(columns))
    for name in names:
        own = [column for column in columns if _plain(column) == name]
        if own:
            return name if name in own else own[0]
    found = [column for column in columns if _plain(column) in others]
    return found[0] if len(found) == 1 else None


def _plain(column: str) -> str:
    """Return a column's name as programs write it: "File Name" is file_name."""
    return re.sub(r"[\s_-]+", "_", column.strip().lower())


def _wrong_columns(
    shown: str,
    columns: list[str],
    missing: Iterable[tuple[str, Sequence[str]]],
    expected: str,
    taken: Collection[str] = (),
) -> ColumnError:
    """Return the error of missing columns: each has the option that names it, its name and similar names.

    taken: columns with another use, which are not suggested.
    """
    near = []
    free = [column for column in columns if column not in taken]
    for option, names in missing:
        ratios = {c: max(difflib.SequenceMatcher(None, _plain(c), n).ratio() for n in names) for c in free}
        nearest = [column for column, ratio in ratios.items() if ratio == max(ratios.values()) >= NEAR]
        near.append(f"{option} {' or '.join(map(show_path, nearest)) or 'NAME'}")
    present = ", ".join(map(show_path, columns)) or "none"
    advice = f"; perhaps {' '.join(near)}"
    if any(re.search(r"\w\.[a-z]\w{1,4}$", column.lower()) for column in columns):  # x.png
        advice = "; is the first line a header? It must name the columns"
    return ColumnError(f"{shown}: columns are {present}", f"expected {expected}{advice}")
