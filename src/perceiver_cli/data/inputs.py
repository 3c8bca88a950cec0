"""From paths, bytes and pipes to examples, and from an example's sources to inputs ready to decode. No torch.

An `Input` is one modality of an example: an encoded file, or a stored array of a record or of a byte array's file. Both
have the same few methods, so that no caller distinguishes them.
"""

from __future__ import annotations

import codecs
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from typing import BinaryIO, ClassVar

from perceiver_cli.config import REST, DataConfig
from perceiver_cli.data.account import Account
from perceiver_cli.data.archives import unpacked
from perceiver_cli.data.cells import MAX_MANIFEST_BYTES, cells_of_line
from perceiver_cli.data.containers import kind_of_stream
from perceiver_cli.data.examples import PAUSE, Example, passed_on
from perceiver_cli.data.folders import of_suffix, suffix_of
from perceiver_cli.data.listing import Listing, fitting, listed, listed_stream
from perceiver_cli.data.manifest import (
    NO_OPTIONS,
    PATH_COLUMNS,
    ColumnError,
    Manifest,
    Row,
    is_manifest,
    manifest_of,
    read_manifest,
    suffix_of_rows,
)
from perceiver_cli.data.pairing import (
    TABLE,
    as_points,
    assemble,
    either,
    identity,
    numbered,
    sources_of,
    stem,
    tables_beside,
)
from perceiver_cli.errors import DataError
from perceiver_cli.files import is_idle, show_path
from perceiver_cli.preprocess import modality, with_time
from perceiver_cli.preprocess.base import Array, ByteArray, Span
from perceiver_cli.preprocess.detection import File, detected, looked_at, only, other_kind
from perceiver_cli.preprocess.live_sound import SOUND, Live, Raw, live
from perceiver_cli.preprocess.source import Source, received
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.records.byte_arrays import is_byte_array, stored_rows
from perceiver_cli.records.format import HEAD_BYTES, Stored
from perceiver_cli.records.shards import UNLIMITED
from perceiver_cli.records.stream import Feed, is_tar, read_records

READ_BYTES = 1 << 20  # per read


@dataclass(frozen=True)
class Encoded:
    """An encoded file, or its bytes. seconds: the length on its time axis, None without one."""

    source: Source
    spec: InputSpec
    limits: Limits
    seconds: float | None = None
    is_prepared: ClassVar[bool] = False  # crops and augmentation are still to do

    @property
    def origin(self) -> str:
        """A name for the bytes of `content`."""
        return self.source.name

    def array(self, span: Span | None = None) -> Array:
        """Return the decoded array, or a span of it. Raises DataError."""
        if span is None:
            return modality(self.spec.modality).load(self.source, self.spec, self.limits)
        return with_time(self.spec.modality).load(self.source, self.spec, self.limits, span)

    def windows(self, window_s: float, hop_s: float) -> Iterator[tuple[float, Array]]:
        """Yield (start in seconds, decoded array) of each window; see `TimedModality.windows`."""
        return with_time(self.spec.modality).windows(self.source, self.spec, self.limits, window_s, hop_s)

    def prepared(self) -> ByteArray:
        raise TypeError(f"{self.source.shown}: an encoded file is not prepared")

    def content(self) -> Iterator[bytes]:
        """Yield the bytes of the file."""
        with self.source.open(self.limits) as file:
            while block := file.read(READ_BYTES):
                yield block


Input = Encoded | Stored


def opened(source: Source | Stored, spec: InputSpec, limits: Limits) -> Input:
    """Return a source as an Input. Raises DataError for an unreadable file, another modality or preparation."""
    if isinstance(source, Stored):
        return source
    source = detected(source, spec.modality)
    if source.holds_rows or is_byte_array(source, spec):
        return stored_rows(source, spec.modality, spec, limits)
    if spec.modality not in source.kinds:
        raise other_kind(source, spec.modality)
    return Encoded(source, spec, limits)


@dataclass(frozen=True)
class Pipe:
    """A pipe with a stream of records, or with the bytes of one file; the name is the file's.

    raw: the form of its samples, if it is sound without a header. is_live: its sound is read while it arrives.
    """

    name: str
    file: BinaryIO
    raw: Raw | None = None
    is_live: bool = False


Part = str | os.PathLike[str] | bytes | Source
Named = Part | Mapping[str, Part] | Pipe | Example  # a mapping has a part for each modality


def source_of(part: Part) -> Source:
    """Return a path or bytes as a Source."""
    if isinstance(part, Source):
        return part
    return Source("-", part) if isinstance(part, bytes) else Source(os.fspath(part))


def examples_of(
    named: Named,
    reads: Mapping[str, InputSpec],
    limits: Limits,
    use: Collection[str] | None = None,
    account: Account | None = None,
    options: Sequence[DataConfig] = (NO_OPTIONS,),
) -> Iterator[Example]:
    """Yield the examples to predict, without labels; an unreadable input is an example with an error.

    named: a path or bytes, a mapping of these by modality, a pipe, or an example. A folder stands for the files below
    it (for a model of several modalities, files of one stem make one example), a manifest for its rows, tars for their
    records. reads: the model's inputs. use: the inputs to answer from, all if unset. account: gets the paths that are
    no examples. options: how to read a manifest or a folder, see `fitting`. Raises DataError for an unreadable
    manifest, a folder without a usable file or records not prepared as in `reads`, IntegrityError for damaged records.
    """
    use = [*reads] if use is None else use
    account = Account() if account is None else account
    listing = Listing()
    if isinstance(named, str | os.PathLike):
        path = named
        listing = fitting(lambda each: listed(path, "ignored", each, only(use)), options)
    is_empty = listing.folder != ""
    for example in _listing_examples(listing, [*reads], use):
        is_empty = False
        yield example
    if is_empty:
        found = "; ".join(listing.account.brief())
        raise DataError(f"{show_path(listing.folder)}: nothing to predict: {found}", f"expected {either(reads)}")
    account.add(listing.account)
    for example in chain(
        _held_examples(named, reads, limits, use, options),
        _tar_examples(listing.tars, reads, limits, use, options[-1].pass_columns),
    ):
        account.paths += 0 if example is PAUSE else len(example.files)
        yield example


def _held_examples(
    named: Named, reads: Mapping[str, InputSpec], limits: Limits, use: Collection[str], options: Sequence[DataConfig]
) -> Iterator[Example]:
    """Yield the examples of an input that is not a path: one, or one for each record of a pipe."""
    if isinstance(named, Example):
        yield named
    elif isinstance(named, Mapping):
        sources = {name: source_of(part) for name, part in named.items()}
        yield Example(identity(source.name for source in sources.values()), sources)
    elif isinstance(named, Pipe) and named.raw is not None:
        if named.is_live:
            source = Source(named.name, Live(named.file, named.raw), (SOUND,))
        else:
            source = Source(named.name, named.raw.as_wav(received(named.file, limits)), (SOUND,))
        yield _file_example(File(named.name, source), use)
    elif (
        isinstance(named, Pipe) and isinstance(named.file, io.BufferedReader) and _is_lines_of_rows(named.file, options)
    ):
        yield from _Rows([*reads], use, options).of_lines(named.file)
    elif isinstance(named, Pipe):
        head, stream = unpacked(named.file, named.name)
        hears = named.is_live and SOUND in use and "video" not in use
        if hears and (sound := live(stream, head, named.name)) is not None:
            yield _file_example(File(named.name, Source(named.name, sound, (SOUND,))), use)
            return
        kind = kind_of_stream(head)
        if kind == "records" or (kind is None and is_tar(head)):  # damaged ones too
            feed = Feed(stream, show_path("stdin"))
            yield from _stream_examples(feed, reads, limits, use, options[-1].pass_columns)
        elif kind == "archives":
            yield from _listing_examples(listed_stream(stream, named.name, "ignored"), [*reads], use)
        else:
            source = Source(named.name, received(stream, limits))
            if (suffix := _suffix_of_rows(source, options)) is not None:
                yield from _Rows([*reads], use, options).of_source(replace(source, name="stdin"), suffix)
            else:
                file = piped(source, only(use))
                if file.error is not None and options[0].columns:
                    expected = f"expected JSON lines, or a CSV whose first line names {_some(options[0].columns)}"
                    file = replace(file, error=DataError(f"{source.shown}: no rows", expected))
                yield _file_example(file, use)
    elif isinstance(named, Source) and (suffix := _suffix_of_rows(named, options)) is not None:
        yield from _Rows([*reads], use, options).of_source(named, suffix)
    elif isinstance(named, bytes | Source):
        yield _file_example(looked_at(source_of(named), None, only(use)), use)
    elif not isinstance(named, str | os.PathLike):  # whose examples are listed
        raise TypeError(f"an input is a path, bytes, or a mapping of these by modality; found {type(named).__name__}")


def _some(columns: Collection[str]) -> str:
    """Return the names of columns in words."""
    return " or ".join(map(show_path, columns))


def _suffix_of_rows(source: Source, options: Sequence[DataConfig]) -> str | None:
    """Return the suffix of a manifest in bytes, None if the bytes are one file.

    A model that reads columns takes all JSON for rows.
    """
    columns = options[0].columns or {}
    if not isinstance(source.data, bytes):
        return None
    if columns and is_manifest(source.name, labelled=False):
        return os.path.splitext(source.name)[1]
    named = (name for each in options for name in (each.path_column or {}).values())
    return suffix_of_rows(source.data, {*PATH_COLUMNS, *named, *columns}, is_json=bool(columns))


def _is_lines_of_rows(file: io.BufferedReader, options: Sequence[DataConfig]) -> bool:
    """Return whether a pipe begins with a row as a line of JSON. Waits for its first bytes, which stay in the pipe."""
    begun = file.peek()
    first = begun.removeprefix(codecs.BOM_UTF8).split(b"\n")[0].strip()
    return first.startswith(b"{") and first != b"{" and _suffix_of_rows(Source("stdin", begun), options) is not None


@dataclass
class _Rows:
    """The rows of a manifest that is not in a file, as examples. ids: of the rows so far. Paths are relative to root.

    reads, use, options: see `examples_of`.
    """

    reads: Collection[str]
    use: Collection[str]
    options: Sequence[DataConfig]
    ids: Counter[str] = field(default_factory=Counter)

    def of_source(self, source: Source, suffix: str) -> Iterator[Example]:
        """Yield the examples of bytes in the format of a suffix."""
        yield from self._examples(lambda each: read_manifest(source, each, "ignored", suffix=suffix))

    def of_lines(self, file: io.BufferedReader) -> Iterator[Example]:
        """Yield the examples of lines of JSON as they arrive, and a PAUSE whenever the pipe is empty.

        A line that is no row is an example with an error. Raises DataError for a first line that is no row: all others
        are alike.
        """
        number, rest, is_last = 0, b"", False
        while not is_last:
            chunk = file.read1(READ_BYTES)
            is_last = not chunk
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_MANIFEST_BYTES:
                raise DataError(f"stdin: a line of more than {MAX_MANIFEST_BYTES:,} bytes", "expected a row a line")
            for line in [*lines, rest] if is_last else lines:
                if line.strip(codecs.BOM_UTF8 + b" \t\r"):
                    number += 1
                    try:
                        yield from self._of_line(line, number)
                    except DataError as error:
                        if number == 1:
                            raise
                        yield Example(f"row {number}", {}, error=str(error))
            if not is_last and is_idle(file):
                yield PAUSE

    def _of_line(self, line: bytes, number: int) -> Iterator[Example]:
        """Yield the example of a line of JSON; a column that is in other rows alone is an empty cell."""
        try:
            cells = cells_of_line(line, number)
        except (ValueError, RecursionError) as error:
            raise DataError(f"stdin: {error}", "expected an object of JSON a line") from error
        columns = {*(self.options[0].columns or {}), *(self.options[0].path_column or {}).values()} - {REST}
        if not columns.isdisjoint(cells.columns):
            cells = replace(cells, columns=[*dict.fromkeys([*cells.columns, *sorted(columns)])])
        yield from self._examples(lambda each: manifest_of(cells, "stdin", each, "ignored", first=number), number)

    def _examples(self, read: Callable[[DataConfig], Manifest], first: int = 1) -> Iterator[Example]:
        """Yield the examples of the rows that are read. first: the number of the first."""
        try:
            manifest = fitting(read, self.options)
        except ColumnError as error:
            if not self.options[0].columns:
                raise
            raise DataError(error.message, f"the model reads {_some(self.options[0].columns)}") from error
        listing = Listing(manifest.rows, folder=self.options[0].root or "", by_stem=False, columns=manifest.columns)
        yield from _listing_examples(listing, self.reads, self.use, first, self.ids)


def piped(source: Source, wanted: str | None = None) -> File:
    """Return the bytes of a pipe as a file, see `looked_at`; the error of a list of paths says how to pass it."""
    file = looked_at(source, None, wanted)
    data = source.data if isinstance(source.data, bytes) else b""
    first = re.split(rb"[\0\r\n]", data.removeprefix(codecs.BOM_UTF8)[:HEAD_BYTES], maxsplit=1)[0]
    if file.error is None or not first.strip() or not os.path.exists(first):
        return file
    fault = f"{source.shown}: a list of paths, such as {show_path(os.fsdecode(first))}, expected the bytes of one file"
    option = "--files-from - -0" if b"\0" in data else "--files-from -"
    return replace(file, error=DataError(fault, f"pass {option}"))


def _tar_examples(
    tars: Iterable[str], reads: Mapping[str, InputSpec], limits: Limits, use: Collection[str], passed: Sequence[str]
) -> Iterator[Example]:
    """Yield the examples of tars of records."""
    for tar in tars:
        with Source(tar).open(UNLIMITED) as file:
            yield from _stream_examples(Feed(file, show_path(tar)), reads, limits, use, passed)


def _file_example(file: File, use: Collection[str]) -> Example:
    """Return the example of one file, with an error if it has no modality in `use`."""
    if file.error is not None:
        return Example(file.path, {}, error=str(file.error), place=file.source.name)
    nearest = file.among(use)
    if nearest is None:
        error = str(other_kind(file.source, either(use)))
        return Example(file.path, {}, error=error, place=file.source.name)
    return Example(file.path, sources_of({nearest: file}, use))


def _row_example(row: Row, number: int, folder: str, reads: Collection[str], use: Collection[str]) -> Example:
    """Return the example of a row: of its file, of its file for each modality, or of its cells."""
    cells = {name: source for name, source in row.cells.items() if name in reads}
    if row.path:
        example = _file_example(row.looked_at(folder, only(use)), use)
    else:
        sources = {name: Source(os.path.join(folder, path)) for name, path in row.columns.items()}
        own = next(iter(row.cells.values())).name if row.cells else f"row {number}"
        example = Example(identity(row.paths) if sources else own, sources)
    return replace(example, sources={**example.sources, **cells}, passed=row.passed)


def _listing_examples(
    listing: Listing, reads: Collection[str], use: Collection[str], first: int = 1, ids: Counter[str] | None = None
) -> Iterator[Example]:
    """Yield the examples of a listing; in a folder, files of one stem make one if each is of another modality.

    first: the number of the first row. ids: of the rows before it.
    """
    is_folder = listing.by_stem and listing.folder != ""
    by_stem = is_folder and listing.pair != "none" and len(reads) > 1
    suffixes = frozenset[str]().union(*(modality(name).suffixes for name in reads))
    ids = Counter() if ids is None else ids
    rows = enumerate(listing.rows, start=first)
    for _, folder_rows in groupby(rows, key=lambda pair: os.path.dirname(pair[1].path) if by_stem else pair[0]):
        groups: dict[str, list[File]] = defaultdict(list)
        passed: dict[str, Mapping[str, str]] = {}
        for number, row in folder_rows:
            if row.cells or listing.columns or not row.path:
                example = _row_example(row, number, listing.folder, reads, use)
                is_of_cells = row.cells or listing.columns
                yield replace(example, id=numbered(example.id, ids)) if is_of_cells else example
            else:
                file = row.looked_at(listing.folder, only(use))
                file = as_points(file) if by_stem and listing.pair == "all" else file
                if is_folder and file.among(reads) is None and suffix_of(file.path) not in suffixes:
                    listing.account.pass_over(of_suffix(file), row.path)
                else:
                    groups[stem(file.path)].append(file)
                    passed[file.path] = row.passed
        tables = tables_beside(chain.from_iterable(groups.values()), reads, listing.pair) if by_stem else set()
        for path in sorted(tables):
            listing.account.pass_over(TABLE, path)
        for every in groups.values():
            files = [file for file in every if file.path not in tables]
            by_kind, spare = assemble([file for file in files if file.among(reads)], reads)
            if len(by_kind) > 1 and spare is None:
                name = identity(file.path for file in by_kind.values())
                yield Example(name, sources_of(by_kind, reads), passed=passed[every[0].path])
                files = [file for file in files if file.among(reads) is None]
            yield from (replace(_file_example(file, use), passed=passed[file.path]) for file in files)


def _stream_examples(
    feed: Feed, reads: Mapping[str, InputSpec], limits: Limits, use: Collection[str], passed: Sequence[str]
) -> Iterator[Example]:
    """Yield the examples of a stream of records as they arrive, one at a time. Raises as `examples_of`."""
    checked = None
    for header, record in read_records(feed, limits, feed.take):
        if header is not checked:
            if header.inputs and header.inputs.keys().isdisjoint(use):
                held = "+".join(sorted(header.inputs))
                raise DataError(
                    f"{feed.shown}: holds {held}, expected {either(use)}", f"pass a model of {held} with -m"
                )
            header.check(feed.shown, reads, "the model")
        checked, facts = header, record.facts
        stored = {
            name: Stored(
                facts.path, header, name, facts.seconds.get(name, 0.0), partial(bytes, npy),
                facts.digests.get(name, b""), feed.shown,
            )
            for name, npy in record.arrays.items()
        }  # fmt: skip
        columns = passed_on(facts.columns, passed)
        yield Example(facts.id, stored, error=facts.error, place=facts.path, passed=columns)


def brought(example: Example, reads: Iterable[str]) -> dict[str, Source | Stored]:
    """Return an example's sources of modalities in `reads`, sorted. Raises DataError if it is bad or has none."""
    if example.error is not None:
        raise DataError(example.error)
    wanted = set(reads)
    sources = {name: source for name, source in sorted(example.sources.items()) if name in wanted}
    if not sources:
        for source in example.sources.values():
            if isinstance(source, Source) and source.kinds and len(example.sources) == 1:
                raise other_kind(source, either(wanted))
        raise DataError(f"{show_path(example.id)}: no {either(wanted)}")
    return sources
