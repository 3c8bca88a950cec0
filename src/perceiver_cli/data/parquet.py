"""From Parquet and Arrow files to rows, as Hugging Face stores data sets: bytes of files in a column. No torch.

A row group has to be decoded whole, so a shuffled read of single rows would decode all of it for each. Instead the
bytes of every row are copied once, in order, to a temporary file, in which workers find them as in a tar.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perceiver_cli.config import DataConfig
from perceiver_cli.data.account import Account
from perceiver_cli.data.cells import as_label
from perceiver_cli.data.containers import name_of
from perceiver_cli.data.manifest import LABEL_COLUMNS, LIKE_LABEL, NEEDED, SPLIT_NAMES, ColumnError, Labels, Row
from perceiver_cli.data.members import Archive, Slice, archive_of
from perceiver_cli.data.table_files import TableFile, is_list
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import names
from perceiver_cli.preprocess.detection import looked_at
from perceiver_cli.preprocess.source import Source

SAMPLE = 64  # rows from which the kinds of columns are learnt


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are for.

    files: columns with the bytes of files, the first of each modality. label, group, split: other columns, if there are
    such. names: names of the classes, if the label is an index. several: whether a label is a list.
    """

    files: tuple[str, ...]
    label: str | None
    group: str | None
    split: str | None
    names: tuple[str, ...]
    several: bool = False

    @property
    def every(self) -> list[str]:
        """The columns that are read."""
        return list(
            dict.fromkeys(name for name in (*self.files, self.label, self.group, self.split) if name is not None)
        )


def rows_of_tables(
    paths: Sequence[str], splits: Sequence[str], labels: Labels, options: DataConfig, account: Account, notes: list[str]
) -> tuple[list[Row], bool, Archive]:
    """Return a row for each file in tables, whether labels are lists, and the temporary file with the bytes.

    splits: of the rows of each table without a column of splits. labels: see `listing.listed`. account: counts every
    cell of the columns with files. Raises DataError for damaged tables, and if labels are needed and missing.
    """
    tables = [TableFile(path) for path in paths]
    columns = _columns(tables[0], labels, options, notes)
    found: list[tuple[Row, str, tuple[int, int]]] = []

    def blocks() -> Iterator[bytes]:
        done = 0
        for table, split in zip(tables, splits, strict=True):
            for number, cells in enumerate(table.rows(_present(table, columns))):
                row = _row(f"{name_of(table.path)}/{number:06d}", cells, columns, split, labels, table, account)
                for column in columns.files:
                    path = row.path if len(columns.files) == 1 else f"{row.path}.{column}"
                    data, where = _file(cells[column], table.path)
                    account.inside += 1
                    if data is None and where is None:
                        account.pass_over("an empty cell", path)
                    elif labels in NEEDED and not row.labels:
                        account.unlabelled.add(path)
                    else:
                        found.append((row, path, (done, len(data or b"")) if where is None else (-1, 0)))
                        if where is not None:
                            places[len(found) - 1] = where
                        yield data or b""
                        done += len(data or b"")

    places: dict[int, str] = {}  # of files that a table only names
    archive = archive_of(blocks(), paths[0] if len(paths) == 1 else os.path.commonpath(paths))
    rows = []
    for number, (row, path, (at, size)) in enumerate(found):
        shown = os.path.join(os.path.dirname(paths[0]), path)
        source = Source(places[number]) if number in places else Source(shown, Slice(archive, at, size))
        rows.append(Row(path, split=row.split, labels=row.labels, group=row.group, source=source))
    return rows, columns.several, archive


def _present(table: TableFile, columns: Columns) -> list[str]:
    """Return the columns to read. Raises DataError for a table without one of them."""
    missing = [name for name in columns.every if name not in table.names]
    if missing:
        fault = f"{table.source.shown}: no column {show_path(missing[0])}"
        raise DataError(fault, f"found {', '.join(map(show_path, table.names))}")
    return columns.every


def _columns(table: TableFile, labels: Labels, options: DataConfig, notes: list[str]) -> Columns:
    """Return the columns of a table by their use. Raises DataError if there are no files, or no needed labels."""
    shown, present, held = show_path(table.path), table.names, table.held
    listed = ", ".join(map(show_path, present))
    if not held:
        raise DataError(f"{shown}: no column of bytes: columns are {listed}", f"expected some of {', '.join(names())}")
    files = _by_kind(table, held)
    if others := [name for name in held if name not in files]:
        notes.append(
            f"{shown}: {counted(len(others), 'column')} of bytes not used: {', '.join(map(show_path, others))}"
        )
    usual = (*LABEL_COLUMNS, *LIKE_LABEL, "fine_label")
    label = options.label_column or next((name for name in usual if name in present and name not in held), None)
    for name in filter(None, (options.label_column, options.group_by)):
        if name not in present:
            raise ColumnError(f"{shown}: no column {show_path(name)}", f"found {listed}")
    if label is None and labels in NEEDED:
        raise ColumnError(f"{shown}: no column of labels: columns are {listed}", "name it: --label-column COLUMN")
    split = "split" if "split" in present and "split" not in held else None
    several = label is not None and is_list(table.schema.field(label).type)
    label = label if labels != "ignored" else None
    return Columns(files, label, options.group_by, split, _class_names(table, label), several)


def _by_kind(table: TableFile, held: list[str]) -> tuple[str, ...]:
    """Return the first column of each modality, judged by the content of the first cell that has any."""
    first: dict[str, str] = {}
    for cells, _ in zip(table.rows(held), range(SAMPLE), strict=False):
        for name in held:
            data, where = _file(cells[name], table.path)
            if name not in first and (data or where):
                kinds = looked_at(Source(where) if where else Source(name, data)).source.kinds
                first[name] = kinds[0] if kinds else ""
    chosen: dict[str, str] = {}
    for name in sorted(held, key=lambda name: (name not in names(), held.index(name))):
        if kind := first.get(name):
            chosen.setdefault(kind, name)
    return tuple(name for name in held if name in chosen.values()) or tuple(held[:1])


def _class_names(table: TableFile, label: str | None) -> tuple[str, ...]:
    """Return the names of the classes of a column, which Hugging Face keeps in the schema."""
    try:
        feature: Any = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        while isinstance(feature, Mapping) and "feature" in feature:  # of a list
            feature = feature["feature"]
        feature = feature[0] if isinstance(feature, list) else feature
        return tuple(str(name) for name in feature["names"])
    except (KeyError, ValueError, TypeError, IndexError, RecursionError):
        return ()


def _file(cell: Any, table: str) -> tuple[bytes | None, str | None]:
    """Return the bytes in a cell, or the path of the file that it names, from the table's folder on."""
    path = None
    if isinstance(cell, Mapping):
        cell, path = cell.get("bytes"), cell.get("path")
    if cell is not None:
        return bytes(cell), None
    return None, os.path.join(os.path.dirname(table), path) if isinstance(path, str) and path else None


def _row(
    path: str,
    cells: Mapping[str, Any],
    columns: Columns,
    split: str,
    labels: Labels,
    table: TableFile,
    account: Account,
) -> Row:
    """Return the row of one row of a table, without its files."""
    label, split_cell, group = (
        None if column is None else cells[column] for column in (columns.label, columns.split, columns.group)
    )
    several = label if isinstance(label, list) else [label]
    named = tuple(text for each in several if (text := _label(each, columns.names, table, path)))
    own = str(split_cell or split).strip().lower()
    if own not in SPLIT_NAMES:
        raise DataError(f"{table.source.shown}: row {path} has split {show_path(own)}", "expected train, val or test")
    return Row(path, split=SPLIT_NAMES[own], labels=named, group=_label(group, (), table, path))


def _label(cell: Any, names: Sequence[str], table: TableFile, path: str) -> str:
    """Return the label or group in a cell, "" for none."""
    if isinstance(cell, int) and names and not isinstance(cell, bool):
        if cell >= len(names):
            fault = f"{table.source.shown}: row {path} has label {cell}"
            raise DataError(fault, f"the table names {counted(len(names), 'class')}")
        return names[cell] if cell >= 0 else ""  # -1 is Hugging Face's for no label
    try:
        return as_label(cell)
    except ValueError as error:
        raise DataError(
            f"{table.source.shown}: row {path} has {error} as label or group", "expected text or an index"
        ) from error
