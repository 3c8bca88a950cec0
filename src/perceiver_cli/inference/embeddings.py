"""Embeddings of any number of inputs in one file, written as they come: no row is held, the file is whole or absent."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from perceiver_cli.errors import UsageError
from perceiver_cli.files import atomic_write, show_path

if TYPE_CHECKING:
    from perceiver_cli.inference.predictor import Prediction


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix of an output that can be written here; else raise UsageError."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in _HEADERS:
        raise UsageError(
            f"--embeddings {show_path(path)}: not a format written here", f"expected {' or '.join(_HEADERS)}"
        )
    return suffix


def keeping_embeddings(
    predictions: Iterable[Prediction], path: str | os.PathLike[str], channels: int
) -> Iterator[Prediction]:
    """Yield predictions as they come and write their embeddings, D = `channels`, in the same order.

    FILE.npy holds rows (n, D) float32; FILE.safetensors also their "paths", UTF-8, each ended by NUL. An input that
    could not be read has a row of NaN. The file appears when all is done.

    Raises:
        UsageError: another suffix. ResourceError: it cannot be written.
    """
    suffix = check_suffix(path)
    header, count = _HEADERS[suffix], 0
    # Both formats begin with the number of rows, which is known at the end: the header is written twice.
    with atomic_write(path) as file, tempfile.TemporaryFile(dir=os.path.dirname(path) or ".") as names:
        file.write(header(0, channels, 0))
        for prediction in predictions:
            row = np.full(channels, np.nan) if prediction.embedding is None else prediction.embedding
            file.write(row.astype("<f4", copy=False).tobytes())
            names.write(os.fsencode(prediction.path) + b"\0")
            count += 1
            yield prediction
        name_bytes = names.tell()
        if suffix == ".safetensors":
            names.seek(0)
            shutil.copyfileobj(names, file)
        file.seek(0)
        file.write(header(count, channels, name_bytes))


def _npy_header(count: int, channels: int, name_bytes: int) -> bytes:
    """Return a header of the same length for every count: numpy leaves room for its growth."""
    stream = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (count, channels)}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def _safetensors_header(count: int, channels: int, name_bytes: int) -> bytes:
    """Return a header of 512 bytes, with spaces at its end."""
    end = 4 * count * channels
    tensors = {
        "embeddings": {"dtype": "F32", "shape": [count, channels], "data_offsets": [0, end]},
        "paths": {"dtype": "U8", "shape": [name_bytes], "data_offsets": [end, end + name_bytes]},
    }
    return (504).to_bytes(8, "little") + json.dumps(tensors).encode().ljust(504)


_HEADERS: dict[str, Callable[[int, int, int], bytes]] = {".npy": _npy_header, ".safetensors": _safetensors_header}
