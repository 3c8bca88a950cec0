"""What people and pipes see: data on stdout, talk on stderr, exit codes, progress.

The only user of rich, which is imported when something is drawn: `--help` does not wait for it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from perceiver_cli.errors import EXIT_BUG, EXIT_RESOURCE, PerceiverError, ResourceError
from perceiver_cli.files import printable, show_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LAST_WORDS = 5  # lines of libraries that are shown when something went wrong
LIBRARY_BYTES = 1 << 16  # read at a time of what libraries wrote: all that a pipe holds
debug = False
quiet = False  # -q: errors and nothing else
verbose = False  # -v: also what libraries have to say
_stderr: IO[str] | None = None  # file 2 as it was before libraries were kept from it


@cache
def talk() -> Console:
    """Return the console on stderr. A reader that leaves is no reason for a run to end."""
    from rich.console import Console

    # In a pipe or a log a line stays a line; on a terminal words wrap.
    stream = _stderr or sys.stderr
    console = Console(
        file=stream, quiet=stream is None, highlight=False, markup=False, soft_wrap=not stderr_is_terminal()
    )
    console.on_broken_pipe = lambda: setattr(console, "quiet", True)  # type: ignore[method-assign]
    return console


def stderr_is_terminal() -> bool:
    """Return whether somebody looks at stderr."""
    stream = _stderr or sys.stderr
    return stream is not None and stream.isatty()


def guarded(app: Callable[[], None]) -> None:
    """Run the command line: expected errors become one line and their exit code; a bug says so and exits with 1."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends by the signal (130); train installs its own handler
    _guard_stderr()
    try:
        app()
    except PerceiverError as error:
        _fail(str(error), error.exit_code, quote_libraries=isinstance(error, ResourceError))
    except MemoryError:
        _fail("out of memory; try a smaller --batch-size", EXIT_RESOURCE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        _fail(f"stdout: cannot write: {error.strerror}", EXIT_RESOURCE)
    except Exception as error:
        bug = f"this is a bug: {type(error).__name__}: {error}"
        _fail(f"{bug}; run it again with --debug before the command", EXIT_BUG, quote_libraries=True)
    finally:
        _libraries.heard()


def _fail(message: str, exit_code: int, *, quote_libraries: bool = False) -> None:
    if debug:
        traceback.print_exc()
    complain(f"perceiver: {message}")
    if quote_libraries:
        _libraries.last_words()
    sys.exit(exit_code)


class _Escaped(io.TextIOWrapper):
    """A stream on which control characters come out escaped: messages of others quote what people typed."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def _guard_stderr() -> None:
    """Let only `talk` write as it likes to stderr; what else Python writes there (usage, warnings) is escaped."""
    if sys.stderr is None:
        return
    global _stderr
    own = os.dup(2)
    _stderr = open(own, "w", 1, sys.stderr.encoding, "backslashreplace")  # noqa: SIM115  # until the end
    sys.stderr = _Escaped(open(own, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)  # noqa: SIM115


class _Libraries:
    """What C libraries write to file 2 by themselves, such as libtiff's warnings of a damaged file: kept, not shown.

    With -v each line is shown, escaped; without, the last ones are if the program then fails. It goes through a pipe
    that never blocks, so that what is too much is lost and no decoder waits.
    """

    def __init__(self) -> None:
        self.pipe: int | None = None
        self.lines: deque[str] = deque(maxlen=LAST_WORDS)

    def listen(self) -> None:
        """Begin, in place of file 2."""
        self.pipe, write_end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(write_end, False)
        os.dup2(write_end, 2)
        os.close(write_end)

    def heard(self) -> None:
        """Take in what there is."""
        with suppress(OSError):  # nothing more; or in a process that was forked and reads for another
            while self.pipe is not None and (data := os.read(self.pipe, LIBRARY_BYTES)):
                for line in data.decode("utf-8", "surrogateescape").splitlines():
                    self.lines.append(line)
                    if verbose:
                        _print(f"library: {line}")

    def last_words(self) -> None:
        """Show the last lines, where they were not shown already."""
        self.heard()
        for line in () if verbose else self.lines:
            _print(f"library: {line}")


_libraries = _Libraries()


def begin(with_tracebacks: bool) -> None:
    """Settle how the command that follows speaks: with --debug, libraries write to stderr directly."""
    global debug
    debug = with_tracebacks
    if not debug and sys.stderr is not None:
        _libraries.listen()


def say(message: str) -> None:
    """Print one line of talk on stderr; nothing with -q."""
    if not quiet:
        complain(message)


def say_notes(notes: Iterable[str]) -> None:
    """Print what is worth knowing, a line each."""
    for note in notes:
        say(f"note: {note}")


def complain(message: str) -> None:
    """Print one line on stderr that -q does not silence: an error, or an input that cannot be used."""
    _libraries.heard()
    _print(message)


def _print(message: str) -> None:
    with suppress(OSError, ValueError):  # nobody may be listening
        from rich.text import Text

        talk().print(Text(printable(message)))


def emit(text: str, *, styled: bool = False) -> None:
    """Write data to stdout and flush. Ends quietly by SIGPIPE where the reader has left.

    On a terminal control characters are escaped, unless the text is `styled`: safe, with escapes of our own. Raises
    ResourceError if stdout is closed or its disk is full.
    """
    if is_terminal() and not styled:
        text = printable(text, "\n\t")
    emit_bytes(text.encode("utf-8", "surrogateescape"))


def emit_bytes(data: bytes) -> None:
    """Write bytes to stdout and flush, as `emit` does."""
    if sys.stdout is None:
        raise ResourceError("stdout is closed")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        end_by_signal(signal.SIGPIPE)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered can no longer fail
        raise ResourceError(f"stdout: cannot write: {error.strerror}") from error


def end_by_signal(number: int) -> None:
    """End this process by a signal, so that shells and schedulers see which."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def emit_json(record: Mapping[str, Any]) -> None:
    """Write one JSON object on one line."""
    emit(json.dumps(record) + "\n")


def emit_table(columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> None:
    """Write a table to stdout, names to the left and figures to the right; total: the cells of a last row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("class", "name", "") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if total:
        table.add_row(*map(Text, total), style="bold")
    stream = io.StringIO()
    # In a pipe a row is a line, however long.
    width = None if is_terminal() else 1000
    Console(file=stream, width=width, force_terminal=is_terminal(), markup=False).print(table)
    emit("".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines()), styled=True)


def bar(*more: str) -> Progress:
    """Return a bar on stderr with further texts; it shows nothing if that is no terminal, or with -q."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    disable = not stderr_is_terminal() or quiet
    return Progress(*columns, *map(TextColumn, more), console=talk(), transient=True, disable=disable)


@contextmanager
def counting(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while something is counted."""
    with bar() as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print names and values: aligned lines, or one JSON object."""
    if as_json:
        emit_json(facts)
        return
    rows = list(flat_items(facts, ""))
    width = max(len(name) for name, _ in rows)
    emit("".join(f"{name:<{width}}  {value}\n" for name, value in rows))


def flat_items(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{name}.")
        elif isinstance(value, int):
            yield prefix + name, f"{value:,}"
        elif isinstance(value, list | tuple):
            yield prefix + name, " ".join(show_text(v) if isinstance(v, str) else str(v) for v in value)
        elif value is not None:
            yield prefix + name, f"{value:.6g}" if isinstance(value, float) else show_text(str(value))
