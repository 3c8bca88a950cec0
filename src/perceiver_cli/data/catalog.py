"""The catalog of a data set: examples by split and class, and notes on ignored files. No torch.

Nothing is decoded here. The order of examples, the split and the classes depend on names alone, never on the order on
disk. An example of several files is the same whether a manifest or their stem joins them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, combinations, islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import DataConfig
from perceiver_cli.data.account import FLAT, Account
from perceiver_cli.data.examples import Example, Examples, Records
from perceiver_cli.data.folders import of_suffix, parent, suffix_of, tally
from perceiver_cli.data.listing import Listing, Stdin, listed
from perceiver_cli.data.manifest import NO_OPTIONS, Labels, Row, alike
from perceiver_cli.data.pairing import (
    MOST,
    PROBES,
    TABLE,
    Labelled,
    as_points,
    assemble,
    companions,
    either,
    identity,
    sources_of,
    stem,
    streams,
    tables_beside,
    with_cells,
)
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import modality, names
from perceiver_cli.preprocess.base import TrainingSet
from perceiver_cli.preprocess.detection import (
    UNKNOWN,
    File,
    formats,
    looked_at,
    only,
    other_kind,
    taker,
    with_formats,
    without_rows,
)
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.records.byte_arrays import settled_by_rows
from perceiver_cli.records.format import SPLITS, Header
from perceiver_cli.records.shards import Shards, open_shards, spooled

PARENT = "parent"  # group by the name of a file's folder
Sighted = tuple[Labelled, set[str], set[str]]  # examples, all modalities in the data, modalities of the examples


@dataclass(frozen=True)
class Catalog:
    """The examples of a data set by split, its class names in order, and notes on ignored files.

    modalities: those of the examples, sorted; holds: all in the data. prepared: the header of records. group_by: the
    column, or "parent", that groups the examples. account: counts the paths that no example has. columns: the kinds of
    a manifest's columns whose cells are inputs.
    """

    root: str
    modalities: tuple[str, ...]
    holds: tuple[str, ...]
    classes: tuple[str, ...]
    splits: Mapping[str, Examples]
    notes: tuple[str, ...] = ()
    multi_label: bool = False  # each example may have several labels, or none
    prepared: Header | None = None
    group_by: str | None = None
    account: Account = field(default_factory=Account)
    columns: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of ids and labels in the splits train and val."""
        digest = hashlib.sha256()
        for split in ("train", "val"):
            for name, labels in self.examples(split).named():
                digest.update(f"{split}\0{name}\0{labels}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    @cached_property
    def bad(self) -> dict[str, str]:
        """The errors known without decoding, by id."""
        return {name: error for examples in self.splits.values() for name, error in examples.errors().items()}

    def examples(self, split: str) -> Examples:
        """Return the examples of a split, none for a missing split."""
        return self.splits.get(split, Examples())

    def merged(self, splits: Iterable[str]) -> Examples:
        """Return the examples of several splits, sorted by id."""
        first, *others = [self.splits[split] for split in splits if split in self.splits] or [Examples()]
        return first.merged(others) if others else first

    def accounted(self, bad: Collection[str] = (), split: str | None = None, *, scored: bool = False) -> Account:
        """Return the account of every path; examples with an id in `bad` could not be decoded.

        split: the only one that is used; examples of others are passed over. scored: unlabelled examples are not used.
        """
        account = deepcopy(self.account)
        bad = {*self.bad, *bad}
        for name, examples in sorted(self.splits.items()):
            other = None if split in (None, "all", name) else f"of the split {name}"
            for identity_, labels, files in examples.filed():
                unlabelled = scored and not labels and not self.multi_label
                fault = "unreadable" if identity_ in bad else "unlabelled" if unlabelled else None
                account.use(name, identity_, files, fault=other or fault)
        return account

    def counts(self, split: str) -> dict[str, int]:
        """Return the number of examples of each class in a split."""
        return dict(zip(self.classes, self.examples(split).counts(len(self.classes)), strict=True))

    def hold_out(self, fraction: float) -> Catalog:
        """Return the catalog with a validation split: its own, or a share of train chosen by hash of id or group.

        Only the hash of its id or group decides, so new files never move old ones. Two exceptions keep every class in
        both splits: a class that train would lack keeps its group with the largest hash there; a class of two groups or
        more that val would lack moves its group with the smallest hash.

        Raises DataError if each class has only one group.
        """
        if "val" in self.splits or fraction == 0 or "train" not in self.splits:
            return self
        examples = self.splits["train"]
        keys, firsts = examples.columns(grouped=self.group_by is not None)  # multi-label examples go by their first
        held = np.isin(keys, _held_out(keys, firsts, fraction))
        if self.group_by is not None and not held.any():
            raise DataError(
                f"{show_path(self.root)}: no class has two groups by {show_path(self.group_by)}, so none is held out",
                "group by another column, or pass --set data.val_fraction=0 to train without validation",
            )
        return self.split(examples, held, np.ones(len(examples), bool))

    def split(self, examples: Examples, held: NDArray[np.bool_], known: NDArray[np.bool_]) -> Catalog:
        """Return the catalog with the `known` of these examples as train, or as val if they are `held` too."""
        others = {name: examples for name, examples in self.splits.items() if name not in ("train", "val")}
        divided = {"train": examples.where(known & ~held), "val": examples.where(known & held)}
        return replace(self, splits=others | {name: examples for name, examples in divided.items() if len(examples)})

    def check_groups(self) -> None:
        """Raise DataError if examples of one group are in two splits."""
        if self.group_by is None:
            return
        keys = {name: examples.columns(grouped=True)[0] for name, examples in sorted(self.splits.items())}
        for one, other in combinations(keys, 2):
            shared = np.intersect1d(keys[one], keys[other])
            if len(shared):
                example = self.splits[one][int(np.flatnonzero(keys[one] == shared[0])[0])]
                groups = f"{counted(len(shared), 'group')} by {show_path(self.group_by)}"
                places = f"in both {one} and {other}, such as {show_path(example.group or parent(example.id))}"
                raise DataError(f"{show_path(self.root)}: {groups} {places}", "give each to one split")


def _held_out(keys: NDArray[np.uint64], classes: NDArray[np.int64], fraction: float) -> NDArray[np.uint64]:
    """Return the keys, one per group, that are held out; see `Catalog.hold_out`."""
    limit = int(fraction * 2.0**64)
    order = np.lexsort((keys, classes))
    groups = [np.unique(own).tolist() for own in np.split(keys[order], np.flatnonzero(np.diff(classes[order])) + 1)]
    count = Counter(chain.from_iterable(groups))  # number of classes in each group
    stay = {own[-1] for own in groups if own[-1] < limit}
    lent: set[int] = set()

    def goes(key: int) -> bool:
        return (key < limit and key not in stay) or key in lent

    def spare(key: int) -> bool:
        """Return whether every class in this group has another group that stays."""
        return all(any(other != key and not goes(other) for other in own) for own in groups if key in own)

    for own in groups:
        if len(own) > 1 and not any(map(goes, own)):
            lent.update(islice((key for key in own if count[key] == 1 or spare(key)), 1))
    return np.array([key for key in count if goes(key)], np.uint64)


def scan(
    data: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    reads: Iterable[str] | None = None,
    options: DataConfig = NO_OPTIONS,
    labels: Labels = "needed",
    stdin: Stdin | None = None,
) -> Catalog:
    """Return the catalog of a folder (see `rows_in`), a manifest (see `read_manifest`) or records, "-" on stdin.

    The content of a file decides its kind. Without `reads`, examples have the most common kind; each other kind if at
    least half of its files share their stem with one of those (`cat/017.png`, `cat/017.wav`); and the sound of videos
    if at least half of a sample have any. With `reads`, the modalities of a recipe or model, they have only these.
    With `classes`, those of a model, examples of other classes get no label. options: columns of a manifest and its
    `root`; what makes pairs; `group_by`, whose groups are each in one split. labels: "scored" leaves out rows without a
    label. stdin: of an earlier call, if there was one.

    Raises DataError if nothing is usable, IntegrityError for records that are damaged or cut short.
    """
    name, group_by = os.fspath(data), options.group_by
    options = options.model_copy(update={"group_by": None}) if group_by == PARENT else options
    if name == "-":
        stdin = stdin or Stdin()
        if (arrived := stdin.listing(labels, options)) is None:
            shards = spooled(stdin.begun[1], "stdin")
            return _records_catalog(shards, "-", classes, reads, options, group_by)
        listing = arrived
    else:
        listing = listed(name, labels, options)
    if listing.tars:
        return _records_catalog(open_shards(listing.tars), name, classes, reads, options, group_by, listing.account)
    if group_by == PARENT:
        listing = replace(listing, rows=[replace(row, group=parent(next(iter(row.paths), ""))) for row in listing.rows])
    catalog = of_listing(replace(listing, folder=listing.folder or os.path.dirname(name)), name, classes, reads)
    ordered = {split: examples.merged([]) for split, examples in catalog.splits.items()}
    return replace(catalog, splits=ordered, group_by=group_by)


def of_listing(
    listing: Listing, root: str, classes: Sequence[str] | None = None, reads: Iterable[str] | None = None
) -> Catalog:
    """Return the catalog of a listing's rows, in order; `root` names it. Raises DataError if no file is usable."""
    wanted, notes, rows = None if reads is None else set(reads), list(listing.notes), list(listing.rows)
    full = [row for row in rows if row.paths]
    by_modality = _by_column if any(row.columns for row in full) else _by_content
    examples, holds, brings = with_cells(*by_modality(listing, full, wanted, notes), rows, wanted)
    if not holds:
        if len(rows) == 1 and (only := rows[0].file) is not None and only.error is not None:
            raise with_formats(only.error, wanted)
        top = Path(root)
        if not listing.by_stem:
            first = full[0].looked_at(listing.folder).error if full and full[0].path else None
            cause = "" if first is None else f", the first: {first.message}"
            what = "no usable files in the manifest" if full else "the manifest names no file"
            hint = f"expected {formats(wanted)}" if full else "add rows to it"
            raise DataError(f"{show_path(top)}: {what}{cause}", hint)
        reason = f"{show_path(top)}: no usable files: {'; '.join(listing.account.brief())}"
        looked = (without_rows(row.looked_at(listing.folder)).error for row in full[:PROBES] if row.path)
        known = (error for error in looked if error is not None and not error.message.endswith(UNKNOWN))
        if (first := next(known, None)) is not None:
            raise DataError(f"{reason}, the first: {first.message}", first.hint)
        form = "expected class/file or split/class/file"
        if listing.account.passed_over.keys() == {FLAT}:
            above = show_path(os.path.dirname(os.path.abspath(root)))
            raise DataError(reason, f"{form}; if this is the folder of one class, pass the one above it, {above}")
        raise DataError(reason, f"{form} with {formats(wanted)}")
    for number, row in enumerate(rows, start=1):
        if not row.paths and not row.cells:
            error = f"{show_path(root)}: row {number} names no file"
            examples.append((Example(f"row {number}", {}, error=error), row))
    for name in sorted(brings) if len(brings) > 1 else ():
        missing = sum(name not in example.sources for example, _ in examples)
        if missing:
            notes.append(f"{missing} of {len(examples)} examples have no {name}")
    counts = Counter(name for _, row in examples for name in row.labels)
    notes += _vanished(rows, counts)
    trained = {name for _, row in examples if row.split == "train" for name in row.labels}
    ordered = _class_names(counts, trained, classes, "file", notes)
    notes += _in_several(examples)
    splits, multi_label = _in_splits(root, examples, ordered), listing.multi_label
    return Catalog(
        root, tuple(sorted(brings)), tuple(sorted(holds)), ordered, splits, tuple(notes), multi_label,
        account=listing.account, columns=listing.columns,
    )  # fmt: skip


def _vanished(rows: Sequence[Row], counts: Counter[str]) -> Iterator[str]:
    """Yield a note for each class without an example, though rows have it: none of its files is of a usable kind."""
    for label in sorted({name for row in rows for name in row.labels} - counts.keys()):
        suffixes = Counter(suffix_of(path) for row in rows if label in row.labels for path in row.paths)
        yield f"no file of the class {show_path(label)} is used: {tally(suffixes)}"


def _in_several(examples: Labelled) -> Iterator[str]:
    """Yield a note if examples are in several splits: a model is then tested on what it has seen."""
    splits: dict[str, set[str]] = defaultdict(set)
    for example, row in examples:
        splits[example.id].add(row.split)
    if shared := [name for name, own in splits.items() if len(own) > 1]:
        where = f"{show_path(shared[0])} in {' and '.join(sorted(splits[shared[0]]))}"
        yield f"{counted(len(shared), 'example')} in several splits, such as {where}: scores will be too good"


def _in_splits(root: str, examples: Labelled, classes: Sequence[str]) -> dict[str, Examples]:
    """Return the labelled examples of each split. Raises DataError if two of different files have the same id."""
    class_index = {name: index for index, name in enumerate(classes)}
    splits: dict[str, list[Example]] = defaultdict(list)
    sources: dict[str, Mapping[str, object]] = {}
    for example, row in examples:
        if sources.setdefault(example.id, example.sources) != example.sources:
            raise DataError(f"{show_path(root)}: two examples of the stem {show_path(example.id)}", "rename the files")
        labels = tuple(sorted({class_index[name] for name in row.labels if name in class_index}))
        splits[row.split].append(replace(example, labels=labels, group=row.group, passed=row.passed))
    return {split: Examples(own) for split, own in splits.items()}


def _class_names(
    counts: Counter[str], trained: set[str], classes: Sequence[str] | None, noun: str, notes: list[str]
) -> tuple[str, ...]:
    """Return the model's `classes`, else those in train, else all; note how many examples have other classes."""
    names = tuple(sorted(trained or counts)) if classes is None else tuple(classes)
    known = set(names)
    strangers = Counter({name: count for name, count in counts.items() if name not in known})
    if strangers:
        whose = "the model's classes" if classes is not None else "the training classes"
        notes.append(f"{counted(strangers.total(), noun)} of classes not among {whose}: {tally(strangers)}")
    notes += alike([*counts, *names])
    return names


def _by_column(listing: Listing, rows: Sequence[Row], reads: set[str] | None, notes: list[str]) -> Sighted:
    """Return the examples of rows with a file per modality, the modalities in the data, and those of the examples."""
    holds = {name for row in rows for name in row.columns}
    brings = holds if reads is None else holds & reads
    examples = []
    for row in rows:
        names = sorted(brings & row.columns.keys())
        sources = {name: Source(os.path.join(listing.folder, row.columns[name])) for name in names}
        if sources:
            examples.append((Example(identity(row.paths), sources), row))
        for name in sorted(row.columns.keys() - brings):
            listing.account.pass_over(f"{name}, which is not read", row.columns[name])
    if brings and holds - brings:
        notes.append(f"ignored columns: {', '.join(sorted(holds - brings))}")
    if brings and len(examples) < len(rows):
        notes.append(f"ignored {counted(len(rows) - len(examples), 'row')} without {either(brings)}")
    return examples, holds, brings


def _looked_at(
    listing: Listing, rows: Sequence[Row], reads: set[str] | None, notes: list[str]
) -> list[tuple[File, Row]]:
    """Return the file of each row, with the row, without the tables of numbers that lie beside media."""
    files = [row.looked_at(listing.folder) for row in rows]
    if reads is None:
        files = [without_rows(file) for file in files]
        if not any(file.source.kinds for file in files) and (taken := taker(files)) is not None:
            files = [row.looked_at(listing.folder, taken) for row in rows]
            notes.append(f"tables with a line of column names are read as {taken}; --preset chooses another kind")
    elif not any(file.among(reads) for file in files if not file.source.holds_rows):
        files = [row.looked_at(listing.folder, only(reads)) for row in rows]
    if listing.by_stem and listing.pair == "all":
        files = [as_points(file) for file in files]
    tables = tables_beside(files, reads, listing.pair) if listing.by_stem else set()
    if tables:
        shown = f"{counted(len(tables), 'table')} of numbers beside {'files' if len(tables) > 1 else 'a file'}"
        notes.append(f"{shown} of the same stem, passed over; --pair all reads them as points")
    for path in sorted(tables):
        listing.account.pass_over(TABLE, path)
    return [(file, row) for file, row in zip(files, rows, strict=True) if file.path not in tables]


def _by_content(listing: Listing, rows: Sequence[Row], reads: set[str] | None, notes: list[str]) -> Sighted:
    """Return the examples of rows with one file each, the modalities in the data, and those of the examples."""
    pairs = _looked_at(listing, rows, reads, notes)
    files, by_stem = [file for file, _ in pairs], listing.by_stem and listing.pair != "none"
    holds = {file.source.kinds[0] for file in files if file.source.kinds}
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

    # A file of another kind with the suffix of a usable kind is damaged (an empty .png); others are passed over.
    kind_of = {suffix: kind for kind in reversed(names()) if kind in usable for suffix in modality(kind).suffixes}
    kind_of |= {suffix_of(file.path): kind for file in files if (kind := file.among(usable)) is not None}
    groups: dict[str | int, list[tuple[File, Row]]] = defaultdict(list)
    for number, (file, row) in enumerate(pairs):
        is_missing = not listing.by_stem and row.file is not None and row.file.error is not None
        expected = kind_of.get(suffix_of(file.path), min(usable, default=None) if is_missing else None)
        if expected is None:
            listing.account.pass_over(of_suffix(file), file.path)
            continue
        if file.among(usable) is None:
            error = file.error or other_kind(file.source, expected)
            file = File(file.path, replace(file.source, kinds=(expected,)), error)
        groups[stem(file.path) if by_stem and len(usable) > 1 else number].append((file, row))
    if listing.by_stem and len(usable) == 1:
        notes += _twins([file.path for file, _ in pairs if file.among(usable)])
    return _assembled(groups.values(), usable, brings, listing.account, notes), holds, brings


def _twins(paths: Sequence[str]) -> Iterator[str]:
    """Yield a note if files of one modality, in order, share their stem: one may be a mask or a copy of the other."""
    twins = [pair for pair in pairwise(paths) if stem(pair[0]) == stem(pair[1])]
    if twins:
        shown = " and ".join(map(show_path, twins[0]))
        fault = f"{counted(len(twins), 'file')} with the stem of another, such as {shown}"
        yield f"{fault}: each is an example, even if it is a mask"


def _assembled(
    groups: Iterable[list[tuple[File, Row]]], usable: set[str], brings: set[str], account: Account, notes: list[str]
) -> Labelled:
    """Return the example of each group of files, and note how many their stem joins."""
    examples: Labelled = []
    joined: Counter[tuple[str, ...]] = Counter()
    for group in groups:
        by_kind, spare = assemble([file for file, _ in group], usable)
        fault = next((str(file.error) for file, _ in group if file.error is not None), None)
        if spare is not None and fault is None:
            fault = f"{spare.source.shown}: a second {spare.source.kinds[0]} file with the same stem, expected one"
        name = identity(file.path for file in by_kind.values())
        joined[tuple(sorted(by_kind))] += len(by_kind) > 1
        example = Example(name, sources_of(by_kind, brings), error=fault)
        examples.append((example, group[0][1]))
        for file, _ in group if example.sources else group[1:]:
            if file.source.name not in example.files:
                kind = file.among(usable)
                reason = f"a second {kind} of its stem" if kind in brings else f"{kind}, which is not read"
                account.pass_over(reason, file.path)
    for kinds, count in sorted((+joined).items()):
        how = "--pair none turns it off in training"
        notes.append(f"{' + '.join(kinds)} by stem: {count} of {len(examples)} examples; {how}")
    return examples


def _records_catalog(
    shards: Shards,
    root: str,
    classes: Sequence[str] | None,
    reads: Iterable[str] | None,
    options: DataConfig,
    group_by: str | None,
    beside: Account | None = None,
) -> Catalog:
    """Return the catalog of records, the same as of their files. beside: the account of what lies beside them."""
    column = None if group_by == PARENT else group_by
    groups = None if column is None else shards.column(column)
    holds = set(shards.header.inputs)
    brings = sorted(holds if reads is None else holds & set(reads))
    notes = list(shards.notes)
    order = shards.in_order()
    splits = shards.columns["splits"][order]
    labels, per_record = shards.columns["labels"], np.diff(shards.columns["label_ends"], prepend=0)
    in_training = np.repeat(shards.columns["splits"] == SPLITS.index("train"), per_record)
    trained = {shards.names[place] for place in np.unique(labels[in_training])}
    counts = np.bincount(labels, minlength=len(shards.names)).tolist()
    ordered = _class_names(Counter(dict(zip(shards.names, counts, strict=True))), trained, classes, "record", notes)
    index = {name: place for place, name in enumerate(ordered)}
    label_classes = np.array([index.get(name, -1) for name in shards.names], np.int64)
    for name in brings if len(brings) > 1 else ():
        missing = int((shards.columns[f"size_{name}"] < 0).sum()) - len(shards.errors)
        if missing:
            notes.append(f"{missing} of {len(shards)} records have no {name}")
    rows = {split: order[splits == number] for number, split in enumerate(SPLITS)}
    made = partial(Records, shards, label_classes=label_classes, modalities=brings, groups=groups)
    records = {split: made(own, passed=options.pass_columns) for split, own in rows.items() if len(own)}
    header, kinds = shards.header, tuple(sorted(holds))
    account = beside or Account()
    account.inside += len(shards)
    return Catalog(
        root, tuple(brings), kinds, ordered, records, tuple(notes), header.multi_label, header, group_by, account
    )


def resolve_specs(specs: Mapping[str, InputSpec], catalog: Catalog, limits: Limits) -> dict[str, InputSpec]:
    """Return the specs with a value for every "auto": from the header of records, else a sample of training examples.

    Raises DataError, which names the first option that differs, for records of another preparation.
    """
    known = TrainingSet(len(catalog.splits["train"]), tuple(catalog.classes))
    specs = {name: modality(name).adapt(spec, known) for name, spec in specs.items()}
    if catalog.prepared is not None:
        settled = catalog.prepared.settled(specs)
        catalog.prepared.check(show_path(catalog.root), settled, "this run")
        return settled
    ranked = sorted(catalog.splits["train"], key=lambda example: example.key)
    settled = dict(specs)
    for name, spec in specs.items():
        brought = (example.sources.get(name) for example in ranked)
        probes = list(islice((source for source in brought if isinstance(source, Source)), modality(name).probes))
        if probes and looked_at(probes[0], None, name).source.holds_rows:
            probes, spec = [], settled_by_rows(probes[0], name, spec, limits)
        settled[name] = modality(name).resolve(spec, probes, limits)
    return settled
