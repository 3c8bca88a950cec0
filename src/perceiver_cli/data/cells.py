"""From the bytes of a manifest to its cells: CSV as programs write it, JSON, Parquet, lines of PATH LABEL. No torch."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from perceiver_cli.data.table_files import TableFile
from perceiver_cli.errors import DataError
from perceiver_cli.files import parse_json, show_path
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.text import NOTE_CP1252, marked

PARQUET = ".parquet"
LINES = ".txt"  # lines of PATH LABEL, as in the lists of Kinetics
MAX_MANIFEST_BYTES = 256 << 20
SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"?[ ,;\t]*(?:\r\n|\r|\n)', re.IGNORECASE)  # Excel's
# How programs quote cells, in the order of trying: as RFC 4180; with backslashes (Spark, MySQL); in TSV not at all.
QUOTING: tuple[dict[str, Any], ...] = ({}, {"escapechar": "\\", "doublequote": False})
UNQUOTED: dict[str, Any] = {"quoting": csv.QUOTE_NONE}
SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # XLSX and ODS, which are zips; XLS
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # a byte of a text that is not UTF-8
BLANKS = r"[\s\ufeff\u200b\u2060]"  # no-break spaces too; the last three have no width
ENDS, LINE_ENDS = re.compile(rf"^{BLANKS}+|{BLANKS}+$"), re.compile(r"[\r\n\t]+")

Fits = Callable[[list[str]], bool]  # whether columns of these names can be a manifest's


@dataclass(frozen=True)
class Cells:
    """The cells of a table. columns: names as in the header, doubled and empty ones too. notes: how it was read.

    rows: each row's cells by column, the last if two columns have one name; a cell that a row lacks is missing or None.
    """

    columns: list[str]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


def read_cells(source: Source, fits: Fits, suffix: str | None = None) -> Cells:
    """Return the cells of a manifest, read by its suffix, or by the one that bytes without a name would have.

    fits: chooses the separator of a CSV by its header. Raises DataError for a file that contradicts its suffix.
    """
    shown, suffix = source.shown, suffix or Path(source.name).suffix.lower()
    if suffix == PARQUET:
        if source.data is not None:
            raise DataError(f"{shown}: a Parquet manifest inside an archive", "unpack it, or save it as CSV")
        table = TableFile(source.name, MAX_MANIFEST_BYTES)
        return Cells(table.names, list(table.rows(table.names)))
    with source.open(Limits(file_bytes=MAX_MANIFEST_BYTES)) as file:
        data = file.read()
    if data.startswith(SPREADSHEETS):
        raise DataError(f"{shown}: a spreadsheet or another zip, not a {suffix} manifest", "save it as CSV")
    try:
        return MANIFESTS[suffix](decoded(data), fits)
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{shown}: not a {suffix} manifest: {error}") from error


def decoded(data: bytes) -> str:
    """Return bytes as text by their byte order mark, else as UTF-8; bytes that are not UTF-8 become surrogates."""
    encoding = marked(data)
    if encoding is None and len(data) > 1 and (data[0] == 0) != (data[1] == 0):  # UTF-16 without a mark
        encoding = "utf-16-le" if data[1] == 0 else "utf-16-be"
    if encoding is None or encoding == "utf-8":
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    return data.decode(encoding)


def _in_cp1252(text: str) -> str:
    """Return text whose bytes are not UTF-8 as Windows-1252, the code of Excel's plain CSV; other text as it is."""
    if NOT_UTF8.search(text) is None:
        return text
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "surrogateescape")


def bytes_of(text: str) -> str:
    """Return text that was read as Windows-1252 with the bytes of its table again: a path may have any bytes."""
    with suppress(UnicodeEncodeError):
        return text.encode("cp1252", "surrogateescape").decode("utf-8", "surrogateescape")
    return text


def as_label(cell: Any) -> str:
    """Return a scalar of CSV or JSON as the text of a label, without blanks around it or line ends in it; "" is none.

    true, false and null are as in JSON. Raises ValueError for a list or an object.
    """
    if isinstance(cell, list | dict):
        raise ValueError("a list" if isinstance(cell, list) else "an object")
    text = "" if cell is None else str(cell).lower() if isinstance(cell, bool) else str(cell)
    return ENDS.sub("", LINE_ENDS.sub(" ", text))


# ---------------------------------------------------------------- CSV


def _table(text: str, fits: Fits, separators: str) -> Cells:
    """Return the cells of a CSV; separators: those it may have, the usual one first."""
    notes = []
    if mark := SEPARATOR_LINE.match(text):
        text, separators = text[mark.end() :], mark[1]
    separator = _separator(text, fits, separators)
    if separator != separators[0]:
        notes.append(f"cells are separated by {show_path(separator)}")
    lines = _lines(text, separator)
    if not lines:
        return Cells([], [])
    if NOT_UTF8.search(text):
        notes.append(NOTE_CP1252)
        lines = [list(map(_in_cp1252, line)) for line in lines]
    columns, rows = list(map(as_label, lines[0])), lines[1:]
    while rows and not any(map(str.strip, rows[-1])):  # a spreadsheet saves empty rows too
        rows.pop()
    for number, row in enumerate(rows, start=1):
        if any(map(str.strip, row[len(columns) :])):
            raise ValueError(f"row {number} has more cells than columns: {len(row)}, expected {len(columns)}")
    return Cells(columns, [dict(zip(columns, row, strict=False)) for row in rows], tuple(notes))


def _separator(text: str, fits: Fits, separators: str) -> str:
    """Return the separator of a CSV: the first with which the header fits, else the first that makes most columns."""
    ranked = []
    for place, separator in enumerate(separators):
        header = next(filter(None, csv.reader(_stream(text), delimiter=separator)), [])
        ranked.append((not fits([name.strip() for name in header]), -len(header), place, separator))
    return min(ranked)[3]


def _lines(text: str, separator: str) -> list[list[str]]:
    """Return the cells of each line that is not blank. Raises ValueError for quotes that no writer leaves."""
    fault = ""
    for quoting in (*QUOTING, UNQUOTED) if separator == "\t" else QUOTING:
        reader = csv.reader(_stream(text), delimiter=separator, strict=True, **quoting)
        try:
            return [line for line in reader if line]
        except csv.Error as error:
            fault = fault or f"line {reader.line_num}: {error}"
    raise ValueError(fault)


def _stream(text: str) -> io.StringIO:
    return io.StringIO(text, newline="")  # lines end at \n, \r\n or \r; csv keeps those within quotes


# ---------------------------------------------------------------- JSON, lines


def _json(text: str, fits: Fits) -> Cells:
    """Return the cells of an array of objects, or of an object a line."""
    lines = re.split(r"\r\n|\r|\n", text)  # splitlines also cuts at U+2028
    if text.lstrip().startswith("["):
        rows = parse_json(text)
    elif text.strip() == "{" or lines[0].strip() == "{":  # written over several lines
        rows = [parse_json(text)]
    else:
        rows = [_json_line(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if len(rows) == 1 and isinstance(rows[0], dict) and any(isinstance(cell, dict) for cell in rows[0].values()):
        raise ValueError("one object that holds objects, expected an array with an object for each row")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object")
    return Cells(list(dict.fromkeys(name for row in rows for name in row)), rows)


def cells_of_line(line: bytes, number: int) -> Cells:
    """Return the cells of the only row of a line of JSON. Raises ValueError with its number for another line."""
    row = _json_line(decoded(line), number)
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not an object")
    return Cells([*row], [row])


def _json_line(line: str, number: int) -> Any:
    """Return the value of a line. Raises ValueError with its number: the parser counts from this line's start."""
    try:
        return parse_json(line)
    except ValueError as error:
        fault = re.sub(r": line \d+ (column \d+) \(char \d+\)$", r" at \1", str(error))
        raise ValueError(f"line {number}: {fault}") from error


def _path_label_lines(text: str, fits: Fits) -> Cells:
    def rows() -> Iterator[dict[str, Any]]:
        for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
            blank = "\t" if "\t" in line.strip() else None  # a label after a tab may have blanks
            words = list(map(_in_cp1252, line.strip().rsplit(blank, maxsplit=1)))
            if len(words) == 1:
                raise ValueError(f"line {number} is {show_path(words[0])}, expected PATH LABEL")
            if words:
                yield {"path": words[0], "label": words[1]}

    notes = (NOTE_CP1252,) if NOT_UTF8.search(text) else ()
    return Cells(["path", "label"], list(rows()), notes)


MANIFESTS: dict[str, Callable[[str, Fits], Cells]] = {
    ".csv": partial(_table, separators=",;\t|"),
    ".tsv": partial(_table, separators="\t,;|"),
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    LINES: _path_label_lines,
}
SUFFIXES = (*MANIFESTS, PARQUET)
