"""Parquet and Arrow files as tables of cells, by pyarrow (extra [parquet]). No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perceiver_cli.preprocess.columnar import load_pyarrow
from perceiver_cli.preprocess.source import Source, as_data_errors
from perceiver_cli.preprocess.spec import Limits

BATCH_BYTES = 32 << 20  # in memory at once, if a table declares the size of its rows correctly
MAX_ROWS = 20_000_000
MAX_BATCH = 256  # rows in memory at once


class TableFile:
    """One Parquet or Arrow file. Raises DataError if it is damaged or larger than `most` bytes.

    names: its columns. held: those of bytes, or of structs with a field of bytes.
    """

    def __init__(self, path: str, most: int = 1 << 62) -> None:
        self.path, self.source = path, Source(path)
        self.source.open(Limits(file_bytes=most)).close()
        with self.errors():
            if path.lower().endswith(".arrow"):
                self.file, self.schema = None, self._arrow().schema
            else:
                parquet = load_pyarrow().parquet
                self.file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
                self.schema = self.file.schema_arrow
                if self.file.metadata.num_rows > MAX_ROWS:
                    raise ValueError(f"{self.file.metadata.num_rows} rows, expected {MAX_ROWS} at most")
            self.names: list[str] = list(self.schema.names)  # read here: names that are not text raise
            self.held = [field.name for field in self.schema if is_binary(field.type)]

    def errors(self) -> Any:
        """Return a context in which errors of pyarrow are DataErrors."""
        return as_data_errors(self.source, "table")

    def _arrow(self) -> Any:
        pyarrow = load_pyarrow()
        with open(self.path, "rb") as file:
            is_stream = file.read(6) != b"ARROW1"
        mapped = pyarrow.memory_map(self.path)
        return pyarrow.ipc.open_stream(mapped) if is_stream else pyarrow.ipc.open_file(mapped)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the cells of each row by column. Raises DataError."""
        with self.errors():
            for batch in self._batches(columns):
                yield from batch.to_pylist()

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        if self.file is not None:
            facts = self.file.metadata
            groups = (facts.row_group(number) for number in range(facts.num_row_groups))
            row = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
            size = min(MAX_BATCH, max(1, BATCH_BYTES // max(1, row)))
            yield from self.file.iter_batches(batch_size=size, columns=columns, use_threads=False)
            return
        reader = self._arrow()
        each = reader if hasattr(reader, "read_next_batch") else map(reader.get_batch, range(reader.num_record_batches))
        for batch in each:
            batch.validate(full=True)  # the file is mapped: a place outside of it would end the process
            chosen = batch.select(columns)
            yield from (chosen.slice(at, 1) for at in range(len(chosen)))


def holds_files(path: str) -> bool:
    """Return whether a file is a table with a column of bytes, which a manifest has not. Raises DataError."""
    return path.lower().endswith((".parquet", ".arrow")) and bool(TableFile(path).held)


def is_list(kind: Any) -> bool:
    """Return whether a column of a type holds lists."""
    types = load_pyarrow().types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def is_binary(kind: Any) -> bool:
    """Return whether a column of a type holds bytes, or a struct with a field of bytes."""
    types = load_pyarrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and is_binary(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
