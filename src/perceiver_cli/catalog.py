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
from itertools import chain, combinations, groupby, islice
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import InputSpec, Limits
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import show_path
from perceiver_cli.folders import folders_in, parent, rows_in, suffix_of, tally, walk_files
from perceiver_cli.manifest import CONTENT, MANIFESTS, Row, is_manifest, read_manifest
from perceiver_cli.pairing import MOST, PROBES, File, assemble, companions, identity, look, sources_of, stem, streams
from perceiver_cli.preprocess import candidates, formats, holds_rows, modality
from perceiver_cli.preprocess.base import Source
from perceiver_cli.shards import UNLIMITED, Shards, key_of, open_shards, spooled, tar_files
from perceiver_cli.stream import SPLITS, Feed, Header, Stored, Unread, read_records, settled_by_rows

PARENT = "parent"  # to group by the folder that a file lies in


@dataclass(frozen=True)
class Example:
    """One input, not yet read.

    id: its path below the data folder, or the stem that its files share; sources: by modality, any of which may be
    missing, or one under CONTENT; labels: class indices, one unless the data says several, none where the class is not
    known; group: what it shares with others of its split, "" for nothing.
    """

    id: str
    sources: Mapping[str, Source]
    labels: tuple[int, ...] = ()
    group: str = ""

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
    records, how their arrays were made. group_by: what examples are grouped by, if by anything.
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
    group_by: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of id and class of all that a run learns from and is judged by: the splits train and val."""
        digest = hashlib.sha256()
        for split in ("train", "val"):
            for name, labels in named(self.splits.get(split, ())):
                digest.update(f"{split}\0{name}\0{labels}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def counts(self, split: str) -> dict[str, int]:
        """Return the number of examples of each class in a split."""
        examples = self.splits.get(split, ())
        if isinstance(examples, Records):
            return dict(zip(self.classes, examples.tally(len(self.classes)), strict=True))
        found = Counter(label for _, labels in named(self.splits.get(split, ())) for label in labels)
        return {name: found[index] for index, name in enumerate(self.classes)}

    def hold_out(self, fraction: float) -> Catalog:
        """Return the catalog with a validation split: its own, or a share of train chosen by hash of id or of group.

        An example goes by its own hash alone, so that adding files never moves old ones. Two exceptions see to it that
        every class is learned and judged: of a class that would go whole, the group with the largest hash stays; of
        one that would stay whole, the group with the smallest goes, if there are two. Test examples are never touched.

        Raises:
            DataError: there are groups, and none can go because each class has only one.
        """
        if "val" in self.splits or fraction == 0 or "train" not in self.splits:
            return self
        examples = self.splits["train"]
        keys, firsts = _columns(examples, self.group_by)  # several labels: the first one stands for them
        held = np.isin(keys, _held_out(keys, firsts, fraction))
        if self.group_by is not None and not held.any():
            raise DataError(
                f"{show_path(self.root)}: no class has two groups by {show_path(self.group_by)}, so none can validate",
                "group by something else, or pass --set data.val_fraction=0 to do without",
            )
        return self.split(examples, held, np.ones(len(examples), bool))

    def split(self, examples: Sequence[Example], held: NDArray[np.bool_], known: NDArray[np.bool_]) -> Catalog:
        """Return the catalog with these examples, where `known`, as train and, where also `held`, as val."""
        others = {name: found for name, found in self.splits.items() if name not in ("train", "val")}
        parts = {"train": _chosen(examples, known & ~held), "val": _chosen(examples, known & held)}
        return replace(self, splits=others | {name: found for name, found in parts.items() if len(found)})

    def check_groups(self) -> None:
        """Raise DataError if examples of one group are in two splits."""
        if self.group_by is None:
            return
        keys = {name: _columns(examples, self.group_by)[0] for name, examples in self.splits.items()}
        for one, other in combinations(sorted(keys), 2):
            shared = np.intersect1d(keys[one], keys[other])
            if len(shared):
                example = self.splits[one][int(np.flatnonzero(keys[one] == shared[0])[0])]
                group = example.group or parent(example.id)
                raise DataError(
                    f"{show_path(self.root)}: {counted(len(shared), 'group')} by {show_path(self.group_by)} in both "
                    f"{one} and {other}, such as {show_path(group)}",
                    "give each to one split",
                )


def _held_out(keys: NDArray[np.uint64], classes: NDArray[np.int64], fraction: float) -> NDArray[np.uint64]:
    """Return the keys (one a group) that validate; see `Catalog.hold_out`."""
    limit = int(fraction * 2.0**64)
    order = np.lexsort((keys, classes))
    by_class = np.split(keys[order], np.flatnonzero(np.diff(classes[order])) + 1)
    groups = [np.unique(own).tolist() for own in by_class]
    count = Counter(chain.from_iterable(groups))  # of classes that a group holds
    stay = {own[-1] for own in groups if own[-1] < limit}
    lent: set[int] = set()

    def goes(key: int) -> bool:
        return (key < limit and key not in stay) or key in lent

    def spare(key: int) -> bool:
        """Return whether every class in this group has another one to learn from."""
        holding = (own for own in groups if key in own)
        return all(any(other != key and not goes(other) for other in own) for own in holding)

    for own in groups:
        if len(own) > 1 and not any(map(goes, own)):
            lent.update(islice((key for key in own if count[key] == 1 or spare(key)), 1))
    return np.array([key for key in count if goes(key)], np.uint64)


def named(examples: Sequence[Example]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield id and labels of each example."""
    return examples.named() if isinstance(examples, Records) else ((e.id, e.labels) for e in examples)


def _columns(examples: Sequence[Example], group_by: str | None = None) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the key (with groups, of its group) and the first label of each example, -1 for none."""
    if isinstance(examples, Records):
        keys, labels = examples.columns()
        if group_by is not None:
            keys = np.array([key_of(parent(name) or name) for name, _ in examples.named()], np.uint64)
        return keys, labels
    firsts = [example.labels[0] if example.labels else -1 for example in examples]
    found = [key_of(example.group) if example.group else example.key for example in examples]
    return np.array(found, np.uint64), np.array(firsts, np.int64)


def merged(catalog: Catalog, splits: Iterable[str]) -> Sequence[Example]:
    """Return the examples of several splits, sorted by id."""
    parts = [catalog.splits[split] for split in splits if split in catalog.splits]
    if len(parts) < 2:
        return parts[0] if parts else ()
    if all(isinstance(part, Records) for part in parts):
        rows = np.concatenate([part.rows for part in parts if isinstance(part, Records)])
        ids = [name for part in parts for name, _ in named(part)]
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        assert isinstance(parts[0], Records)
        return parts[0].chosen(rows[order])
    return tuple(sorted(chain.from_iterable(parts), key=lambda e: e.id))


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
    data: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    reads: Iterable[str] | None = None,
    group_by: str | None = None,
) -> Catalog:
    """Return the catalog of a folder (class folders or metadata, see `rows_in`) or a manifest (see `read_manifest`).

    What a file is, its content says. Without `reads`, examples bring the commonest kind; each other kind of whose files
    at least half share their stem with those (`cat/017.png`, `cat/017.wav`), as parts of one example; and the sound of
    videos if at least half of those probed have any. With `reads`, the modalities of a recipe or model, they bring what
    there is of these. With `classes` (of a model), labels are matched by name; examples of other classes get none.
    `group_by`, "parent" for the name of the folder that a file lies in or a column of the manifest, says what is never
    in two splits.

    Tars of records, a folder or pattern of them, or "-" for a stream of them on stdin, hold what `preprocess` found.

    Raises:
        DataError: no such folder or manifest, or no usable files; says what was looked for and what was found.
        IntegrityError: records that are damaged, or a stream that was cut short.
    """
    if os.fspath(data) == "-":
        with os.fdopen(0, "rb", closefd=False) as stdin:
            return _of_records(spooled(stdin, "stdin"), "-", classes, reads, group_by)
    if (tars := tar_files(data)) is not None:
        return _of_records(open_shards(tars), os.fspath(data), classes, reads, group_by)
    top = Path(data)
    notes: list[str] = []
    column = None if group_by == PARENT else group_by
    if top.is_dir():
        rows, multi_label = rows_in(top, notes, column)
    elif is_manifest(top) and top.is_file():
        rows, multi_label = read_manifest(top, group_by=column)
    else:
        what = "neither a folder nor a manifest" if top.exists() else "no such folder"
        raise DataError(f"{show_path(data)}: {what}", f"expected a folder of class folders, or {', '.join(MANIFESTS)}")
    if group_by == PARENT:
        rows = [replace(row, group=parent(next(iter(row.paths.values()), ""))) for row in rows]
    folder = os.fspath(top if top.is_dir() else top.parent)
    catalog = of_rows(
        rows, os.fspath(data), folder, classes, reads, by_stem=top.is_dir(), multi_label=multi_label, notes=notes
    )
    ordered = {split: tuple(sorted(examples, key=lambda e: e.id)) for split, examples in catalog.splits.items()}
    return replace(catalog, splits=ordered, group_by=group_by)


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
        notes.append(f"{counted(strangers.total(), 'file')} of classes not among {whose}: {tally(strangers)}")
    splits: dict[str, list[Example]] = defaultdict(list)
    seen: dict[str, Mapping[str, Source]] = {}
    for example in found:
        if seen.setdefault(example.id, example.sources) != example.sources:
            raise DataError(f"{show_path(root)}: two examples of the stem {show_path(example.id)}", "rename the files")
        labels = tuple(sorted({index[name] for name in example.row.labels if name in index}))
        splits[example.row.split].append(Example(example.id, example.sources, labels, example.row.group))
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
        notes.append(f"ignored {counted(len(rows) - len(found), 'row')} without {either(brings)}")
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

    kind_of = {suffix_of(file.path): kind for file in files if (kind := file.among(usable)) is not None}
    ignored: Counter[str] = Counter()
    groups: dict[str | int, list[tuple[File, Row]]] = defaultdict(list)
    for number, (file, row) in enumerate(zip(files, rows, strict=True)):
        suffix = suffix_of(file.path)
        if suffix not in kind_of:
            ignored[suffix] += 1
            continue
        if file.among(usable) is None:
            expected = kind_of[suffix]
            error = file.error or f"{file.source.shown}: {file.kinds[0]} by its content, expected {expected}"
            file = replace(file, kinds=(expected,), error=error)
        groups[stem(file.path) if by_stem and len(usable) > 1 else number].append((file, row))
    if ignored and usable:
        notes.append(f"ignored {counted(ignored.total(), 'file')} besides {either(usable)}: {tally(ignored)}")

    found = []
    for group in groups.values():
        parts, spare = assemble([file for file, _ in group], usable)
        problem = next((file.error for file, _ in group if file.error is not None), None)
        if spare is not None:
            problem = problem or f"{spare.source.shown}: a second {spare.kinds[0]} file of its stem, expected one"
        name = identity(file.path for file in parts.values())
        found.append(_Found(name, sources_of(parts, brings), group[0][1], problem))
    return found, holds, brings


def _of_records(
    shards: Shards, root: str, classes: Sequence[str] | None, reads: Iterable[str] | None, group_by: str | None
) -> Catalog:
    """Return the catalog of records, as `scan` does of the files that they were made from."""
    if group_by not in (None, PARENT):
        raise DataError(f"{show_path(root)}: records have no columns to group by", f"expected {PARENT}")
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
        notes.append(f"{counted(strangers.total(), 'record')} of classes not among {whose}: {tally(strangers)}")
    for name in brings if len(brings) > 1 else ():
        missing = int((shards.columns[f"size_{name}"] < 0).sum()) - len(shards.errors)
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
        {shards.id(row): error for row, error in shards.errors.items()},
        notes=tuple(notes),
        multi_label=shards.header.multi_label,
        prepared=shards.header,
        group_by=group_by,
    )


def _nothing_usable(top: Path) -> DataError:
    if not top.is_dir():
        return DataError(f"{show_path(top)}: no usable files in the manifest", f"expected {formats()}")
    suffixes: Counter[str] = Counter()
    folders = len(folders_in(top))
    for count, path in enumerate(walk_files(top)):
        suffixes[suffix_of(path)] += 1
        if count == 10_000:
            break
    found = f"{counted(folders, 'folder')} and {counted(suffixes.total(), 'file')}"
    found += f" ({tally(suffixes)})" if suffixes else ""
    return DataError(
        f"{show_path(top)}: no usable files: found {found}",
        f"expected class/file or split/class/file with {formats()}",
    )


def either(names: Iterable[str]) -> str:
    """Return names for a message: audio or video."""
    return " or ".join(sorted(names))


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
    found = dict(specs)
    for name, spec in specs.items():
        probes = [e.sources[name] for e in ranked if name in e.sources][:PROBES]
        if probes and holds_rows(probes[0]):
            probes, spec = [], settled_by_rows(probes[0], name, spec, limits)
        found[name] = modality(name).resolve(spec, probes, limits)
    return found
