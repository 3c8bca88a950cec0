"""Recordings, which are files of numbers over time: text tables (CSV, TSV), arrays (NPY), Parquet, Arrow, WAV and FLAC.

Each column is a channel, and one may hold the times. A line of names may stand above the rows. Sizes are checked before
memory is allocated. Objects in arrays are never unpickled.
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from math import prod
from typing import NamedTuple

import numpy as np

from perceiver_cli.errors import DataError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.columnar import ARROW, MAX_COLUMNS, PARQUET, check_columns, read_columns
from perceiver_cli.preprocess.point_tables import header_of
from perceiver_cli.preprocess.sound_files import is_lossless, read_channels
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.time_columns import (
    Floats,
    Kind,
    are_days,
    is_time,
    may_be_times,
    past_midnight,
    scale_of,
    seconds_of_clock,
    seconds_of_date,
)

NPY = b"\x93NUMPY"
MAX_LINE = 1 << 20  # letters of a line of text
LOOKED_AT = 64  # lines at the start of a text that show its form
LAST = 8  # of these, the lines by which the separator is chosen
LEAST_ROWS = 8  # below a line of names, from which on a table is certainly a recording
# Separators of cells, None for blanks, and whether a comma is a decimal point.
MARKS = ((",", False), *((mark, comma) for mark in (";", "\t", "|", None) for comma in (False, True)))
COMMENTS = ("#", "%", "//", "!")
MISSING = ("", "nan", "null", "n/a", "na", "none", "?", "-")  # what programs write into an empty cell
INDEX = ("index", "id", "row", "sample", "n", "#")  # names of columns that count the rows
COUNTED: tuple[Kind, ...] = ("number", "time", "clock")
TIMES = "numbers, 10:00:05 or 2024-03-05T10:00:05"
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:\.\d{3})+(?:,\d*)?")  # with points between thousands and a decimal comma
PATH = re.compile(r".*\.[A-Za-z]\w{1,7}$")  # a cell that names a file


class Recording(NamedTuple):
    """Numbers over time. names: of the channels; "1", "2", ... if the file has none. is_named: whether it has names.

    values: (T, channels) float64, NaN where missing. times: (T,) in seconds, never falling, or None.
    """

    names: tuple[str, ...]
    is_named: bool
    values: Floats
    times: Floats | None = None


class Form(NamedTuple):
    """The form of a text of numbers. separator: None for blanks. comma: whether decimal points are commas.

    start: lines above the rows. rows: number of rows among the lines that were looked at.
    """

    separator: str | None
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    start: int
    comma: bool
    rows: int


def is_recording(head: bytes) -> bool:
    """Return whether a file that begins with `head` can be a recording."""
    if head.startswith((PARQUET, *ARROW)) or is_lossless(head):
        return True
    if head.startswith(NPY):
        with suppress(Exception):  # NumPy reads the header as Python, which fails in dozens of ways
            header = header_of(head)
            return header.dtype.kind in "fiu" and len(header.shape) in (1, 2)
        return False
    return _form_of_head(head) is not None


def is_named_recording(head: bytes) -> bool:
    """Return whether a text table is certainly a recording: rows of numbers below the names of their columns.

    A table of x, y and z without times may be points.
    """
    form = None if head.startswith((NPY, PARQUET, *ARROW)) else _form_of_head(head)
    if form is None or not form.names or form.rows < LEAST_ROWS or 2 * form.kinds.count("words") > len(form.kinds):
        return False
    return any(map(is_time, form.names)) or not {"x", "y", "z"} <= {name.strip().lower() for name in form.names}


def _form_of_head(head: bytes) -> Form | None:
    lines = _lines(_as_text(head))
    return _form(lines if len(head) < HEAD_BYTES else lines[:-1])


def read_recording(source: Source, limits: Limits, time: str = "auto", unit: str = "auto") -> Recording:
    """Return the recording in a file.

    time: the name of the column of times; "auto" finds it; "none": there is none. unit: of times that are numbers, see
    `scale_of`. Raises DataError for a file that is damaged, without numbers or with times that go back, LimitError for
    a file that is too large.
    """
    with as_data_errors(source, "series"), source.open(limits) as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if is_lossless(head):
            rate_hz, values = read_channels(source, file, limits)
            check_columns(source, values.shape[1])
            if not values.size:
                raise DataError(f"{source.shown}: no samples in the file")
            return Recording(_numbered(values.shape[1]), False, values, np.arange(len(values)) / rate_hz)
        if head.startswith((PARQUET, *ARROW)):
            names, kinds, values = read_columns(source, file, limits)
        else:
            data = file.read()
            names, kinds, values = _array(source, data, limits) if head.startswith(NPY) else _text(source, data, limits)
    is_named = any(names)
    names = names if is_named else _numbered(len(names))
    return _divided(source, Recording(names, is_named, values), kinds, time, unit)


def _numbered(count: int) -> tuple[str, ...]:
    """Return the names of channels in a file without names."""
    return tuple(str(place) for place in range(1, count + 1))


def _divided(source: Source, every: Recording, kinds: Sequence[Kind], time: str, unit: str) -> Recording:
    """Return the recording without the column of times and without columns that count the rows."""
    values = every.values
    names = tuple(name or f"column {place}" for place, name in enumerate(every.names, start=1))
    place, times = _times(source, every._replace(names=names), kinds, time, unit)
    channels = [at for at, kind in enumerate(kinds) if kind == "number" and at != place]
    if every.is_named:
        channels = [at for at in channels if not _counts(every.names[at], values[:, at])]
        channels = [at for at in channels if every.names[at] or np.isfinite(values[:, at]).any()]
    if times is not None and place is not None:
        known = np.isfinite(times)
        if not known.all():
            source.note(f"left out {int((~known).sum())} of {len(known)} rows without a time")
            values, times = values[known], times[known]
        if len(times) > 1 and (np.diff(times) < 0).any():
            row = int(np.flatnonzero(np.diff(times) < 0)[0]) + 2
            fault = f"{source.shown}: the times in column {show_path(names[place])} go back at row {row}"
            raise DataError(fault, "sort the rows; if these are no times, pass --set inputs.series.time=none")
    values = values[:, channels]
    values = np.where(np.isfinite(values), values, np.nan)
    if not channels or not values.size:
        raise DataError(f"{source.shown}: no {'samples' if channels else 'column of numbers'} in the file")
    return Recording(tuple(names[at] for at in channels), every.is_named, values, times)


def _times(
    source: Source, every: Recording, kinds: Sequence[Kind], time: str, unit: str
) -> tuple[int | None, Floats | None]:
    """Return the place of the column of times and its times in seconds, or None twice. Raises as `_named_time`."""
    if time == "none":
        return None, None
    place = _found_time(source, every, kinds) if time == "auto" else _named_time(source, every.names, kinds, time)
    if place is None:
        return None, None
    column = every.values[:, place]
    if kinds[place] == "clock":
        days = [at for at, kind in enumerate(kinds) if kind == "time" and are_days(every.values[:, at])]
        return place, column + every.values[:, days[0]] if len(days) == 1 else past_midnight(column)
    return place, column if kinds[place] == "time" else column * scale_of(every.names[place], column, unit)


def _named_time(source: Source, names: Sequence[str], kinds: Sequence[Kind], time: str) -> int:
    """Return the place of the column of this name. Raises DataError if there is none, or it holds no times."""
    if time not in names or kinds[names.index(time)] == "words":
        shown = ", ".join(map(show_path, names[:10]))
        if time in names:
            raise DataError(f"{source.shown}: no times in column {show_path(time)}", f"expected {TIMES}")
        raise DataError(f"{source.shown}: no column {show_path(time)} for the times", f"its columns are {shown}")
    return names.index(time)


def _found_time(source: Source, every: Recording, kinds: Sequence[Kind]) -> int | None:
    """Return the place of the likeliest column of times: dates with a clock, a clock, numbers, dates alone."""
    dates = [at for at, kind in enumerate(kinds) if kind == "time"]
    days = [at for at in dates if are_days(every.values[:, at])]
    clocks = [at for at, kind in enumerate(kinds) if kind == "clock"]
    called = [at for at, name in enumerate(every.names) if every.is_named and is_time(name)]
    numbers = [at for at in called if kinds[at] == "number" and may_be_times(every.names[at], every.values[:, at])]
    found = [*(at for at in dates if at not in days), *clocks, *numbers, *days]
    words = [show_path(every.names[at]) for at in called if kinds[at] == "words"]
    if words and not [at for at in found if at not in days]:
        source.note(f"no times are read from {', '.join(words)}, expected {TIMES}")
    return found[0] if found else None


def _counts(name: str, column: Floats) -> bool:
    """Return whether a column counts the rows, as an index does; one without a name may skip numbers."""
    plain = name.strip().lower()
    unnamed = plain == "" or plain.startswith(("unnamed:", "__index_level"))
    if not (unnamed or plain in INDEX) or len(column) < 2 or not np.isfinite(column).all():
        return False
    steps = np.diff(column)
    return bool(((steps >= 1) & (steps % 1 == 0)).all()) if unnamed else bool((steps == 1).all())


# ---------------------------------------------------------------- text


def _as_text(data: bytes) -> str:
    """Return bytes as text by their mark, as UTF-8 or as Windows-1252; a wrong guess harms names, never numbers."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8-sig")
    return data.removeprefix(b"\xef\xbb\xbf").decode("cp1252", "replace")


def _lines(text: str) -> list[str]:
    return list(islice(_each_line(text), LOOKED_AT))


def _each_line(text: str) -> Iterator[str]:
    return iter(io.StringIO(text, newline=None))


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    try:
        row = next(csv.reader([line.strip("\r\n")], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []
    return [cell.strip() for cell in row]


def _form(lines: Sequence[str]) -> Form | None:
    """Return the form of a text by its first lines, or None for other text, such as a manifest of files."""
    lines = [line for line in lines if not line.lower().startswith("sep=")]
    shown = [line for line in lines if line.strip() and not line.lstrip().startswith(COMMENTS)]
    if not shown or any("\0" in line or len(line) > MAX_LINE for line in shown):
        return None
    ranked = []
    for place, (separator, comma) in enumerate(MARKS):
        if (separator and separator not in shown[-1]) or (comma and not any("," in line for line in shown[-LAST:])):
            continue
        rows = [_cells(line, separator) for line in shown[-LAST:]]
        rows = [row for row in rows if any(_kind(cell, comma) == "number" for cell in row)]
        width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
        cells = [cell for row in rows for cell in row if len(row) == width and cell.lower() not in MISSING]
        words = sum(_kind(cell, comma) == "words" for cell in cells)
        ranked += [(words / len(cells), -width, place)] if cells else []
    if not ranked:
        return None
    _, width, place = min(ranked)
    return _of_columns(lines, *MARKS[place], -width)


def _of_columns(lines: Sequence[str], separator: str | None, comma: bool, width: int) -> Form | None:
    """Return the form of a text whose rows have `width` columns, or None if these are not a recording's."""
    above, rows = list[list[str]](), list[list[str]]()
    for line in lines:
        is_comment = line.lstrip().startswith(COMMENTS)
        cells = _cells(line.strip().lstrip("".join(COMMENTS)) if is_comment else line, separator)
        if rows or (len(cells) == width and not is_comment and any(_kind(cell, comma) == "number" for cell in cells)):
            rows += [cells] if len(cells) == width and not is_comment else []
        else:
            above.append(cells)
    if width > MAX_COLUMNS or not rows:
        return None
    kinds: list[Kind] = []
    for column in zip(*rows, strict=True):
        known = [cell for cell in column if cell.lower() not in MISSING]
        found = Counter(_kind(cell, comma) for cell in known)
        kinds.append(next((kind for kind in COUNTED if 2 * found[kind] > len(known)), "words"))
        kinds[-1] = kinds[-1] if known else "number"
        if kinds[-1] == "words" and any(map(PATH.match, known)):
            return None  # a manifest
    if kinds.count("words") > 2 * kinds.count("number"):
        return None
    start = len(above)
    above = [cells + [""] * (width - len(cells)) for cells in above if len(cells) in (width, max(2, width - 1))]
    named = (cells for cells in above if not any(_kind(cell, comma) == "number" for cell in cells))
    return Form(separator, tuple(next(named, ())), tuple(kinds), start, comma, len(rows))


def _plain(cell: str, comma: bool) -> str:
    """Return a number as Python reads it; if commas are decimal points, points separate thousands."""
    if not comma:
        return cell
    return (cell.replace(".", "") if THOUSANDS.fullmatch(cell) else cell).replace(",", ".")


def _kind(cell: str, comma: bool) -> Kind:
    try:
        float(_plain(cell, comma))
        return "number"
    except ValueError:
        if seconds_of_clock(cell) is not None:
            return "clock"
        return "time" if seconds_of_date(cell) is not None else "words"


def _text(source: Source, data: bytes, limits: Limits) -> tuple[tuple[str, ...], tuple[Kind, ...], Floats]:
    """Return names, kinds and values of the columns of a text. Raises DataError for a row of another length."""
    source.check_limit(len(data), "bytes", "text_bytes", limits)
    text = _as_text(data)
    form = _form(_lines(text))
    if form is None:
        raise DataError(
            f"{source.shown}: no table of numbers over time", "expected a line of names, then rows of numbers"
        )
    width = len(form.kinds)
    source.check_decoded(8.0 * width * (text.count("\n") + text.count("\r") + 1), 1, limits)
    places = [place for place, kind in enumerate(form.kinds) if kind != "words"]
    numbers = array("d")
    for number, row in _rows(text, form):
        if len(row) != width:
            fault = f"{source.shown}: row {number} has {len(row)} cells, expected {width}"
            raise DataError(fault, "the file may be cut short")
        chosen = [row[place] for place in places]
        try:
            plain = [_plain(cell.strip(), form.comma) for cell in chosen] if form.comma else chosen
            numbers.extend(array("d", map(float, plain)))
        except ValueError:
            numbers.extend(
                _number(source, cell, form, place, number) for place, cell in zip(places, chosen, strict=True)
            )
    known = np.frombuffer(numbers, np.float64).reshape(-1, len(places)) if numbers else np.empty((0, len(places)))
    values = np.full((len(known), width), np.nan)
    values[:, places] = known
    return form.names or ("",) * width, form.kinds, values


def _rows(text: str, form: Form) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each row."""
    lines = _each_line(text)
    if text[:4].lower() == "sep=":
        next(lines)
    body = islice(lines, form.start, None)
    width = len(form.kinds)
    comments = ("#", "//") if form.kinds[0] == "words" else COMMENTS  # words may begin with ! or %
    rows = csv.reader(body, delimiter=form.separator) if form.separator else (line.split() for line in body)
    for number, row in enumerate(rows, start=1):
        if row and not row[0].lstrip().startswith(comments) and (len(row) > 1 or row[0].strip()):
            yield number, row[:width] if len(row) == width + 1 and not row[width].strip() else row


def _number(source: Source, cell: str, form: Form, place: int, row: int) -> float:
    """Return the number or time in a cell, NaN if it is missing. Raises DataError for words."""
    text = cell.strip()
    if text.lower() in MISSING:
        return np.nan
    read = {"time": seconds_of_date, "clock": seconds_of_clock}.get(form.kinds[place])
    if read is not None and (seconds := read(text)) is not None:
        return seconds
    with suppress(ValueError):
        return float(_plain(text, form.comma))
    where = f"row {row}, column {show_path(form.names[place]) if form.names else place + 1}"
    raise DataError(f"{source.shown}: {where} has {show_path(text[:40])}, expected a number")


# ---------------------------------------------------------------- arrays


def _array(source: Source, data: bytes, limits: Limits) -> tuple[tuple[str, ...], tuple[Kind, ...], Floats]:
    """Return the columns of an array (T,), (T, channels) or (channels, T): time is the longer axis."""
    dtype, shape, column_major, start = header_of(data)
    if dtype.kind not in "fiu" or len(shape) not in (1, 2) or min(shape, default=0) < 1:
        what = "objects" if dtype.hasobject else f"{dtype.name} of shape {shape}"
        raise DataError(f"{source.shown}: an array of {what}, expected numbers (time, channels)")
    declared, available = prod(shape) * dtype.itemsize, len(data) - start
    if declared != available:
        raise DataError(f"{source.shown}: declared {declared} bytes of numbers, found {available}")
    source.check_decoded(prod(shape), 8, limits)
    values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if column_major else "C")
    values = values.reshape(len(values), -1)
    values = values if len(shape) == 1 or shape[0] >= shape[1] else values.T
    check_columns(source, values.shape[1])
    numbers: list[Kind] = ["number"] * values.shape[1]
    return ("",) * len(numbers), tuple(numbers), values.astype(np.float64)
