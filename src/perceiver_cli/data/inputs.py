"""From what was named to examples, and from an example's sources to inputs that can be decoded. No torch.

An `Input` is what an example brings of one modality. An encoded file, an array of a record and a byte array in a file
give it in the same few methods, so that nothing above asks which of them it has.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, BinaryIO, ClassVar, Protocol

from perceiver_cli.data.examples import Example
from perceiver_cli.data.listing import File, Listing, listed, looked_at
from perceiver_cli.data.pairing import assemble, either, identity, sources_of, stem
from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import modality, timed_modality
from perceiver_cli.preprocess.base import Array, ByteArray, Span, TimedModality
from perceiver_cli.preprocess.detection import detected, other_kind
from perceiver_cli.preprocess.source import Source, received
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.records.byte_arrays import stored_rows
from perceiver_cli.records.format import HEAD_BYTES, Stored
from perceiver_cli.records.shards import UNLIMITED
from perceiver_cli.records.stream import Feed, is_tar, read_records

READ_BYTES = 1 << 20  # of a file at a time


class Input(Protocol):
    """What an example brings of one modality.

    origin: what the bytes of `content` belong to. is_prepared: whether it is what the model is given already, crops and
    augmentation done. seconds: the length on its time axis, None without one.
    """

    @property
    def origin(self) -> str: ...
    @property
    def is_prepared(self) -> bool: ...
    @property
    def seconds(self) -> float | None: ...

    def array(self, span: Span | None = None) -> Array:
        """Return the decoded array, or that of a span of seconds. Raises DataError."""

    def windows(self, window_s: float, hop_s: float) -> Iterator[tuple[float, Array]]:
        """Yield (start in seconds, decoded array) of each window; see `TimedModality.windows`."""

    def prepared(self) -> ByteArray:
        """Return what the model is given, of an input that `is_prepared`. Raises DataError."""

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes that it is stored in."""


@dataclass(frozen=True)
class Encoded:
    """An encoded file, or its bytes, as an Input: decoded when it is asked for."""

    source: Source
    spec: InputSpec
    limits: Limits
    seconds: float | None = None
    is_prepared: ClassVar[bool] = False  # crops and augmentation are still to come

    @property
    def origin(self) -> str:
        return self.source.name

    def array(self, span: Span | None = None) -> Array:
        if span is None:
            return modality(self.spec.modality).load(self.source, self.spec, self.limits)
        return self._timed.load(self.source, self.spec, self.limits, span)

    def windows(self, window_s: float, hop_s: float) -> Iterator[tuple[float, Array]]:
        return self._timed.windows(self.source, self.spec, self.limits, window_s, hop_s)

    def prepared(self) -> ByteArray:
        raise TypeError(f"{self.source.shown}: an encoded file is not prepared")

    def content(self) -> Iterator[bytes]:
        with self.source.open(self.limits) as file:
            while block := file.read(READ_BYTES):
                yield block

    @property
    def _timed(self) -> TimedModality[Any]:
        timed = timed_modality(self.spec.modality)
        assert timed is not None, self.spec.modality
        return timed


def opened(source: Source | Stored, spec: InputSpec, limits: Limits) -> Input:
    """Return a source as an Input. Raises DataError if it is unreadable, of another modality or prepared otherwise."""
    if isinstance(source, Stored):
        return source
    source = detected(source, spec.modality)
    if source.holds_rows:
        return stored_rows(source, spec.modality, spec, limits)
    if spec.modality not in source.kinds:
        raise other_kind(source, spec.modality)
    return Encoded(source, spec, limits)


@dataclass(frozen=True)
class Pipe:
    """What arrives on a pipe: a stream of records, or the bytes of one file, which the name is for."""

    name: str
    file: BinaryIO


Part = str | os.PathLike[str] | bytes | Source
Named = Part | Mapping[str, Part] | Pipe | Example  # several parts: by modality


def source_of(part: Part) -> Source:
    """Return a path or bytes as a Source."""
    if isinstance(part, Source):
        return part
    return Source("-", part) if isinstance(part, bytes) else Source(os.fspath(part))


def examples_of(
    named: Named, reads: Mapping[str, InputSpec], limits: Limits, use: Collection[str] | None = None
) -> Iterator[Example]:
    """Yield the examples that are to be predicted, without labels.

    named: a path or bytes, a mapping of these by modality, a pipe, or an example. A folder stands for the files below
    it (those of one stem, each of another modality, make one example of a model of several modalities), a manifest for
    its rows, a tar, or a folder or pattern of tars, for its records. reads: the inputs of the model. use: those of them
    to answer from, all if unset. An input that cannot be read is an example with an error. Raises DataError for a
    manifest that cannot be read or records not prepared as `reads` says, IntegrityError for damaged records.
    """
    if isinstance(named, Example):
        yield named
    elif isinstance(named, Mapping):
        sources = {name: source_of(part) for name, part in named.items()}
        yield Example(identity(source.name for source in sources.values()), sources)
    elif isinstance(named, Pipe):
        head = named.file.read(HEAD_BYTES)
        if is_tar(head):
            yield from _of_stream(Feed(named.file, show_path("stdin"), head), reads, limits)
        else:
            yield from examples_of(Source(named.name, received(named.file, limits, head)), reads, limits, use)
    elif isinstance(named, bytes | Source):
        yield _of_file(looked_at(source_of(named)), [*reads] if use is None else use)
    else:
        listing = listed(named, labels="ignored")
        for tar in listing.tars:
            with Source(tar).open(UNLIMITED) as file:
                yield from _of_stream(Feed(file, show_path(tar)), reads, limits)
        yield from _of_listing(listing, [*reads], [*reads] if use is None else use)


def _of_file(file: File, use: Collection[str]) -> Example:
    """Return the example of one file, with an error where nothing of it is used."""
    if file.error is not None:
        return Example(file.path, {}, error=str(file.error))
    nearest = file.among(use)
    if nearest is None:
        return Example(file.path, {}, error=str(other_kind(file.source, either(use))))
    return Example(file.path, sources_of({nearest: file}, use))


def _of_listing(listing: Listing, reads: Collection[str], use: Collection[str]) -> Iterator[Example]:
    """Yield the examples of a listing; in a folder, files of one stem make one if each is of another modality."""
    by_stem = listing.by_stem and len(reads) > 1
    for _, rows in groupby(enumerate(listing.rows, start=1), key=lambda pair: os.path.dirname(pair[1].path)):
        groups: dict[str | int, list[File]] = defaultdict(list)
        for number, row in rows:
            if row.path:
                file = row.looked_at(listing.folder)
                # A file of a folder is called by its whole path, one of a manifest as the manifest does.
                file = replace(file, path=file.source.name) if listing.by_stem else file
                groups[stem(file.path) if by_stem else number].append(file)
            else:
                sources = {name: Source(os.path.join(listing.folder, path)) for name, path in row.columns.items()}
                yield Example(identity(row.paths) if sources else f"row {number}", sources)
        for files in groups.values():
            by_kind, spare = assemble([file for file in files if file.among(reads)], reads)
            if len(by_kind) > 1 and spare is None:
                yield Example(identity(file.path for file in by_kind.values()), sources_of(by_kind, reads))
            else:
                yield from (_of_file(file, use) for file in files)


def _of_stream(feed: Feed, reads: Mapping[str, InputSpec], limits: Limits) -> Iterator[Example]:
    """Yield the examples of a stream of records as they arrive; no more than one is held. Raises as `examples_of`."""
    checked = None
    for header, record in read_records(feed, limits, feed.take):
        if header is not checked:
            header.check(feed.shown, reads, "the model")
        checked = header
        facts = record.facts
        stored = {
            name: Stored(facts.path, header, name, facts.seconds.get(name, 0.0), partial(bytes, npy))
            for name, npy in record.arrays.items()
        }
        yield Example(facts.path, stored, error=facts.error)


def brought(example: Example, reads: Iterable[str]) -> dict[str, Source | Stored]:
    """Return the sources that an example brings of `reads`, sorted. Raises DataError if it is bad or brings none."""
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
