"""What a command reads: paths, the lines of a list, rows of cells, and the bytes on stdin."""

import codecs
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from perceiver_cli.cli import options, terminal
from perceiver_cli.errors import UsageError
from perceiver_cli.files import is_idle, show_command, show_path

PIPE_BYTES = 1 << 20  # read from stdin at a time


@dataclass
class ListPlace:
    """How many paths of a list are answered. list: its name, "-" for stdin, None without a list."""

    list: str | None = None
    null: bool = False
    waiting: deque[tuple[int, str]] = field(default_factory=deque)  # lines taken but not yet answered
    line: int = 0  # the last answered one

    def answered(self, path: str, *, is_part: bool) -> None:
        """Note an answer to a path, or to a part of its input."""
        places = [place for place, (_, own) in enumerate(self.waiting) if own == path]  # none for a file of a folder
        for _ in range(places[0] + (not is_part) if places else 0):
            self.line, _ = self.waiting.popleft()

    def command(self) -> str | None:
        """Return the command that answers the rest of a list, or None if the list is a pipe or its paths end in NUL."""
        if self.list in (None, "-") or self.null or not (self.waiting or self.line):
            return None
        first = self.waiting[0][0] if self.waiting else self.line + 1  # none waits right after an answer
        words = [re.sub(f"^(--files-from=)?{re.escape(str(self.list))}$", r"\1-", word) for word in sys.argv[1:]]
        tail = show_command(["tail", "-n", f"+{first}", str(self.list)])
        return f"{tail} | {show_command(['perceiver', *words])}"


def raw_of(inputs: list[str], rate: str | None, channels: int | None, encoding: options.Encoding | None) -> Any:
    """Return the format of the raw samples on stdin from options, or None without --rate."""
    if rate is None:
        if channels is not None or encoding is not None:
            raise UsageError(
                f"--{'channels' if channels is not None else 'encoding'} needs raw sound", "pass --rate HZ"
            )
        return None
    if "-" not in inputs:
        raise UsageError("--rate needs raw sound on stdin", "pass - and pipe it in")
    from perceiver_cli.preprocess.live_sound import Raw

    return Raw(round(options.number(f"--rate {rate}", rate)), channels or 1, encoding or "s16le")


def listed_to_predict(
    inputs: list[str],
    files_from: str | None,
    null: bool,
    stdin_name: str,
    row: list[str] | None = None,
    *,
    raw: Any = None,
    is_live: bool = False,
) -> tuple[Iterator[Any], ListPlace]:
    """Return the paths to predict, those in a list, and the bytes on stdin as a Pipe; and the ListPlace in the list.

    raw, is_live: see Pipe.
    """
    if row:
        if inputs or files_from is not None:
            raise UsageError("--row is the only input", "leave out the files, or name them in the row")
        return iter([_row(row)]), ListPlace()
    _check_null(files_from, null)
    if not inputs and files_from is None:
        raise UsageError("nothing to predict", "pass files, or - with bytes on stdin, or --files-from")
    if inputs.count("-") + (files_from == "-") > 1:
        raise UsageError("stdin can be read once", "pass - once, or --files-from -")
    if "-" in inputs or files_from == "-":
        terminal.piped_stdin()
    from perceiver_cli.data.examples import PAUSE
    from perceiver_cli.data.inputs import Pipe

    def opened(path: str) -> Any:
        if path != "-":
            return path
        return Pipe(stdin_name, os.fdopen(terminal.piped_stdin(), "rb", PIPE_BYTES, closefd=False), raw, is_live)

    place = ListPlace(files_from, null)

    def taken() -> Iterator[Any]:
        for line, path in _lines(files_from, null, is_live=True):
            if path:
                place.waiting.append((line, path))
            yield path or PAUSE

    return chain(map(opened, inputs), taken()), place


def _check_null(files_from: str | None, null: bool) -> None:
    """Raise UsageError for -0 without a list."""
    if null and files_from is None:
        raise UsageError("-0 has no effect without --files-from", "pass --files-from - -0")


def _row(cells: list[str]) -> Any:
    """Return the row that KEY=VALUE words describe, as JSON."""
    from perceiver_cli.preprocess.source import Source

    values: dict[str, str] = {}
    for cell in cells:
        name, equals, value = cell.partition("=")
        if not equals or not name or name in values:
            raise UsageError(f"--row {cell}: expected KEY=VALUE, each key once", "such as --row title='red shoe'")
        values[name] = value
    return Source("--row", json.dumps(values).encode())


def _lines(path: str | None, null: bool, *, is_live: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the number of each line of a list and its path, as they arrive; blank lines are left out.

    is_live: also yield "" whenever the writer of the list pauses.
    """
    if path is None:
        return
    try:
        stream = os.fdopen(0, "rb", closefd=False) if path == "-" else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--files-from {show_path(path)}: cannot read: {error.strerror}") from error
    rest, end, number = b"", b"\0" if null else b"\n", 0  # the number of whole lines so far
    with stream:
        for place, chunk in enumerate(_chunks(stream)):
            if place == 0 and not null:
                _check_list(chunk, path)
            *names, rest = (rest + chunk).split(end)
            for name in names:
                number += 1
                if shown := _path_in_list(name, path, null):
                    yield number, shown
            if is_live and is_idle(stream):
                yield number, ""
    if shown := _path_in_list(rest, path, null):
        yield number + 1, shown


def _check_list(begun: bytes, path: str) -> None:
    """Raise UsageError for a manifest in place of a list of paths."""
    from perceiver_cli.data.manifest import PATH_COLUMNS, suffix_of_rows

    if suffix_of_rows(begun, PATH_COLUMNS) is not None and not os.path.lexists(begun.splitlines()[0]):
        fault = f"--files-from {show_path(path)}: a manifest, not a list of paths"
        raise UsageError(fault, f"leave out --files-from: pass {show_path(path)}")


def _chunks(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield the bytes of a list as they arrive, without a byte order mark, and as UTF-8 if they are UTF-16."""
    decoder = None
    for number, chunk in enumerate(iter(partial(stream.read1, 1 << 16), b"")):
        if number == 0:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            is_wide = chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell's > writes it
            decoder = codecs.getincrementaldecoder("utf-16")("replace") if is_wide else None
        yield chunk if decoder is None else decoder.decode(chunk).encode()


def _path_in_list(name: bytes, shown: str, null: bool) -> str:
    """Return a path of a list, without the \\r of a line end; "" for a blank line. Raises UsageError for a wrong -0."""
    option = f"--files-from {show_path(shown)}"
    if not null and b"\0" in name:
        raise UsageError(f"{option}: paths end in NUL, not in line ends", "pass -0")
    if null and b"\n" in name.rstrip(b"\r\n") and not os.path.lexists(name):
        raise UsageError(f"{option}: paths end in line ends, not in NUL", "leave out -0")
    if not null and name.endswith(b"\r") and not os.path.lexists(name):
        name = name.removesuffix(b"\r")
    return os.fsdecode(name) if name.strip() else ""


def inputs_to_prepare(
    inputs: list[str], files_from: str | None, null: bool, stdin_name: str, limit: list[str] | None
) -> Any:
    """Return the paths to prepare, or the bytes on stdin as a Source."""
    from perceiver_cli.preprocess.source import Source, received
    from perceiver_cli.preprocess.spec import Limits

    _check_null(files_from, null)
    if not inputs and files_from is None:
        raise UsageError("nothing to prepare", "pass files or folders, or - with bytes on stdin, or --files-from")
    if "-" in inputs:
        if len(inputs) > 1 or files_from is not None:
            raise UsageError("- must be the only input", "pass several paths with --files-from")
        with os.fdopen(terminal.piped_stdin(), "rb", closefd=False) as stream:
            return Source(stdin_name, received(stream, Limits().raised(options.raised_limits(limit))))
    if files_from == "-":
        terminal.piped_stdin()
    return [*inputs, *(path for _, path in _lines(files_from, null))]
