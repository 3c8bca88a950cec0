"""Records as a tar stream: the writer, and a reader that notices a stream cut short. No torch.

A record is one example in adjacent members with WebDataset's names: `KEY.json` (path, id, label, split), `KEY.cls`
(class index) and one `KEY.<modality>.npy` for each modality of the example. The first member says how the arrays were
prepared, the last one counts the records. An unreadable input has an error member in its place, which other tools
ignore. Streams may follow each other (`cat a.tar b.tar`). The same examples give the same bytes at any time, anywhere.

The reader checks each size before it allocates memory, and never unpacks a member to a file.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Generic
from zlib import adler32, crc32

from perceiver_cli.errors import DataError, IntegrityError, LimitError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.digests import digests
from perceiver_cli.records.format import Facts, Header, Record, T, header_check, json_object

# WebDataset and Hugging Face ignore members without a dot and with underscores around their name.
HEADER, ERROR, END = "__perceiver__/header", "__perceiver__/error", "__perceiver__/end"
BLOCK = 512
ZEROS = bytes(BLOCK)
SEAL_AT = 500  # in a tar header
END_BYTES = 4 * BLOCK  # of the end of a stream: its member and two blocks of zeros
UNSEALED = bytes(8)  # what a member without a seal has in its place, as in records of version 0.1.0
MAX_NAME = 100  # bytes of a member's name in USTAR
MAX_JSON_BYTES = 1 << 20  # for the facts of a record
MAX_HEADER_BYTES = 64 << 20  # the header holds the class names
COMPRESSED = {b"\x1f\x8b": "zcat", b"\x28\xb5\x2f\xfd": "zstd -dc", b"\xfd7zXZ\0": "xz -dc", b"BZh": "bzcat"}


class Writer:
    """Writes a stream through a function: the header at once, then records, then the end. num_*: written so far."""

    def __init__(self, write: Callable[[bytes], object], header: Header) -> None:
        self.write = write
        self.num_records = self.num_errors = self.num_bytes = 0
        self.packed(tar_members([(HEADER, header.to_json())]), records=0)

    def packed(self, members: bytes, records: int = 1, errors: int = 0) -> None:
        """Write the members that `pack` returned; the caller passes rising keys."""
        self.num_records += records
        self.num_errors += errors
        self.num_bytes += len(members)
        self.write(members)

    def close(self) -> None:
        """Write the end, which proves that no record is missing."""
        counts = {"records": self.num_records, "errors": self.num_errors}
        self.packed(tar_members([(END, json.dumps(counts).encode() + b"\n")]), records=0)
        self.write(2 * ZEROS)


def pack(facts: Facts, arrays: Mapping[str, bytes | memoryview], number: int, header: Header) -> bytes:
    """Return the tar members of one record, whose arrays are in NPY format and whose key is the number."""
    if facts.error is not None:
        return tar_members([(ERROR, facts.to_json(header.multi_label))])
    key = f"{number:08d}"
    facts = replace(facts, digests={name: digests(array) for name, array in arrays.items()})
    members: list[tuple[str, bytes | memoryview]] = [(f"{key}.json", facts.to_json(header.multi_label))]
    if not header.multi_label and facts.labels and facts.labels[0] in header.class_index:
        members.append((f"{key}.cls", b"%d" % header.class_index[facts.labels[0]]))
    return tar_members([*members, *((f"{key}.{name}.npy", array) for name, array in arrays.items())])


def tar_members(members: Sequence[tuple[str, bytes | memoryview]]) -> bytes:
    """Return POSIX ustar members without owner and time. Raises UsageError for a name or size that no tar can hold.

    Each has a seal, except arrays: KEY.json holds their digests.
    """
    data: list[bytes | memoryview] = []
    for name, content in members:
        seal = UNSEALED if name.endswith(".npy") else _seal(content)
        data += [_tar_header(name, len(content), seal), content, bytes(-len(content) % BLOCK)]
    return b"".join(data)


def _seal(content: bytes | memoryview) -> bytes:
    """Return the crc32 of a member's content, for the end of its tar header: USTAR leaves these bytes unused."""
    return b"%08x" % crc32(content)


# The header of an empty regular file without owner and time; a record's differs in name, size, checksum and seal.
_TAR_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_TAR_END_SUM = sum(_TAR_HEADER[156:SEAL_AT]) + 8 * ord(" ")  # the checksum counts itself as eight blanks


def _tar_header(name: str, size: int, seal: bytes) -> bytes:
    """Return `TarInfo.tobuf(USTAR_FORMAT)` of a regular file, eight times faster: `tobuf` makes writing slow.

    seal: eight bytes that replace zeros.
    """
    encoded = name.encode("ascii")
    if len(encoded) > MAX_NAME or size >= 8**11:
        raise UsageError(f"a member {show_path(name)} of {size} bytes does not fit into a tar")
    begin = encoded.ljust(MAX_NAME, b"\0") + _TAR_HEADER[100:124] + b"%011o\0" % size + _TAR_HEADER[136:148]
    end = _TAR_HEADER[156:SEAL_AT] + seal + _TAR_HEADER[SEAL_AT + len(seal) :]
    return begin + b"%06o\0 " % (sum(begin) + sum(seal) + _TAR_END_SUM) + end


class Feed:
    """The bytes of a stream. at: bytes taken or skipped. records: records read. shown: the name, safe to print."""

    def __init__(self, file: BinaryIO, shown: str, begun: bytes = b"") -> None:
        self.file, self.shown = file, shown
        self.at = self.records = 0
        self._begun = begun  # bytes that the caller has read already

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end."""
        begun, self._begun = self._begun[:count], self._begun[count:]
        data = begun + self.file.read(count - len(begun))
        self.at += len(data)
        return data

    def skip(self, count: int) -> tuple[int, int]:
        """Skip `count` bytes of a file; return their position and `count`."""
        self.file.seek(count, io.SEEK_CUR)
        self.at += count
        return self.at - count, count

    def content(self, name: str, size: int, seal: bytes, limit: int) -> bytes:
        """Return the content of a member. Raises IntegrityError if it is larger than `limit`, cut short or damaged."""
        if size > limit:
            raise self.damaged(f"{show_path(name)} of {size} bytes, expected {limit} at most")
        padded = size + -size % BLOCK
        data = self.take(padded)
        if len(data) < padded:
            raise self.cut()
        if seal not in (UNSEALED, _seal(content := data[:size])):
            raise self.damaged(f"{show_path(name)} is damaged: its bytes are not those that were written")
        return content

    def cut(self) -> IntegrityError:
        """Return the error of a stream that ends too early."""
        fault = f"{self.shown}: the stream was cut short after {self.records} records"
        return IntegrityError(fault, "its writer did not finish: see the writer's error")

    def damaged(self, fault: str) -> IntegrityError:
        """Return the error of a stream with a fault."""
        return IntegrityError(f"{self.shown}: {fault} (after {self.records} records, byte {self.at})")


def is_tar(head: bytes) -> bool:
    """Return whether bytes begin like a tar or a compressed file."""
    return head[257:262] == b"ustar" or compression(head) is not None


def is_sealed(block: bytes | memoryview) -> bool:
    """Return whether the tar header of a member has a seal: records of version 0.1.0 have none."""
    return block[SEAL_AT : SEAL_AT + len(UNSEALED)] != UNSEALED


def compression(head: bytes) -> str | None:
    """Return the command that unpacks a file with these first bytes, or None if it is not compressed."""
    return next((command for magic, command in COMPRESSED.items() if head.startswith(magic)), None)


def read_records(feed: Feed, limits: Limits, take: Callable[[int], T]) -> Iterator[tuple[Header, Record[T]]]:
    """Yield the header and each record of one or several adjacent streams; `feed.records` does not count errors.

    take: called with the size of an array: `feed.take` gives its bytes, `feed.skip` its place. Raises DataError for
    another kind of file, LimitError for an array above `limits` before it is read, and IntegrityError, which counts the
    records before the fault, for a stream that is cut short or damaged.
    """
    header: Header | None = None
    while (header := _next_header(feed, header)) is not None:
        count = errors = 0
        pending: _Pending[T] | None = None
        before = ""  # key of the last record
        while True:
            name, size, seal = _parse_member(feed, feed.take(BLOCK))
            key = name.partition(".")[0]
            if pending is not None and key != pending.key:
                yield header, pending.record(feed)
                before, pending, count = pending.key, None, count + 1
                feed.records += 1
            if name == END:
                counts = json_object(feed.content(name, size, seal, MAX_JSON_BYTES), f"{feed.shown}: {END}")
                for kind, number in (("records", count), ("errors", errors)):
                    if counts.get(kind) != number:
                        raise feed.damaged(f"{number} {kind}, but its end says {counts.get(kind)!r:.20}")
                break
            if name == ERROR:
                facts = Facts.parse(feed.content(name, size, seal, MAX_JSON_BYTES), f"{feed.shown}: {ERROR}")
                if facts.error is None:
                    raise feed.damaged(f"{ERROR} without an error")
                yield header, Record("", facts, {})
                errors += 1
                continue
            if pending is None:
                if not re.fullmatch(r"[0-9A-Za-z_-]+", key) or key <= before:
                    raise feed.damaged(f"a member {show_path(name)}, expected rising keys, then {END}")
                pending = _Pending(key)
            pending.add(feed, name, size, seal, header.inputs, limits, take)


@dataclass
class _Pending(Generic[T]):
    """A record with the members read so far."""

    key: str
    facts: bytes | None = None
    label: bytes | None = None
    arrays: dict[str, T] = field(default_factory=dict)

    def add(
        self, feed: Feed, name: str, size: int, seal: bytes, reads: Collection[str], limits: Limits,
        take: Callable[[int], T],
    ) -> None:  # fmt: skip
        """Read one member."""
        rest = name.partition(".")[2]
        kind, _, suffix = rest.rpartition(".")
        if rest == "json" and self.facts is None:
            self.facts = feed.content(name, size, seal, MAX_JSON_BYTES)
        elif rest == "cls" and self.label is None:
            self.label = feed.content(name, size, seal, BLOCK)
        elif suffix == "npy" and kind in reads and kind not in self.arrays:
            if size > limits.decoded_bytes:
                raise LimitError(f"{feed.shown}: {name}", size, "bytes", "decoded_bytes", limits.decoded_bytes)
            before, padding = feed.at, -size % BLOCK
            self.arrays[kind] = take(size)
            feed.take(padding)
            if feed.at - before < size + padding:
                raise feed.cut()
        else:
            expected = ", ".join(f"{kind}.npy" for kind in reads)
            raise feed.damaged(f"a member {show_path(name)}, expected one each of json, cls, {expected}")

    def record(self, feed: Feed) -> Record[T]:
        if self.facts is None:
            raise feed.damaged(f"no {self.key}.json")
        return Record(self.key, Facts.parse(self.facts, f"{feed.shown}: {self.key}.json"), self.arrays)


def _next_header(feed: Feed, before: Header | None) -> Header | None:
    """Return the header of the next stream, None at the end. Skip blocks of zeros between and after streams."""
    block = ZEROS
    while block == ZEROS:
        block = feed.take(BLOCK)
    if len(block) == 0 and before is not None:
        return None
    hint = "expected records written by `perceiver preprocess`"
    if before is None:
        command = compression(block)
        if command is not None:
            raise DataError(f"{feed.shown}: compressed", f"unpack it: {command} FILE | perceiver ... -")
        if block[257:262] != b"ustar":
            raise DataError(f"{feed.shown}: {'not a tar' if block else 'empty'}", hint)
    if not block.startswith(HEADER.encode() + b"\0"):
        name = show_path(block[:MAX_NAME].rstrip(b"\0").decode("ascii", "replace"))
        raise DataError(f"{feed.shown}: a tar that begins with {name}, not with {HEADER}", hint)
    header = Header.parse(feed.content(*_parse_member(feed, block), MAX_HEADER_BYTES), feed.shown)
    if before is not None:
        header_check(feed.shown, before, header)
    return header


_SIZE = re.compile(rb"[0-7]{1,11}[ \0]")


def _parse_member(feed: Feed, block: bytes) -> tuple[str, int, bytes]:
    """Return name, size and seal of a member from its header. Raises IntegrityError unless it is a regular file."""
    if len(block) < BLOCK or block == ZEROS:
        raise feed.cut()
    field_ = block[148:156]
    try:
        declared = int(field_.strip(b" \0"), 8)
    except ValueError:
        declared = -1
    # The low half of Adler-32 is the sum of the bytes plus one, a hundred times faster than `sum`.
    checksum = adler32(block) % 65536 - 1 - sum(field_) + 8 * 0x20
    size = _SIZE.match(block, 124, 136)
    if (declared - checksum) % 65521 or block[257:262] != b"ustar" or size is None:
        raise feed.damaged("a damaged tar header")
    name = block[:100].rstrip(b"\0").decode("ascii", "replace")
    if block[156:157] not in (b"0", b"\0") or block[345:346] != b"\0":
        raise feed.damaged(f"{show_path(name)} of tar type {block[156:157]!r:.10}, expected regular files")
    return name, int(size[0][:-1], 8), block[SEAL_AT : SEAL_AT + len(UNSEALED)]
