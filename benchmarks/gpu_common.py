"""What the parts of `benchmarks.gpu` share: their setting, their rows, and work in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Record = dict[str, Any]  # a row of the table, or {"facts": {...}} about the machine


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and by `time.monotonic` until when. On a CPU everything is small: a rehearsal."""

    device: str
    deadline: float

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device != "cpu"

    @property
    def left_s(self) -> float:
        """Seconds until the part is cut."""
        return self.deadline - time.monotonic()


def row(what: str, value: object = "", unit: str = "", verdict: str = "", **more: object) -> Record:
    """Return a row of the table. verdict: "passed", "failed: why", another word, or nothing for a measurement."""
    return {"what": what, "value": value, "unit": unit, "verdict": verdict, **more}


def judged(what: str, value: float, most: float, unit: str = "", **more: object) -> Record:
    """Return a row that passes if a value is `most` or less; NaN fails."""
    return row(what, value, unit, "passed" if value <= most else f"failed: expected {most:g} at most", **more)


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def attempted(what: str, work: Callable[..., Iterator[Record]], *arguments: Any) -> Iterator[Record]:
    """Yield the records of `work(*arguments)`; an error becomes a row that failed."""
    try:
        yield from work(*arguments)
    except Exception as error:
        yield row(what, verdict=f"failed: {first_line(error)}")


def isolated(what: str, seconds: float, work: Callable[..., Iterator[Record]], *arguments: Any) -> Iterator[Record]:
    """Yield the records of `work(*arguments)`, run in a new process that is killed after `seconds`.

    A crash or a hang becomes a row that failed. The process is not forked: CUDA does not survive a fork of a process
    that has asked for it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, receiver, what, work, arguments))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                if code := process.exitcode:
                    ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                    yield row(what, verdict=f"failed: {ending}")
                return
        yield row(what, verdict=f"cut after {seconds:.0f} s")
    finally:
        process.kill()
        process.join()


def _send(
    sender: Connection, receiver: Connection, what: str, work: Callable[..., Iterator[Record]], arguments: Any
) -> None:
    receiver.close()
    for record in attempted(what, work, *arguments):
        sender.send(record)
