"""The modalities there are, and which one a file belongs to, by its content. Never imports torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from perceiver_cli.config import InputSpec, Limits
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.preprocess.base import Array, Modality, Source
from perceiver_cli.preprocess.rows import kinds_in

__all__ = ["BUILT_IN", "candidates", "decode", "detect", "expected", "formats", "holds_rows", "modality", "register"]

# Name is file. Detection asks in this order: an animation could be read as an image, a video for its sound.
BUILT_IN = ("video", "image", "audio", "points")
_registered: dict[str, Modality[Any]] = {}


def register(new: Modality[Any]) -> None:
    """Make a modality from outside the package known under its name. Detection asks it before the built-in ones.

    Raises:
        UsageError: its `InputSpec` subclass is not defined, or the name is taken.
    """
    if new.name in BUILT_IN or new.name not in InputSpec.kinds:
        raise UsageError(f"modality {new.name!r} needs a name of its own and an InputSpec subclass with that default")
    _registered[new.name] = new


def modality(name: str) -> Modality[Any]:
    """Return the modality of that name. Raises UsageError where there is none."""
    if name in BUILT_IN:
        return import_module(f"perceiver_cli.preprocess.{name}").MODALITY  # type: ignore[no-any-return]
    if name in _registered:
        return _registered[name]
    raise UsageError(f"no modality named {name!r}", f"there are {', '.join([*_registered, *BUILT_IN])}")


def candidates(source: Source) -> tuple[str, ...]:
    """Return the names of the modalities that read content such as a source's, judged by its first bytes; not empty.

    Raises:
        DataError: empty, unreadable, or of no known format.
    """
    head = source.head()
    every = (*_registered, *BUILT_IN)
    names = kinds_in(head, every) or tuple(name for name in every if modality(name).sniff(head, source.name))
    if not names:
        raise DataError(f"{source.shown}: not a format that is read here", f"expected {formats()}")
    return names


def holds_rows(source: Source) -> bool:
    """Return whether a source is a byte array, one input as rows with Fourier features; not if it is unreadable."""
    try:
        return bool(kinds_in(source.head(), (*_registered, *BUILT_IN)))
    except DataError:
        return False


def detect(source: Source) -> str:
    """Return the name of the modality that a source belongs to: the first of `candidates`."""
    return candidates(source)[0]


def expected(source: Source, name: str) -> Modality[Any]:
    """Return the modality of that name, if it reads content such as the source's.

    Raises:
        DataError: unreadable, or of another modality by its content; names both.
    """
    wanted = modality(name)
    if holds_rows(source):
        raise DataError(f"{source.shown}: a byte array, which is not decoded", "pass the file that it was made from")
    if not wanted.sniff(source.head(), source.name):
        raise DataError(f"{source.shown}: {detect(source)} by its content, expected {name}")
    return wanted


def decode(source: Source, spec: InputSpec, limits: Limits) -> Array:
    """Return the decoded array of a source, as `spec`'s modality loads it.

    Raises:
        DataError: unreadable, over a limit, or of another modality by its content; names both.
    """
    return expected(source, spec.modality).load(source, spec, limits)


def formats() -> str:
    """Return the formats of every modality, for messages."""
    return "; ".join(f"{name}: {modality(name).formats}" for name in [*_registered, *BUILT_IN])
