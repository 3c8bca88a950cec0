"""Safe text of paths in messages, and outputs that are either complete or absent."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import select
import shlex
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from perceiver_cli.errors import DataError, PerceiverError, ResourceError, UsageError

LINGER_S = 0.01  # wait for more of a pipe before what has come is answered: a shell loop writes the next line sooner
MAX_SHOWN = 200  # characters of a path in a message
MOST_NAMES = 10_000  # of a folder that are compared with a name that is not there
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")  # names of files that `atomic_write` has not finished
# Error numbers that are no fault of an input, and the hint for each.
SHORTAGES = {
    errno.EMFILE: "allow more open files (ulimit -n), or pass a smaller --workers",
    errno.ENFILE: "allow the system more open files, or pass a smaller --workers",
    errno.ENOMEM: "free memory",
    errno.EAGAIN: "allow more processes (ulimit -u), or pass a smaller --workers",
}
# Error numbers of an output that needs another name, and the hint for each.
NOT_WRITTEN = {
    errno.EEXIST: "a file has the name of a folder that the output needs: choose another output",
    errno.ENOTDIR: "a file has the name of a folder that the output needs: choose another output",
    errno.EISDIR: "a folder has this name: choose another output",
    errno.EACCES: "allow writing there, or choose another output",
    errno.EPERM: "allow writing there, or choose another output",
    errno.EROFS: "choose an output on a disk that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
}
# For os.open, where the system has them. Without O_BINARY Windows changes line ends.
BINARY, NO_LINK, NO_WAIT = (getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"))
plugins: list[str] = []  # files of --plugin that this process has run, as the user named them


def show_path(path: str | os.PathLike[str]) -> str:
    """Return `path` in quotes as one safe line of at most 200 characters, escaped as in C.

    Control and bidirectional characters and bytes that are not UTF-8 are escaped. Every file name in a message goes
    through it: a file name is untrusted data.
    """
    return f"'{_cut(_escaped(os.fspath(path)))}'"


def show_text(text: str | os.PathLike[str]) -> str:
    """Return `text` escaped and cut as by `show_path`, but with its own quotes: for a cell of a table or a title."""
    return _cut(_escaped(os.fspath(text), "\\"))


def _cut(escaped: str) -> str:
    """Return text of at most 200 characters: a longer one without its middle."""
    half = MAX_SHOWN // 2
    return escaped if len(escaped) <= MAX_SHOWN else f"{escaped[:half]}...{escaped[-half:]}"


def show_command(words: Iterable[str]) -> str:
    """Return a command that can be copied and run: words are quoted for a shell, with escapes as bash's $'...'."""
    return " ".join(shlex.quote(word) if _escaped(word) == word else f"$'{_escaped(word)}'" for word in words)


def perceiver_command(words: Iterable[str]) -> str:
    """Return a command of this program that can be copied and run: it names the plugins of this process."""
    words = list(words)
    more = (word for path in plugins if path not in words for word in ("--plugin", path))
    return show_command([*words, *more])


def _escaped(text: str, marks: str = "\\'") -> str:
    """Return text with unprintable characters and `marks`, backslashes and quotes, escaped as in C."""
    if text.isascii() and text.isprintable() and "\\" not in text and "'" not in text:
        return text
    return "".join("\\" + char if char in marks else _printable(char) for char in text)


def printable(text: str, keep: str = "\n") -> str:
    """Return text that is safe for a terminal: control, bidi, non-UTF-8 bytes C-escaped, except those in `keep`."""
    if text.isascii() and (text.replace("\n", "") if "\n" in keep else text).isprintable():
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
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", *, new: bool = False) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside `path`; on success it is synced and takes the name, on failure it is removed.

    The order write, fsync(file), rename, fsync(folder) leaves the old or the new content after a crash or a power cut,
    never a part (ALICE, OSDI 2014). With O_TMPFILE the file has no name until it is complete, so a killed process
    leaves nothing behind. Temporary files that killed processes left in the folder are removed. Raises ResourceError if
    the folder cannot be made or written, or the disk is full. With `new` an existing file is never replaced: a file
    that appears meanwhile is a ResourceError too.
    """
    target = Path(path)
    folder = target.parent
    try:
        make_folder(folder)
        remove_leftovers(folder)
        temporary = folder / f".{target.name[:80]}.{os.urandom(8).hex()}.tmp"
        handle, nameless = _opened(folder, temporary)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if nameless:  # Python follows the link only with a src_dir_fd, which is unused
                os.link(f"/proc/self/fd/{file.fileno()}", temporary, src_dir_fd=file.fileno())
            if os.name != "nt":  # while it is open: its lock tells other processes that this one is alive
                _name(temporary, target, new)
        if os.name == "nt":  # Windows renames no open file
            _name(temporary, target, new)
        sync_folder(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            fault = f"{show_path(target)}: another process has written it meanwhile"
            raise ResourceError(fault, "choose another output") from error
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise


def _name(temporary: Path, target: Path, new: bool) -> None:
    """Give a finished file its name. Raises FileExistsError if `new` is set and another file has that name."""
    if not new:
        os.replace(temporary, target)
    elif os.name == "nt":
        os.rename(temporary, target)
    else:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError as error:  # a file system without hard links
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            os.replace(temporary, target)
        else:
            temporary.unlink()


def _opened(folder: Path, temporary: Path) -> tuple[int, bool]:
    """Return a handle of a new, locked file in a folder, and whether it has no name; else its name is `temporary`."""
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        with suppress(OSError):  # not every file system supports O_TMPFILE
            handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
            _lock(handle)
            return handle, True
    while True:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | BINARY, 0o666)
        _lock(handle)
        if os.path.exists(temporary):  # else another process took it for a leftover before it was locked
            return handle, False
        os.close(handle)


def _lock(handle: int, *, wait: bool = True) -> bool:
    """Return whether this process has locked an open file; forked workers share the lock."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):  # Windows, a file system without locks, or another process holds it
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder: no process locks them."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if TEMPORARY.fullmatch(entry.name)]:
            with suppress(OSError):
                handle = os.open(folder / name, os.O_RDONLY | NO_LINK | NO_WAIT)
                try:
                    if stat.S_ISREG(os.fstat(handle).st_mode) and _lock(handle, wait=False):
                        (folder / name).unlink()
                finally:
                    os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably: a lost folder would lose all files in it. Raises OSError."""
    missing = [each for each in (folder, *folder.parents) if not os.path.isdir(each)]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def is_idle(stream: IO[bytes]) -> bool:
    """Return whether a pipe stays empty for LINGER_S; False on Windows, which cannot say."""
    try:
        return not select.select([stream], [], [], LINGER_S)[0]
    except OSError:
        return False


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for a lone surrogate such as "\\ud800".

    "\\udc80" to "\\udcff" are allowed: in file names they stand for bytes that are not UTF-8.
    """
    value = json.loads(text)
    escapes = (b"\\ud", b"\\uD") if isinstance(text, bytes) else ("\\ud", "\\uD")
    if not text.isascii() or any(escape in text for escape in escapes):  # type: ignore[operator]
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return value


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


NAMED_PIPE = "a pipe, not a regular file; pipe the bytes in and pass - instead"  # <(command) of a shell is one


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Return a regular file, open for reading; a FIFO could block its reader for ever. Raises OSError or ValueError."""
    handle = os.open(path, os.O_RDONLY | BINARY | NO_WAIT)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        is_pipe = stat.S_ISFIFO(os.fstat(handle).st_mode)
        os.close(handle)
        raise OSError(errno.EINVAL, NAMED_PIPE if is_pipe else "not a regular file", os.fspath(path))
    return os.fdopen(handle, "rb")


def status_of(path: str | os.PathLike[str]) -> os.stat_result | None:
    """Return the status of the file or folder that a path leads to, or None if there is none.

    Raises DataError or ResourceError if that is unknown, with the cause: permission, a name too long, a loop of links.
    """
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from error


def similar_path(path: str | os.PathLike[str]) -> str:
    """Return ", perhaps PATH" for a path that does not exist: the nearest name beside its first missing part, or ""."""
    missing = Path(path)
    while status_of(missing.parent) is None and missing.parent != missing:
        missing = missing.parent
    with suppress(OSError), os.scandir(missing.parent) as entries:
        names = [entry.name for entry in islice(entries, MOST_NAMES)]
        if near := difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75):
            folder = missing.with_name(near[0])
            whole = folder / Path(path).relative_to(missing)
            return f", perhaps {show_path(folder if status_of(whole) is None else whole)}"
    return ""


def cannot_write(path: Path, error: OSError) -> ResourceError:
    """Return the error for an output that cannot be written."""
    number = error.errno or 0
    hint = SHORTAGES.get(number, NOT_WRITTEN.get(number, "free space or choose another output"))
    return ResourceError(f"{show_path(path)}: cannot write: {cause(error)}", hint)


def cannot_read(path: str | os.PathLike[str], error: OSError | ValueError) -> PerceiverError:
    """Return the error for an input that cannot be read, by the path's fault or by a shortage of this process."""
    number = getattr(error, "errno", None) or 0
    kind = ResourceError if number in SHORTAGES else DataError
    return kind(f"{show_path(path)}: cannot read: {cause(error)}", SHORTAGES.get(number, ""))


def cause(error: OSError | ValueError) -> str:
    """Return the reason of a system error, for a message."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
