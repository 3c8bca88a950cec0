"""Cores and memory of this machine. No torch."""

from __future__ import annotations

import os
from contextlib import suppress


def cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Return this machine's memory in bytes, or None if the system does not tell (Windows)."""
    with suppress(AttributeError, ValueError, OSError):
        page, count = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        return page * count if min(page, count) > 0 else None
    return None
