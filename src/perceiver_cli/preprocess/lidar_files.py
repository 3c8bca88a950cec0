"""Files of lidar: PCD, LAS and LAZ, and the raw floats of KITTI and nuScenes, their claims checked first.

NumPy reads PCD and raw floats; laspy reads LAS, with lazrs for LAZ (extra `[lidar]`).
"""

from __future__ import annotations

import io
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.geometry import COLOURS, Mesh, check_claim, check_counts, plain_name, unix_lines
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits

PCD_HEAD = rb"\s*(?:#[^\n]*\n\s*)*(?:VERSION\s+[.\d]+\s+)?(?:FIELDS|COLUMNS)\s"
PCD_KEYS = ("FIELDS", "COLUMNS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "POINTS", "DATA")
PCD_KINDS = {"F": "f", "I": "i", "U": "u"}
MAX_HEADER_BYTES = 1 << 14  # of PCD
MAX_FIELDS, MAX_PER_FIELD = 256, 4096
LZF_RATIO = 88  # a reference of 3 bytes stands for 264
RAW = {"bin": ("x", "y", "z", "intensity"), "pcd.bin": ("x", "y", "z", "intensity", "ring")}  # columns by suffix
FARTHEST = 1e5  # metres; bytes that are no coordinates exceed it when they are read as floats
POINT_BYTES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)  # least size of a point of LAS, by its format
LAZ_FLAGS = 0xC0
VLR_BYTES, EVLR_BYTES = 54, 60
LASZIP, LAYERED, VARIABLE = 22204, 3, 0xFFFFFFFF  # id of laszip's record, its compressor with layers, any chunk size
LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}  # of an item by its type; extra bytes have one each


def is_pcd(head: bytes, suffix: str) -> bool:
    """Return whether a file begins as a PCD."""
    return head.startswith(b"# .PCD") or re.match(PCD_HEAD, head) is not None


def read_pcd(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of a PCD: ASCII, binary or binary_compressed."""
    keys, start = _pcd_header(source, data)
    record = _pcd_record(source, keys)
    width, height = int(keys.get("WIDTH", ["0"])[0]), int(keys.get("HEIGHT", ["1"])[0])
    count = int(keys.get("POINTS", [str(width * height)])[0])
    if count < 0 or ("WIDTH" in keys and count != width * height):
        raise DataError(f"{source.shown}: {count} points in a PCD of {width} x {height}")
    check_counts(source, count, 0, limits)
    source.check_decoded(count, record.itemsize, limits)
    match keys["DATA"][0].lower():
        case "ascii":
            columns = _pcd_text(source, unix_lines(data)[start:], count, record)
        case "binary":
            check_claim(source, count * record.itemsize, len(data) - start)
            if len(data[start + count * record.itemsize :].strip(b"\0\r\n ")) >= record.itemsize:
                raise DataError(f"{source.shown}: declared {count} points, found more bytes than they take")
            table = np.frombuffer(data, record, count, start)
            columns = {name: table[name] for name in record.names or ()}
        case "binary_compressed":
            columns = _pcd_compressed(source, data[start:], count, record)
        case other:
            raise DataError(f"{source.shown}: PCD data {show_path(other)}",
                            "expected ascii, binary or binary_compressed")  # fmt: skip
    points = np.stack([columns[axis].astype(np.float64) for axis in "xyz"], axis=1)
    return Mesh(points, columns=partial(_pcd_columns, columns))


def _pcd_header(source: Source, data: bytes) -> tuple[dict[str, list[str]], int]:
    """Return the words of each key in the header of a PCD, and the offset of its data."""
    end = re.compile(rb"(?m)^DATA[ \t]+\w+[ \t]*\r?\n?").search(unix_lines(data), 0, MAX_HEADER_BYTES)
    if end is None:
        raise DataError(f"{source.shown}: no line DATA in {min(len(data), MAX_HEADER_BYTES)} bytes of PCD")
    lines = [line.split() for line in unix_lines(data)[: end.end()].decode("latin-1").splitlines()]
    keys = {line[0]: line[1:] for line in lines if line and line[0] in PCD_KEYS}
    keys["FIELDS"] = keys.get("FIELDS", keys.get("COLUMNS", []))
    return keys, end.end()


def _pcd_record(source: Source, keys: Mapping[str, list[str]]) -> np.dtype[Any]:
    """Return the type of a point of a PCD. Raises DataError for fields that contradict each other."""
    names, sizes, kinds = keys["FIELDS"], keys.get("SIZE", []), keys.get("TYPE", [])
    counts = [int(count) for count in keys.get("COUNT", ["1"] * len(names))]
    if not len(names) == len(sizes) == len(kinds) == len(counts) <= MAX_FIELDS:
        each = f"{len(names)} names, {len(sizes)} sizes, {len(kinds)} types, {len(counts)} counts"
        raise DataError(f"{source.shown}: the fields of a PCD have {each}")
    if not {"x", "y", "z"} <= set(names) or any(not 0 <= count <= MAX_PER_FIELD for count in counts):
        raise DataError(f"{source.shown}: a PCD with the fields {show_path(' '.join(names))}", "expected x y z")
    fields: list[Any] = []
    for place, (name, size, kind, count) in enumerate(zip(names, sizes, kinds, counts, strict=True)):
        taken = name == "_" or any(name == field[0] for field in fields)  # padding
        number = np.dtype(f"<{PCD_KINDS[kind]}{int(size)}")
        fields.append((f"_{place}" if taken else name, number, *([(count,)] if count != 1 else [])))
    return np.dtype(fields)


def _pcd_text(source: Source, body: bytes, count: int, record: np.dtype[Any]) -> dict[str, Array]:
    """Return the columns of an ASCII PCD."""
    lines = [line for line in body.splitlines() if line.strip()]
    if len(lines) != count:
        raise DataError(f"{source.shown}: declared {count} points, found {len(lines)} lines")
    table = np.loadtxt(lines, np.float64, ndmin=2) if lines else np.empty((0, 3))
    columns, place = dict[str, Array](), 0
    numbers = sum(int(np.prod(record[name].shape)) for name in record.names or ())
    if numbers != table.shape[1]:
        raise DataError(f"{source.shown}: {table.shape[1]} numbers a line in a PCD of {numbers}")
    for name in record.names or ():
        number, width = record[name].base, int(np.prod(record[name].shape))
        # A packed colour is a whole number, or a float of the same bits.
        columns[name] = table[:, place] if width == 1 else table[:, place : place + width]
        columns[name] = columns[name].astype(number) if number.kind == "f" else columns[name]
        place += width
    return columns


def _pcd_compressed(source: Source, body: bytes, count: int, record: np.dtype[Any]) -> dict[str, Array]:
    """Return the columns of a compressed PCD, which stand one after the other."""
    packed, plain = struct.unpack("<2I", body[:8])
    check_claim(source, 8 + packed, len(body))
    if plain != count * record.itemsize or plain > LZF_RATIO * packed + 32:
        raise DataError(f"{source.shown}: {plain} bytes in {packed} of LZF, expected {count} x {record.itemsize}")
    table, columns, at = _lzf(memoryview(body)[8 : 8 + packed], plain), {}, 0
    for name in record.names or ():
        columns[name] = np.frombuffer(table, record[name], count, at)
        at += count * record[name].itemsize
    return columns


def _lzf(data: memoryview, size: int) -> bytes:
    """Return the `size` bytes that LZF packed. Raises ValueError for a reference out of bounds or another size."""
    out, at, end = bytearray(), 0, len(data)
    while at < end and len(out) <= size:
        control = data[at]
        at += 1
        if control < 32:  # a run of control + 1 bytes as they are
            out += data[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[at]
            at += 1
        begin = len(out) - ((control & 31) << 8) - data[at] - 1
        at += 1
        if begin < 0:
            raise ValueError("LZF refers to bytes before its first")
        piece = out[begin : begin + length + 2]  # shorter if it reaches into what it writes
        out += (piece * -(-(length + 2) // len(piece)))[: length + 2]
    if len(out) != size or at != end:
        raise ValueError(f"LZF of {len(out)} bytes, expected {size}")
    return bytes(out)


def _pcd_columns(columns: Mapping[str, Array]) -> dict[str, Array]:
    """Return the columns of a PCD besides x, y, z; a packed colour becomes three."""
    named: dict[str, Array] = {}
    for name, values in columns.items():
        if name in ("rgb", "rgba") and values.ndim == 1:
            bits = values.astype("<f4").view("<u4") if values.dtype.kind == "f" and values.itemsize == 4 else values
            bits = bits.astype(np.int64)
            shifts = zip(COLOURS, (16, 8, 0), strict=True)
            named |= {colour: (bits >> shift & 255).astype(np.uint8) for colour, shift in shifts}
        elif values.ndim == 1 and name not in "xyz" and not name.startswith("_"):
            named[plain_name(name)] = values
    return named


def raw_suffix(name: str) -> str:
    """Return the suffix of a name in lower case without a dot; nuScenes' "pcd.bin" is one."""
    name = name.lower()
    return "pcd.bin" if name.endswith(".pcd.bin") else name.rpartition(".")[2]


def is_raw_cloud(head: bytes, suffix: str) -> bool:
    """Return whether a .bin begins with points as KITTI has them, or a .pcd.bin as nuScenes.

    Other .bin are not: whole numbers, embeddings, samples of sound, whose fourth numbers may be negative.
    """
    columns = len(RAW.get(suffix, ()))
    if not columns or len(head) < 4 * columns:
        return False
    rows = np.frombuffer(head, "<f4", len(head) // (4 * columns) * columns).reshape(-1, columns)
    with np.errstate(all="ignore"):
        known = rows[np.isfinite(rows).all(axis=1)]
        small = (known != 0) & (np.abs(known) < 1e-20)  # whole numbers read as floats
        far, negative = np.abs(known) >= FARTHEST, known[:, 3:] < 0  # an echo has a strength, and a laser a number
        ring = known[:, 4:]
        return bool(known.any()) and not any(map(np.any, (small, far, negative, ring != np.floor(ring))))


def read_raw(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of float32 x, y, z, intensity (KITTI), and ring (nuScenes)."""
    names = RAW[raw_suffix(source.name)]
    columns = len(names)
    if len(data) % (4 * columns):
        raise DataError(f"{source.shown}: {len(data)} bytes, no multiple of {4 * columns}",
                        f"expected {columns} float32 a point")  # fmt: skip
    check_counts(source, len(data) // (4 * columns), 0, limits)
    table = np.frombuffer(data, "<f4").reshape(-1, columns)
    named = {name: table[:, place] for place, name in enumerate(names) if place > 2}
    return Mesh(table[:, :3].astype(np.float64), columns=lambda: named)


def read_las(source: Source, data: bytes, limits: Limits) -> Mesh:
    """Return the points of a LAS or LAZ. Raises UsageError without the extra."""
    try:
        import laspy
    except ImportError as error:
        raise UsageError("laspy, which reads LAS, is missing", "pip install 'perceiver-cli[lidar]'") from error
    count = _check_las(source, data, limits)
    backend = laspy.LazBackend.Lazrs
    if data[104] & LAZ_FLAGS and not backend.is_available():
        raise UsageError("lazrs, which reads LAZ, is missing", "pip install 'perceiver-cli[lidar]'")
    try:
        with _without_stderr(), laspy.open(io.BytesIO(data), laz_backend=backend, read_evlrs=False) as file:
            points = file.read_points(count)
        if len(points) != count:
            raise DataError(f"{source.shown}: declared {count} points, found {len(points)}")
        table = np.stack([np.asarray(points[axis], np.float64) for axis in "xyz"], axis=1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic of Rust, which is not an Exception
            raise
        raise DataError(f"{source.shown}: cannot decode the points: damaged LAZ") from None
    return Mesh(table, columns=partial(_las_columns, points))


LOCK = threading.Lock()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence stderr in the body: a panic of Rust prints there before it is an exception."""
    with LOCK, open(os.devnull, "wb") as null:
        kept = os.dup(2)
        try:
            os.dup2(null.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _las_columns(points: Any) -> dict[str, Array]:
    """Return the dimensions of LAS besides x, y, z."""
    names = [name for name in points.point_format.dimension_names if name not in ("X", "Y", "Z")]
    return {plain_name(name): np.asarray(points[name]) for name in names}


def _check_las(source: Source, data: bytes, limits: Limits) -> int:
    """Return the number of points of a LAS. Raises DataError if it claims more than it holds or than limits allow."""
    if len(data) < 227:
        raise DataError(f"{source.shown}: ends inside the LAS header")
    (minor,) = struct.unpack_from("<B", data, 25)
    header, start, num_vlrs, kind, size, count = struct.unpack_from("<HIIBHI", data, 94)
    if minor >= 4 and len(data) >= 375:
        first_evlr, num_evlrs, count = struct.unpack_from("<QIQ", data, 235)
        check_claim(source, num_evlrs * EVLR_BYTES, len(data) - min(first_evlr, len(data)))
    check_claim(source, start, len(data))
    check_claim(source, header + VLR_BYTES * num_vlrs, start)
    form, is_packed = kind & ~LAZ_FLAGS, bool(kind & LAZ_FLAGS)
    if form >= len(POINT_BYTES) or size < POINT_BYTES[form]:
        raise DataError(f"{source.shown}: LAS points of format {form} in {size} bytes")
    check_counts(source, count, 0, limits)
    source.check_decoded(count, size, limits)
    if is_packed:
        _check_chunks(source, data, start, count, size)
    else:
        check_claim(source, count * size, len(data) - start)
    return int(count)


def _check_chunks(source: Source, data: bytes, start: int, count: int, size: int) -> None:
    """Raise DataError if the chunks of a LAZ claim more than the file holds: lazrs takes memory for all they claim."""
    layers, chunk_points = _laszip(source, data, size)
    (table,) = struct.unpack_from("<q", data, start)
    if table == -1:  # a writer that could not seek back
        (table,) = struct.unpack_from("<q", data, len(data) - 8)
    if not start + 8 <= table <= len(data) - 8:
        raise DataError(f"{source.shown}: the chunk table of a LAZ lies at {table}, outside of {len(data)} bytes")
    (num_chunks,) = struct.unpack_from("<I", data, table + 4)
    if num_chunks > count:
        raise DataError(f"{source.shown}: {num_chunks} chunks in a LAZ of {count} points")
    at, left = start + 8, count
    while layers and left > 0:  # a chunk: its first point, its number of points, the sizes of its layers, the layers
        points, *sizes = struct.unpack_from(f"<{1 + layers}I", data, at + size)
        at += size + 4 + 4 * layers
        check_claim(source, sum(sizes), len(data) - at)
        at += sum(sizes)
        left -= points if chunk_points == VARIABLE else chunk_points


def _laszip(source: Source, data: bytes, size: int) -> tuple[int, int]:
    """Return the number of layers in each chunk of a LAZ, 0 without layers, and the points of a chunk."""
    at, _, num_vlrs = struct.unpack_from("<HII", data, 94)
    for _ in range(num_vlrs):
        record, length = struct.unpack_from("<HH", data, at + 18)
        at += VLR_BYTES
        if record == LASZIP:
            compressor, chunk_points = struct.unpack_from("<H10xI", data, at)
            (num_items,) = struct.unpack_from("<H", data, at + 32)
            items = [struct.unpack_from("<HH", data, at + 34 + 6 * item) for item in range(num_items)]
            are_layered = {kind >= min(LAYERS) for kind, _ in items}
            fits = sum(width for _, width in items) == size and are_layered == {compressor == LAYERED}
            if not fits or chunk_points == 0:
                raise DataError(f"{source.shown}: a LAZ whose items do not make points of {size} bytes")
            return sum(LAYERS.get(kind, width) for kind, width in items) * (compressor == LAYERED), chunk_points
        at += length
    raise DataError(f"{source.shown}: a LAZ without the record of laszip")
