"""The processes that share a computation, and what they send to each other: numbers, JSON and bytes, never pickles.

A process is a rank, as in MPI. `joined()` finds the others by the variables of torchrun, SLURM or `--devices`.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from perceiver_cli.errors import LostError, PerceiverError, UsageError, error_facts, error_from
from perceiver_cli.hardware import LAUNCHED, Place, place

TIMEOUT_S = 1800.0  # the longest that a process waits for another; one of them may read all files first
PORTS = 10_000, 50_000  # the first, and how many follow; a job of SLURM takes one of them


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a job. All must call every method but `share` and `leads`.

    team_size: processes that hold slices of the same inputs, neighbours, and so work as one. group: torch's, of these
    processes; None for all of the job.
    """

    place: Place
    timeout_s: float = TIMEOUT_S
    team_size: int = 1
    group: Any = None

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.place.rank

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.place.size

    @property
    def first(self) -> bool:
        """Whether this process is the one that decides, writes files and prints."""
        return self.rank == 0

    @property
    def teams(self) -> int:
        """The number of teams."""
        return self.size // self.team_size

    def leads(self, rank: int | None = None) -> bool:
        """Return whether a process [default: this one] is the first of its team."""
        return (self.rank if rank is None else rank) % self.team_size == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Return which of `count` equal pieces of work belong to a process [default: this one]: an adjacent range."""
        team = (self.rank if rank is None else rank) // self.team_size
        return range(count * team // self.teams, count * (team + 1) // self.teams)

    def in_teams(self, team_size: int) -> tuple[Ranks, Ranks]:
        """Return these processes in teams, whose size divides their number, and the processes of this one's team.

        The methods of the team that send something are for all of the job: send within a team by its `group`.
        """
        if team_size == 1:
            return self, ALONE
        mine = None
        with self.talking():
            for first in range(0, self.size, team_size):  # all processes must make each group
                members = list(range(first, first + team_size))
                group = dist.new_group(members, timedelta(seconds=self.timeout_s))
                mine = group if self.rank in members else mine
        place = Place(self.rank % team_size, team_size, self.place.local, self.place.local_size)
        return replace(self, team_size=team_size), Ranks(place, self.timeout_s, group=mine)

    def device(self, name: str) -> str:
        """Return the device of this process, given the requested one: each process takes its own GPU."""
        if self.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            if self.size > 1 and name.startswith(("cuda:", "mps")):
                raise UsageError(f"--device {name}: one device for {self.size} processes", "pass --device cuda")
            return name
        found = torch.cuda.device_count()
        if found == 1:  # SLURM shows each task its own
            return "cuda"
        if self.place.local_size > found:
            raise UsageError(f"{self.place.local_size} processes on this machine, found {found} GPUs")
        return f"cuda:{self.place.local}"

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        with self.talking():
            dist.all_reduce(total)
        return total.tolist()

    def meet(self) -> None:
        """Wait for all processes: one that leaves early would break the connection of the others."""
        self.totals([0.0])

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the bytes of every process, in their order, to the first; an empty list to the others."""
        if self.size == 1:
            return [payload]
        sizes = torch.zeros(self.size, dtype=torch.long)
        sizes[self.rank] = len(payload)
        with self.talking():
            dist.all_reduce(sizes)
            if not self.first:
                dist.send(_tensor(payload), 0)
                return []
            theirs = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()[1:]]
            for rank, data in enumerate(theirs, start=1):
                dist.recv(data, rank)
        return [payload, *(data.numpy().tobytes() for data in theirs)]

    def told(self, payload: bytes) -> bytes:
        """Return the bytes of the first process; bytes of the others are ignored."""
        if self.size == 1:
            return payload
        size = int(self.totals([len(payload) * self.first])[0])
        data = _tensor(payload) if self.first else torch.empty(size, dtype=torch.uint8)
        with self.talking():
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def exchange(self, value: Any) -> list[Any]:
        """Return the values of all processes, which must be JSON, in their order."""
        if self.size == 1:
            return [value]
        found = self.gather(json.dumps(value).encode())
        every: list[Any] = json.loads(self.told(b"[" + b",".join(found) + b"]"))
        return every

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what the first process makes, which must be JSON; all raise its error."""
        if self.size == 1:
            return make()
        value, error = None, None
        if self.first:
            try:
                value = make()
            except PerceiverError as raised:
                error = raised
        told = json.loads(self.told(json.dumps([value, error and error_facts(error)]).encode()))
        if told[1] is not None:
            raise error or error_from(told[1])
        return value if self.first else told[0]

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Raise LostError in place of torch's error of a broken or silent connection."""
        try:
            yield
        except RuntimeError as error:
            which = f"process {self.rank} of {self.size}"
            raise LostError(f"{which} lost the others: one of them ended or did not answer in time") from error


ALONE = Ranks(Place())


def _tensor(data: bytes) -> Tensor:
    """Return bytes as a tensor; torch refuses a buffer without bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def joined(timeout_s: float = TIMEOUT_S) -> Ranks:
    """Return this process among those of its launcher, connected; ALONE without a launcher.

    Raises UsageError if the variables of the launcher make no sense, LostError if the others do not come.
    """
    here = place()
    if here.size == 1:
        return ALONE
    ranks = Ranks(here, timeout_s)
    if not dist.is_initialized():
        # Each kind of device has its own connection: numbers on the CPU never wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with ranks.talking():
            dist.init_process_group(backend, _meeting_point(), timedelta(seconds=timeout_s), here.size, here.rank)
        atexit.register(_leave)
    return ranks


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _meeting_point() -> str:
    """Return where the processes of a launch find each other."""
    if folder := os.environ.get(LAUNCHED):
        return f"file://{folder}/store"
    if "MASTER_ADDR" in os.environ:
        return "env://"
    # srun: the first of its nodes, at a port that every process can compute.
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    port = PORTS[0] + int(os.environ.get("SLURM_JOB_ID", "0")) % PORTS[1]
    host = socket.gethostname() if first is None else first[1] + (first[2] or "")
    return f"tcp://{host}:{os.environ.get('MASTER_PORT', port)}"
