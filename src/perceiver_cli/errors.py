"""Every expected error, with its exit code. Any other exception is a bug and exits with 1.

The message is one line: the input, its state, the expected state. The hint says what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from typing import Any

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_RESOURCE = 5
EXIT_DIVERGED = 6
EXIT_INTEGRITY = 7


class PerceiverError(Exception):
    """Base of all expected errors. hint: what to do next, e.g. the flag that raises a limit."""

    exit_code: int = EXIT_BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[PerceiverError], tuple[str, str]]:
        # Data workers send errors to another process; the default would lose the hint.
        return type(self), (self.message, self.hint)


class UsageError(PerceiverError):
    """A flag or a configuration value, or a combination of them, that cannot work."""

    exit_code = EXIT_USAGE


class DataError(PerceiverError):
    """Input data that is missing, damaged, too large or of the wrong kind."""

    exit_code = EXIT_DATA


class AbsentError(DataError):
    """A file that lacks the requested stream, such as a video without sound: a missing modality, not damage."""


class LimitError(DataError):
    """Input data that is larger than a limit allows; the hint names the flag that raises it."""

    def __init__(self, subject: str, size: float, unit: str, limit: str, allowed: float) -> None:
        needed = ceil(size)
        super().__init__(f"{subject}: {needed} {unit} > {allowed:.0f}", f"pass --limit {limit}={needed} to allow it")

    def __reduce__(self) -> tuple[type[PerceiverError], tuple[str, str]]:
        return DataError, (self.message, self.hint)  # the message holds the other arguments


class ResourceError(PerceiverError):
    """An output that cannot be written, a lock of another process, or too little memory."""

    exit_code = EXIT_RESOURCE


class LostError(ResourceError):
    """Another process of the same job has ended or does not answer; its own error says why."""


class DivergedError(PerceiverError):
    """Training met a loss or gradient that is not finite."""

    exit_code = EXIT_DIVERGED


class IntegrityError(PerceiverError):
    """A checkpoint or record that is damaged, incomplete or of another format version."""

    exit_code = EXIT_INTEGRITY


def error_facts(error: PerceiverError) -> dict[str, Any]:
    """Return an error as JSON types, for another process. lost: whether only other processes of its job know why."""
    lost = isinstance(error, LostError)
    return {"status": error.exit_code, "message": error.message, "hint": error.hint, "lost": lost}


def error_from(facts: Mapping[str, Any]) -> PerceiverError:
    """Return the error of `error_facts`."""
    kinds = {kind.exit_code: kind for kind in (UsageError, DataError, ResourceError, DivergedError, IntegrityError)}
    return kinds.get(facts["status"], PerceiverError)(facts["message"], facts["hint"])


# What libraries say when memory runs out; each raises its own type. In order: torch on a CPU, CUDA, cuBLAS, the loader
# of shared objects, C's strerror(ENOMEM), C++, Pillow, threads.
# What libraries say. A primitive is oneDNN's; it says more if an operation is not supported.
OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator: can't allocate|out of memory|STATUS_ALLOC_FAILED|failed to map segment from shared object|"
    "Cannot allocate memory|std::bad_alloc|can't start new thread|could not (?:create|execute) a primitive$"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error or one of its causes says that memory ran out on the CPU or a GPU."""
    chain: BaseException | None = error
    while chain is not None:
        named = isinstance(chain, MemoryError) or type(chain).__name__ == "OutOfMemoryError"  # torch's, without import
        if named or (not isinstance(chain, PerceiverError) and OUT_OF_MEMORY.search(str(chain))):
            return True
        chain = chain.__cause__
    return False


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 file, 2 files, 2,000 classes."""
    plural = noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
