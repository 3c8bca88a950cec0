"""Arrays in the format of NPY, parsed without pickle."""

from __future__ import annotations

import io
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from perceiver_cli.errors import DataError
from perceiver_cli.files import show_text
from perceiver_cli.preprocess.base import Array

MAX_NPY_HEADER = 4096


def npy_bytes(array: Array) -> bytes:
    """Return an array in the format of NPY, version 1.0, C order."""
    return npy_header(array.dtype.newbyteorder("<").str, array.shape) + array.tobytes()


@lru_cache(maxsize=256)
def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of an array in C order. Its length is the same for every number of rows: NumPy pads it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def parse_npy(data: bytes | memoryview, shown: str) -> Array:
    """Return the array in NPY 1.0 bytes, without a copy. Raises DataError unless it holds numbers in C order."""
    view = memoryview(data)
    length = int.from_bytes(view[8:10], "little")
    if bytes(view[:8]) != b"\x93NUMPY\x01\x00" or length > MAX_NPY_HEADER:
        raise DataError(f"{shown}: not an array in NPY format 1.0")
    head = _parse_npy_header(bytes(view[: 10 + length]))
    if isinstance(head, str):
        raise DataError(f"{shown}: {head}")
    dtype, shape = head
    body = view[10 + length :]
    if len(body) != prod(shape) * dtype.itemsize:
        raise DataError(f"{shown}: an array of {dtype} {shape} in {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape)


@lru_cache(maxsize=256)
def _parse_npy_header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]] | str:
    """Return dtype and shape, or the fault as text."""
    stream = io.BytesIO(head)
    stream.seek(8)
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except MemoryError:
        raise
    except Exception as error:  # NumPy parses a Python literal here: a damaged one raises any error
        return f"a damaged NPY header: {show_text(str(error))}"
    if dtype.kind not in "uif" or dtype.itemsize > 8 or dtype.byteorder == ">":
        return f"an array of {show_text(str(dtype))}, expected numbers"
    if fortran or len(shape) > 8 or min(shape, default=1) < 0:
        return f"an array of shape {shape}" + (" in Fortran order" if fortran else "")
    return dtype, shape
