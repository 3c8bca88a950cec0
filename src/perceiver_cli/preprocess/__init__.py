"""The registry of modalities. Never imports torch.

A modality is one file: its options, its reader, and `register` at the end. No list names it. The other files of this
folder hold code that several modalities share; `detection.py` finds the modality of a file.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

from perceiver_cli.errors import UsageError
from perceiver_cli.preprocess.base import Modality, TimedModality
from perceiver_cli.preprocess.spec import InputSpec, Limits

_registered: dict[str, Modality[Any]] = {}


def register(new: Modality[Any]) -> None:
    """Register a modality. Raises UsageError if no `InputSpec` has its name, or if another file here has that name."""
    is_taken = new.name in _files() and type(new).__module__ != f"{__name__}.{new.name}"
    if is_taken or new.name not in InputSpec.kinds:
        raise UsageError(f"modality {new.name!r} needs a name of its own and an InputSpec subclass with that default")
    _registered[new.name] = new


@cache
def _files() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


@cache
def _import(name: str) -> None:
    if name in _files():
        import_module(f"{__name__}.{name}")


def names() -> tuple[str, ...]:
    """Return the names of all modalities, in the order in which detection asks them."""
    for name in _files():
        _import(name)
    return tuple(sorted(_registered, key=lambda name: _registered[name].precedence))


def modality(name: str) -> Modality[Any]:
    """Return the modality of that name. Raises UsageError if it is unknown."""
    _import(name)  # this file alone: others may import slow libraries
    if name not in _registered:
        raise UsageError(f"no modality named {name!r}", f"there are {', '.join(names())}")
    return _registered[name]


def timed_modality(name: str) -> TimedModality[Any] | None:
    """Return the modality of that name, or None if it has no time axis. Raises UsageError if it is unknown."""
    return timed if isinstance(timed := modality(name), TimedModality) else None


def cell_kinds() -> dict[str, str]:
    """Return the modality of each kind of a table's cells, such as "number"."""
    return {kind: name for name in names() for kind in modality(name).cells}


def with_time(name: str) -> TimedModality[Any]:
    """Return the modality of that name, which has a time axis."""
    timed = modality(name)
    assert isinstance(timed, TimedModality), name
    return timed


def spec_type(name: str) -> type[InputSpec] | None:
    """Return the class of a modality's options, or None if it is unknown."""
    _import(name)
    return InputSpec.kinds.get(name)


def settled(spec: InputSpec) -> InputSpec:
    """Return a spec in which every "auto" has the value for the case without training files."""
    return modality(spec.modality).resolve(spec, [], Limits())  # type: ignore[no-any-return]
