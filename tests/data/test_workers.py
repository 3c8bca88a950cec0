"""Worker processes that die, are stopped, fail, or outlive their parent."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from pickle import PicklingError

import numpy as np
import pytest

from perceiver_cli.data.catalog import scan
from perceiver_cli.data.loader import Reader, ordered_tasks
from perceiver_cli.data.workers import in_order
from perceiver_cli.errors import DataError, ResourceError
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.spec import Limits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")


def answer(number: int) -> np.ndarray:
    """Return more than a pipe holds, so that a worker dies in the middle of a message."""
    return np.full(1 << 16, number)


def hurt(sent: signal.Signals, number: int) -> np.ndarray:
    if number == 40:
        os.kill(os.getpid(), sent)
    return answer(number)


def test_results_come_in_order_and_in_any_size() -> None:
    assert [int(array[0]) for array in in_order(answer, range(100), 3)] == list(range(100))
    assert list(in_order(abs, [], 2)) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_is_stopped_ends_the_work_within_seconds(sent: signal.Signals) -> None:
    begun = time.monotonic()
    with pytest.raises(ResourceError, match="one of 2 data workers was killed or stopped"):
        list(in_order(partial(hurt, sent), range(200), 2))
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_job_ends_no_worker(sent: signal.Signals) -> None:
    assert len(list(in_order(partial(hurt, sent), range(100), 2))) == 100


def fail(number: int) -> object:
    if number == 20:
        raise DataError("a bad file", "look at it")
    return (lambda: 0) if number == 60 else number


class Greedy:
    """An item for which a worker has no memory: an error where it is received."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return refuse, ()


def refuse() -> None:
    raise MemoryError


def test_a_worker_without_memory_for_its_work_ends_it() -> None:
    with pytest.raises(ResourceError, match="for lack of memory"):
        list(in_order(str, [Greedy()], 1))


def test_errors_of_a_worker_come_as_they_are() -> None:
    with pytest.raises(DataError, match="a bad file; look at it"):
        list(in_order(fail, range(40), 2))
    with pytest.raises((AttributeError, PicklingError), match="lambda"):  # the second since Python 3.14
        list(in_order(fail, range(50, 70), 2))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_loader_whose_worker_dies_says_so_where_it_is_read(bars: Path, sent: signal.Signals) -> None:
    """torch raises from a signal handler, in the middle of whatever the program does then."""
    reader = Reader({"image": ImageSpec(size=12)}, Limits())
    batches = reader.batches(ordered_tasks(scan(bars).examples("train"), 1), 2)
    next(batches)
    workers = [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]
    os.kill(workers[-1], sent)
    time.sleep(0.2)  # the handler would raise here
    if sent == signal.SIGTERM:  # to a whole process group: the run reads on, and saves
        assert len(list(batches)) == 119
    else:
        with pytest.raises(ResourceError, match="one of 2 data workers was killed or stopped"):
            list(batches)


def test_a_worker_that_dies_while_it_sends_is_told(bars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its broken connection is an EOFError, which ended the command with "Aborted!" and status 1."""

    def cut(*_: object) -> object:
        raise EOFError

    reader = Reader({"image": ImageSpec(size=12)}, Limits())
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__next__", cut)
    with pytest.raises(ResourceError, match="one of 2 data workers was killed or stopped"):
        list(reader.batches(ordered_tasks(scan(bars).examples("train"), 1), 2))


def test_a_batch_for_which_a_worker_has_no_memory_ends_the_work(bars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue of multiprocessing drops what it cannot send, and prints it."""

    def too_large(self: object, protocol: object) -> object:
        raise MemoryError

    monkeypatch.setattr("perceiver_cli.data.loader.Batch.__reduce_ex__", too_large)
    reader = Reader({"image": ImageSpec(size=12)}, Limits())
    with pytest.raises(ResourceError, match="for lack of memory"):
        list(reader.batches(ordered_tasks(scan(bars).examples("train"), 1), 2))


def test_a_temporary_folder_that_is_too_long_for_sockets_is_told(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker could not send its batch, and the loader waited for ever."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    reader = Reader({"image": ImageSpec(size=12)}, Limits())
    with pytest.raises(ResourceError, match="too long for the sockets of workers: at most 71 bytes; set TMPDIR"):
        list(reader.batches(ordered_tasks(scan(bars).examples("train"), 1), 2))
    assert len(list(reader.batches(ordered_tasks(scan(bars).examples("train"), 1), 0))) == 120


def hook(kind: type[Exception]) -> None:
    """Raise an error in a worker that nothing catches, as `multiprocessing`'s own threads do."""
    sys.excepthook(kind, kind("lost"), None)


@pytest.mark.parametrize(
    ("kind", "printed"), [(ConnectionResetError, ""), (EOFError, ""), (ValueError, "ValueError: lost\n")]
)
def test_a_worker_whose_parent_was_killed_says_nothing(
    kind: type[Exception], printed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    list(in_order(hook, [kind], 1))
    assert capfd.readouterr().err == printed
