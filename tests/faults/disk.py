"""The program in forked processes whose disk is watched, fails or ends them at a chosen call (disk.c).

A server, started with the layer preloaded, has imported torch already. It forks for each command; the child takes its
files, limits and user, and runs the program's `main`.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.table import Place

NOBODY = 65534
TIMEOUT_S = 60


@dataclass(frozen=True)
class Ended:
    """A command that ended. calls: how often it changed the watched folder."""

    args: list[str]
    returncode: int
    stdout: bytes
    stderr: bytes
    calls: int


class Disk:
    """Runs commands in a folder; `root`, below it, is the disk that the layer watches."""

    def __init__(self, place: Place) -> None:
        for tool in ("gcc",):
            if shutil.which(tool) is None:
                raise RuntimeError(f"{tool} is missing: it compiles tests/faults/disk.c")
        self.folder, self.root = place.folder, place.folder / "disk"
        self.root.mkdir()
        layer = place.folder / "disk.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", layer, source], check=True)
        self.environment = place.environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.disk"], env=self.environment | {"LD_PRELOAD": str(layer)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.kill()
        self.server.communicate()

    def start(self, *arguments: str | Path, **more: Any) -> int:
        """Start `perceiver ARGUMENTS`; return its process id.

        cwd; stdin, stdout, stderr: a path, or None for a closed file; user: a number; limits: (resource, number)
        pairs; kill, fail (call), number (errno), kinds (letters of disk.c), once, log.
        """
        self.asked = {
            "arguments": list(map(str, arguments)), "cwd": str(self.folder), "root": str(self.root),
            "stdin": "/dev/null", "stdout": str(self.folder / "stdout"), "stderr": str(self.folder / "stderr"),
            "environment": self.environment, **more,
        }  # fmt: skip
        for name in ("stdout", "stderr"):
            (self.folder / name).unlink(missing_ok=True)
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(self.asked) + "\n")
        self.server.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with {self.server.wait()}")
        return line

    def wait(self) -> Ended:
        """Return the command that was started last, when it has ended."""
        status, calls = map(int, self._line().split())
        out, err = (
            path.read_bytes() if (path := self.folder / name).is_file() else b"" for name in ("stdout", "stderr")
        )
        return Ended(self.asked["arguments"], status, out, err, calls)

    def run(self, *arguments: str | Path, **more: Any) -> Ended:
        """Return `perceiver ARGUMENTS`, ended; its status is -14 after TIMEOUT_S. The keywords are those of `start`."""
        self.start(*arguments, **more)
        return self.wait()


def serve() -> None:
    """Answer lines of JSON on stdin: print the process id of each command, then its status and number of calls."""
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            become(json.loads(line), writer)
        os.close(writer)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        os.set_blocking(reader, False)  # data workers may hold the other end
        calls = b""
        with suppress(BlockingIOError):
            calls = os.read(reader, 100)
        os.close(reader)
        print(os.waitstatus_to_exitcode(status), int(calls or 0), flush=True)


def become(asked: dict[str, Any], writer: int) -> None:
    """Run the program as asked. Does not return."""
    signal.alarm(TIMEOUT_S)
    wanted = [
        (asked["stdin"], os.O_RDONLY), (asked["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ]  # fmt: skip
    for number, (path, flags) in enumerate(wanted):
        if path is None:
            os.close(number)
        elif path == "no reader":
            reader, end = os.pipe()
            os.close(reader)
            os.dup2(end, number)
            os.close(end)
        else:
            opened = os.open(path, flags, 0o666)
            os.dup2(opened, number)
            if opened != number:
                os.close(opened)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ.pop("LD_PRELOAD", None)
    tempfile.tempdir = None
    sys.argv = ["perceiver", *asked["arguments"]]
    sys.stdin = None if asked["stdin"] is None else open(0, closefd=False)  # type: ignore[assignment]  # noqa: SIM115
    sys.stdout = None if asked["stdout"] is None else open(1, "w", closefd=False)  # type: ignore[assignment]  # noqa: SIM115
    sys.stderr = None if asked["stderr"] is None else open(2, "w", 1, errors="backslashreplace", closefd=False)  # type: ignore[assignment]  # noqa: SIM115
    from perceiver_cli.__main__ import main
    from perceiver_cli.cli import train

    layer = ctypes.CDLL(None)
    layer.disk_begin(
        asked["root"].encode(), ctypes.c_long(asked.get("kill", 0)), ctypes.c_long(asked.get("fail", 0)),
        asked.get("number", 0), asked.get("kinds", "").encode(), int(asked.get("once", False)),
        asked.get("log", "").encode(),
    )  # fmt: skip
    if "user" in asked:
        os.setgroups([])
        os.setgid(asked["user"])
        os.setuid(asked["user"])
    for name, number in asked.get("limits", ()):
        resource.setrlimit(getattr(resource, name), (number, number))
    train.STARTED_AT = time.monotonic()
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    with suppress(OSError):
        os.write(writer, str(layer.disk_count()).encode())
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    # As tests/warm.py: what is slow to import; and what another user may not be allowed to read.

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import rich.progress  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch._dynamo  # noqa: F401

    import perceiver_cli.cli.app
    import perceiver_cli.inference.evaluation
    import perceiver_cli.model.export
    import perceiver_cli.model.pretrained
    import perceiver_cli.report.html
    import perceiver_cli.training.trainer  # noqa: F401

    serve()
