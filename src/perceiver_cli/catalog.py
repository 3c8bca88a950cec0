"""What a data folder or a manifest holds: examples by split and class, and what was left out and why. No torch.

Nothing is decoded here. The order of examples, the split and the classes depend on names alone, never on the order in
which a disk lists them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from perceiver_cli.config import InputSpec, Limits
from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess import detect, formats, modality
from perceiver_cli.preprocess.base import Source

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
PROBES = 64  # files looked at to find the modality and to settle "auto" options
MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Example:
    """One input, not yet read.

    id: its path below the data folder; sources: by modality; labels: class indices, one unless the data says several,
    none where the class is not known.
    """

    id: str
    sources: Mapping[str, Source]
    labels: tuple[int, ...] = ()

    @cached_property
    def key(self) -> int:
        """A number made from the id alone, for seeds and splits."""
        return int.from_bytes(hashlib.sha256(self.id.encode("utf-8", "surrogateescape")).digest()[:8], "little")


@dataclass(frozen=True)
class Catalog:
    """What a data folder or a manifest holds: examples by split, class names in order, what was left out and why."""

    root: str
    modality: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    bad: Mapping[str, str] = field(default_factory=dict)  # example id -> error, known without decoding
    notes: tuple[str, ...] = ()
    multi_label: bool = False  # each example may have several labels, or none

    @property
    def fingerprint(self) -> str:
        """A hash of every split, id and class: what a run was trained on."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for example in self.splits[split]:
                digest.update(f"{split}\0{example.id}\0{example.labels}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def counts(self, split: str) -> dict[str, int]:
        """Return the number of examples of each class in a split."""
        found = Counter(label for example in self.splits.get(split, ()) for label in example.labels)
        return {name: found[index] for index, name in enumerate(self.classes)}

    def hold_out(self, fraction: float) -> Catalog:
        """Return the catalog with a validation split: its own, or a stratified share of train chosen by hash of id.

        From each class the examples with the smallest hash go, so that adding files moves few of the old ones. Test
        examples are never touched.
        """
        if "val" in self.splits or fraction == 0 or "train" not in self.splits:
            return self
        by_class: dict[tuple[int, ...], list[Example]] = defaultdict(list)
        for example in self.splits["train"]:
            by_class[example.labels[:1]].append(example)  # several labels: the first one stands for it
        held = {
            example.id
            for examples in by_class.values()
            if len(examples) > 1
            for example in sorted(examples, key=lambda e: e.key)[: max(1, round(fraction * len(examples)))]
        }
        train = tuple(e for e in self.splits["train"] if e.id not in held)
        val = tuple(e for e in self.splits["train"] if e.id in held)
        return replace(self, splits={**self.splits, "train": train, "val": val})


# ---------------------------------------------------------------- scanning

Entry = tuple[str, str, str, tuple[str, ...]]  # id, path, split, class names


def scan(data: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Catalog:
    """Return the catalog of a folder of class folders, or of a manifest (CSV, TSV, JSONL).

    A folder is `split/class/file`, `class/split/file` (ModelNet's) or `class/file`; a manifest has a column `path`, one
    of `label` or `labels`, and may have `split`. The modality is the one that most of the probed files belong to, by
    content. With `classes` (of a model), labels are matched by name; examples of other classes get none.

    Raises:
        DataError: no such folder or manifest, or no usable files; says what was looked for and what was found.
    """
    top = Path(data)
    notes: list[str] = []
    multi_label = False
    if top.is_dir():
        entries = _labelled_files(top, notes)
    elif top.suffix.lower() in MANIFESTS and top.is_file():
        entries, multi_label = _listed_files(top)
    else:
        what = "neither a folder nor a manifest" if top.exists() else "no such folder"
        raise DataError(f"{show_path(data)}: {what}", "expected a folder of class folders, or .csv, .tsv, .jsonl")
    kind = _majority_modality([path for _, path, _, _ in entries]) if entries else None
    if kind is None:
        raise _nothing_usable(top)
    usable, bad = _usable(entries, kind, notes)

    known = {name for _, _, split, names in usable if split == "train" for name in names}
    known = known or {name for _, _, _, names in usable for name in names}
    ordered = tuple(classes) if classes is not None else tuple(sorted(known))
    index = {name: i for i, name in enumerate(ordered)}
    strangers = Counter(name for _, _, _, names in usable for name in names if name not in index)
    if strangers:
        whose = "the model's classes" if classes is not None else "the training classes"
        notes.append(f"{sum(strangers.values())} files of classes not among {whose}: {_tally(strangers)}")
    splits: dict[str, list[Example]] = defaultdict(list)
    for identity, path, split, names in usable:
        labels = tuple(sorted({index[name] for name in names if name in index}))
        splits[split].append(Example(identity, {kind: Source(path)}, labels))
    by_id = {split: tuple(sorted(examples, key=lambda e: e.id)) for split, examples in splits.items()}
    return Catalog(os.fspath(data), kind, ordered, by_id, bad, tuple(notes), multi_label)


def _usable(entries: list[Entry], kind: str, notes: list[str]) -> tuple[list[Entry], dict[str, str]]:
    """Return the entries of a modality, damaged ones among them, and the error of each damaged one by id.

    A file of another kind is damaged if it carries the suffix of a usable one (an empty .png); else it is not data.
    """
    problems = {entry: _sniff_problem(entry[1], kind) for entry in entries}
    suffixes = {_suffix(path) for (_, path, _, _), problem in problems.items() if problem is None}
    bad: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    for (identity, path, _, _), problem in problems.items():
        if problem is not None and _suffix(path) in suffixes:
            bad[identity] = problem
        elif problem is not None:
            ignored[_suffix(path) or "no suffix"] += 1
    if ignored:
        notes.append(f"ignored {sum(ignored.values())} files that are not {kind}: {_tally(ignored)}")
    return [entry for entry, problem in problems.items() if problem is None or entry[0] in bad], bad


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, sorted, without hidden ones and without following folder links."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def _labelled_files(top: Path, notes: list[str]) -> list[Entry]:
    """Return the entries of every file below class folders."""
    cut = len(os.path.join(os.fspath(top), ""))

    def entries(folder: Path, split: str, name: str) -> list[Entry]:
        return [(path[cut:], path, split, (name,)) for path in walk_files(folder)]

    folders = _folders(top)
    splits = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    found: list[Entry] = []
    if splits:
        outside = [folder.name for folder in folders if folder not in splits]
        if outside:
            notes.append(f"ignored folders beside the splits: {', '.join(map(show_path, outside))}")
        for split in splits:
            for label in _folders(split):
                found += entries(label, SPLIT_NAMES[split.name.lower()], label.name)
        return found
    for label in folders:
        inside = _folders(label)
        if inside and all(folder.name.lower() in SPLIT_NAMES for folder in inside):
            for split in inside:
                found += entries(split, SPLIT_NAMES[split.name.lower()], label.name)
        else:
            found += entries(label, "train", label.name)
    return found


def _folders(parent: Path) -> list[Path]:
    return [entry for entry in sorted(parent.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _listed_files(manifest: Path) -> tuple[list[Entry], bool]:
    """Return the entries of a manifest, and whether it has a column of several labels.

    Paths are relative to the manifest. `labels` holds several, separated by ; , or | (in JSONL also a list).

    Raises:
        DataError: not readable as its suffix says, a row without a path, or other columns, which are named.
    """
    shown = show_path(manifest)
    with Source(os.fspath(manifest)).open(Limits(file_bytes=MAX_MANIFEST_BYTES)) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise DataError(f"{shown}: UTF-16, expected UTF-8")
    try:
        rows = MANIFESTS[manifest.suffix.lower()](text)
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{shown}: not a {manifest.suffix} manifest: {error}") from error
    columns = list(rows[0]) if rows else []
    path_column = next((name for name in PATH_COLUMNS if name in columns), None)
    label_column = next((name for name in ("labels", "label") if name in columns), None)
    if path_column is None or label_column is None:
        found = ", ".join(show_path(str(name)) for name in columns) or "none"
        raise DataError(f"{shown}: columns are {found}", "expected path, label or labels, and perhaps split")
    entries: list[Entry] = []
    for number, row in enumerate(rows, start=1):
        path, label, split = row.get(path_column), row.get(label_column), str(row.get("split") or "train").lower()
        if not isinstance(path, str) or not path or label is None:
            raise DataError(f"{shown}: row {number} has no {path_column} or no {label_column}")
        if split not in SPLIT_NAMES:
            raise DataError(f"{shown}: row {number} has split {show_path(split)}, expected train, val or test")
        parts = label if isinstance(label, list) else re.split(r"[;,|]", str(label))
        names = tuple(str(part).strip() for part in parts) if label_column == "labels" else (str(label),)
        entries.append((path, os.path.join(manifest.parent, path), SPLIT_NAMES[split], tuple(filter(None, names))))
    return entries, label_column == "labels"


def _json_lines(text: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is not an object")
    return rows


MANIFESTS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    ".csv": lambda text: list(csv.DictReader(io.StringIO(text))),
    ".tsv": lambda text: list(csv.DictReader(io.StringIO(text), delimiter="\t")),
    ".jsonl": _json_lines,
}
PATH_COLUMNS = ("path", "file_name", "file", "filename")


def _majority_modality(paths: list[str]) -> str | None:
    votes: Counter[str] = Counter()
    stride = max(1, len(paths) // PROBES)
    for path in [*paths[::stride], *paths[: PROBES * 4]]:
        try:
            votes[detect(Source(path))] += 1
        except DataError:
            continue
        if votes.total() >= PROBES:
            break
    return votes.most_common(1)[0][0] if votes else None


def _sniff_problem(path: str, kind: str) -> str | None:
    source = Source(path)
    try:
        if modality(kind).sniff(source.head(), path):
            return None
    except DataError as error:
        return str(error)
    return f"{source.shown}: not {kind} by its content"


def _nothing_usable(top: Path) -> DataError:
    if not top.is_dir():
        return DataError(f"{show_path(top)}: no usable files in the manifest", f"expected {formats()}")
    suffixes: Counter[str] = Counter()
    folders = len(_folders(top))
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


def _tally(counter: Counter[str]) -> str:
    shown = ", ".join(f"{show_path(name)} {count}" for name, count in counter.most_common(5))
    return shown + (", ..." if len(counter) > 5 else "")


def resolve_specs(specs: Mapping[str, InputSpec], examples: Sequence[Example], limits: Limits) -> dict[str, InputSpec]:
    """Return the specs with every "auto" settled by a sample of the examples."""
    probes = sorted(examples, key=lambda e: e.key)[:PROBES]
    return {
        name: modality(spec.modality).resolve(spec, [probe.sources[name] for probe in probes], limits)
        for name, spec in specs.items()
    }
