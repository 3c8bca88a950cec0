"""Safe text of paths in messages, and outputs that are either complete or absent."""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from perceiver_cli.errors import ResourceError, UsageError

MAX_SHOWN = 200  # characters of a path in a message
BINARY = getattr(os, "O_BINARY", 0)  # for os.open: without it Windows changes line ends


def show_path(path: str | os.PathLike[str]) -> str:
    """Return `path` in quotes as one safe line of at most 200 characters; control, bidi, non-UTF-8 bytes are C-escaped.

    Every file name in a message goes through it: a file name is untrusted data.
    """
    return f"'{show_text(path)}'"


def show_text(text: str | os.PathLike[str]) -> str:
    """Return `text` escaped and cut as by `show_path`, without quotes, for a cell of a table or a title."""
    escaped, half = _escaped(os.fspath(text)), MAX_SHOWN // 2
    return escaped if len(escaped) <= MAX_SHOWN else f"{escaped[:half]}...{escaped[-half:]}"


def show_command(words: Iterable[str]) -> str:
    """Return a command to show, copy and run: words quoted for a shell, those with escapes as bash's $'...'."""
    return " ".join(shlex.quote(word) if _escaped(word) == word else f"$'{_escaped(word)}'" for word in words)


def _escaped(text: str) -> str:
    """Return text with unprintable characters, backslashes and quotes escaped as in C."""
    return "".join("\\" + char if char in "\\'" else _printable(char) for char in text)


def printable(text: str, keep: str = "\n") -> str:
    """Return text that is safe for a terminal: control, bidi, non-UTF-8 bytes C-escaped, except those in `keep`."""
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
    """Yield a temporary file beside `path`; on success it is synced and takes the name, on failure it is removed.

    The order write, fsync(file), rename, fsync(folder) leaves the old or the new content after a crash or a power cut,
    never a part (ALICE, OSDI 2014). On systems with O_TMPFILE the file has no name before, so that a killed process
    leaves none behind. Raises ResourceError if the folder cannot be made or written, or the disk is full.
    """
    target = Path(path)
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{target.name[:80]}.{os.urandom(8).hex()}.tmp"
        handle, nameless = _opened(folder, temporary)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if nameless:  # with a src_dir_fd, which is unused, Python follows the link to the file
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
        os.replace(temporary, target)
        sync_folder(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise


def _opened(folder: Path, temporary: Path) -> tuple[int, bool]:
    """Return a handle of a new file in a folder, and whether it has no name; a name is `temporary`."""
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        with suppress(OSError):  # not every file system supports O_TMPFILE
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), True
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | BINARY, 0o666), False


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, completely or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def check_suffix(path: str | os.PathLike[str], suffixes: Sequence[str], option: str, problem: str) -> str:
    """Return the suffix of an output in lower case. Raises UsageError if it is not in `suffixes`."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise UsageError(f"{option} {show_path(path)}: {problem}", f"expected {' or '.join(suffixes)}")
    return suffix


def check_plot(path: str | os.PathLike[str]) -> str:
    """Return the format of a plot by its suffix. Raises UsageError if it is neither PNG nor SVG."""
    return check_suffix(path, (".png", ".svg"), "-o", "not a format of plots")[1:]


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable, where the system opens folders: Windows does not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> ResourceError:
    """Return the error for an output that cannot be written."""
    reason = error.strerror or type(error).__name__
    return ResourceError(f"{show_path(path)}: cannot write: {reason}", "free space or choose another output")
