"""Paths as they are shown, and outputs that are either whole or absent."""

from __future__ import annotations

import os
import secrets
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from perceiver_cli.errors import ResourceError, UsageError

MAX_SHOWN = 200  # characters of a path in a message


def show_path(path: str | os.PathLike[str]) -> str:
    """Return `path` in quotes as a single safe line: control, bidi and non-UTF-8 bytes C-escaped, <= 200 long.

    A file name is data from a stranger. This is the only way one may reach a terminal or a log.
    """
    return f"'{show_text(path)}'"


def show_text(text: str | os.PathLike[str]) -> str:
    """Return `text` escaped and cut as `show_path` does, without quotes: for a cell of a table or a title."""
    escaped, half = _escaped(os.fspath(text)), MAX_SHOWN // 2
    return escaped if len(escaped) <= MAX_SHOWN else f"{escaped[:half]}...{escaped[-half:]}"


def show_command(words: Iterable[str]) -> str:
    """Return a command that can be shown, copied and run: quoted for a shell, what cannot be shown as bash's $'...'."""
    return " ".join(shlex.quote(word) if _escaped(word) == word else f"$'{_escaped(word)}'" for word in words)


def _escaped(text: str) -> str:
    """Return text with what cannot be shown, backslashes and quotes escaped as in C."""
    return "".join("\\" + char if char in "\\'" else _printable(char) for char in text)


def printable(text: str, keep: str = "\n") -> str:
    """Return text with control, bidi and non-UTF-8 bytes C-escaped, but for those in `keep`: safe for a terminal."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(char if char in keep else _printable(char) for char in text)


def _printable(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if char == "\n":
        return "\\n"
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return char


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success it is synced and takes the name, on failure it is removed.

    The order write, fsync(file), rename, fsync(folder) means that after a crash or a power cut the name holds
    either the old content or the new, never a part (ALICE, OSDI 2014). Where the system can, the file has no name until
    then, so that not even a killed process leaves one behind. Raises ResourceError if the folder cannot be made or
    written, or the disk is full.
    """
    target = Path(path)
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{target.name[:80]}.{secrets.token_hex(8)}.tmp"
        handle, nameless = _opened(folder, temporary)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if nameless:  # by a folder that is not used, which has Python follow the link to the file
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
        os.replace(temporary, target)
        sync_folder(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise


def _opened(folder: Path, temporary: Path) -> tuple[int, bool]:
    """Return a handle of a new file in a folder, and whether it has no name yet; else it is `temporary`."""
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        with suppress(OSError):  # not every file system has such files
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666), True
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666), False


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def check_suffix(path: str | os.PathLike[str], suffixes: Sequence[str], option: str, problem: str) -> str:
    """Return the suffix of an output, in small letters. Raises UsageError if it is none of `suffixes`."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise UsageError(f"{option} {show_path(path)}: {problem}", f"expected {' or '.join(suffixes)}")
    return suffix


def check_plot(path: str | os.PathLike[str]) -> str:
    """Return the format of a plot by its suffix. Raises UsageError where it is neither PNG nor SVG."""
    return check_suffix(path, (".png", ".svg"), "-o", "not a format drawn here")[1:]


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> ResourceError:
    """Return the one-line error for an output that could not be written."""
    reason = error.strerror or type(error).__name__
    return ResourceError(f"{show_path(path)}: cannot write: {reason}", "free space or choose another output")
