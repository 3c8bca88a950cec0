"""Detects the modality of a file from its first bytes, read once, and explains a refusal."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess import foreign, modality, names
from perceiver_cli.preprocess.geometry import BOM
from perceiver_cli.preprocess.point_tables import described
from perceiver_cli.preprocess.source import HEAD_BYTES, Source

# A byte array in a file, the paper's M x C with Fourier features, is an .npy, or the .safetensors of `perceiver
# preprocess`. Only the latter says how it was prepared; an .npy could be of any modality.
LEAST_COLUMNS = 16  # of an .npy with a byte array; a cloud of points has fewer, even with colours and normals
LONGER_HEADS = (1 << 16, 1 << 20)  # bytes of a text with long lines
FEW_LINES = 24  # fewer lines do not show what a table is
UNKNOWN = "unknown format"  # in the error of a file; a command lists the known formats once, not with each file
METADATA = "perceiver"  # the only entry in the metadata of a .safetensors: the header of a stream as JSON


class TableError(DataError):
    """A table of numbers, of no modality unless the user names one."""


def detected(source: Source, wanted: str | None = None) -> Source:
    """Return the source with its kinds filled in. Raises DataError if no modality reads it.

    wanted: the modality that the user names; if it reads the source, no other modality is asked. A table of numbers is
    of a modality only if the user names it.
    """
    if source.kinds:
        return source
    head, every = source.head(), names()
    rows = _kinds_of_rows(head, every)
    if wanted is not None and not is_safetensors(head) and modality(wanted).may_read(head, source.name):
        rows = ()  # an array of many channels; `inputs.opened` knows a byte array of the model by its shape
    if wanted is not None and not rows and modality(wanted).sniff(head, source.name):
        return replace(source, kinds=(wanted,), is_table=modality(wanted).is_table(head, source.name))
    kinds = rows or tuple(name for name in every if modality(name).sniff(head, source.name))
    kinds += tuple(name for name in every if name not in kinds and modality(name).also_reads(head))
    if not kinds:
        head = _of_table(source, head)
    if wanted is not None and wanted not in kinds and modality(wanted).may_read(head, source.name):
        kinds = (wanted,)
    if not kinds:
        raise _refusal(source, head, every)
    is_table = not is_safetensors(head) if rows else modality(kinds[0]).is_table(head, source.name)
    return replace(source, kinds=kinds, holds_rows=bool(rows), is_table=is_table)


def _of_table(source: Source, head: bytes) -> bytes:
    """Return more of a text whose lines are so long that its `head` has few, as in a table of many columns."""
    is_text = head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" not in head
    for full, more in pairwise((HEAD_BYTES, *LONGER_HEADS)):
        if not is_text or len(head) < full or head.count(b"\n") + head.count(b"\r") >= FEW_LINES:
            break
        head = source.head(more)
    return head


def _refusal(source: Source, head: bytes, every: tuple[str, ...]) -> DataError:
    """Return the error of a file that no modality reads; it says what the file is."""
    if (known := foreign.described(head, source.name)) is not None:
        return DataError(f"{source.shown}: {known[0]}", known[1])
    if (table := described(head.removeprefix(BOM))) is not None:
        return TableError(f"{source.shown}: {table}, which could be anything", _how_to_take(head, source.name, every))
    return DataError(f"{source.shown}: {UNKNOWN}")


@dataclass(frozen=True)
class File:
    """A file with known kinds. path: as named. error: why it cannot be read, if that is known."""

    path: str
    source: Source
    error: DataError | None = None

    def among(self, allowed: Container[str]) -> str | None:
        """Return the nearest allowed kind: a video may also be read for its sound."""
        return next((kind for kind in self.source.kinds if kind in allowed), None)


def looked_at(source: Source, path: str | None = None, wanted: str | None = None) -> File:
    """Return a source as a file with the kinds of its content; unknown content gives an error and no kinds.

    wanted: the one modality that the user's model reads; a table of numbers counts as this modality if it can.
    """
    path = source.name if path is None else path
    try:
        return File(path, detected(source, wanted))
    except DataError as error:
        return File(path, replace(source, is_table=isinstance(error, TableError)), error)


def without_rows(file: File) -> File:
    """Return a file; an .npy that may be a byte array of any modality gets an error in place of its kinds."""
    source = file.source
    if not (source.holds_rows and len(source.kinds) > 1):
        return file
    what = f"{source.shown}: {described(source.head())}, which could be anything"
    how = "to read it as a byte array, pass a preset of its modality: --preset tiny-image"
    fault = TableError(what, f"{how}; as series: --preset tiny-series")
    return File(file.path, replace(source, kinds=()), fault)


def taker(files: Sequence[File]) -> str | None:
    """Return the modality to which most of these files of unknown kind certainly belong, or None."""
    heads = []
    for file in files:
        with suppress(DataError):
            heads.append((_of_table(file.source, file.source.head()), file.source.name))
    for name in names():
        if 2 * sum(modality(name).takes_folders(*head) for head in heads) > len(files):
            return name
    return None


def only(names: Iterable[str] | None) -> str | None:
    """Return the one name, or None for several names or none."""
    each = tuple(names or ())
    return each[0] if len(each) == 1 else None


def _how_to_take(head: bytes, shown: str, every: tuple[str, ...]) -> str:
    """Return a hint on how to read a table."""
    readers = [name for name in every if modality(name).may_read(head, shown)]
    if not readers:
        return "expected a picture, a sound, a video or a mesh"
    presets = " or ".join(f"--preset tiny-{name}" for name in readers)
    return f"to read it as {' or '.join(readers)}, name it in a column {readers[0]} of a manifest, or pass {presets}"


def is_safetensors(head: bytes) -> bool:
    """Return whether a file that begins with `head` is a .safetensors with a byte array."""
    return head[8:].startswith(b'{"__metadata__":{"%s":' % METADATA.encode())


def _kinds_of_rows(head: bytes, every: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modalities among `every` whose byte array a file may hold, judged by its first bytes."""
    if is_safetensors(head):
        kinds = re.findall(rb'\\"modality\\": ?\\"(\w+)\\"', head)
        return tuple(name for name in every if name.encode() in kinds)
    if not head.startswith(b"\x93NUMPY\x01\x00"):
        return ()
    length = int.from_bytes(head[8:10], "little")
    try:
        header = ast.literal_eval(head[10 : 10 + length].decode("latin-1").strip())
        is_float, shape = header["descr"] in ("<f4", "<f2"), header["shape"]
        return every if is_float and len(shape) == 2 and shape[1] >= LEAST_COLUMNS else ()
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError):
        return ()


def other_kind(source: Source, expected: str) -> DataError:
    """Return the error of a source whose modality is not the expected one."""
    return DataError(f"{source.shown}: {source.kinds[0]} by its content, expected {expected}")


def formats(wanted: Iterable[str] | None = None) -> str:
    """Return the formats of some modalities, by default of all, for messages."""
    return "; ".join(f"{name}: {modality(name).formats}" for name in names() if wanted is None or name in {*wanted})


def with_formats(error: DataError, wanted: Iterable[str] | None = None) -> DataError:
    """Return the error of the only input of a command; for an unknown format it lists the wanted formats."""
    return DataError(error.message, f"expected {formats(wanted)}") if error.message.endswith(UNKNOWN) else error


def identified(source: Source, wanted: str | None = None) -> Source:
    """Return the only input of a command with its kinds filled in, as `detected` does."""
    try:
        return detected(source, wanted)
    except DataError as error:
        raise with_formats(error, wanted and [wanted]) from error
