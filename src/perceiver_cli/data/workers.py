"""Work for several processes, results in order. A process that dies or is stopped ends the work with an error."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from perceiver_cli.errors import ResourceError, counted
from perceiver_cli.files import SHORTAGES, cause, show_path
from perceiver_cli.malloc import check_room

CHUNK = 16  # inputs per message between processes
AHEAD = 2  # chunks per process that may wait for earlier ones
WATCH_S = 0.5  # between checks of workers, and of a worker's parent
STOPPED_LOOKS = 4  # checks in a row before a stopped worker counts as dead: Ctrl-Z stops the parent too
GROUP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # sent to all processes of a job

MAX_SOCKET, SOCKET_NAME = 103, 32  # bytes of a socket's path, the shortest of all systems, and of its name in TMPDIR
FILES_BESIDE, FILES_PER_WORKER = 16, 16  # descriptors that must be free: in all, and per worker

Item = TypeVar("Item")
Result = TypeVar("Result")


def start_method() -> str:
    """Return how workers start: "fork" shares the memory of this process, "spawn" is for Windows and macOS."""
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"  # Apple's libraries crash
    return "fork" if can_fork else "spawn"


def in_progress(workers: int) -> int:
    """Return the maximum number of items that `in_order` has begun and its caller has not finished."""
    return CHUNK * (AHEAD * workers + 1)


def in_order(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `call(item)` in order, from `workers` processes (0: this one).

    Raises ResourceError if a process dies, is stopped or cannot be started; an error of `call` is raised unchanged.
    """
    if workers == 0:
        yield from map(call, items)
        return
    check_room()
    check_files(workers)
    rest = iter(items)
    sent = received = 0
    with _pool(call, workers) as links:
        try:
            while chunk := list(islice(rest, CHUNK)):
                links[sent % workers].send(chunk)
                sent += 1
                if sent - received > AHEAD * workers:
                    received += 1
                    yield from _results(links[(received - 1) % workers])
            while received < sent:
                received += 1
                yield from _results(links[(received - 1) % workers])
        except (EOFError, ConnectionError) as error:
            raise worker_died(workers) from error


def _results(link: Connection) -> list[Any]:
    """Return a worker's results of its oldest chunk. Raises its error, EOFError if it died."""
    outcome = link.recv()
    if isinstance(outcome, BaseException):
        raise outcome
    return list(outcome)


@contextmanager
def _pool(call: Callable[[Any], Any], workers: int) -> Iterator[list[Connection]]:
    """Yield a connection to each of some new processes; afterwards kill them.

    Each worker has its own pipe and holds the only other end. So its death ends a wait for it, even in the middle of a
    message, and leaves no lock behind; `ProcessPoolExecutor` would wait for ever.
    """
    context: Any = multiprocessing.get_context(start_method())
    forked = start_method() == "fork"
    links: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        with starting_workers():
            for _ in range(workers):
                mine, theirs = context.Pipe()
                links.append(mine)
                with theirs:
                    process = context.Process(target=_work, args=(theirs, links if forked else [], call), daemon=True)
                    process.start()
                processes.append(process)
        with watched(processes):
            yield links
    finally:
        for link in links:
            link.close()
        kill_all(processes)


def _work(link: Connection, others: Sequence[Connection], call: Callable[[Any], Any]) -> None:
    """Send the results of chunks until the parent ends. others: the parent's ends of pipes, which a fork inherits."""
    begin_worker()
    for other in others:
        other.close()
    chunks: SimpleQueue[Sequence[Any]] = SimpleQueue()

    def take() -> None:  # so that neither side waits for the other to read
        try:
            while True:
                chunks.put(link.recv())
        finally:  # the parent has ended, or memory: it would wait for ever for a worker that waits for this thread
            os._exit(0)

    threading.Thread(target=take, daemon=True).start()
    with suppress(OSError):
        while True:
            outcome: object
            try:
                outcome = [call(item) for item in chunks.get()]
            except Exception as error:
                error.add_note(traceback.format_exc())
                outcome = error
            _send(link, outcome)
    os._exit(0)


def _send(link: Connection, outcome: object) -> None:
    """Send results or their error; if these cannot be sent, send that error."""
    try:
        link.send(outcome)
    except OSError:
        raise
    except Exception as error:
        link.send(error)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Hold signals back from worker processes that start in the `with`, until each has called `begin_worker`.

    Raises ResourceError if the system starts no more processes.
    """
    blocked = [getattr(signal, name) for name in GROUP_SIGNALS if hasattr(signal, name)]
    masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked) if masks else ()
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot start data workers: {error.strerror or error}", "try --workers 0") from error
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(number: int = 0) -> None:
    """Make this process a data worker: it ends with its parent, and ignores signals to the whole job.

    A run that a signal ends still reads its last batches, and saves.
    """
    names = [name for name in GROUP_SIGNALS if hasattr(signal, name)]
    for name in names:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [getattr(signal, name) for name in names])
    sys.excepthook = _hook
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]
    end_with_parent()


def _cannot_send(error: Exception, item: object) -> None:
    """End this worker: a queue would drop what it cannot send, and the parent would wait for it for ever."""
    if not isinstance(error, MemoryError):
        traceback.print_exception(error)
    os._exit(1)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error, except a lost connection, which threads of Python raise when the parent ends."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def end_with_parent() -> None:
    """End a worker process when its parent ends for any reason; else it would wait for work for ever."""
    number = os.getppid()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        while parent.is_alive() and os.getppid() == number:  # a process forked later keeps the parent "alive"
            parent.join(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def watched(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Kill workers that stay stopped, so that nothing waits for them for ever."""
    done = threading.Event()

    def watch() -> None:
        looks = dict.fromkeys(processes, 0)
        while not done.wait(WATCH_S):
            for process in processes:
                looks[process] = looks[process] + 1 if _is_stopped(process.pid) else 0
                if looks[process] >= STOPPED_LOOKS:
                    process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def kill_all(processes: Sequence[BaseProcess]) -> None:
    """End worker processes at once."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _is_stopped(pid: int | None) -> bool:
    """Return whether a process is stopped by a signal, where the system tells: Linux."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] == b"T"
    return False


def check_files(workers: int) -> None:
    """Raise ResourceError if this process may not open the files that its workers need: torch would hang.

    Each worker has pipes and semaphores, and sends each array of a batch as a file.
    """
    opened: list[int] = []
    try:
        for _ in range(FILES_BESIDE + FILES_PER_WORKER * workers):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        hint = SHORTAGES.get(error.errno or 0, "try --workers 0")
        raise ResourceError(f"{counted(workers, 'data worker')} cannot start: {cause(error)}", hint) from error
    finally:
        for handle in opened:
            os.close(handle)


def check_sockets() -> None:
    """Raise ResourceError if the temporary folder is too long for the sockets of torch's workers: it would hang.

    They send each array as a file through a socket of a name like TMPDIR/pymp-xxxxxxxx/listener-xxxxxxxx.
    """
    folder = tempfile.gettempdir()
    spare = MAX_SOCKET - SOCKET_NAME
    if hasattr(socket, "AF_UNIX") and len(os.fsencode(folder)) > spare:
        fault = f"TMPDIR {show_path(folder)} is too long for the sockets of workers: at most {spare} bytes"
        raise ResourceError(fault, "set TMPDIR to a shorter path, or pass --workers 0")


def worker_died(workers: int) -> ResourceError:
    """Return the error of a worker process that died."""
    return ResourceError(
        f"one of {workers} data workers was killed or stopped, most likely for lack of memory", "try --workers 0"
    )
