"""Embeddings of any number of inputs in one file: rows are written as they come, nothing is held, whole or absent."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import UsageError
from perceiver_cli.files import atomic_write, show_path

if TYPE_CHECKING:
    from perceiver_cli.inference.predictor import Prediction


SUFFIXES = (".npy", ".safetensors")


class _Rows:
    """Rows (n, D) float32 that are being written, and the name of each.

    The number of rows stands at the beginning of both formats and is known at the end. So npy gets a header that is
    written over, which has room for that; and of safetensors, which also holds names, rows and names wait in
    temporary files.
    """

    def __init__(self, file: IO[bytes], channels: int, rows: IO[bytes] | None, names: IO[bytes] | None) -> None:
        self.file, self.channels, self.rows, self.names = file, channels, rows or file, names
        self.count = 0
        if names is None:
            file.write(self._npy_header())

    def write(self, name: str, embedding: NDArray[np.float32] | None) -> None:
        """Append a row; that of an input that could not be read is not a number."""
        row = np.full(self.channels, np.nan, "<f4") if embedding is None else embedding.astype("<f4", copy=False)
        self.rows.write(row.tobytes())
        if self.names is not None:
            self.names.write(os.fsencode(name) + b"\0")
        self.count += 1

    def finish(self) -> None:
        """Write what stands at the beginning."""
        if self.names is None:
            self.file.seek(0)
            self.file.write(self._npy_header())
            return
        end = 4 * self.count * self.channels
        tensors = {
            "embeddings": {"dtype": "F32", "shape": [self.count, self.channels], "data_offsets": [0, end]},
            "paths": {"dtype": "U8", "shape": [self.names.tell()], "data_offsets": [end, end + self.names.tell()]},
        }
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)  # so that tensors are aligned
        self.file.write(len(header).to_bytes(8, "little") + header)
        for part in (self.rows, self.names):
            part.seek(0)
            shutil.copyfileobj(part, self.file)

    def _npy_header(self) -> bytes:
        stream = io.BytesIO()
        # The same length for every count: numpy leaves room for its growth.
        shape = (self.count, self.channels)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return stream.getvalue()


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix of an output, if it is one that can be written. Raises UsageError."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"--embeddings {show_path(path)}: not a format written here", f"expected {' or '.join(SUFFIXES)}"
        )
    return suffix


def keeping_embeddings(
    predictions: Iterable[Prediction], path: str | os.PathLike[str], channels: int
) -> Iterator[Prediction]:
    """Yield predictions as they come and write their embeddings, D = `channels`, in the same order.

    FILE.npy holds rows (n, D); FILE.safetensors also their "paths", UTF-8, each ended by NUL. An input that could not
    be read has a row of NaN. The file appears when all is done.

    Raises:
        UsageError: another suffix. ResourceError: it cannot be written.
    """
    suffix = check_suffix(path)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(path))
        folder = os.path.dirname(path) or "."  # where there is to be room for the file itself
        waiting = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2)]
        rows = _Rows(file, channels, *(waiting if suffix == ".safetensors" else (None, None)))
        for prediction in predictions:
            rows.write(prediction.path, prediction.embedding)
            yield prediction
        rows.finish()
