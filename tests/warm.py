"""`perceiver` and `python` for tests, started from a process that has imported torch already: 0.1 s instead of 2.

    python tests/warm.py FOLDER        serves, and writes FOLDER/perceiver and FOLDER/python, called as the real ones

FOLDER/perceiver passes its arguments, environment, folder and its own files 0, 1 and 2 through a socket to the server.
The server forks, and the child runs the program's `main` on those very files; its exit status, or the signal that ended
it, becomes that of FOLDER/perceiver. Where the child could not be as a new process is (a closed stdout, another
locale, other variables that Python or torch reads at its start), FOLDER/perceiver becomes the real program.
FOLDER/python does the same for `python FILE ...` and `python -c CODE ...`, and is the real one for anything else.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import runpy
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
def real(): os.execv({python!r}, [{python!r}, *({real!r}), *sys.argv[1:]])
if {python_only} and (len(sys.argv) < 2 or sys.argv[1].startswith("-") and sys.argv[1] != "-c"): real()
try: [os.fstat(number) for number in (0, 1, 2)]
except OSError: real()
link = socket.socket(socket.AF_UNIX)
try: link.connect({address!r})
except OSError: real()
asked = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(link, [b"%016d" % len(asked)], [0, 1, 2])
link.sendall(asked)
child = int(link.recv(16))
if child == 0: real()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(child, number))
for number in (0, 1, 2): os.close(number)
status = int(link.recv(16))
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""
AT_START = ("PYTHON", "LC_", "LANG", "OMP_", "MKL_", "MALLOC", "LD_", "COV_")  # variables that are read at the start


def serve(folder: Path) -> None:
    """Write FOLDER/perceiver and answer its calls until the process that started this one ends."""
    address = str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        for name, real in (("python", []), ("perceiver", ["-m", "perceiver_cli"])):
            text = CLIENT.format(name=name, python=sys.executable, real=real, python_only=not real, address=address)
            (folder / name).write_text(text)
            (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
        parent = os.getppid()
        server.settimeout(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # handlers are not waited for
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                link, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    handle(link)
                link.close()


def handle(link: socket.socket) -> None:
    """Run one call in a child and tell its end. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(link, 16, 3)
    asked = b""
    while len(asked) < int(length):
        asked += link.recv(1 << 20)
    program, arguments, cwd, environment = json.loads(asked)
    if at_start(environment) != at_start(dict(os.environ)):
        link.sendall(b"%016d" % 0)
        os._exit(0)
    child = os.fork()
    if child == 0:
        link.close()
        become(files, program, arguments, cwd, environment)
    for number in files:
        os.close(number)
    for number in (0, 1, 2):  # a pipe ends when the child lets go of it
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    with contextlib.suppress(OSError):
        link.sendall(b"%016d" % child)
        _, status = os.waitpid(child, 0)
        link.sendall(b"%016d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def at_start(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that a process reads once, at its start."""
    return {name: value for name, value in environment.items() if name.startswith(AT_START)}


def become(files: list[int], program: str, arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run the program as if this process had just been started. Does not return."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), "utf-8", line_buffering=os.isatty(1))  # noqa: SIM115
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
    code: object = 0
    try:
        run_perceiver(arguments) if program == "perceiver" else run_python(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def run_perceiver(arguments: list[str]) -> None:
    """Run `perceiver ARGUMENTS`."""
    from perceiver_cli.__main__ import main
    from perceiver_cli.cli import train

    train.STARTED_AT = time.monotonic()
    sys.argv = ["perceiver", *arguments]
    main()


def run_python(arguments: list[str]) -> None:
    """Run `python -c CODE ...` or `python FILE ...`."""
    if arguments[0] != "-c":
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
        return
    sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)


def preload() -> None:
    """Import what is slow to import, and what commands import when they need it."""
    import av  # noqa: F401
    import jinja2  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import rich.progress  # noqa: F401
    import scipy.stats  # noqa: F401
    import soundfile  # noqa: F401
    import torch._dynamo  # noqa: F401  # the first optimiser imports it, in two seconds
    import trimesh  # noqa: F401

    import perceiver_cli.cli.app
    import perceiver_cli.inference.evaluation
    import perceiver_cli.inference.explain
    import perceiver_cli.report.html
    import perceiver_cli.training.trainer  # noqa: F401


if __name__ == "__main__":
    preload()
    serve(Path(sys.argv[1]))
