"""Random access to records on disk: each tar is indexed once and memory-mapped; a pipe is spooled first. No torch.

The index holds NumPy columns, about sixty bytes a record. It lies beside the tar as TAR.index, or in the user's cache
folder if the tar's folder is read-only, and is valid while the tar keeps its size and time of change. One digest
covers it; a damaged index is made again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import re
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
from perceiver_cli.files import atomic_write, cannot_read, cannot_write, open_file, show_path
from perceiver_cli.preprocess.source import key_of
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.digests import digests, num_digests
from perceiver_cli.records.format import HEAD_BYTES, SPLITS, Facts, Header, Stored, header_check
from perceiver_cli.records.stream import BLOCK, MAX_JSON_BYTES, Feed, is_sealed, is_tar, read_records

INDEX_FORMAT = 3
INDEX_SUFFIX = ".index"  # of the file beside a tar that holds its index
UNSEALED_FORMAT = 2  # version 0.1.0's: without digests
UNLIMITED = Limits(decoded_bytes=1 << 62, file_bytes=1 << 62)  # mapped files allocate nothing
READ_BYTES = 1 << 20  # per read
PER_MODALITY = {"at": "q", "size": "q", "seconds": "d", "sums_at": "q"}  # type codes of columns
# The tar header of KEY.json: its name, mode and owner, and size.
FACTS_HEADER = re.compile(rb"(?=[\w-]+\.json\0).{124}([0-7]{11})\0.{121}ustar", re.DOTALL)
Columns = dict[str, NDArray[Any]]

_tokens = itertools.count()
_open: WeakValueDictionary[int, Tar] = WeakValueDictionary()


class Tar:
    """One tar of records, mapped into memory. Forked data workers find it by its token.

    sound: for each block, whether it begins an array that this process has checked against its digests. One check is
    enough: it takes half as long as copying the array.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path, self.shown, self.token = path, show_path(path), next(_tokens)
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        self.sound = np.zeros(len(self._map) // BLOCK + 1, bool)  # only pages that are set take memory
        _open[self.token] = self

    def bytes_at(self, at: int, size: int) -> memoryview:
        """Return bytes of the tar, still on disk. Raises DataError if the tar has become too short."""
        if self._map.size() < at + size:  # the system would kill this process for a read past the end
            raise DataError(f"{self.shown}: became shorter while it was read, found {self._map.size()} bytes")
        return self._bytes[at : at + size]

    def mark(self, at: int) -> None:
        """Record that the array at an offset is intact."""
        self.sound[at // BLOCK] = True

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return _opened, (self.token,)


def _opened(token: int) -> Tar:
    return _open[token]


@dataclass(frozen=True)
class TextColumn:
    """The cells of a column, four bytes for each record. places: of a record's cell in texts."""

    places: NDArray[np.int32]
    texts: tuple[str, ...]

    def of(self, row: int) -> str:
        """Return the cell of a record."""
        return self.texts[int(self.places[row])]


@dataclass(frozen=True)
class Shards:
    """Records of one or more tars, as columns; each row is a record.

    header: preparation of all records. names: class names. columns: id_ends into ids (bytes), keys (hashes of the ids),
    splits (indices into SPLITS), files (indices into tars), label_ends into labels (indices into names), and for each
    modality at_, size_ (-1 if missing), seconds_ and sums_at_, a place in sums (digests of arrays; -1 for none).
    errors: of unreadable inputs, by row.
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
        """Return the id in a record's facts."""
        ends = self.columns["id_ends"]
        start = int(ends[row - 1]) if row else 0
        return self.columns["ids"][start : int(ends[row])].tobytes().decode("utf-8", "surrogatepass")

    def id(self, row: int) -> str:
        """Return the id of a record, with a number added if earlier records have the same id."""
        name = self.given_id(row)
        return f"{name}~{self.copies[row]}" if row in self.copies else name

    @cached_property
    def copies(self) -> dict[int, int]:
        """The number of earlier rows with the same id, by row; rows without any are left out."""
        keys = self.columns["keys"]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
        numbers: dict[int, int] = {}
        for place in same.tolist():
            numbers[int(order[place])] = numbers.get(int(order[place - 1]), 0) + 1
        return numbers

    def label_indices(self, row: int) -> Sequence[int]:
        """Return the labels of a record, as indices into `names`."""
        ends = self.columns["label_ends"]
        return self.columns["labels"][int(ends[row - 1]) if row else 0 : int(ends[row])].tolist()  # type: ignore[no-any-return]

    def stored(self, row: int, name: str, modalities: Sequence[str]) -> dict[str, Stored]:
        """Return a record's arrays of these modalities, if it has them; they stay on disk until they are read."""
        columns, tar = self.columns, self.tars[int(self.columns["files"][row])]
        stored = {}
        for kind in modalities:
            at, size, seconds, place = (columns[f"{key}_{kind}"][row].item() for key in PER_MODALITY)
            if size >= 0:
                each = Stored(name, self.header, kind, seconds, partial(tar.bytes_at, at, size))
                if place >= 0 and not tar.sound[at // BLOCK]:
                    sums = columns["sums"][place : place + num_digests(size)].tobytes()
                    each = replace(each, digests=sums, within=tar.shown, mark=partial(tar.mark, at))
                stored[kind] = each
        return stored

    def facts(self, row: int) -> Facts:
        """Return the facts of a record, read from its tar: KEY.json lies before its arrays. Raises DataError."""
        tar = self.tars[int(self.columns["files"][row])]
        places = [int(self.columns[f"at_{name}"][row]) for name in self.header.inputs]
        sizes = [int(self.columns[f"size_{name}"][row]) for name in self.header.inputs]
        at = min((at for at, size in zip(places, sizes, strict=True) if size >= 0), default=0) - BLOCK
        for place in range(at - BLOCK, max(-1, at - MAX_JSON_BYTES - 4 * BLOCK), -BLOCK):
            block = bytes(tar.bytes_at(place, BLOCK))
            if (found := FACTS_HEADER.match(block)) is not None:
                return Facts.parse(bytes(tar.bytes_at(place + BLOCK, int(found[1], 8))), tar.shown)
        return Facts(self.given_id(row), self.given_id(row))  # an unreadable input has no arrays

    def column(self, column: str) -> TextColumn:
        """Return the cells of a manifest's column, after reading the facts of all records.

        Raises DataError if a readable record lacks it.
        """
        texts: dict[str, int] = {"": 0}
        places = np.zeros(len(self), np.int32)
        for row in range(len(self)):
            cell = self.facts(row).columns.get(column)
            if cell is None and row not in self.errors:
                shown = self.tars[int(self.columns["files"][row])].shown
                fault = f"{shown}: no column {show_path(column)} in the record {show_path(self.given_id(row))}"
                raise DataError(fault, "prepare a manifest that has it, or group by parent")
            places[row] = texts.setdefault(cell or "", len(texts))
        return TextColumn(places, tuple(texts))

    def in_order(self) -> NDArray[np.int64]:
        """Return the rows sorted by id."""
        if all(one < two for one, two in pairwise(map(self.id, range(len(self))))):  # the usual case
            return np.arange(len(self))
        return np.array(sorted(range(len(self)), key=self.id), np.int64)


def open_shards(paths: Sequence[str]) -> Shards:
    """Return the records of tars. Raises DataError if their preparation differs, IntegrityError if one is damaged."""
    shards = []
    for path in paths:
        try:
            with open_file(path) as file:
                shards.append(_indexed(file, path))
        except OSError as error:
            raise cannot_read(path, error) from error
    return _joined(shards)


def spooled(file: BinaryIO, name: str) -> Shards:
    """Return a stream's records, copied to disk while in use. Raises DataError, IntegrityError or ResourceError."""
    shown = show_path(name)
    head = file.read(HEAD_BYTES)
    if not is_tar(head):
        fault = "not records" if head else "empty"
        expected = "expected a stream from `perceiver preprocess`, a tar, a CSV with a header, or JSON lines"
        raise DataError(f"{shown}: {fault}", expected)
    try:
        with tempfile.TemporaryFile() as copy:  # without a name, so that nothing is left if a signal ends the process
            copied = copy.write(head)
            while data := file.read(READ_BYTES):
                copied += copy.write(data)
            copy.flush()
            copy.seek(0)
            shards = _joined([_scanned(Tar(copy, name), copy, shown)])
            place = show_path(tempfile.gettempdir())
            note = f"{shown}: {copied / 1e6:,.1f} MB of records, copied to {place} until this process ends"
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()), error) from error
    return replace(shards, notes=(note,))


def _indexed(file: BinaryIO, path: str) -> Shards:
    """Return the records of one tar, from its cached index or a new one, which is then cached."""
    status = os.fstat(file.fileno())
    if status.st_size == 0:
        raise DataError(f"{show_path(path)}: the file is empty")
    tar = Tar(file, path)
    identity = {"format": INDEX_FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "perceiver"
    places = [Path(path + INDEX_SUFFIX), cache / f"{key_of(os.path.abspath(path)):016x}.index"]
    for place in places:
        if (cached := _read_index(place, identity, tar)) is not None:
            return cached
    shards = _scanned(tar, file, show_path(path))
    for place in places:
        with suppress(ResourceError):
            _write_index(place, identity, shards)
            break
    return shards


def _scanned(tar: Tar, file: BinaryIO, shown: str) -> Shards:
    """Return the records of one tar; arrays are skipped, other members are read."""
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
            sums = facts.digests.get(name, b"")
            row[f"sums_at_{name}"] = len(columns["sums"]) if sums else -1
            columns["sums"].frombytes(sums)
        for key, value in row.items():
            columns[key].append(value)
    if first is None:
        raise DataError(f"{shown}: no records in it")
    return Shards((tar,), first, tuple(names), {key: np.array(column) for key, column in columns.items()}, errors)


def _type_codes(header: Header) -> dict[str, str]:
    """Return the type code of each column of an index, for `array` and NumPy."""
    codes = {"ids": "B", "id_ends": "q", "keys": "Q", "splits": "B", "labels": "i", "label_ends": "q", "sums": "B"}
    return codes | {f"{key}_{name}": code for name in sorted(header.inputs) for key, code in PER_MODALITY.items()}


def _joined(tars: Sequence[Shards]) -> Shards:
    """Return the records of several tars, one tar after another."""
    header = tars[0].header
    for shards in tars:
        header_check(show_path(shards.tars[0].path), header, shards.header)
    names = tuple(dict.fromkeys(name for shards in tars for name in shards.names))
    index = {name: place for place, name in enumerate(names)}
    joined: dict[str, list[NDArray[Any]]] = defaultdict(list)
    num_rows = num_ids = num_labels = num_sums = 0
    errors: dict[int, str] = {}
    for number, shards in enumerate(tars):
        table = shards.columns
        moved = {
            "id_ends": table["id_ends"] + num_ids,
            "label_ends": table["label_ends"] + num_labels,
            "labels": np.array([index[name] for name in shards.names], np.int32)[table["labels"]],
            "files": np.full(len(shards), number, np.int32),
        }
        for name in header.inputs:
            place = table[f"sums_at_{name}"]
            moved[f"sums_at_{name}"] = np.where(place < 0, place, place + num_sums)
        for key, column in (table | moved).items():
            joined[key].append(column)
        errors |= {num_rows + row: error for row, error in shards.errors.items()}
        num_rows, num_ids = num_rows + len(shards), num_ids + len(table["ids"])
        num_labels, num_sums = num_labels + len(table["labels"]), num_sums + len(table["sums"])
    columns = {key: each[0] if len(each) == 1 else np.concatenate(each) for key, each in joined.items()}
    return Shards(tuple(shards.tars[0] for shards in tars), header, names, columns, errors)


def _write_index(place: Path, identity: dict[str, int], shards: Shards) -> None:
    from safetensors.numpy import save

    header, errors = shards.header.to_json().decode(), list(shards.errors.items())
    facts = {**identity, "header": header, "names": shards.names, "errors": errors}
    facts["digest"] = _index_digest(facts, shards.columns)
    with atomic_write(place) as file:
        file.write(save(shards.columns, {"index": json.dumps(facts)}))


def _index_digest(facts: Mapping[str, Any], columns: Columns) -> str:
    """Return the digest of an index: of its facts, and of the digests of its columns."""
    table = [(name, column.dtype.str, digests(column.tobytes()).hex()) for name, column in sorted(columns.items())]
    return hashlib.sha256(json.dumps([facts, table]).encode()).hexdigest()


def _read_index(place: Path, identity: dict[str, int], tar: Tar) -> Shards | None:
    """Return the cached index, or None if it is missing, stale or corrupt."""
    if not place.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, "numpy") as file:
            facts = json.loads(file.metadata()["index"])
            if any(facts[key] != value for key, value in identity.items() if key != "format"):
                return None
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        header = Header.parse(facts["header"].encode(), show_path(place))
        if facts["format"] == UNSEALED_FORMAT and not is_sealed(tar.bytes_at(0, BLOCK)):
            none = np.full(len(columns["keys"]), -1)
            columns |= {"sums": np.empty(0, np.uint8)} | {f"sums_at_{name}": none for name in header.inputs}
        elif facts["format"] != INDEX_FORMAT or facts.pop("digest") != _index_digest(facts, columns):
            return None
        names = tuple(map(str, facts["names"]))
        errors = {int(row): str(error) for row, error in facts["errors"]}
        shards = Shards((tar,), header, names, columns, errors)
        return shards if _sound(shards, identity["size"]) else None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, IntegrityError):
        return None


def _sound(shards: Shards, num_bytes: int) -> bool:
    """Return whether the columns of one tar fit together and point into its bytes."""
    columns, codes = shards.columns, _type_codes(shards.header)
    if columns.keys() != codes.keys() or any(columns[key].dtype != np.dtype(code) for key, code in codes.items()):
        return False
    if any(columns[key].shape != (len(shards),) for key in codes if key not in ("ids", "labels", "sums")):
        return False
    ends = [(columns[f"{key}_ends"], columns[f"{key}s"]) for key in ("id", "label")]
    spans = [(columns[f"at_{name}"], columns[f"size_{name}"]) for name in shards.header.inputs]
    labels, sums = columns["labels"], columns["sums"]
    places = [(columns[f"sums_at_{name}"], columns[f"size_{name}"]) for name in shards.header.inputs]
    return bool(
        all((np.diff(end, prepend=0) >= 0).all() and int(end[-1]) == len(flat) for end, flat in ends)
        and all(((at >= 0) & (size >= -1) & (size <= num_bytes) & (at <= num_bytes - size)).all() for at, size in spans)
        and all(((at >= -1) & ((at < 0) | (at <= len(sums) - num_digests(size)))).all() for at, size in places)
        and (columns["splits"] < len(SPLITS)).all()
        and ((labels >= 0) & (labels < len(shards.names))).all()
        and all(0 <= row < len(shards) for row in shards.errors)
    )
