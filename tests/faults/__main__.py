"""Run the table of faults: `python -m tests.faults [--sample] [--jobs N] [--list] [ROW ...]`.

stdout gets a Markdown table of passed / tried, stderr the first verdicts of each row that failed. ROW: a part of a
row's name. Rows run in processes of their own, `--jobs` at a time. The exit status is 0 if every trial passed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import tests.faults
from tests.faults.table import ROWS, Place, Row, Verdict
from tests.warm import preload

SHOWN = 3  # verdicts of a failed row


def load_rows() -> None:
    """Import every module of this folder, which fills ROWS."""
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if not module.name.startswith(("__", "test_")):
            importlib.import_module(f"tests.faults.{module.name}")


def run_row(sender: Connection, row: Row, place: Place) -> None:
    """Send the verdicts of a row: one for each trial."""
    place.folder.mkdir()
    verdicts: list[Verdict] = []
    try:
        verdicts += row.trials(place)
    except Exception:
        verdicts.append(f"the row itself: {traceback.format_exc()}")
    verdicts += [f"only {len(verdicts)} of {place.count} trials were made"] * (len(verdicts) < place.count)
    sender.send(verdicts)


def outcomes(rows: list[Row], places: list[Place], jobs: int) -> Iterator[tuple[Row, list[Verdict], float]]:
    """Yield each row with its verdicts and seconds, some at a time, each in a fork, whose crash is a verdict too."""
    context = multiprocessing.get_context("fork")
    waiting = list(zip(rows, places, strict=True))
    running: dict[Connection, tuple[Row, Place, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            row, place = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=run_row, args=(sender, row, place))
            process.start()
            sender.close()
            running[receiver] = row, place, process, time.monotonic()
        for receiver in wait(running):
            assert isinstance(receiver, Connection)
            row, place, process, begun = running.pop(receiver)
            try:
                verdicts = receiver.recv()
            except EOFError:
                verdicts = ["the row's process ended without a verdict"]
            process.join()
            shutil.rmtree(place.folder, ignore_errors=True)
            yield row, verdicts, time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--sample", action="store_true", help="a few trials of each row")
    parser.add_argument("--list", action="store_true", help="names of the rows and their trials")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the rows are forks of this process
    load_rows()
    rows = [row for row in ROWS.values() if not options.rows or any(part in row.name for part in options.rows)]
    if not rows:
        parser.error(f"no row with {' or '.join(options.rows)} in its name")
    if options.list:
        print("\n".join(f"{row.tried:6} {row.sample:6} {row.name}" for row in rows))
        return 0
    begun, bad = time.monotonic(), 0
    # Not a TemporaryDirectory: trials fork this process and run what it has registered for its exit.
    base = Path(tempfile.mkdtemp())
    warm = subprocess.Popen([sys.executable, Path(__file__).parent.parent / "warm.py", base])
    preload()
    while not os.access(base / "perceiver", os.X_OK):
        assert warm.poll() is None, "tests/warm.py ended"
        time.sleep(0.05)
    counts = [row.sample if options.sample else row.tried for row in rows]
    places = [Place(base / str(i), count, base / "perceiver") for i, count in enumerate(counts)]
    print("| fault | passed / tried | s |\n|---|---|---|", flush=True)
    try:
        for row, verdicts, seconds in outcomes(rows, places, options.jobs):
            failed = [(number, verdict) for number, verdict in enumerate(verdicts, 1) if verdict]
            bad += len(failed)
            print(f"| {row.name} | {len(verdicts) - len(failed):,} / {len(verdicts):,} | {seconds:.0f} |", flush=True)
            for number, verdict in failed[:SHOWN]:
                print(f"{row.name}, trial {number}: {verdict}", file=sys.stderr, flush=True)
    finally:
        warm.terminate()
        warm.wait()
        shutil.rmtree(base, ignore_errors=True)
    print(f"{len(rows)} rows in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
