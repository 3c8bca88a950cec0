"""One command as several processes of this machine: one prints, and all give one exit status. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perceiver_cli.data.workers import GROUP_SIGNALS
from perceiver_cli.errors import PerceiverError, ResourceError, error_from
from perceiver_cli.hardware import LAUNCHED, machine_cores

LOOK_S = 0.05  # between looks at the processes
GRACE_S = 10.0  # the others may take to end by themselves after one has failed


def launch(count: int, words: Sequence[str], stderr: int | None = None) -> int:
    """Run `perceiver WORDS` as `count` processes; return their exit status, or minus the signal that ended them.

    The first process has the streams of this one, with `stderr` as file 2; the others print errors only. Raises the
    error of the process that failed first, or a ResourceError that names one that was killed.
    """
    with tempfile.TemporaryDirectory(prefix="perceiver-") as folder:
        each = (_process(rank, count, words, folder) for rank in range(count))
        processes = [subprocess.Popen(**arguments, stderr=stderr) for arguments in each]
        with _forwarding(processes) as received:
            codes = _ended(processes, Path(folder))
        if received and all(code in (0, -received[0]) for code in codes):
            return -received[0]
        if (error := _cause(codes, Path(folder))) is not None:
            raise error
    return max(codes)


def _process(rank: int, count: int, words: Sequence[str], folder: str) -> dict[str, Any]:
    """Return the arguments of Popen of one process."""
    own = {
        "OMP_NUM_THREADS": str(max(1, machine_cores() // count)),
        # The processes are on one machine: they need no interface that others can reach.
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, LAUNCHED: folder}
    return {
        "args": [sys.executable, "-P", "-m", "perceiver_cli", *words],
        "env": {**own, **os.environ, **{name: str(value) for name, value in names.items()}},
        "stdin": subprocess.DEVNULL,
        "stdout": None if rank == 0 else subprocess.DEVNULL,
        # A signal to this process's group reaches them once: this process forwards it.
        "start_new_session": True,
    }


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward signals to the processes; yield the list of those received."""
    received: list[int] = []

    def send(number: int) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def forward(number: int, frame: object) -> None:
        received.append(number)
        send(number)

    def pause(number: int, frame: object) -> None:  # Ctrl-Z
        send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        send(signal.SIGCONT)

    handlers = dict.fromkeys((name for name in GROUP_SIGNALS if hasattr(signal, name)), forward)
    handlers |= {"SIGTSTP": pause} if hasattr(signal, "SIGTSTP") else {}
    before = {}
    for name, handler in handlers.items():
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _ended(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> list[int]:
    """Wait for all processes; return their exit statuses. Some time after one has failed, the others are killed.

    A status without a report in `folder`, such as that of unreadable files, is no failure.
    """
    deadline: float | None = None
    try:
        while any(process.poll() is None for process in processes):
            if deadline is None and (any(folder.glob("failed-*")) or any((p.returncode or 0) < 0 for p in processes)):
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(LOOK_S)
        codes = [process.poll() for process in processes]
        return [0 if code is None else code for code in codes]  # one that was killed here is not at fault
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _cause(codes: Sequence[int], folder: Path) -> PerceiverError | None:
    """Return the error of the process that failed first, not of one that lost another; None if none failed."""
    reports: list[Mapping[str, Any]] = []
    for path in folder.glob("failed-*"):
        with suppress(OSError, ValueError):
            reports.append(json.loads(path.read_text(encoding="utf-8")))
    reports.sort(key=lambda report: (report["lost"], report["at"]))
    if reports and not reports[0]["lost"]:
        return error_from(reports[0])
    for rank, code in enumerate(codes):
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            why = ", most likely for lack of memory" if name == "SIGKILL" else ""
            return ResourceError(f"process {rank} of {len(codes)} was ended by {name}{why}", "saved state is kept")
    return error_from(reports[0]) if reports else None
