"""Takes away what other systems do not have, in every Python process that finds this folder in PYTHONPATH.

PERCEIVER_TEST_WITHOUT names the system: "windows" or "macos". The program must not ask which system it runs on, only
whether a function is there; so what is taken away here is what it must do without there.
"""

import multiprocessing.context
import os
import shutil
import signal
import subprocess  # asks for msvcrt when it is imported  # noqa: F401
import sys
import tempfile
import types

MACOS = {
    os: ("sched_getaffinity", "sched_setaffinity", "process_cpu_count", "O_TMPFILE", "posix_fallocate", "memfd_create"),
    signal: (),
}
WINDOWS = {
    os: (
        *MACOS[os],
        *("fork", "forkpty", "sysconf", "mkfifo", "getuid", "geteuid", "killpg", "setsid", "getloadavg"),
        *("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "set_blocking"),
    ),
    signal: ("SIGPIPE", "SIGHUP", "SIGUSR1", "SIGUSR2"),
}
SYSTEM = os.environ.get("PERCEIVER_TEST_WITHOUT")


def _no_link(*_: object, **__: object) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


def _no_folder(path: object, flags: int, *arguments: object, **options: object) -> int:
    if os.path.isdir(path):  # type: ignore[arg-type]
        raise PermissionError(13, "Permission denied", str(path))
    return _open(path, flags, *arguments, **options)  # type: ignore[arg-type]


_open = os.open
if SYSTEM:
    import asyncio.selector_events  # asks for os.sysconf when it is imported, from Python 3.12 on  # noqa: F401

    for module, names in (WINDOWS if SYSTEM == "windows" else MACOS).items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    multiprocessing.context._concrete_contexts.pop("fork")
    multiprocessing.context._concrete_contexts.pop("forkserver")
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    multiprocessing.set_start_method("spawn")
if SYSTEM == "windows":
    import fcntl

    msvcrt = types.ModuleType("msvcrt")
    msvcrt.LK_NBLCK = 2  # type: ignore[attr-defined]
    msvcrt.locking = lambda handle, *_: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    sys.modules["msvcrt"] = msvcrt
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None  # type: ignore[assignment]
    os.symlink = _no_link  # without the privilege, as most people run
    os.open = _no_folder
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile._bin_openflags &= os.O_RDWR | os.O_CREAT | os.O_EXCL  # type: ignore[attr-defined]
