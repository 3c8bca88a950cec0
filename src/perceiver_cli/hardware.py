"""Cores and memory of this machine, and the processes of one job that share them. No torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import NamedTuple

from perceiver_cli.errors import UsageError

LAUNCHED = "PERCEIVER_LAUNCHED"  # the folder of a launch by `--devices`, in which its processes meet
TORCHRUN = ("RANK", "WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


class Place(NamedTuple):
    """The place of a process among the `size` of its job, and among the `local_size` of them on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1


def place() -> Place:
    """Return this process's place by the variables of torchrun, or of a step of SLURM; alone without them.

    Raises UsageError for variables that make no sense.
    """
    by_slurm = "WORLD_SIZE" not in os.environ
    # A script of sbatch has no step: a process that it starts without srun is alone.
    if by_slurm and not all(name in os.environ for name in SLURM):
        return Place()
    try:
        if by_slurm:
            rank, size, local = (int(os.environ[name]) for name in SLURM)
            local_size = _slurm_tasks(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"]))
        else:
            rank, size = (int(os.environ[name]) for name in TORCHRUN)
            local, local_size = (
                int(os.environ.get(name, value)) for name, value in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
            )
    except (KeyError, ValueError, IndexError) as error:
        names = "SLURM_*" if by_slurm else ", ".join(TORCHRUN)
        raise UsageError(f"the variables {names} do not say which process this is: {error}", "unset them") from error
    if not (0 <= rank < size and 0 <= local < local_size <= size):
        raise UsageError(f"process {rank} of {size}, {local} of {local_size} here: impossible", "unset WORLD_SIZE")
    return Place(rank, size, local, local_size)


def _slurm_tasks(text: str, node: int) -> int:
    """Return the number of tasks of a node in text such as "2(x3),1"."""
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}")
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, of fewer nodes")


def cores() -> int:
    """Return the number of cores that this process may use, at least 1: its share if the job has several processes."""
    if "SLURM_CPUS_PER_TASK" in os.environ:  # then SLURM has bound the process to its own share
        return machine_cores()
    return max(1, machine_cores() // place().local_size)


def machine_cores() -> int:
    """Return the number of cores that this process may use if it is alone, at least 1."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Return this process's share of the machine's memory, or None if it is unknown (Windows)."""
    with suppress(AttributeError, ValueError, OSError):
        page, count = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        return page * count // place().local_size if min(page, count) > 0 else None
    return None
