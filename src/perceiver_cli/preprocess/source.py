"""One encoded input: a file, a member of an archive, or bytes from a pipe."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, TypeVar

from perceiver_cli.errors import DataError, LimitError, PerceiverError, ResourceError, is_out_of_memory
from perceiver_cli.files import cannot_read, open_file, show_path, show_text
from perceiver_cli.preprocess.spec import Limits

RECEIVED_BYTES = 1 << 20  # read from a pipe at a time
HEAD_BYTES = 4096  # enough for every signature that detection asks for
T = TypeVar("T")


def key_of(name: str) -> int:
    """Return a 64-bit number made from an id alone, for seeds and splits."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


class Member(Protocol):
    """The bytes of a file inside another, such as a member of an archive; a worker reaches them by their place."""

    @property
    def size(self) -> int: ...

    def open(self, count: int | None = None) -> BinaryIO:
        """Return a seekable file object over the first `count` bytes, or over all. Raises DataError or OSError."""

    def state(self) -> tuple[int, int]:
        """Return what changes when the bytes change: a place and a time of change in ns."""


@dataclass(frozen=True)
class Source:
    """One encoded input: a file, a member of an archive, or bytes from a pipe. Only its methods read it.

    name: the path; of a member the archive's, then its own. data: the bytes, or the member; None is the file `name`.
    kinds: the modalities that read the content, the best match first; empty until `detection.detected` fills them in.
    holds_rows: whether it is a byte array in a file, one input as rows with Fourier features. is_table: whether it has
    only numbers, in text or an array, so that it could also be something else. notes: what its decoder left out.
    """

    name: str
    data: bytes | Member | None = None
    kinds: tuple[str, ...] = field(default=(), compare=False)
    holds_rows: bool = field(default=False, compare=False)
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    is_table: bool = field(default=False, compare=False)

    @property
    def shown(self) -> str:
        """The name, safe to print."""
        return show_path(self.name)

    def note(self, text: str) -> None:
        """Keep a note for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def state(self) -> tuple[str, int, int] | None:
        """Return (name, size in bytes or place, time of change in ns) of the file, or None if there is no such file."""
        with suppress(OSError, ValueError):
            if self.data is None:
                status = os.stat(self.name)
                return self.name, status.st_size, status.st_mtime_ns
        return None if self.data is None or isinstance(self.data, bytes) else (self.name, *self.data.state())

    def head(self, count: int = HEAD_BYTES) -> bytes:
        """Return the first `count` bytes. Raises DataError for an empty, unreadable or irregular file."""
        try:
            with self._opened(count) as file:
                head = file.read(count)
        except OSError as error:
            raise cannot_read(self.name, error) from error
        if not head:
            raise DataError(f"{self.shown}: the file is empty")
        return head

    def open(self, limits: Limits) -> BinaryIO:
        """Return a seekable binary file object over the input. Raises as `head` does, and LimitError for its size."""
        if self.data is not None and not isinstance(self.data, bytes):
            self.check_limit(self.data.size, "bytes", "file_bytes", limits)  # before a member is unpacked
        file = self._opened()
        size = file.seek(0, os.SEEK_END)
        if 0 < size <= limits.file_bytes:
            file.seek(0)
            return file
        file.close()
        self.check_limit(size, "bytes", "file_bytes", limits)
        raise DataError(f"{self.shown}: the file is empty")

    def read(self, limits: Limits) -> bytes:
        """Return all bytes of the input. Raises as `open` does."""
        with self.open(limits) as file:
            return file.read()

    def check_limit(self, amount: float, unit: str, name: str, limits: Limits) -> None:
        """Raise LimitError if `amount`, counted in `unit`, is above the limit `name`."""
        allowed = getattr(limits, name)
        if amount > allowed:
            raise LimitError(self.shown, amount, unit, name, allowed)

    def check_decoded(self, count: float, itemsize: int, limits: Limits) -> None:
        """Raise LimitError if an array of `count` items is above `limits.decoded_bytes`; call it before allocating."""
        self.check_limit(count * itemsize, "decoded bytes", "decoded_bytes", limits)

    def _opened(self, count: int | None = None) -> BinaryIO:
        if isinstance(self.data, bytes):
            return io.BytesIO(self.data)
        try:
            return open_file(self.name) if self.data is None else self.data.open(count)
        except (OSError, ValueError) as error:
            raise cannot_read(self.name, error) from error


def received(file: BinaryIO, limits: Limits, begun: bytes = b"") -> bytes:
    """Return `begun` and the rest of a pipe, which is read until it ends or exceeds `limits.file_bytes`."""
    data = io.BytesIO(begun)
    data.seek(len(begun))
    while data.tell() <= limits.file_bytes and (block := file.read(RECEIVED_BYTES)):
        data.write(block)
    return data.getvalue()


@contextmanager
def as_data_errors(source: Source, noun: str) -> Iterator[None]:
    """Turn every exception of a decoder in the body into a DataError of one line: decoders raise dozens of types."""
    try:
        yield
    except PerceiverError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # not the file's fault
            raise ResourceError(
                f"out of memory while decoding the {noun} {source.shown}", "pass a smaller --workers"
            ) from error
        reason = getattr(error, "strerror", None) or getattr(error, "error_string", None)
        reason = str(reason or f"{type(error).__name__}: {error}").removesuffix(": ").removeprefix("OSError: ")
        # Without the addresses of objects, which differ in each run: records keep this message.
        reason = show_text(re.sub(r" at 0x[0-9a-f]+", "", reason))
        raise DataError(f"{source.shown}: cannot decode the {noun}: {reason}") from error


def probed(sources: Iterable[Source], probe: Callable[[Source], T], option: str) -> Iterator[T]:
    """Yield `probe(source)` of every readable source, to settle `option`. Raises DataError if no source is readable."""
    problem, empty = "", True
    for source in sources:
        try:
            answer = probe(source)
        except DataError as error:
            problem = problem or f", the first: {error.message}"
        else:
            empty = False
            yield answer
    if empty:
        raise DataError(f'{option} = "auto": no file can be read{problem}', f"give {option} instead")
