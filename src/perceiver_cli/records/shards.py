"""Records on disk, read at random: each tar is indexed once and memory-mapped; a pipe is spooled first. No torch.

The index is columns of NumPy arrays, some fifty bytes a record, kept beside the tar as TAR.index (in the user's cache
folder where it cannot be written there) and good for as long as the tar has its size and time of change.
"""

from __future__ import annotations

import glob
import itertools
import json
import mmap
import os
import sys
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import DataError, IntegrityError, ResourceError
from perceiver_cli.files import atomic_write, cannot_write, show_path
from perceiver_cli.preprocess.source import key_of
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.format import HEAD_BYTES, SPLITS, Header, Stored, header_check
from perceiver_cli.records.stream import Feed, is_tar, read_records

INDEX_FORMAT = 2
UNLIMITED = Limits(decoded_bytes=1 << 62, file_bytes=1 << 62)  # of what is mapped, nothing is allocated
READ_BYTES = 1 << 20  # at a time
Columns = dict[str, NDArray[Any]]

_tokens = itertools.count()
_open: WeakValueDictionary[int, Tar] = WeakValueDictionary()


class Tar:
    """One tar of records, mapped into memory. Data workers, which are forked, find it again by its token."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path, self.token = path, next(_tokens)
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        _open[self.token] = self

    def bytes_at(self, at: int, size: int) -> memoryview:
        """Return bytes of the tar, still on disk. Raises DataError if it has become too short for them."""
        if self._map.size() < at + size:  # the system would end the process that reads there
            raise DataError(f"{show_path(self.path)}: became shorter while it was read, found {self._map.size()} bytes")
        return self._bytes[at : at + size]

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return _opened, (self.token,)


def _opened(token: int) -> Tar:
    return _open[token]


@dataclass(frozen=True)
class Shards:
    """Records of one or more tars, as columns; each row is a record.

    tars, header: what they lie in, and how all of them were prepared. names: of labels. columns: id_ends into ids
    (bytes); keys (numbers made from the ids), splits (places in SPLITS), files (places in tars), label_ends into labels
    (places in names); and of each modality at_, size_ (-1 where it is missing) and seconds_. errors: by row, of inputs
    that could not be read.
    """

    tars: tuple[Tar, ...]
    header: Header
    names: tuple[str, ...]
    columns: Columns
    errors: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["keys"])

    def given_id(self, row: int) -> str:
        """Return the id of a record, as it says."""
        ends = self.columns["id_ends"]
        start = int(ends[row - 1]) if row else 0
        return self.columns["ids"][start : int(ends[row])].tobytes().decode("utf-8", "surrogatepass")

    def id(self, row: int) -> str:
        """Return the id of a record; of records that say the same one, later ones have a number added."""
        name = self.given_id(row)
        return f"{name}~{self.copies[row]}" if row in self.copies else name

    @cached_property
    def copies(self) -> dict[int, int]:
        """The rows whose id an earlier row has, and how many earlier ones have it."""
        keys = self.columns["keys"]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        numbers: dict[int, int] = {}
        for place in same.tolist():
            numbers[int(order[place])] = numbers.get(int(order[place - 1]), 0) + 1
        return numbers

    def label_indices(self, row: int) -> Sequence[int]:
        """Return the labels of a record, as places in `names`."""
        ends = self.columns["label_ends"]
        return self.columns["labels"][int(ends[row - 1]) if row else 0 : int(ends[row])].tolist()  # type: ignore[no-any-return]

    def stored(self, row: int, name: str, modalities: Sequence[str]) -> dict[str, Stored]:
        """Return what a record brings of those modalities that it has; its arrays stay on disk until they are read."""
        columns, tar = self.columns, self.tars[int(self.columns["files"][row])]
        stored = {}
        for kind in modalities:
            at, size, seconds = (columns[f"{key}_{kind}"][row].item() for key in ("at", "size", "seconds"))
            if size >= 0:
                stored[kind] = Stored(name, self.header, kind, seconds, partial(tar.bytes_at, at, size))
        return stored

    def in_order(self) -> NDArray[np.int64]:
        """Return the rows sorted by id."""
        if all(one < two for one, two in pairwise(map(self.id, range(len(self))))):  # as they are written
            return np.arange(len(self))
        return np.array(sorted(range(len(self)), key=self.id), np.int64)


def tar_files(data: str | os.PathLike[str]) -> list[str] | None:
    """Return the tars that a tar, a folder or a pattern stands for, else None. Raises DataError if nothing matches."""
    path = os.fspath(data)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar"))) or None
    if os.path.isfile(path):
        with suppress(OSError), open(path, "rb") as file:
            return [path] if is_tar(file.read(HEAD_BYTES)) else None
    if not os.path.exists(path) and glob.has_magic(path):
        matches = sorted(glob.glob(path))
        if not matches:
            raise DataError(f"{show_path(path)}: no file matches this pattern", "expected tars of records")
        return matches
    return None


def open_shards(paths: Sequence[str]) -> Shards:
    """Return the records of tars. Raises DataError if they are not prepared alike, IntegrityError if one is damaged."""
    tars = []
    for path in paths:
        try:
            with open(path, "rb", READ_BYTES) as file:
                tars.append(_indexed(file, path))
        except OSError as error:
            raise DataError(f"{show_path(path)}: cannot read: {error.strerror}") from error
    return _joined(tars)


def spooled(file: BinaryIO, name: str) -> Shards:
    """Return the records of a stream, which lies on disk until they are let go of.

    Raises DataError if it is no such stream, IntegrityError if it is damaged, ResourceError if the disk is full.
    """
    shown = show_path(name)
    head = file.read(HEAD_BYTES)
    if not is_tar(head):
        what = "not records" if head else "nothing in it"
        raise DataError(f"{shown}: {what}", "expected a stream as `perceiver preprocess` writes it")
    try:
        with tempfile.NamedTemporaryFile(prefix="perceiver-", suffix=".tar") as copy:
            copied = copy.write(head)
            while data := file.read(READ_BYTES):
                copied += copy.write(data)
            copy.flush()
            copy.seek(0)
            shards = _joined([_scanned(Tar(copy, name), copy, shown)])  # type: ignore[arg-type]
            where = f"{shown}: {copied / 1e6:,.1f} MB of records, spooled to {show_path(copy.name)} until this ends"
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()), error) from error
    return replace(shards, notes=(where,))


IndexedTar = tuple[Tar, Header, tuple[str, ...], Columns, dict[int, str]]


def _indexed(file: BinaryIO, path: str) -> IndexedTar:
    """Return a tar with its index: the one that was kept if it is of this very file, else a new one, which is kept."""
    status = os.fstat(file.fileno())
    if status.st_size == 0:
        raise DataError(f"{show_path(path)}: the file is empty")
    tar = Tar(file, path)
    identity = {"format": INDEX_FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "perceiver"
    places = [Path(f"{path}.index"), cache / f"{key_of(os.path.abspath(path)):016x}.index"]
    for place in places:
        kept = _read_index(place, identity)
        if kept is not None:
            return (tar, *kept)
    indexed = _scanned(tar, file, show_path(path))
    for place in places:
        with suppress(ResourceError):
            _write_index(place, identity, indexed)
            break
    return indexed


def _scanned(tar: Tar, file: BinaryIO, shown: str) -> IndexedTar:
    """Return a tar with a new index: its members are gone through, their arrays passed over."""
    feed = Feed(file, shown)
    names: dict[str, int] = {}
    errors: dict[int, str] = {}
    first: Header | None = None
    columns: dict[str, array[Any]] = {}
    for header, record in read_records(feed, UNLIMITED, feed.skip):
        if first is None:
            first = header
            columns = {key: array(code) for key, code in _type_codes(header).items()}
        facts = record.facts
        if facts.error is not None:
            errors[len(columns["keys"])] = facts.error
        columns["ids"].frombytes(facts.id.encode("utf-8", "surrogatepass"))
        columns["labels"].extend(names.setdefault(sys.intern(name), len(names)) for name in facts.labels)
        row: dict[str, float] = {
            "id_ends": len(columns["ids"]), "keys": key_of(facts.id), "splits": SPLITS.index(facts.split),
            "label_ends": len(columns["labels"]),
        }  # fmt: skip
        for name in first.inputs:
            row[f"at_{name}"], row[f"size_{name}"] = record.arrays.get(name, (0, -1))
            row[f"seconds_{name}"] = facts.seconds.get(name, 0.0)
        for key, value in row.items():
            columns[key].append(value)
    if first is None:
        raise DataError(f"{shown}: no records in it")
    return tar, first, tuple(names), {key: np.array(column) for key, column in columns.items()}, errors


def _type_codes(header: Header) -> dict[str, str]:
    """Return the columns of an index and the type of each, as `array` and NumPy name it."""
    codes = {"ids": "B", "id_ends": "q", "keys": "Q", "splits": "B", "labels": "i", "label_ends": "q"}
    for name in sorted(header.inputs):
        codes |= {f"at_{name}": "q", f"size_{name}": "q", f"seconds_{name}": "d"}
    return codes


def _joined(indexed: Sequence[IndexedTar]) -> Shards:
    """Return the rows of several tars one after another, labels by name."""
    tars, headers, *_ = zip(*indexed, strict=True)
    for tar, header in zip(tars, headers, strict=True):
        header_check(show_path(tar.path), headers[0], header)
    names = tuple(dict.fromkeys(name for _, _, own, _, _ in indexed for name in own))
    index = {name: place for place, name in enumerate(names)}
    joined: dict[str, list[NDArray[Any]]] = defaultdict(list)
    num_rows = num_ids = num_labels = 0
    errors: dict[int, str] = {}
    for number, (_, _, own, table, bad) in enumerate(indexed):
        moved = {
            "id_ends": table["id_ends"] + num_ids,
            "label_ends": table["label_ends"] + num_labels,
            "labels": np.array([index[name] for name in own], np.int32)[table["labels"]],
            "files": np.full(len(table["keys"]), number, np.int32),
        }
        for key, column in (table | moved).items():
            joined[key].append(column)
        errors |= {num_rows + row: error for row, error in bad.items()}
        num_rows, num_ids = num_rows + len(table["keys"]), num_ids + len(table["ids"])
        num_labels += len(table["labels"])
    columns = {key: each[0] if len(each) == 1 else np.concatenate(each) for key, each in joined.items()}
    return Shards(tars, headers[0], names, columns, errors)


def _write_index(place: Path, identity: dict[str, int], indexed: IndexedTar) -> None:
    from safetensors.numpy import save

    _, header, names, columns, errors = indexed
    facts = {**identity, "header": header.to_json().decode(), "names": list(names), "errors": list(errors.items())}
    with atomic_write(place) as file:
        file.write(save(columns, {"index": json.dumps(facts)}))


def _read_index(
    place: Path, identity: dict[str, int]
) -> tuple[Header, tuple[str, ...], Columns, dict[int, str]] | None:
    """Return the cached index, or None if it is missing, stale or corrupt."""
    if not place.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, "numpy") as file:
            facts = json.loads(file.metadata()["index"])
            if any(facts[key] != value for key, value in identity.items()):
                return None
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        header = Header.parse(facts["header"].encode(), show_path(place))
        names = tuple(map(str, facts["names"]))
        errors = {int(row): str(error) for row, error in facts["errors"]}
        sound = _sound(columns, header, len(names), identity["size"])
        sound = sound and all(0 <= row < len(columns["keys"]) for row in errors)
        return (header, names, columns, errors) if sound else None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, IntegrityError):
        return None


def _sound(columns: Columns, header: Header, num_names: int, num_bytes: int) -> bool:
    """Return whether columns fit together and point into the file."""
    rows = len(columns["keys"])
    codes = _type_codes(header)
    if columns.keys() != codes.keys() or any(columns[key].dtype != np.dtype(code) for key, code in codes.items()):
        return False
    if any(columns[key].shape != (rows,) for key in codes if key not in ("ids", "labels")):
        return False
    ends = [(columns[f"{key}_ends"], columns[f"{key}s"]) for key in ("id", "label")]
    places = [(columns[f"at_{name}"], columns[f"size_{name}"]) for name in header.inputs]
    labels = columns["labels"]
    return bool(
        all((np.diff(end, prepend=0) >= 0).all() and int(end[-1]) == len(flat) for end, flat in ends)
        and all(
            ((at >= 0) & (size >= -1) & (size <= num_bytes) & (at <= num_bytes - size)).all() for at, size in places
        )
        and (columns["splits"] < len(SPLITS)).all()
        and ((labels >= 0) & (labels < num_names)).all()
    )
