"""From a path to rows, or to tars of records. No torch."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from perceiver_cli.config import DataConfig, load_config
from perceiver_cli.data.account import Account
from perceiver_cli.data.archives import Contents, contents_of_stream, opened, unpacked
from perceiver_cli.data.cells import MAX_MANIFEST_BYTES, SUFFIXES
from perceiver_cli.data.containers import check_foreign, containers, count_containers, kind_of_stream, splits_of
from perceiver_cli.data.folders import has_metadata, rows_in, rows_with_metadata, walk
from perceiver_cli.data.manifest import (
    LABEL_COLUMNS,
    LIKE_LABEL,
    NEEDED,
    NO_OPTIONS,
    PATH_COLUMNS,
    ColumnError,
    Labels,
    Row,
    is_manifest,
    read_manifest,
    suffix_of_rows,
)
from perceiver_cli.data.parquet import rows_of_tables
from perceiver_cli.data.paths import located
from perceiver_cli.data.table_files import holds_files
from perceiver_cli.data.webdataset import rows_of
from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.files import NAMED_PIPE, show_path, status_of
from perceiver_cli.preprocess.detection import looked_at
from perceiver_cli.preprocess.source import Source, received
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.stream import is_tar
from perceiver_cli.run_folder import CONFIG_FILE

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The contents of a path: rows of files, or tars of records.

    folder: the base of the rows' paths. by_stem: files of one stem may make one example, as `pair` of the configuration
    says. multi_label: an example may have several labels. columns: the kinds of a manifest's columns whose cells are
    inputs. notes: messages for the user. account: of the paths without a row; it grows while the rows are taken.
    """

    rows: Iterable[Row] = ()
    tars: tuple[str, ...] = ()
    folder: str = ""
    by_stem: bool = True
    pair: str = "media"
    multi_label: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    account: Account = field(default_factory=Account)


def fitting(read: Callable[[DataConfig], T], options: Sequence[DataConfig]) -> T:
    """Return `read(options)` for the first options whose columns the manifest has, else for the last."""
    for each in options[:-1]:
        with suppress(ColumnError):
            return read(each)
    return read(options[-1])


def data_of_run(model: Path) -> DataConfig | None:
    """Return the data options of the run that wrote a model file, None for a file without its run folder."""
    try:
        return load_config(model.parent / CONFIG_FILE).data
    except UsageError:
        return None


def ways_to_read(
    run: DataConfig | None, trained: DataConfig, given: Mapping[str, Any], path: str | os.PathLike[str] | None
) -> tuple[DataConfig, DataConfig]:
    """Return two ways to read data at a path: as in training; by usual names, if its manifest lacks those columns.

    run: see `data_of_run`; its root is for the manifest of training alone. trained: how the model's data was read.
    given: the user's options, which win over both.
    """
    named: dict[str, Any] = {"label_column": trained.label_column, "path_column": trained.path_column}
    if path is not None and run is not None and run.path == os.path.abspath(path):
        named["root"] = run.root
    usual = DataConfig(**{"pair": trained.pair, "columns": trained.columns, **given})
    return usual.model_copy(update={**named, **given}), usual


def listed(
    path: str | os.PathLike[str],
    labels: Labels = "needed",
    options: DataConfig = NO_OPTIONS,
    wanted: str | None = None,
) -> Listing:
    """Return the listing of a folder, a manifest, tars of records, or one file. Every path is expanded here.

    labels: "needed", "scored": class folders (see `rows_in`) or a manifest with labels; "optional": the same, else all
    files of a folder, no records; "ignored": every file of a folder, sorted by name. options: columns of a manifest,
    its root, and what makes pairs. wanted: see `looked_at`. Raises DataError for a pattern without a match, an
    unreadable manifest, or, if labels are needed, another file.
    """
    name = os.fspath(path)
    is_pattern = glob.has_magic(name) and "{" not in name and not os.path.lexists(name)
    if is_pattern and (files := _matched(name, labels, wanted)) is not None:
        return files
    is_data = labels in NEEDED or os.path.isdir(name)
    file = None if is_data else looked_at(Source(name), None, wanted)
    if file is not None and file.source.kinds:  # also a table of numbers: it is a point cloud, not a manifest
        return Listing([Row(name, file=file)], account=Account(paths=1))
    found = containers(name)
    if found is not None and found[0] == "tables" and _is_input(found[1][0], wanted):
        found = None  # a folder of inputs, of which each is a table of its own
    if found is not None and (labels != "optional" or found[0] != "records"):
        return _of_containers(name, *found, labels, options)
    if os.path.isdir(name):
        check_foreign(name, wanted)
        return _of_folder(name, labels, options)
    if is_manifest(name, labelled=labels != "ignored") and os.path.isfile(name):
        return _of_manifest(Source(name), labels, options)
    if file is not None:
        return Listing([Row(name, file=file)], account=Account(paths=1))
    check_foreign(name, wanted)
    status = status_of(name)
    if status is not None and stat.S_ISFIFO(status.st_mode):
        raise DataError(f"{show_path(path)}: {NAMED_PIPE}")
    fault = "no such folder" if status is None else "neither a folder nor a manifest"
    raise DataError(f"{show_path(path)}: {fault}", f"expected a folder of class folders, or {', '.join(SUFFIXES)}")


def _is_input(table: str, wanted: str | None) -> bool:
    """Return whether a table is itself an input of the wanted modality, not a container of files."""
    if wanted is None or not looked_at(Source(table), None, wanted).source.kinds:
        return False
    try:
        return not holds_files(table)
    except DataError:  # a damaged one
        return True


def _of_manifest(source: Source, labels: Labels, options: DataConfig) -> Listing:
    """Return the listing of a manifest; paths are relative to its folder, or to the current one if it is in no file."""
    read = read_manifest(source, options, labels)
    folder = os.path.dirname(source.name) if options.root is None else options.root
    rows, notes = located(read.rows, folder, source.shown, labels)
    account = Account(paths=sum(len(set(row.paths)) or 1 for row in rows) + len(read.unlabelled))
    for path in read.unlabelled:
        account.unlabelled.add(path)
    return Listing(
        rows, folder=folder, by_stem=False, multi_label=read.multi_label, columns=read.columns,
        notes=(*read.notes, *notes), account=account,
    )  # fmt: skip


class Stdin:
    """Labelled data on stdin. It is read once, however often it is listed: with other columns if the first fail."""

    @cached_property
    def begun(self) -> tuple[bytes, BinaryIO]:
        """The first bytes, and the stream from its start, uncompressed."""
        return unpacked(os.fdopen(0, "rb", closefd=False), "stdin")

    @cached_property
    def _rest(self) -> bytes:
        return received(self.begun[1], Limits(file_bytes=MAX_MANIFEST_BYTES))

    def listing(self, labels: Labels, options: DataConfig) -> Listing | None:
        """Return the listing of an archive or a manifest, None for records and what else there is."""
        head, stream = self.begun
        if kind_of_stream(head) == "archives":
            return listed_stream(stream, "stdin", labels, options)
        columns = {*PATH_COLUMNS, *LABEL_COLUMNS, *LIKE_LABEL, *(options.path_column or {}).values()}
        columns |= {*(options.columns or {}), *([options.label_column] if options.label_column else [])}
        suffix = None if is_tar(head) else suffix_of_rows(head, columns)
        return None if suffix is None else _of_manifest(Source(f"stdin{suffix}", self._rest), labels, options)


def _matched(pattern: str, labels: Labels, wanted: str | None) -> Listing | None:
    """Return the files that a pattern stands for, which no shell has expanded, or None if they are no media.

    Raises DataError if there are none, or if labels are needed: a pattern gives none.
    """
    matches = sorted(glob.glob(pattern))
    if not matches:
        fault = f"{show_path(pattern)}: no file matches this pattern"
        raise DataError(fault, "expected files, a folder, a manifest or tars of records")
    if not looked_at(Source(matches[0]), None, wanted).source.kinds:
        return None
    if labels in NEEDED:
        fault = f"{show_path(pattern)}: {counted(len(matches), 'file')} without labels, such as {show_path(matches[0])}"
        raise DataError(fault, "expected a folder of class folders, a manifest or tars of records")
    rows = [Row(name, file=looked_at(Source(name), None, wanted)) for name in matches]
    return Listing(rows, account=Account(paths=len(rows)))


def _of_containers(name: str, kind: str, paths: list[str], labels: Labels, options: DataConfig) -> Listing:
    """Return the listing of containers at a path."""
    account = Account()
    count_containers(name, paths, account)
    if kind == "records":
        return Listing(tars=tuple(paths), account=account)
    if kind == "tables":
        notes: list[str] = []
        rows, several, archive = rows_of_tables(paths, splits_of(paths), labels, options, account, notes)
        notes += [archive.note] if archive.note else []
        return Listing(rows, folder="", multi_label=several, notes=tuple(notes), account=account)
    return _of_archives(list(map(opened, paths)), name if paths == [name] else "", labels, options, account)


def listed_stream(file: BinaryIO, name: str, labels: Labels = "needed", options: DataConfig = NO_OPTIONS) -> Listing:
    """Return the listing of a tar or zip that arrives in a stream, which is copied; see `listed`."""
    return _of_archives([contents_of_stream(file, name)], name, labels, options, Account())


def _of_archives(
    each: Sequence[Contents], folder: str, labels: Labels, options: DataConfig, account: Account
) -> Listing:
    notes = [note for contents in each if (note := contents.archive.note)]
    rows, several = rows_of(each, labels, options, account, notes)
    return Listing(rows, folder=folder, multi_label=several, notes=tuple(notes), account=account)


def _of_folder(name: str, labels: Labels, options: DataConfig) -> Listing:
    """Return the listing of a folder: its labelled files or, unless labels are needed, all of its files."""
    notes: list[str] = []
    account = Account()
    if labels != "ignored":
        read = rows_in(Path(name), account, notes, options, labels)
        if read.rows or labels != "optional":
            folder = options.root or name
            return Listing(
                read.rows, folder=folder, pair=options.pair, multi_label=read.multi_label, columns=read.columns,
                notes=tuple(notes), account=account,
            )  # fmt: skip
        account = Account()
    files = (path for path, is_folder in walk(name, account) if not is_folder)
    if labels == "ignored" and has_metadata(name):
        return Listing(rows_with_metadata(Path(name), list(files), account, options), folder=name, account=account)
    every = map(Row, files)
    return Listing(every, folder=name, pair=options.pair, account=account)
