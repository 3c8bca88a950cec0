"""Columns of numbers and times from Parquet and Arrow, by pyarrow (extra [parquet])."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.time_columns import Floats, Kind

PARQUET, ARROW = b"PAR1", (b"ARROW1", b"\xff\xff\xff\xff")
MAX_COLUMNS = 4096
BATCH_ROWS = 1 << 16
STREAM_AT = 8  # bytes before the stream in an Arrow file
HEADER_TYPE, HEADER = 1, 2  # places of fields in a Message
BUFFERS, COMPRESSION = 2, 3  # in a RecordBatch
DICTIONARY, DATA = 2, 1  # the type of a DictionaryBatch, and its RecordBatch


def check_columns(source: Source, count: int) -> None:
    """Raise DataError for more than MAX_COLUMNS columns."""
    if count > MAX_COLUMNS:
        raise DataError(f"{source.shown}: {count} columns, expected {MAX_COLUMNS} at most")


def load_pyarrow() -> Any:
    """Return pyarrow. Raises UsageError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "pyarrow, which reads Parquet and Arrow files, is missing", "pip install 'perceiver-cli[parquet]'"
        ) from error
    return pyarrow


def read_columns(source: Source, file: Any, limits: Limits) -> tuple[tuple[str, ...], tuple[Kind, ...], Floats]:
    """Return the names, kinds and values of the columns that hold numbers or times in a Parquet or Arrow file."""
    pyarrow = load_pyarrow()
    types = pyarrow.types
    head = file.read(6)
    file.seek(0)
    if head.startswith(PARQUET):
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
        schema = table.schema_arrow
        source.check_decoded(float(table.metadata.num_rows) * len(schema), 8, limits)
    else:
        reader = _stream(pyarrow, source, file, limits, is_file=head.startswith(ARROW[0]))
        schema = reader.schema
    check_columns(source, len(schema))
    kinds: dict[str, Kind] = {}
    for field in schema:
        is_number = types.is_integer(field.type) or types.is_floating(field.type) or types.is_decimal(field.type)
        is_time = types.is_timestamp(field.type) or types.is_date(field.type)
        if is_number or is_time:
            kinds[str(field.name)] = "time" if is_time else "number"
    if len({*schema.names}) < len(schema.names):
        raise DataError(f"{source.shown}: two columns have the same name")
    parts, total = [], 0
    if head.startswith(PARQUET):
        batches = table.iter_batches(BATCH_ROWS, columns=list(kinds), use_threads=False)
    else:
        batches = (batch.select(list(kinds)) for batch in reader)
    for batch in batches:
        batch.validate(full=True)
        total += batch.num_rows * max(1, len(kinds))
        source.check_decoded(total, 8, limits)
        columns = [_column(pyarrow, batch.column(place), kind) for place, kind in enumerate(kinds.values())]
        parts.append(np.stack(columns, axis=1) if columns else np.empty((0, 0)))
    values = np.concatenate(parts) if parts else np.empty((0, len(kinds)))
    return tuple(kinds), tuple(kinds.values()), values


def _stream(pyarrow: Any, source: Source, file: Any, limits: Limits, *, is_file: bool) -> Any:
    """Return the reader of an Arrow stream, or of the stream inside an Arrow file.

    pyarrow unpacks each batch whole, so all sizes are checked before. Raises LimitError for a size above the limits,
    DataError for a truncated file.
    """
    expected = pyarrow.ipc.open_file(file).num_record_batches if is_file else None
    file.seek(STREAM_AT if is_file else 0)
    count = total = 0
    for message in pyarrow.ipc.MessageReader.open_stream(file):
        if message.type in ("record batch", "dictionary"):
            count += message.type == "record batch"
            total += _unpacked_bytes(bytes(message.metadata), memoryview(message.body))
            source.check_decoded(total, 1, limits)
    if expected not in (None, count):
        raise DataError(f"{source.shown}: declared {expected} batches of rows, found {count}")
    file.seek(STREAM_AT if is_file else 0)
    return pyarrow.ipc.open_stream(file)


def _unpacked_bytes(metadata: bytes, body: memoryview) -> int:
    """Return the number of bytes of a batch after unpacking; Arrow's Message.fbs defines where the sizes stand.

    Raises struct.error for damaged metadata.
    """

    def number(form: str, at: int) -> int:
        if at < 0:
            raise struct.error("an offset before the start")
        return int(struct.unpack_from(form, metadata, at)[0])

    def field(table: int, place: int) -> int:
        fields = table - number("<i", table)
        offset = number("<H", fields + 4 + 2 * place) if 4 + 2 * place < number("<H", fields) else 0
        return table + offset if offset else 0

    def pointed(at: int) -> int:
        return at + number("<I", at)

    batch = pointed(field(pointed(0), HEADER))
    if number("<B", field(pointed(0), HEADER_TYPE)) == DICTIONARY:
        batch = pointed(field(batch, DATA))
    if not field(batch, COMPRESSION):
        return len(body)
    buffers, total = pointed(field(batch, BUFFERS)), 0
    for place in range(number("<I", buffers)):
        start, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * place)
        if length:
            total += max(length, int(struct.unpack_from("<q", body, max(0, start))[0]))  # -1: not packed
    return total


def _column(pyarrow: Any, column: Any, kind: Kind) -> Floats:
    """Return a column as float64, times in seconds, NaN for a missing cell."""
    if kind == "time":
        column = column.cast(pyarrow.timestamp("us"), safe=False).cast(pyarrow.int64())
    numbers = column.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)
    return np.asarray(numbers * 1e-6 if kind == "time" else numbers, np.float64)
