"""One encoded input: a file, or bytes from a pipe."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass, field
from typing import BinaryIO

from perceiver_cli.errors import DataError, LimitError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.spec import Limits


def key_of(name: str) -> int:
    """Return a number made from an id alone, for seeds and splits."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


RECEIVED_BYTES = 1 << 20  # from a pipe at a time
HEAD_BYTES = 4096  # enough for every signature that detection looks at


@dataclass(frozen=True)
class Source:
    """One encoded input: a file, or bytes that arrived on a pipe. Nothing is read until asked.

    kinds: the modalities that read such content, the nearest first; empty until `preprocess.look` was at it.
    holds_rows: whether it is a byte array in a file, one input as rows with Fourier features.
    """

    name: str
    data: bytes | None = None
    kinds: tuple[str, ...] = field(default=(), compare=False)
    holds_rows: bool = field(default=False, compare=False)

    @property
    def shown(self) -> str:
        """The name, safe to print."""
        return show_path(self.name)

    def state(self) -> tuple[str, int, int] | None:
        """Return what changes when the file does: name, bytes, time; None where there is no such file."""
        try:
            status = os.stat(self.name) if self.data is None else None
        except (OSError, ValueError):
            return None
        return None if status is None else (self.name, status.st_size, status.st_mtime_ns)

    def head(self) -> bytes:
        """Return the first `HEAD_BYTES` bytes. Raises DataError if there are none or it is no regular file."""
        try:
            with self._opened() as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            raise DataError(f"{self.shown}: cannot read: {error.strerror}") from error
        if not head:
            raise DataError(f"{self.shown}: the file is empty")
        return head

    def open(self, limits: Limits) -> BinaryIO:
        """Return a seekable binary file object over the input. Raises as `head`, and LimitError for its size."""
        file = self._opened()
        size = file.seek(0, os.SEEK_END)
        if 0 < size <= limits.file_bytes:
            file.seek(0)
            return file
        file.close()
        self.check_limit(size, "bytes", "file_bytes", limits)
        raise DataError(f"{self.shown}: the file is empty")

    def read(self, limits: Limits) -> bytes:
        """Return all bytes of the input, under the same checks as `open`."""
        if self.data is not None and len(self.data) <= limits.file_bytes:
            return self.data
        with self.open(limits) as file:
            return file.read()

    def check_limit(self, amount: float, unit: str, name: str, limits: Limits) -> None:
        """Raise LimitError if `amount`, in `unit`, is above the limit of that name."""
        allowed = getattr(limits, name)
        if amount > allowed:
            raise LimitError(self.shown, amount, unit, name, allowed)

    def check_decoded(self, count: float, itemsize: int, limits: Limits) -> None:
        """Raise LimitError if an array of `count` items is above `limits.decoded_bytes`; call it before allocating."""
        self.check_limit(count * itemsize, "decoded bytes", "decoded_bytes", limits)

    def _opened(self) -> BinaryIO:
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            # Non-blocking, so that a FIFO named like an image cannot hang the reader.
            handle = os.open(self.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{self.shown}: cannot read: {reason}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise DataError(f"{self.shown}: not a regular file")
        return os.fdopen(handle, "rb")


def received(file: BinaryIO, limits: Limits, begun: bytes = b"") -> bytes:
    """Return `begun` and what else a pipe brings: all, or so much that it is over `limits.file_bytes`."""
    data = io.BytesIO(begun)
    data.seek(len(begun))
    while data.tell() <= limits.file_bytes and (block := file.read(RECEIVED_BYTES)):
        data.write(block)
    return data.getvalue()
