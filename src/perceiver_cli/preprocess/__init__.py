"""The modalities there are, and which one a file belongs to, by its content. Never imports torch.

A modality is one file of this folder: its options, its reader, and `register` at the end. Nothing else lists it.
"""

from __future__ import annotations

import ast
import pkgutil
import re
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.preprocess.base import Modality, TimedModality
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits

_registered: dict[str, Modality[Any]] = {}
# A byte array in a file, the paper's M x C with Fourier features, is an .npy, or the .safetensors of `perceiver
# preprocess`. Only the latter says how it was prepared; an .npy could be of any modality.
LEAST_COLUMNS = 16  # of an .npy: with fewer it is a cloud of points, with colours and normals at most
METADATA = "perceiver"  # the one entry of a .safetensors, the header of a stream as JSON


def register(new: Modality[Any]) -> None:
    """Make a modality known. Raises UsageError without an `InputSpec` of its name, or if a file here has the name."""
    owner = f"{__name__}.{new.name}"
    if new.name not in InputSpec.kinds or (new.name in _files() and type(new).__module__ != owner):
        raise UsageError(f"modality {new.name!r} needs a name of its own and an InputSpec subclass with that default")
    _registered[new.name] = new


@cache
def _files() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def names() -> tuple[str, ...]:
    """Return the names of all modalities in the order in which detection asks them."""
    for name in _files():
        import_module(f"{__name__}.{name}")
    return tuple(sorted(_registered, key=lambda name: _registered[name].precedence))


def modality(name: str) -> Modality[Any]:
    """Return the modality of that name. Raises UsageError where there is none."""
    if name not in _registered and name in _files():
        import_module(f"{__name__}.{name}")  # that file alone: the others may import slow libraries
    if name not in _registered:
        raise UsageError(f"no modality named {name!r}", f"there are {', '.join(names())}")
    return _registered[name]


def timed_modality(name: str) -> TimedModality[Any] | None:
    """Return the modality of that name if it has a time axis. Raises UsageError where there is none."""
    wanted = modality(name)
    return wanted if isinstance(wanted, TimedModality) else None


def spec_type(name: str) -> type[InputSpec] | None:
    """Return the class of a modality's options, or None where there is no such modality."""
    if name not in InputSpec.kinds and name in _files():
        import_module(f"{__name__}.{name}")
    return InputSpec.kinds.get(name)


def settled(spec: InputSpec) -> InputSpec:
    """Return a spec whose every "auto" has the value that it takes without data to look at."""
    return modality(spec.modality).resolve(spec, [], Limits())  # type: ignore[no-any-return]


def look(source: Source) -> Source:
    """Return the source with its kinds, judged by its first bytes, once. Raises DataError if it has none."""
    if source.kinds:
        return source
    head, every = source.head(), names()
    rows = _kinds_of_rows(head, every)
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
