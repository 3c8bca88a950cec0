"""What a data folder or a manifest holds: examples by split and class, and what was left out and why. No torch.

Nothing is decoded here. The order of examples, the split and the classes depend on names alone, never on the order in
which a disk lists them; an example of several files is the same whether a manifest or their stem brings them together.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import InputSpec, Limits
from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.manifest import CONTENT, SPLIT_NAMES, Row, is_manifest, read_manifest
from perceiver_cli.pairing import MOST, PROBES, File, assemble, companions, identity, look, sources_of, stem, streams
from perceiver_cli.preprocess import candidates, formats, modality
from perceiver_cli.preprocess.base import Source
from perceiver_cli.shards import UNLIMITED, Shards, key_of, open_shards, spooled, tar_files
from perceiver_cli.stream import SPLITS, Feed, Header, Stored, read_records


@dataclass(frozen=True)
class Example:
    """One input, not yet read.

    id: its path below the data folder, or the stem that its files share; sources: by modality, any of which may be
    missing, or one under CONTENT; labels: class indices, one unless the data says several, none where the class is not
    known.
    """

    id: str
    sources: Mapping[str, Source]
    labels: tuple[int, ...] = ()

    @cached_property
    def key(self) -> int:
        """A number made from the id alone, for seeds and splits."""
        return key_of(self.id)


class Records(Sequence[Example]):
    """Rows of shards as examples, each made when it is asked for: a million of them take no memory.

    places: by name of a label in the shards, the class that it is, -1 for none.
    """

    def __init__(
        self, shards: Shards, rows: NDArray[np.int64], places: NDArray[np.int64], modalities: Sequence[str]
    ) -> None:
        self.shards, self.rows, self.places, self.modalities = shards, rows, places, modalities

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Records: ...
    def __getitem__(self, place: int | slice) -> Example | Records:
        if isinstance(place, slice):
            return self.chosen(self.rows[place])
        row = int(self.rows[place])
        name = self.shards.id(row)
        return Example(name, self.shards.places(row, name, self.modalities), self._labels(row))

    def chosen(self, rows: NDArray[np.int64]) -> Records:
        """Return other rows of the same shards."""
        return Records(self.shards, rows, self.places, self.modalities)

    def named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield id and labels of each example."""
        return ((self.shards.id(row), self._labels(row)) for row in self.rows.tolist())

    def _labels(self, row: int) -> tuple[int, ...]:
        found = {int(self.places[place]) for place in self.shards.label_indices(row)}
        return tuple(sorted(found - {-1}))

    def tally(self, num_classes: int) -> list[int]:
        """Return the number of examples of each class."""
        chosen = np.zeros(len(self.shards), bool)
        chosen[self.rows] = True
        flat = np.repeat(chosen, np.diff(self.shards.columns["label_ends"], prepend=0))
        found: list[int] = np.bincount(
            self.places[self.shards.columns["labels"][flat]] + 1, minlength=num_classes + 1
        ).tolist()
        return found[1:]

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the key and the first label of each example, -1 for none."""
        firsts = np.full(len(self.shards), -1)
        ends = self.shards.columns["label_ends"]
        counts = np.diff(ends, prepend=0)
        one = counts == 1
        firsts[one] = self.places[self.shards.columns["labels"][ends[one] - 1]]
        for row in np.flatnonzero(counts > 1).tolist():
            firsts[row] = next(iter(self._labels(row)), -1)
        return self.shards.columns["keys"][self.rows], firsts[self.rows]


@dataclass(frozen=True)
class Catalog:
    """What a data folder or a manifest holds: examples by split, class names in order, what was left out and why.

    modalities: sorted, those that the examples bring; holds: those that there are, asked for or not. prepared: of
    records, how their arrays were made.
    """

    root: str
    modalities: tuple[str, ...]
    holds: tuple[str, ...]
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Example]]
    bad: Mapping[str, str] = field(default_factory=dict)  # example id -> error, known without decoding
    notes: tuple[str, ...] = ()
    multi_label: bool = False  # each example may have several labels, or none
    prepared: Header | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every split, id and class: what a run was trained on."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for name, labels in _named(self.splits[split]):
                digest.update(f"{split}\0{name}\0{labels}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def counts(self, split: str) -> dict[str, int]:
        """Return the number of examples of each class in a split."""
        examples = self.splits.get(split, ())
        if isinstance(examples, Records):
            return dict(zip(self.classes, examples.tally(len(self.classes)), strict=True))
        found = Counter(label for example in examples for label in example.labels)
        return {name: found[index] for index, name in enumerate(self.classes)}

    def hold_out(self, fraction: float) -> Catalog:
        """Return the catalog with a validation split: its own, or a stratified share of train chosen by hash of id.

        From each class the examples with the smallest hash go, so that adding files moves few of the old ones. Test
        examples are never touched.
        """
        if "val" in self.splits or fraction == 0 or "train" not in self.splits:
            return self
        examples = self.splits["train"]
        keys, firsts = _columns(examples)  # several labels: the first one stands for them
        held = np.zeros(len(examples), bool)
        for label in np.unique(firsts):
            places = np.flatnonzero(firsts == label)
            if len(places) > 1:
                held[places[np.argsort(keys[places], kind="stable")][: max(1, round(fraction * len(places)))]] = True
        return replace(self, splits={**self.splits, "train": _chosen(examples, ~held), "val": _chosen(examples, held)})


def _named(examples: Sequence[Example]) -> Iterator[tuple[str, tuple[int, ...]]]:
    return examples.named() if isinstance(examples, Records) else ((e.id, e.labels) for e in examples)


def _columns(examples: Sequence[Example]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the key and the first label of each example, -1 for none."""
    if isinstance(examples, Records):
        return examples.columns()
    firsts = [example.labels[0] if example.labels else -1 for example in examples]
    return np.array([example.key for example in examples], np.uint64), np.array(firsts, np.int64)


def _chosen(examples: Sequence[Example], mask: NDArray[np.bool_]) -> Sequence[Example]:
    if isinstance(examples, Records):
        return examples.chosen(examples.rows[mask])
    return tuple(example for example, chosen in zip(examples, mask.tolist(), strict=True) if chosen)


# ---------------------------------------------------------------- scanning


@dataclass(frozen=True)
class _Found:
    """An example whose classes are still names; problem: why it cannot be read, where that is known."""

    id: str
    sources: Mapping[str, Source]
    row: Row
    problem: str | None = None


def scan(
    data: str | os.PathLike[str], classes: Sequence[str] | None = None, reads: Iterable[str] | None = None
) -> Catalog:
    """Return the catalog of a folder of class folders, or of a manifest (CSV, TSV, JSONL; see `read_manifest`).

    A folder is `split/class/file`, `class/split/file` (ModelNet's) or `class/file`. What a file is, its content says.
    Without `reads`, examples bring the commonest kind; each other kind of whose files at least half share their stem
    with those (`cat/017.png`, `cat/017.wav`), as parts of one example; and the sound of videos if at least half of
    those probed have any. With `reads`, the modalities of a recipe or model, they bring what there is of these. With
    `classes` (of a model), labels are matched by name; examples of other classes get none.

    Tars of records, a folder or pattern of them, or "-" for a stream of them on stdin, hold what `preprocess` found.

    Raises:
        DataError: no such folder or manifest, or no usable files; says what was looked for and what was found.
        IntegrityError: records that are damaged, or a stream that was cut short.
    """
    if os.fspath(data) == "-":
        with os.fdopen(0, "rb", closefd=False) as stdin:
            return _of_records(spooled(stdin, "stdin"), "-", classes, reads)
    if (tars := tar_files(data)) is not None:
        return _of_records(open_shards(tars), os.fspath(data), classes, reads)
    top = Path(data)
    notes: list[str] = []
    multi_label = False
    if top.is_dir():
        rows = labelled_files(top, notes)
    elif is_manifest(top) and top.is_file():
        rows, multi_label = read_manifest(top)
    else:
        what = "neither a folder nor a manifest" if top.exists() else "no such folder"
        raise DataError(f"{show_path(data)}: {what}", "expected a folder of class folders, or .csv, .tsv, .jsonl")
    folder = os.fspath(top if top.is_dir() else top.parent)
    catalog = of_rows(
        rows, os.fspath(data), folder, classes, reads, by_stem=top.is_dir(), multi_label=multi_label, notes=notes
    )
    ordered = {split: tuple(sorted(examples, key=lambda e: e.id)) for split, examples in catalog.splits.items()}
    return replace(catalog, splits=ordered)


def of_rows(
    rows: Sequence[Row],
    root: str,
    folder: str,
    classes: Sequence[str] | None = None,
    reads: Iterable[str] | None = None,
    *,
    by_stem: bool = False,
    multi_label: bool = False,
    notes: Sequence[str] = (),
) -> Catalog:
    """Return the catalog of rows whose paths lie in `folder`, in the order given; as `scan` says.

    by_stem: files that share their stem may be parts of one example. root: what to call the data.

    Raises:
        DataError: no usable files.
    """
    wanted, notes = None if reads is None else set(reads), list(notes)
    given = [row for row in rows if row.paths]
    if any(CONTENT not in row.paths for row in given):
        found, holds, brings = _by_column(folder, given, wanted, notes)
    else:
        found, holds, brings = _by_content(folder, given, wanted, notes, by_stem)
    if not holds:
        raise _nothing_usable(Path(root))
    found += [
        _Found(f"row {number}", {}, row, f"{show_path(root)}: row {number} names no file")
        for number, row in enumerate(rows, start=1)
        if not row.paths
    ]
    for name in sorted(brings) if len(brings) > 1 else ():
        missing = sum(name not in example.sources for example in found)
        if missing:
            notes.append(f"{missing} of {len(found)} examples have no {name}")

    known = {name for example in found if example.row.split == "train" for name in example.row.labels}
    known = known or {name for example in found for name in example.row.labels}
    ordered = tuple(classes) if classes is not None else tuple(sorted(known))
    index = {name: i for i, name in enumerate(ordered)}
    strangers = Counter(name for example in found for name in example.row.labels if name not in index)
    if strangers:
        whose = "the model's classes" if classes is not None else "the training classes"
        notes.append(f"{sum(strangers.values())} files of classes not among {whose}: {_tally(strangers)}")
    splits: dict[str, list[Example]] = defaultdict(list)
    seen: dict[str, Mapping[str, Source]] = {}
    for example in found:
        if seen.setdefault(example.id, example.sources) != example.sources:
            raise DataError(f"{show_path(root)}: two examples of the stem {show_path(example.id)}", "rename the files")
        labels = tuple(sorted({index[name] for name in example.row.labels if name in index}))
        splits[example.row.split].append(Example(example.id, example.sources, labels))
    return Catalog(
        root,
        tuple(sorted(brings)),
        tuple(sorted(holds)),
        ordered,
        {split: tuple(examples) for split, examples in splits.items()},
        {example.id: example.problem for example in found if example.problem is not None},
        tuple(notes),
        multi_label,
    )


def _by_column(
    folder: str, rows: Sequence[Row], reads: set[str] | None, notes: list[str]
) -> tuple[list[_Found], set[str], set[str]]:
    """Return the examples of rows that name a file for each modality, what there is, and what of it they bring."""
    holds = {name for row in rows for name in row.paths}
    brings = holds if reads is None else holds & reads
    found = []
    for row in rows:
        sources = {name: Source(os.path.join(folder, row.paths[name])) for name in sorted(brings & row.paths.keys())}
        if sources:
            found.append(_Found(identity(row.paths.values()), sources, row))
    if brings and holds - brings:
        notes.append(f"columns that are not read: {', '.join(sorted(holds - brings))}")
    if brings and len(found) < len(rows):
        notes.append(f"ignored {len(rows) - len(found)} rows without {either(brings)}")
    return found, holds, brings


def _by_content(
    folder: str, rows: Sequence[Row], reads: set[str] | None, notes: list[str], by_stem: bool
) -> tuple[list[_Found], set[str], set[str]]:
    """Return the examples of rows that name one file each, what there is, and what of it they bring.

    A file of another kind is damaged if it carries the suffix of a usable one (an empty .png); else it is not data.
    """
    files = [look(row.paths[CONTENT], folder) for row in rows]
    holds = {file.kinds[0] for file in files if file.kinds}
    allowed = companions(files, by_stem=by_stem) if reads is None else reads
    usable = {kind for file in files if (kind := file.among(allowed)) is not None}
    brings = set(usable)
    if "video" in usable:
        shares = streams([file for file in files if file.among(usable) == "video"])
        holds |= shares.keys()
        inside = {name for name, share in shares.items() if share >= (MOST if reads is None else 0)}
        brings = (usable - {"video"}) | (inside or {"video"})
        brings = brings if reads is None else brings & reads
        if "audio" in shares.keys() - brings:
            notes.append(f"{shares['audio']:.0%} of the videos have sound, which is not read")

    kind_of = {_suffix(file.path): kind for file in files if (kind := file.among(usable)) is not None}
    ignored: Counter[str] = Counter()
    groups: dict[str | int, list[tuple[File, Row]]] = defaultdict(list)
    for number, (file, row) in enumerate(zip(files, rows, strict=True)):
        suffix = _suffix(file.path)
        if suffix not in kind_of:
            ignored[suffix or "no suffix"] += 1
            continue
        if file.among(usable) is None:
            expected = kind_of[suffix]
            error = file.error or f"{file.source.shown}: {file.kinds[0]} by its content, expected {expected}"
            file = replace(file, kinds=(expected,), error=error)
        groups[stem(file.path) if by_stem and len(usable) > 1 else number].append((file, row))
    if ignored and usable:
        notes.append(f"ignored {sum(ignored.values())} files that are not {either(usable)}: {_tally(ignored)}")

    found = []
    for group in groups.values():
        parts, spare = assemble([file for file, _ in group], usable)
        problem = next((file.error for file, _ in group if file.error is not None), None)
        if spare is not None:
            problem = problem or f"{spare.source.shown}: a second {spare.kinds[0]} file of its stem, expected one"
        name = identity(file.path for file in parts.values())
        found.append(_Found(name, sources_of(parts, brings), group[0][1], problem))
    return found, holds, brings


def _of_records(shards: Shards, root: str, classes: Sequence[str] | None, reads: Iterable[str] | None) -> Catalog:
    """Return the catalog of records, as `scan` does of the files that they were made from."""
    holds = set(shards.header.inputs)
    brings = sorted(holds if reads is None else holds & set(reads))
    notes = list(shards.notes)
    order = shards.in_order()
    splits = shards.columns["splits"][order]
    per_record = np.diff(shards.columns["label_ends"], prepend=0)
    trained = np.repeat(shards.columns["splits"] == SPLITS.index("train"), per_record)
    counts = np.bincount(shards.columns["labels"], minlength=len(shards.names))
    in_training = np.bincount(shards.columns["labels"][trained], minlength=len(shards.names)) > 0
    known = {n for n, there in zip(shards.names, in_training.tolist(), strict=True) if there} or set(shards.names)
    ordered = tuple(classes) if classes is not None else tuple(sorted(known))
    index = {name: place for place, name in enumerate(ordered)}
    places = np.array([index.get(name, -1) for name in shards.names], np.int64)
    strangers = Counter({n: int(c) for n, c, place in zip(shards.names, counts, places, strict=True) if place < 0})
    if strangers:
        whose = "the model's classes" if classes is not None else "the training classes"
        notes.append(f"{sum(strangers.values())} records of classes not among {whose}: {_tally(strangers)}")
    for name in brings if len(brings) > 1 else ():
        missing = int((shards.columns[f"size_{name}"] < 0).sum())
        if missing:
            notes.append(f"{missing} of {len(shards)} records have no {name}")
    return Catalog(
        root,
        tuple(brings),
        tuple(sorted(holds)),
        ordered,
        {
            split: Records(shards, order[splits == number], places, brings)
            for number, split in enumerate(SPLITS)
            if (splits == number).any()
        },
        notes=tuple(notes),
        multi_label=shards.header.multi_label,
        prepared=shards.header,
    )


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, sorted, without hidden ones and without following folder links."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def labelled_files(top: Path, notes: list[str]) -> list[Row]:
    """Return a row for every file below class folders."""
    cut = len(os.path.join(os.fspath(top), ""))

    def rows(folder: Path, split: str, name: str) -> list[Row]:
        return [Row({CONTENT: path[cut:]}, split, (name,)) for path in walk_files(folder)]

    folders = folders_in(top)
    splits = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    found: list[Row] = []
    if splits:
        outside = [folder.name for folder in folders if folder not in splits]
        if outside:
            notes.append(f"ignored folders beside the splits: {', '.join(map(show_path, outside))}")
        for split in splits:
            for label in folders_in(split):
                found += rows(label, SPLIT_NAMES[split.name.lower()], label.name)
        return found
    for label in folders:
        inside = folders_in(label)
        if inside and all(folder.name.lower() in SPLIT_NAMES for folder in inside):
            for split in inside:
                found += rows(split, SPLIT_NAMES[split.name.lower()], label.name)
        else:
            found += rows(label, "train", label.name)
    return found


def folders_in(parent: Path) -> list[Path]:
    return [entry for entry in sorted(parent.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _nothing_usable(top: Path) -> DataError:
    if not top.is_dir():
        return DataError(f"{show_path(top)}: no usable files in the manifest", f"expected {formats()}")
    suffixes: Counter[str] = Counter()
    folders = len(folders_in(top))
    for count, path in enumerate(walk_files(top)):
        suffixes[_suffix(path) or "no suffix"] += 1
        if count == 10_000:
            break
    found = f"{folders} folders and {suffixes.total()} files" + (f" ({_tally(suffixes)})" if suffixes else "")
    return DataError(
        f"{show_path(top)}: no usable files: found {found}",
        f"expected class/file or split/class/file with {formats()}",
    )


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def either(names: Iterable[str]) -> str:
    """Return names for a message: audio or video."""
    return " or ".join(sorted(names))


def _tally(counter: Counter[str]) -> str:
    shown = ", ".join(f"{show_path(name)} {count}" for name, count in counter.most_common(5))
    return shown + (", ..." if len(counter) > 5 else "")


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
    elif is_manifest(path) and os.path.isfile(path) and not look(path).kinds:  # a cloud may be a table of numbers
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
        name, seconds = record.facts.path, record.facts.seconds
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


def brought(example: Example, reads: Iterable[str]) -> dict[str, Source]:
    """Return the source of each modality of `reads` that an example brings, sorted; at least one.

    Raises:
        DataError: it brings none of them; says what it is, or that there is nothing.
    """
    wanted = set(reads)
    if CONTENT not in example.sources:
        found = {name: source for name, source in sorted(example.sources.items()) if name in wanted}
        if not found:
            raise DataError(f"{show_path(example.id)}: no {either(wanted)}")
        return found
    source = example.sources[CONTENT]
    kinds = candidates(source)
    file = File(source.name, source, kinds)
    nearest = file.among(wanted)
    if nearest is None:
        raise DataError(f"{source.shown}: {kinds[0]} by its content, expected {either(wanted)}")
    return sources_of({nearest: file}, wanted)


def resolve_specs(specs: Mapping[str, InputSpec], catalog: Catalog, limits: Limits) -> dict[str, InputSpec]:
    """Return the specs with every "auto" settled by a sample of the training examples that have the modality.

    Of records it is settled already.

    Raises:
        DataError: records that were prepared otherwise; names the first option that differs.
    """
    if catalog.prepared is not None:
        found = catalog.prepared.settled(specs)
        catalog.prepared.check(show_path(catalog.root), found, "this run")
        return found
    examples = catalog.splits["train"]
    ranked = sorted(examples, key=lambda e: e.key)
    probes = {name: [e.sources[name] for e in ranked if name in e.sources][:PROBES] for name in specs}
    return {name: modality(name).resolve(spec, probes[name], limits) for name, spec in specs.items()}
