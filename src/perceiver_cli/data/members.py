"""Files inside another file: a member of an archive, opened by its place; and temporary copies of streams. No torch."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from perceiver_cli.data.workers import start_method
from perceiver_cli.errors import DataError, ResourceError, counted
from perceiver_cli.files import cannot_read, cannot_write, open_file, show_path

READ_BYTES = 1 << 20  # per read
IN_MEMORY = 64 << 20  # bytes of a zip's member that are unpacked in memory; a larger one goes to a temporary file
MAX_RATIO = 200  # a compressed tar that unpacks to more times its size is a bomb,
BOMB_BYTES = 1 << 30  # if it is larger than this
FREE = 0.5  # share of the free space that temporary files may fill
ZIP_MEMBER = b"PK\x03\x04"


@dataclass(frozen=True)
class Archive:
    """A file that holds others. path: as named; place: what is opened, another path if it was copied.

    state: its size in bytes and time of change in ns, by which a reader notices another file in its place.
    """

    path: str
    place: str
    state: tuple[int, int]
    copy: object = field(default=None, compare=False, repr=False)  # keeps a temporary file

    @property
    def note(self) -> str | None:
        """A note that says where the archive was copied to, None if it was not."""
        if self.place == self.path:
            return None
        folder = show_path(tempfile.gettempdir())
        return f"{show_path(self.path)}: {self.state[0] / 1e6:,.1f} MB, copied to {folder} until this process ends"

    def opened(self) -> BinaryIO:
        """Return the file, unbuffered. Raises DataError or ResourceError if it is unreadable or has changed."""
        try:
            file: Any = open_file(self.place).detach()  # type: ignore[attr-defined]
        except (OSError, ValueError) as error:
            raise cannot_read(self.path, error) from error
        if state_of(file) != self.state:
            file.close()
            raise DataError(f"{show_path(self.path)}: has changed while it was read")
        return file  # type: ignore[no-any-return]

    def buffered(self) -> BinaryIO:
        """Return the file, to be read from its start. Raises as `opened`."""
        raw: Any = self.opened()
        return io.BufferedReader(raw)

    def __reduce__(self) -> tuple[Any, ...]:
        return Archive, (self.path, self.place, self.state)  # the copy stays with the process that made it


def state_of(file: BinaryIO) -> tuple[int, int]:
    """Return the size in bytes and the time of change in ns of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Slice:
    """The bytes of an archive from a place on: a member that is stored as it is."""

    archive: Archive
    at: int
    size: int

    def open(self, count: int | None = None) -> BinaryIO:
        """Return a file object over the bytes."""
        size = self.size if count is None else min(count, self.size)
        window: Any = _Window(self.archive.opened(), self.at, size)
        return io.BufferedReader(window, max(1, min(size, READ_BYTES)))

    def state(self) -> tuple[int, int]:
        """Return the place and the archive's time of change."""
        return self.at, self.archive.state[1]


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, at: int, size: int) -> None:
        self._file, self._at, self._size, self._done = file, at, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._done, os.SEEK_END: self._size}[whence]
        if place < 0:
            raise ValueError(f"a place before the beginning: {place}")
        self._done = place
        return place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._done)]
        self._file.seek(self._at + self._done)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._done += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Deflated:
    """A member of a zip: at the place of its header, perhaps compressed by deflate, checked by its CRC."""

    archive: Archive
    header: int
    packed: int
    size: int
    crc: int
    stored: bool

    def state(self) -> tuple[int, int]:
        """Return the place and the archive's time of change."""
        return self.header, self.archive.state[1]

    def open(self, count: int | None = None) -> BinaryIO:
        """Return a file object over the bytes, unpacked in memory, or in a temporary file if there are many."""
        wanted, crc = self.size if count is None else min(count, self.size), 0
        with self.archive.opened() as file:
            file.seek(self.header)
            head = file.read(30)
            if len(head) < 30 or head[:4] != ZIP_MEMBER:
                raise ValueError("no header of a member at the place that the zip's directory names")
            file.seek(int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"), os.SEEK_CUR)
            if self.stored and wanted > IN_MEMORY:
                return Slice(self.archive, file.tell(), wanted).open()
            out: Any = io.BytesIO() if wanted <= IN_MEMORY else tempfile.TemporaryFile()  # noqa: SIM115  # it is returned
            for part in self._parts(file, wanted):
                out.write(part)
                crc = zlib.crc32(part, crc)
        if wanted == self.size and crc != self.crc:
            raise ValueError(f"damaged: its CRC is {crc:08x}, expected {self.crc:08x}")
        out.seek(0)
        return out  # type: ignore[no-any-return]

    def _parts(self, file: BinaryIO, wanted: int) -> Iterator[bytes]:
        """Yield the first `wanted` bytes. Raises ValueError if there are fewer."""
        left, inflate = self.packed, zlib.decompressobj(-zlib.MAX_WBITS)
        data = b""
        while wanted:
            if not data:
                data = file.read(min(READ_BYTES, left))
                left -= len(data)
            ended = not data
            try:
                part = data[:wanted] if self.stored else inflate.decompress(data, min(READ_BYTES, wanted))
            except zlib.error as error:
                raise ValueError(f"damaged: {error}") from error
            data = data[wanted:] if self.stored else inflate.unconsumed_tail
            if not part and (ended or inflate.eof):
                raise ValueError(f"damaged: {counted(wanted, 'byte')} are missing")
            wanted -= len(part)
            yield part


def copied(file: BinaryIO, name: str, packed: int = 0) -> Archive:
    """Return the rest of a stream as an archive, copied to a temporary file. packed: its size if it was compressed.

    Raises DataError if the stream is damaged or a bomb, ResourceError if there is no room.
    """

    def blocks() -> Iterator[bytes]:
        done = 0
        with stream_errors(name):
            while block := file.read(READ_BYTES):
                done += len(block)
                if packed and done > max(BOMB_BYTES, MAX_RATIO * packed):
                    fault = f"{show_path(name)}: unpacks to more than {MAX_RATIO} times its size"
                    raise DataError(fault, "if this is meant, unpack it by hand")
                yield block

    return archive_of(blocks(), name)


@contextmanager
def stream_errors(name: str) -> Iterator[None]:
    """Turn errors of reading or unpacking a stream in the body into a DataError of one line."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise DataError(f"{show_path(name)}: damaged, or cut short: {error}", "fetch it again") from error


def replayed(begun: bytes, file: BinaryIO) -> BinaryIO:
    """Return a stream of the bytes that were read from a file already, then its others."""
    stream: Any = _Replay(begun, file)
    return io.BufferedReader(stream, READ_BYTES)


class _Replay(io.RawIOBase):
    """Bytes, then a file."""

    def __init__(self, begun: bytes, file: BinaryIO) -> None:
        self._begun, self._read = begun, getattr(file, "read1", file.read)  # what has arrived, not all that fits

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._begun[: len(buffer)] or self._read(len(buffer))
        self._begun = self._begun[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def archive_of(blocks: Iterable[bytes], name: str) -> Archive:
    """Return an archive of blocks of bytes in a temporary file, which ends with the process. Raises ResourceError."""
    folder = tempfile.gettempdir()
    try:
        allowed, done = int(FREE * shutil.disk_usage(folder).free), 0
        temporary, place, copy = _temporary()
        with temporary as file:
            for block in blocks:
                done += len(block)
                if done > allowed:
                    fault = f"{show_path(name)}: more than {allowed / 1e9:,.1f} GB to copy to {show_path(folder)}"
                    hint = "set TMPDIR to a folder on a larger disk"
                    raise ResourceError(f"{fault}, half of what is free there", hint)
                file.write(block)
            file.flush()
            return Archive(name, place, state_of(file), copy)
    except OSError as error:
        raise cannot_write(Path(folder), error) from error


class _Copy:
    """Keeps a temporary file until the last archive that uses it, or the process, ends."""


def _temporary() -> tuple[BinaryIO, str, _Copy]:
    """Return a temporary file, to be written and closed, the path by which it is opened again, and what keeps it."""
    copy = _Copy()
    if start_method() == "fork" and os.path.isdir("/proc/self/fd"):  # no name: nothing is left if the process is killed
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        handle = os.dup(file.fileno())  # forked workers inherit it
        weakref.finalize(copy, os.close, handle)
        return file, f"/proc/self/fd/{handle}", copy
    handle, path = tempfile.mkstemp(prefix="perceiver-")
    weakref.finalize(copy, os.remove, path)
    return os.fdopen(handle, "wb"), path, copy
