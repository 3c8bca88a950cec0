"""The memory of this process: settings of glibc's malloc, and the peak. No torch."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BYTES = 256 << 20  # freed memory that malloc keeps
OWN_BYTES = 64 << 20, 32 << 20  # size of arrays that are mapped separately; the maximum of glibc before 2.35
LEAN_BYTES = 1 << 20


def keep_freed() -> None:
    """Let malloc keep freed memory, up to KEPT_BYTES, instead of returning it and fetching new pages. Only with glibc.

    A training step or a decoded file frees and takes the same tens of megabytes every time. New pages took half of
    the time of decoding a JPEG, and a fifth of a small model's training step. Forked processes inherit the setting. The
    command line calls this at its start; a program that uses the package may do the same.
    """
    _set(M_TRIM_THRESHOLD, KEPT_BYTES)
    any(_set(M_MMAP_THRESHOLD, size) for size in OWN_BYTES)


def give_back_freed() -> None:
    """Let malloc map arrays of a megabyte separately and return them when freed, for large models and few steps."""
    # A heap returns no memory below a small block in use: a gradient of the ImageNet model's input then takes 1,660 MiB
    # instead of 660.
    _set(M_MMAP_THRESHOLD, LEAN_BYTES)


def check_room(num_bytes: int = 64 << 20) -> None:
    """Raise MemoryError if this process cannot get `num_bytes` more of address space; allocate nothing.

    Called before code that does not survive a lack of memory: oneDNN crashes, and a process pool waits for ever if its
    thread cannot start.
    """
    try:
        mmap.mmap(-1, num_bytes).close()
    except OSError as error:
        raise MemoryError(f"no room for {num_bytes >> 20} MiB") from error


def _set(parameter: int, value: int) -> bool:
    with suppress(OSError, AttributeError, TypeError):  # not glibc: nothing to set
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    return False


def peak_bytes() -> int:
    """Return this process's peak resident size in bytes; 0 on Windows. On Linux getrusage counts the parent's too."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
