"""Data on stdout, talk on stderr, progress bars, exit codes.

rich is imported when it first draws, so that `--help` does not wait for it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from perceiver_cli.errors import (
    DataError,
    LostError,
    PerceiverError,
    ResourceError,
    UsageError,
    error_facts,
    is_out_of_memory,
)
from perceiver_cli.files import SHORTAGES, cause, perceiver_command, printable, show_path, show_text, write_text
from perceiver_cli.hardware import LAUNCHED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from perceiver_cli.advice.base import Advice

LAST_WORDS = 5  # lines of libraries that are shown after a failure
LIBRARY_BYTES = 1 << 16  # read from the libraries' pipe at a time: its capacity
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
LEAST_ROOM = 20  # columns of a terminal for text that is wrapped
SIGPIPE = 13  # where the system does not have it
debug = False
quiet = False  # -q: errors only
verbose = False  # -v: also messages of libraries
_at_signal: list[Callable[[], object]] = []
_before_data: Callable[[], object] | None = None
# rich's own suit dark backgrounds: on light ones the rest of a bar stands out more than what is done.
STYLES = {"bar.back": "dim", "progress.percentage": "default", "progress.remaining": "default"}
_stderr: IO[str] | None = None  # file 2 as it was before the libraries' pipe took its place


@cache
def talk() -> Console:
    """Return the console on stderr; it turns quiet when the reader of stderr leaves, so that a run goes on."""
    from rich.console import Console
    from rich.theme import Theme

    # Lines wrap on a terminal only.
    stream = _stderr or sys.stderr
    console = Console(
        file=stream, quiet=stream is None, highlight=False, markup=False, soft_wrap=not stderr_is_terminal(),
        theme=Theme(STYLES),
    )  # fmt: skip
    console.on_broken_pipe = lambda: setattr(console, "quiet", True)  # type: ignore[method-assign]
    return console


def stderr_is_terminal() -> bool:
    """Return whether stderr is a terminal."""
    stream = _stderr or sys.stderr
    return stream is not None and stream.isatty()


def stderr_number() -> int | None:
    """Return the file number of stderr, which is not 2 while lines of libraries are kept; None if it is closed."""
    stream = _stderr or sys.stderr
    return None if stream is None else stream.fileno()


def guarded(app: Callable[[], None]) -> None:
    """Run the command line: an expected error becomes one line and its exit code, a bug one line and exit code 1."""
    _guard_streams()
    try:
        try:
            _check_folder()
            app()
        finally:
            sys.stdout.flush()  # a failure at exit would print no message
    except PerceiverError as error:
        _fail(error, quote_libraries=isinstance(error, ResourceError) and not isinstance(error, LostError))
    except Exception as error:
        if (known := _of_the_system(error)) is not None:
            _fail(known)
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # frees their arrays: the message needs memory too
            _fail(ResourceError("out of memory", "try a smaller --batch-size, or --recompute in training"))
        bug = f"this is a bug: {type(error).__name__}: {error}"
        _fail(PerceiverError(bug, "for a traceback pass --debug before the command"), quote_libraries=True)
    finally:
        _libraries.heard()


def _check_folder() -> None:
    """Raise UsageError if the current folder was deleted: MKL would end the process without a message."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder was deleted", "change to another folder") from None


def _of_the_system(error: Exception) -> PerceiverError | None:
    """Return a system error as a PerceiverError that names the file and the cause, or None for another error."""
    if isinstance(error, RuntimeError) and "Too many open files" in str(error):  # torch's, about its workers
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if not isinstance(error, OSError):
        return None
    shown = show_path(os.fsdecode(error.filename)) + ": " if isinstance(error.filename, str | bytes) else ""
    if error.errno in SHORTAGES:
        return ResourceError(f"{shown}{cause(error)}", SHORTAGES[error.errno])
    if error.errno in OUTPUT_ERRORS:
        return ResourceError(f"{shown}cannot write: {cause(error)}", "free space or choose another output")
    return DataError(f"{shown}{cause(error)}") if shown else None


def _told_launcher(error: PerceiverError) -> bool:
    """Leave an error to the launcher of this process, which prints one for all; return whether there is a launcher."""
    folder, number = os.environ.get(LAUNCHED), os.environ.get("RANK")
    if folder is None or number is None:
        return False
    with suppress(OSError):
        write_text(os.path.join(folder, f"failed-{number}"), json.dumps(error_facts(error) | {"at": time.monotonic()}))
        return True
    return False


def _fail(error: PerceiverError, *, quote_libraries: bool = False) -> None:
    if debug:
        traceback.print_exc()
    if not _told_launcher(error):
        complain(error)
    if quote_libraries:
        _libraries.last_words()
    sys.exit(error.exit_code)


class _Escaped(io.TextIOWrapper):
    """A stream that escapes control characters: usage errors and warnings quote the user's words."""

    def write(self, text: str) -> int:
        super().write(printable(text.replace(": Value error, ", ": ")))  # pydantic's words, within Typer's
        return len(text)


class _Stdout(io.RawIOBase):
    """File 1. If its reader has left, the process ends by SIGPIPE. Any other failure is a ResourceError."""

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def isatty(self) -> bool:
        return self.is_open and os.isatty(1)

    def write(self, data: Any) -> int:
        try:
            if not self.is_open:
                raise ResourceError("stdout is closed")
            return os.write(1, data)
        except BrokenPipeError:
            end_by_signal(getattr(signal, "SIGPIPE", SIGPIPE))
            raise
        except (OSError, ResourceError) as error:
            self.is_open = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # flushing the rest at exit must not fail again
            if isinstance(error, ResourceError):
                raise
            raise ResourceError(f"stdout: cannot write: {cause(error)}") from error


def _guard_streams() -> None:
    """Keep files 0 to 2 for the streams, report a failure of stdout, and escape what Python writes to stderr.

    The console of `talk` writes to the same file without this escaping.
    """
    streams = (sys.stdin, sys.stdout, sys.stderr)
    for number, stream in enumerate(streams):
        if stream is None:  # closed: the next file that is opened would get its number
            with suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    raw = _Stdout(sys.stdout is not None)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=raw.isatty())
    if sys.stderr is None:
        return
    global _stderr
    own = os.dup(2)
    _stderr = open(own, "w", 1, sys.stderr.encoding, "backslashreplace")  # noqa: SIM115  # until the end
    sys.stderr = _Escaped(open(own, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)  # noqa: SIM115


class _Libraries:
    """Lines that C libraries write to file 2, such as libtiff's warnings of a damaged file.

    With -v each line is printed, escaped. Without it the last lines are printed if the program fails. No decoder waits
    for the pipe: it drops what exceeds its capacity.
    """

    def __init__(self) -> None:
        self.pipe: int | None = None
        self.lines: deque[str] = deque(maxlen=LAST_WORDS)

    def listen(self) -> None:
        """Replace file 2 by a pipe that never blocks, if the system has these: Windows from Python 3.12 on."""
        if not hasattr(os, "set_blocking"):
            return
        self.pipe, write_end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(write_end, False)
        os.dup2(write_end, 2)
        os.close(write_end)

    def heard(self) -> None:
        """Read the lines written so far."""
        with suppress(OSError):  # the pipe is empty, or another process forked from the same one reads it
            while self.pipe is not None and (data := os.read(self.pipe, LIBRARY_BYTES)):
                for line in data.decode("utf-8", "surrogateescape").splitlines():
                    self.lines.append(line)
                    if verbose:
                        _print(f"library: {line}")

    def last_words(self) -> None:
        """Print the last lines, unless -v has printed them."""
        self.heard()
        for line in () if verbose else self.lines:
            _print(f"library: {line}")


_libraries = _Libraries()


def begin(with_tracebacks: bool) -> None:
    """Keep the libraries' lines from now on; with --debug, they write to stderr directly."""
    global debug
    debug = with_tracebacks
    if not debug and sys.stderr is not None:
        _libraries.listen()


def hush() -> None:
    """Print nothing from now on but errors: another process of the same job speaks for all."""
    global quiet
    quiet = True
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def say(message: str, style: str = "") -> None:
    """Print one line on stderr, in a style of rich on a terminal; nothing with -q."""
    if not quiet:
        _libraries.heard()
        _print(message, style)


def say_lines(lines: Iterable[str]) -> None:
    """Print lines on stderr; nothing with -q."""
    for line in lines:
        say(line)


def say_notes(notes: Iterable[str]) -> None:
    """Print a line for each note."""
    for note in notes:
        say(f"note: {note}")


def say_advice(advice: Iterable[Advice]) -> None:
    """Print a line for each thing to do next; on a terminal that is too narrow, the command has one of its own."""
    for each in advice:
        line = f"next: {each}"
        if each.command and stderr_is_terminal() and len(line) > talk().width:
            say(f"next: {each.seen}:")
            line = f"  {perceiver_command(each.command)}"
        say(line)


def complain(error: PerceiverError | str) -> None:
    """Print the line of an error on stderr, with -q too: of a command, or of one unreadable input."""
    _libraries.heard()
    _print(f"perceiver: {error}")


def _print(message: str, style: str = "") -> None:
    with suppress(OSError, ValueError):  # stderr may be closed or full
        try:
            from rich.text import Text

            is_command = re.search(r"(^ +|: |\| )perceiver [a-z]", message) is not None
            # A command that is wrapped could not be copied; None is as the console wraps.
            talk().print(Text(printable(message, ""), style), soft_wrap=is_command or None)
        except (MemoryError, ImportError):  # rich needs memory
            if stream := _stderr or sys.stderr:
                os.write(stream.fileno(), f"{printable(message, '')}\n".encode("utf-8", "backslashreplace"))


def emit(text: str, *, styled: bool = False) -> None:
    """Write data to stdout and flush. If the reader has left, the process ends by SIGPIPE.

    On a terminal control characters are escaped, unless the text is `styled`, safe text with our own escapes. Raises
    ResourceError if stdout is closed or its disk is full.
    """
    if is_terminal() and not styled:
        text = printable(text, "\n\t")
    if _before_data is not None:
        _before_data()
    emit_bytes(text.encode("utf-8", "surrogateescape"))


def emit_bytes(data: bytes) -> None:
    """Write bytes to stdout and flush, as `emit` does."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def piped_stdin(example: str = "sox in.mp3 -t wav - | perceiver predict -") -> int:
    """Return the file number of stdin; raise a UsageError with an example if it is a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("stdin is a terminal", f"pipe data in: {example}")
    return sys.stdin.fileno()


def end_by_signal(number: int) -> None:
    """End this process by a signal, which shells and schedulers see; on Windows by an exit status."""
    if not hasattr(signal, "SIGPIPE"):
        os._exit(128 + number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def on_first_signal(stop: Callable[[], None]) -> list[int]:
    """Call `stop` at the first SIGINT, SIGTERM or SIGHUP (a lost connection); the second ends the process at once.

    Returns the list of received signals, empty until then. Under nohup SIGHUP stays ignored.
    """
    from perceiver_cli.data.workers import GROUP_SIGNALS

    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        stop()

    for name in GROUP_SIGNALS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, handle)
    return received


def clock(seconds: float) -> str:
    """Return a time such as 3:07 or 1:03:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def emit_json(record: Mapping[str, Any]) -> None:
    """Write one JSON object on one line."""
    emit(json.dumps(record) + "\n")


def is_mute() -> bool:
    """Return whether nothing is drawn: with -q, and where stderr is no terminal."""
    return quiet or not stderr_is_terminal()


def drawn(*columns: ProgressColumn, by_hand: bool = False) -> Progress:
    """Return a progress display on stderr that erases itself, hidden if `is_mute`. by_hand: no thread refreshes it."""
    from rich.console import Console
    from rich.progress import Progress

    # Before Rich 14.3 a disabled display ends with an empty line: a quiet console prints none.
    console = Console(quiet=True) if is_mute() else talk()
    return Progress(*columns, console=console, transient=True, disable=is_mute(), auto_refresh=not by_hand)


def bar(*more: str, by_hand: bool = False) -> Progress:
    """Return a progress bar with more text columns; see `drawn`."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return drawn(*columns, *map(TextColumn, more), by_hand=by_hand)


@contextmanager
def at_signal(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` if SIGINT or SIGTERM ends the process in the `with`, the innermost one first.

    The second signal ends it at once. Without `act` the first one does: a hidden cursor would stay hidden.
    """
    before: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        for each in reversed(_at_signal):
            with suppress(Exception):  # such as a write into the middle of another one
                each()
        end_by_signal(number)

    _at_signal.append(act)
    try:
        if len(_at_signal) == 1 and threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _at_signal.remove(act)


@contextmanager
def before_data(act: Callable[[], object] | None) -> Iterator[None]:
    """Call `act` before data is written to a terminal in the `with`."""
    global _before_data
    _before_data, outer = act, _before_data
    try:
        yield
    finally:
        _before_data = outer


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print names and values as aligned lines or as one JSON object."""
    if as_json:
        emit_json(facts)
        return
    rows = list(flat_items(facts, ""))
    width = max(len(name) for name, _ in rows)
    emit("".join(f"{wrapped(value, f'{name:<{width}}  ')}\n" for name, value in rows))


def wrapped(text: str, first: str) -> str:
    """Return the words `first`, then a text; on a terminal its further lines are indented to where the text starts."""
    room = shutil.get_terminal_size().columns - len(first)
    if not is_terminal() or room < LEAST_ROOM:
        return first + text
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return first + f"\n{' ' * len(first)}".join(lines)


def size(num_bytes: float) -> str:
    """Return a number of bytes as 1.2 MB."""
    from rich.filesize import decimal

    return decimal(round(num_bytes))


def figure(value: float | None, style: str) -> str:
    """Return a number in a format such as ".3f", or a dash for None."""
    return "-" if value is None else format(value, style)


def flat_items(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield each value with its dotted name, as text; skip None."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{name}.")
        elif isinstance(value, int):
            yield prefix + name, f"{value:,}"
        elif isinstance(value, list | tuple):
            words = (show_text(v) if isinstance(v, str) else str(v) for v in value)
            yield prefix + name, " ".join(words) or "none"
        elif value is not None:
            yield prefix + name, f"{value:.6g}" if isinstance(value, float) else show_text(str(value))
