"""To which modality a file belongs, by its first bytes, and why it is refused. A file is looked at once."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess import modality, names
from perceiver_cli.preprocess.source import Source

# A byte array in a file, the paper's M x C with Fourier features, is an .npy, or the .safetensors of `perceiver
# preprocess`. Only the latter says how it was prepared; an .npy could be of any modality.
LEAST_COLUMNS = 16  # of an .npy: with fewer it is a cloud of points, with colours and normals at most
METADATA = "perceiver"  # the one entry of a .safetensors, the header of a stream as JSON


def look(source: Source, wanted: str | None = None) -> Source:
    """Return the source with its kinds, judged by its first bytes, once. Raises DataError if it has none.

    wanted: the modality that it should be of; if it is, no other one is asked.
    """
    if source.kinds:
        return source
    head, every = source.head(), names()
    rows = _kinds_of_rows(head, every)
    if wanted is not None and not rows and modality(wanted).sniff(head, source.name):
        return replace(source, kinds=(wanted,))
    kinds = rows or tuple(name for name in every if modality(name).sniff(head, source.name))
    if not kinds:
        raise DataError(f"{source.shown}: not a format that is read here", f"expected {formats()}")
    return replace(source, kinds=kinds, holds_rows=bool(rows))


def is_safetensors(head: bytes) -> bool:
    """Return whether a file begins as a byte array in a .safetensors does."""
    return head[8:].startswith(b'{"__metadata__":{"%s":' % METADATA.encode())


def _kinds_of_rows(head: bytes, every: tuple[str, ...]) -> tuple[str, ...]:
    """Return which modalities of `every` a file may hold the byte array of, judged by its first bytes."""
    if is_safetensors(head):
        kinds = re.findall(rb'\\"modality\\": ?\\"(\w+)\\"', head)
        return tuple(name for name in every if name.encode() in kinds)
    if not head.startswith(b"\x93NUMPY\x01\x00"):
        return ()
    length = int.from_bytes(head[8:10], "little")
    try:
        facts = ast.literal_eval(head[10 : 10 + length].decode("latin-1").strip())
        floats, shape = facts["descr"] in ("<f4", "<f2"), facts["shape"]
        return every if floats and len(shape) == 2 and shape[1] >= LEAST_COLUMNS else ()
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return ()


def other_kind(source: Source, expected: str) -> DataError:
    """Return the error of a source that is of another modality than expected."""
    return DataError(f"{source.shown}: {source.kinds[0]} by its content, expected {expected}")


def formats() -> str:
    """Return the formats of every modality, for messages."""
    return "; ".join(f"{name}: {modality(name).formats}" for name in names())
