"""Byte arrays in files: the paper's M x C with Fourier features, one input each, as .npy or .safetensors.

The .safetensors that `perceiver preprocess` writes says in its metadata how it was prepared; an .npy says nothing, and
could be of any modality: what reads it decides, and its shape must fit.
"""

from __future__ import annotations

import ast
import re

LEAST_COLUMNS = 16  # of an .npy: with fewer it is a cloud of points, with colours and normals at most
METADATA = "perceiver"  # the one entry of a .safetensors, the header of a stream as JSON
_SAFETENSORS = b'{"__metadata__":{"%s":' % METADATA.encode()


def is_safetensors(head: bytes) -> bool:
    """Return whether a file begins as a byte array in a .safetensors does."""
    return head[8:].startswith(_SAFETENSORS)


def kinds_in(head: bytes, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of the modalities `names` a file may hold the byte array of, judged by its first bytes."""
    if is_safetensors(head):
        found = {kind.decode() for kind in re.findall(rb'\\"modality\\": ?\\"(\w+)\\"', head)}
        return tuple(name for name in names if name in found)
    if not head.startswith(b"\x93NUMPY\x01\x00"):
        return ()
    length = int.from_bytes(head[8:10], "little")
    try:
        facts = ast.literal_eval(head[10 : 10 + length].decode("latin-1").strip())
        floats, shape = facts["descr"] in ("<f4", "<f2"), facts["shape"]
        return names if floats and len(shape) == 2 and shape[1] >= LEAST_COLUMNS else ()
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return ()
