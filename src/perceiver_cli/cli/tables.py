"""Tables on stdout. On a terminal they fit its width: names are cut in the middle, figures stay whole."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence

from perceiver_cli.cli.terminal import emit, is_terminal

LEAST_NAME = 12  # columns of a terminal that a name keeps
GAP = 2  # blanks between columns


def terminal_width() -> int:
    """Return the number of columns of the terminal."""
    return shutil.get_terminal_size().columns


def emit_table(columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> None:
    """Write a table to stdout, its first column left-aligned, figures right-aligned; total: the cells of a last row."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [list(row) for row in rows]
    every = [columns, *lines, total] if total else [columns, *lines]
    wide = [max(map(cell_len, column)) for column in zip(*every, strict=True)]
    width = sum(wide) + GAP * len(wide)  # in a pipe rows do not wrap
    if is_terminal():
        room = max(LEAST_NAME, terminal_width() - sum(each + GAP for each in wide[1:]))
        for row in lines:
            row[0] = cut(row[0], room)
        width = max(terminal_width(), min(room, wide[0]) + sum(each + GAP for each in wide[1:]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in lines:
        table.add_row(*map(Text, row))
    if total:
        table.add_row(*map(Text, total), style="bold")
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=is_terminal(), markup=False).print(table)
    emit("".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines()), styled=True)


def cut(text: str, width: int) -> str:
    """Return a text with its middle left out if it is wider on a terminal."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{set_cell_size(text, width - 1 - half)}…{set_cell_size(text[::-1], half)[::-1]}"


def padded(text: str, width: int) -> str:
    """Return a text padded with blanks to a width on a terminal; a longer text unchanged."""
    from rich.cells import cell_len

    return text + " " * max(0, width - cell_len(text))


def emit_facts(facts: Iterable[str], indent: str = "") -> None:
    """Write facts on one line; on a terminal, lines break between facts to fit its width.

    indent: stands before all lines but the first.
    """
    lines = [""]
    for fact in facts:
        longer = f"{lines[-1]}  {fact}" if lines[-1].strip() else lines[-1] + fact
        if is_terminal() and lines[-1].strip() and len(longer) > terminal_width():
            lines.append(indent + fact)
        else:
            lines[-1] = longer
    emit("".join(f"{line}\n" for line in lines))
