"""Work for several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from perceiver_cli.errors import ResourceError

CHUNK = 16  # inputs per message between processes
AHEAD = 2  # chunks per process that may wait for earlier ones

Item = TypeVar("Item")
Result = TypeVar("Result")

_call: Callable[[Any], Any] | None = None  # of a worker process


def start_method() -> str:
    """Return how workers start: "fork" shares what is in memory, "spawn" is for Windows and macOS."""
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"  # Apple's libraries crash
    return "fork" if can_fork else "spawn"


def in_progress(workers: int) -> int:
    """Return the maximum number of items that `in_order` has begun and its caller has not finished."""
    return CHUNK * (AHEAD * workers + 1)


def in_order(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `call(item)` in order, from `workers` processes (0: this one). Raises ResourceError if one dies."""
    if workers == 0:
        yield from map(call, items)
        return
    rest = iter(items)
    waiting: deque[Future[list[Result]]] = deque()
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context(start_method()), _begin, (call,)) as pool:
            try:
                while chunk := list(islice(rest, CHUNK)):
                    waiting.append(pool.submit(_call_each, chunk))
                    if len(waiting) > AHEAD * workers:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise worker_died(workers) from error


def _begin(call: Callable[[Any], Any]) -> None:
    global _call
    _call = call
    end_with_parent()


def end_with_parent() -> None:
    """End a worker process when its parent ends for any reason: it would wait for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call_each(chunk: Sequence[Any]) -> list[Any]:
    assert _call is not None
    return [_call(item) for item in chunk]


def worker_died(workers: int) -> ResourceError:
    """Return the error of a worker process that died."""
    return ResourceError(f"one of {workers} data workers died, most likely for lack of memory", "try --workers 0")
