"""From the paths that were named to examples."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from perceiver_cli.data.catalog import Catalog, of_rows
from perceiver_cli.data.examples import Example
from perceiver_cli.data.listing import CONTENT, Row, is_manifest, read_manifest, rows_in, walk_files
from perceiver_cli.data.pairing import File, assemble, either, identity, look, sources_of, stem, streams
from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import candidates
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.records.format import Stored, Unread
from perceiver_cli.records.shards import UNLIMITED, tar_files
from perceiver_cli.records.stream import Feed, read_records


def of_bytes(source: Source, reads: Mapping[str, InputSpec] | None) -> Catalog:
    """Return the catalog of one input, whose bytes are at hand."""
    file = File(source.name, source, candidates(source))
    kind = file.kinds[0]
    inside = set(streams([file])) if kind == "video" and reads is None else set()
    wanted = set(reads) if reads is not None else inside or {kind}
    nearest = file.among(wanted)
    if nearest is None:
        raise DataError(f"{source.shown}: {kind} by its content, expected {either(wanted)}")
    sources = sources_of({nearest: file}, wanted)
    example = Example(source.name, sources)
    return Catalog(source.name, tuple(sources), file.kinds, (), {"train": (example,)})


def of_paths(
    paths: Sequence[str], reads: Mapping[str, InputSpec] | None, label_from_parent: bool
) -> tuple[Catalog, str, dict[str, int]]:
    """Return the catalog of files, folders and manifests, the folder of its ids, and the place of each file."""
    notes: list[str] = []
    rows: list[Row] = []
    several = False
    folder = ""
    for path in paths:
        listed = is_manifest(path) and os.path.isfile(path) and not look(path).kinds  # a cloud may be a table
        found, base = [Row({CONTENT: path})], ""
        if listed:
            found, multi_label = read_manifest(path, labelled=False)
            base, several = os.path.dirname(path), several or multi_label
        elif os.path.isdir(path):
            base = path
            found, multi_label = rows_in(Path(path), notes) if not label_from_parent else ([], False)
            several = several or multi_label
            found = found or [Row({CONTENT: os.path.relpath(file, path)}) for file in walk_files(path)]
        if label_from_parent:
            found = [replace(row, labels=(_parent(base, row),)) for row in found]
        if len(paths) == 1:
            rows, folder = found, base
        else:  # each below its own folder: only whole paths tell their files apart
            rows += [replace(row, paths={k: os.path.join(base, p) for k, p in row.paths.items()}) for row in found]
    root = paths[0] if len(paths) == 1 else f"{len(paths)} inputs"
    by_stem = not any(map(is_manifest, paths))
    catalog = of_rows(rows, root, folder, reads=reads, by_stem=by_stem, multi_label=several, notes=notes)
    places = {os.path.join(folder, p): place for place, row in enumerate(rows) for p in row.paths.values()}
    return catalog, folder, places


def _parent(base: str, row: Row) -> str:
    """Return the name of the folder that the first file of a row lies in."""
    return os.path.basename(os.path.dirname(os.path.abspath(os.path.join(base, next(iter(row.paths.values()), "")))))


# ---------------------------------------------------------------- what is to be predicted


def unlabelled(path: str, reads: Mapping[str, InputSpec], limits: Limits) -> Iterator[Example]:
    """Yield the examples that a path stands for: of a manifest one for each row, of a folder one for each file below.

    For a model that reads several modalities, files in a folder that share their stem, each of another of these, make
    one example. A tar, or a folder or pattern of tars, stands for the records in it.

    Raises:
        DataError: not a manifest, though its name ends as one's does; records that were not prepared as `reads` says.
        IntegrityError: records that are damaged or cut short.
    """
    if (tars := tar_files(path)) is not None:
        for tar in tars:
            with Source(tar).open(UNLIMITED) as file:
                yield from of_stream(Feed(file, show_path(tar)), reads, limits)
    # A cloud may be a table of numbers, too.
    elif is_manifest(path, labelled=False) and os.path.isfile(path) and not look(path).kinds:
        rows, _ = read_manifest(path, labelled=False)
        for number, row in enumerate(rows, start=1):
            sources = {name: Source(os.path.join(os.path.dirname(path), given)) for name, given in row.paths.items()}
            yield Example(identity(row.paths.values()) if sources else f"row {number}", sources)
    elif os.path.isdir(path):
        yield from _below(path, set(reads))
    else:
        yield Example(path, {CONTENT: Source(path)})


def of_stream(feed: Feed, reads: Mapping[str, InputSpec], limits: Limits) -> Iterator[Example]:
    """Yield the examples of a stream of records as they arrive; no more than one is held.

    Raises:
        DataError: no such stream, or not prepared as `reads` says. IntegrityError: damaged or cut short.
    """
    checked = None
    for header, record in read_records(feed, limits, feed.take):
        if header is not checked:
            header.check(feed.shown, reads, "the model")
            checked = header
        name, seconds, error = record.facts.path, record.facts.seconds, record.facts.error
        if error is not None:
            yield Example(name, {CONTENT: Unread(name, error=error)})
            continue
        yield Example(
            name,
            {m: Stored(name, npy, header=header, modality=m, seconds=seconds.get(m, 0.0))
             for m, npy in record.arrays.items()},
        )  # fmt: skip


def _below(folder: str, reads: set[str]) -> Iterator[Example]:
    for _, paths in groupby(walk_files(folder), key=os.path.dirname):
        groups: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            groups[stem(path) if len(reads) > 1 else path].append(path)
        for group in groups.values():
            files = [file for path in group if (file := look(path)).among(reads)] if len(group) > 1 else []
            parts, spare = assemble(files, reads)
            if len(parts) > 1 and spare is None:
                yield Example(identity(file.path for file in parts.values()), sources_of(parts, reads))
            else:
                yield from (Example(path, {CONTENT: Source(path)}) for path in group)
