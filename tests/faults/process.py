"""`perceiver` in a forked process of its own group, whose pid is known: it and its workers can be hurt."""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.faults.table import Place, Verdict
from tests.warm import become

LIMIT_S = 60.0


class Child:
    """A running command. pid: its process and group; out: its stdout; status: its end, once `ended` was called."""

    def __init__(self, pid: int, out: Path, talk: Path) -> None:
        self.pid, self.out, self.talk, self.status = pid, out, talk, -1000

    def said(self) -> str:
        """Return the last words on stderr."""
        return self.talk.read_text(errors="replace")[-2000:].strip()

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Wait until something is there, or the command has ended."""
        while not there() and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """Return the children of the process."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def hurt_worker(self, sent: signal.Signals, chance: random.Random) -> bool:
        """Send a signal to a worker once there are some; return whether there were."""
        begun = time.monotonic()
        while time.monotonic() - begun < LIMIT_S / 4:
            if len(pids := self.workers()) > 1:
                try:
                    os.kill(chance.choice(pids), sent)
                except ProcessLookupError:
                    continue
                return True
            time.sleep(0.005)
        return False

    def ended(self, *statuses: int) -> Verdict:
        """Wait for the end; return what is wrong with it."""
        begun = time.monotonic()
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - begun > LIMIT_S:
                os.killpg(self.pid, signal.SIGUSR2)  # see `start`
                time.sleep(1)
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return f"hung for {LIMIT_S:.0f} s: {self.said()}"
            time.sleep(0.005)
        self.status = os.waitstatus_to_exitcode(status)
        text = self.said()
        if self.status not in statuses:
            return f"status {self.status}, expected {' or '.join(map(str, statuses))}: {text}"
        return f"a traceback: {text}" if "Traceback" in text or "this is a bug" in text else ""

    def left(self) -> Verdict:
        """Return which of its processes outlive it by more than some seconds."""
        begun = time.monotonic()
        while time.monotonic() - begun < LIMIT_S / 10:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return ""
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        return "workers are left"


def start(place: Place, *arguments: str | Path, cwd: Path | None = None, room_mib: float | None = None) -> Child:
    """Return `perceiver ARGUMENTS`, started in the folder of the row. room_mib: address space that it may add."""
    number = len(list(place.folder.glob("talk-*")))
    paths, environment = [place.folder / f"{name}-{number}" for name in ("out", "talk")], place.environment
    files = [os.open(os.devnull, os.O_RDWR)]
    files += [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644) for path in paths]
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `main` sets it, before its imports
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
            faulthandler.register(signal.SIGUSR2, file=2)  # a process that hangs says where
            if room_mib is not None:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                limit = used + int(room_mib * 2**20)
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            words = [os.fspath(word) for word in arguments]
            become(files, "perceiver", words, os.fspath(cwd or place.folder), environment)
        finally:
            os._exit(70)  # never back into the row
    with suppress(OSError):  # whoever of the two is first
        os.setpgid(pid, pid)
    for file in files:
        os.close(file)
    return Child(pid, *paths)
