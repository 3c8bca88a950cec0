"""Which files make one example: the modalities that belong together, and the files of one stem. No torch."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from perceiver_cli.data.examples import Example
from perceiver_cli.data.manifest import Row
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess import modality, with_time
from perceiver_cli.preprocess.detection import File, looked_at
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

Labelled = list[tuple[Example, Row]]  # examples still without labels, each with the row of its labels
PROBES = 64  # files of a data set that are opened to learn about all
TABLE = "a table of numbers beside a file of the same stem"  # why one is passed over
TABLES_OF = "points"  # the modality of tables beside media, if the user joins them
FOR_TABLES = 10  # tables of numbers that weigh as much as a picture when a folder holds both
MOST = 0.5  # a kind is read if this share of its files has a partner; sound is read if this share of videos has it


def stem(path: str) -> str:
    """Return a path without its last suffix."""
    return os.path.splitext(path)[0]


def identity(paths: Iterable[str]) -> str:
    """Return the id of an example: the path of its one file, the stem that its files share, else all paths.

    It has slashes on any system, so that the same data is split in the same way.
    """
    each = sorted({path.replace(os.sep, "/") for path in paths})
    stems = {stem(path) for path in each}
    return each[0] if len(each) == 1 else stems.pop() if len(stems) == 1 else "+".join(each)


def tables_beside(files: Iterable[File], allowed: Container[str] | None, pair: str) -> set[str]:
    """Return the paths of tables of numbers that lie beside media of the same stem, in the modalities `allowed`.

    Boxes (a.txt beside a.jpg), landmarks and tracks of pitch look like point clouds, and give the class away: they are
    inputs only if `pair` is "all".
    """
    if pair == "all":
        return set()
    every = list(files)
    known = [file for file in every if (file.source.kinds if allowed is None else file.among(allowed))]
    media = {name for file in known if not file.source.is_table for name in (stem(file.path), file.path)}
    tables = every if allowed is None or TABLES_OF in allowed else known
    return {file.path for file in tables if file.source.is_table and stem(file.path) in media}


def as_points(file: File) -> File:
    """Return a table of numbers of no modality as points, another file as it is."""
    if file.source.kinds or not file.source.is_table:
        return file
    return looked_at(replace(file.source, is_table=False), file.path, TABLES_OF)


def companions(files: Iterable[File], *, by_stem: bool) -> set[str]:
    """Return the most common kind and, `by_stem`, each kind of which most files share their stem with one of those.

    Tables of numbers, which may be something else than a cloud, must be ten times as many as media to come first.
    """
    paths: dict[str, list[str]] = defaultdict(list)
    weight: Counter[str] = Counter()
    for file in files:
        if file.source.kinds:
            paths[file.source.kinds[0]].append(file.path)
            weight[file.source.kinds[0]] += 1 if file.source.is_table else FOR_TABLES
    ranked = sorted(paths, key=lambda kind: (-weight[kind], kind))
    chosen = set(ranked[:1])
    stems = {stem(path) for kind in chosen for path in paths[kind]}
    for kind in ranked[1:] if by_stem else ():
        own = {stem(path) for path in paths[kind]}
        if len(own & stems) >= MOST * len(own):
            chosen.add(kind)
            stems |= own
    return chosen


def streams(videos: Sequence[File]) -> dict[str, float]:
    """Return the shares of a sample of videos with picture and with sound, without shares of 0."""
    counts: Counter[str] = Counter()
    sample = videos[:: max(1, len(videos) // PROBES)][:PROBES]
    for file in sample:
        for name in ("audio", "video"):
            with suppress(DataError):
                with_time(name).duration_s(file.source, Limits())
                counts[name] += 1
    return {name: count / len(sample) for name, count in counts.items()}


def assemble(files: Sequence[File], allowed: Container[str]) -> tuple[dict[str, File], File | None]:
    """Return the file of each allowed modality among files of one stem, and a second file of one kind, if any."""
    by_kind: dict[str, File] = {}
    spare = None
    # A dedicated file comes first: x.wav wins over the soundtrack of x.mp4.
    for file in sorted(files, key=lambda file: file.among(allowed) != file.source.kinds[0]):
        kind = file.among(allowed)
        if kind in by_kind and kind == file.source.kinds[0]:
            spare = file
        elif kind is not None:
            by_kind.setdefault(kind, file)
    return by_kind, spare


def sources_of(by_kind: Mapping[str, File], brings: Container[str]) -> dict[str, Source]:
    """Return the source of each modality in `brings`, sorted; a video brings its sound unless another file does."""
    sources = {kind: file.source for kind, file in by_kind.items()}
    for kind, file in by_kind.items():
        for inside in modality(kind).contains:
            sources.setdefault(inside, file.source)
    return {name: sources[name] for name in sorted(sources) if name in brings}


def with_cells(
    examples: Labelled, holds: set[str], brings: set[str], rows: Iterable[Row], reads: set[str] | None
) -> tuple[Labelled, set[str], set[str]]:
    """Return examples with the cells of their rows as inputs too, the modalities in the data, and those of examples.

    A row without files makes an example of its cells. Rows with the same files and other cells get numbers.
    """
    alone = [(Example(next(iter(row.cells.values())).name, {}), row) for row in rows if row.cells and not row.paths]
    held = {name for _, row in (*examples, *alone) for name in row.cells}
    read = held if reads is None else held & reads

    if not read:
        return examples, holds, brings
    every, ids = [], Counter[str]()
    for example, row in (*examples, *alone):
        cells = {name: source for name, source in row.cells.items() if name in read}
        name = numbered(example.id, ids)
        if example.sources or example.error or cells:
            every.append((replace(example, id=name, sources={**example.sources, **cells}), row))
    return every, holds | held, brings | read


def numbered(name: str, names: Counter[str]) -> str:
    """Return the id of one more row of a name, which is counted: "a.png", then "a.png (2)"."""
    names[name] += 1
    return f"{name} ({names[name]})" if names[name] > 1 else name


def either(names: Iterable[str]) -> str:
    """Return names for a message, such as "audio or video"."""
    return " or ".join(sorted(names))
