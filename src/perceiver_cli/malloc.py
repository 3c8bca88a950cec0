"""The memory of this process: what it keeps, gives back and has used. No torch."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 256 << 20  # free memory that is kept
OWN_BYTES = 64 << 20, 32 << 20  # size from which an array is mapped by itself; the most that glibc before 2.35 takes
LEAN_BYTES = 1 << 20


def keep_freed() -> None:
    """Let malloc use again what was freed, up to KEPT_BYTES, where it would give it back and fetch it page by page.

    A training step and a decoded file free and take the same tens of megabytes every time: half the time of a JPEG and
    a fifth of a small model's training step went into fresh pages. Forked processes inherit it; of glibc only. The
    command line calls it at its start; a program that uses the package may do the same.
    """
    _set(M_TRIM_THRESHOLD, KEPT_BYTES)
    any(_set(M_MMAP_THRESHOLD, size) for size in OWN_BYTES)


def give_back_freed() -> None:
    """Let malloc map arrays of a megabyte by themselves and give them back when freed, for large models and few steps.

    From a heap it cannot give back what something small lies above: 1,660 MiB instead of 660 for a gradient of the
    ImageNet model's input.
    """
    _set(M_MMAP_THRESHOLD, LEAN_BYTES)


def _set(parameter: int, value: int) -> bool:
    with suppress(OSError, AttributeError):  # not glibc: nothing to set
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    return False


def peak_bytes() -> int:
    """Return the largest resident size this process has had. Linux's own figure: getrusage's begins at the parent's."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
