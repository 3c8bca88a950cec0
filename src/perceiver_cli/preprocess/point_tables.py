"""Tables of numbers: points in text (XYZ, PTS, ASC) and in arrays (NPY), and how they differ from other tables.

Boxes of YOLO, landmarks, tracks of pitch, EEG and spectrograms are tables too, and lie beside the files that they
describe: read as clouds they give the label away. So a table is points if its suffix is of points and its number of
columns is one that clouds have. `.txt`, `.csv` and `.npy` say nothing: they are points if the user asks, or if columns
4 to 6 of each row in the first 4,096 bytes are a unit vector. These are x, y, z and a normal, as in ModelNet40's
`modelnet40_normal_resampled` and in ShapeNet's parts. No table beside a file has such columns by chance.
"""

from __future__ import annotations

import io
import re
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.geometry import (
    BOM,
    Floats,
    Mesh,
    are_normals,
    check_counts,
    columns_by_place,
    plain_name,
    unix_lines,
)  # fmt: skip
from perceiver_cli.preprocess.source import HEAD_BYTES, Source
from perceiver_cli.preprocess.spec import Limits

SUFFIXES = ("xyz", "xyzi", "xyzn", "xyzrgb", "pts", "asc")  # of points, and of nothing else with such columns
PLAIN = ("txt", "csv", "npy")  # of any table
CLOUD_COLUMNS = (3, 4, 6, 7, 9, 10)  # x, y, z; perhaps an intensity; perhaps colours; perhaps normals
MAX_COLUMNS = 15  # of a cloud if the user asks; more is a byte array or no cloud
COMMENTS = ("#", "//", "%", "!")
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf|infinity)", re.IGNORECASE)
WITH_COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
LOOKED_AT = (HEAD_BYTES, 1 << 20)  # bytes; comments may fill the first
NUM_ELEMENTS = 118  # of chemistry
LEAST_ROWS = 32  # with unit normals, for a table whose suffix says nothing


class TextTable(NamedTuple):
    """The form of a text of numbers, as its first lines show it.

    rows: of these lines. start: bytes before the first row. names: of the columns, if a line above the rows has them.
    declared: number of all rows, if a line says it. comma: "." if a comma is a decimal point, else the blank that it
    stands for.
    """

    rows: Floats
    start: int
    names: tuple[str, ...]
    declared: int | None
    comma: bytes

    @property
    def places(self) -> tuple[int, int, int]:
        """The columns of x, y and z: by name, or the first three."""
        named = {"x", "y", "z"} <= set(self.names)
        x, y, z = (self.names.index(axis) for axis in "xyz") if named else (0, 1, 2)
        return x, y, z


def table_of(head: bytes, *, whole: bool) -> TextTable | None:
    """Return the form of a text table that begins with `head`, or None for other bytes. whole: nothing follows.

    Above the rows may stand comments, a line with their number, and one with the names of their columns.
    """
    if re.search(rb"[\0-\x08]", head):
        return None
    lines = head.splitlines(keepends=True)
    start, above, headers, rows, count = 0, list[str](), 0, list[str](), None
    for line in lines if whole else lines[:-1]:  # the last may be incomplete
        text = line.decode("latin-1").strip()
        is_comment = not text or text.startswith(COMMENTS)
        if not is_comment and (rows or _is_numeric(text)):
            if rows or count is not None or not text.isdigit():
                rows.append(text)
                continue
            count = int(text[:18])
        elif not is_comment:
            headers += 1
        if not rows:
            start += len(line)
            above.append(text)
    parsed = _parsed(rows)
    if parsed is None or headers > 1:
        return None
    words = (tuple(re.split(r"[\s,;]+", re.sub(r"^[\W_]+|[\s,;]+$", "", text))) for text in reversed(above))
    width = parsed[0].shape[1]
    names = next((each for each in words if len(each) == width and not any(map(_is_numeric, each))), ())
    return TextTable(parsed[0], start, tuple(plain_name(name.strip('"')) for name in names), count, parsed[1])


def _is_numeric(text: str) -> bool:
    """Return whether a line begins with a number."""
    first = re.split(r"[\s;]+", text, maxsplit=1)[0]
    return any(NUMBER.fullmatch(each) for each in (first, first.partition(",")[0]))


def _parsed(rows: list[str]) -> tuple[Floats, bytes] | None:
    """Return the numbers of rows of one length, and what a comma stands for; None if they are no such table."""
    rows = [row.rstrip(",; \t") for row in rows]
    by_blanks = [re.split(r"[\s;]+", row) for row in rows]
    by_commas = [re.split(r"\s*,\s*", row) for row in rows]
    comma = b" "
    if not any("," in row for row in rows):
        cells = by_blanks
    elif all(NUMBER.fullmatch(cell) for row in by_commas for cell in row):
        cells = by_commas
    else:  # 1,5 2,5 3,5; a point beside such commas would leave open what separates the numbers
        cells, comma = [[cell.replace(",", ".") for cell in row] for row in by_blanks], b"."
        if any("." in row for row in rows):
            return None
    if not rows or len({len(row) for row in cells}) != 1:
        return None
    if not all(NUMBER.fullmatch(cell) for row in cells for cell in row):
        return None
    return np.array(cells, np.float64), comma


def are_points(head: bytes, suffix: str) -> bool:
    """Return whether a table's suffix and shape, or its unit normals, say that it is points."""
    if suffix not in SUFFIXES + PLAIN:
        return False
    whole = len(head) < HEAD_BYTES - len(BOM)
    array = _array_head(head)
    table = table_of(head, whole=whole) if array is None else None
    if suffix in SUFFIXES:
        if table is None:
            return not whole and all(line.startswith(tuple(each.encode() for each in COMMENTS)) or not line.strip()
                                     for line in head.splitlines()[:-1])  # fmt: skip
        known = table.rows.shape[1] in CLOUD_COLUMNS and not _are_atoms(table)
        return known or {"x", "y", "z"} <= set(table.names)
    rows = table.rows if table is not None else _rows_in(head, array)
    known = rows is not None and rows.shape[1] in (6, 7) and len(rows) >= LEAST_ROWS
    return known and rows is not None and are_normals(rows[:, 3:6])


def _are_atoms(table: TextTable) -> bool:
    """Return whether rows are atoms, as chemistry's .xyz has them: their number above, and elements before x, y, z."""
    element = table.rows[:, 0]
    is_element = (element == np.floor(element)) & (element > 0) & (element <= NUM_ELEMENTS)
    return table.declared is not None and table.rows.shape[1] == 4 and bool(is_element.all())


def may_be_points(head: bytes) -> bool:
    """Return whether a table can be read as points if the user asks: it has 3 to 15 columns."""
    shape = shape_of(head)
    return shape is not None and len(shape) == 2 and 3 <= shape[1] <= MAX_COLUMNS


def shape_of(head: bytes) -> tuple[int, ...] | None:
    """Return the shape of an array, or (rows in `head`, columns) of a text table; None for other files."""
    if (array := _array_head(head)) is not None:
        return array.shape
    table = table_of(head, whole=len(head) < HEAD_BYTES - len(BOM))
    return None if table is None else (len(table.rows), table.rows.shape[1])


def described(head: bytes) -> str | None:
    """Return what a table is, for messages, or None if the file is no table of numbers."""
    if (array := _array_head(head)) is not None:
        return f"an array of {array.dtype.name} {array.shape}"
    shape = shape_of(head)
    return None if shape is None or shape[1] < 2 else f"a table of {shape[1]} numbers a line"


def read_points(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of a text with three or more numbers a line. Raises DataError if its count does not fit."""
    data = unix_lines(data)
    check_counts(source, data.count(b"\n"), 0, limits)
    heads = (table_of(data[:size], whole=size >= len(data)) for size in LOOKED_AT)
    table = next((table for table in heads if table is not None), None)
    if table is None or table.rows.shape[1] < 3:
        raise DataError(f"{source.shown}: no table of three or more numbers a line",
                        "expected lines of x y z, with blanks, commas or ; between them")  # fmt: skip
    body = data[table.start :]
    commas = body.count(b",")
    body = body.replace(b",", table.comma).replace(b";", b" ")
    if b"//" in body:
        body = re.sub(rb"(?m)^[ \t]*//[^\r\n]*", b"", body)
    points = np.loadtxt(io.BytesIO(body), np.float64, usecols=table.places, ndmin=2).reshape(-1, 3)
    if table.declared is not None and table.declared != len(points):
        raise DataError(f"{source.shown}: declared {table.declared} points, found {len(points)}")
    width = table.rows.shape[1]
    per_row = {len(points) * count for count in (width - 1, width)}
    if table.comma == b" " and commas and b"#" not in body and commas not in per_row:
        raise DataError(f"{source.shown}: commas separate numbers in some lines, and are decimal points in others")

    def columns() -> dict[str, Array]:
        every = np.loadtxt(io.BytesIO(body), np.float64, ndmin=2)
        named = {name: every[:, place] for place, name in enumerate(table.names) if name not in "xyz"}
        return (
            named | {str(place + 1): every[:, place] for place in range(3, width)} if named else columns_by_place(every)
        )

    return Mesh(points, columns=columns)


class ArrayHeader(NamedTuple):
    """The header of an NPY. column_major: columns come one after the other. start: the offset of the numbers."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    column_major: bool
    start: int


def header_of(data: bytes) -> ArrayHeader:
    """Return the header of an NPY. Raises ValueError for a damaged one."""
    file, npy = io.BytesIO(data), np.lib.format
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, column_major, dtype = read_header(file)
    return ArrayHeader(dtype, shape, column_major, file.tell())


def _array_head(head: bytes) -> ArrayHeader | None:
    """Return the header of an NPY that begins with `head`, or None for other or damaged bytes."""
    with suppress(Exception):  # NumPy reads it as Python, which fails in dozens of ways
        return header_of(head) if head.startswith(b"\x93NUMPY") else None
    return None


def _rows_in(head: bytes, array: ArrayHeader | None) -> Floats | None:
    """Return the rows of an array of floats that lie in `head`, or None if it has no rows."""
    if array is None:
        return None
    dtype, shape, column_major, start = array
    if dtype.kind != "f" or len(shape) != 2 or column_major or not 1 <= shape[1] <= MAX_COLUMNS:
        return None
    count = (len(head) - start) // dtype.itemsize // shape[1]
    return np.frombuffer(head, dtype, count * shape[1], start).reshape(count, shape[1]).astype(np.float64)


def read_array(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of an (N, 3 or more) array of numbers. Raises DataError for objects, never unpickling them."""
    dtype, shape, column_major, start = header_of(data)
    if dtype.kind not in "fiu":
        raise DataError(f"{source.shown}: an array of {dtype.name}, expected numbers")
    if len(shape) != 2 or min(shape) < 0 or not 3 <= shape[1] <= MAX_COLUMNS or (shape[0] == 3 and shape[1] > 3):
        raise DataError(f"{source.shown}: an array of shape {shape}, expected (points, 3)")
    check_counts(source, shape[0], 0, limits)
    declared, available = prod(shape) * dtype.itemsize, len(data) - start
    if declared != available:
        raise DataError(f"{source.shown}: declared {declared} bytes of numbers, found {available}")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if column_major else "C")
    return Mesh(array[:, :3].astype(np.float64), columns=partial(columns_by_place, array))
