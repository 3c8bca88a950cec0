"""Run the table of faults: `python -m tests.faults [--sample] [--jobs N] [--list] [ROW ...]`.

stdout gets a Markdown table of passed / tried, stderr the first verdicts of each row that failed. ROW: a part of a
row's name. Rows run in processes of their own, `--jobs` at a time. The exit status is 0 if every trial passed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tests.faults
from tests.faults.table import ROWS, Place, Verdict

SHOWN = 3  # verdicts of a failed row


def load_rows() -> None:
    """Import every module of this folder, which fills ROWS."""
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if not module.name.startswith(("__", "test_")):
            importlib.import_module(f"tests.faults.{module.name}")


def run_row(name: str, count: int, program: Path, folder: Path) -> list[Verdict]:
    """Return the verdicts of a row: one for each trial."""
    folder.mkdir()
    verdicts: list[Verdict] = []
    try:
        verdicts += ROWS[name].trials(Place(folder, count, program))
    except Exception:
        verdicts.append(f"the row itself: {traceback.format_exc()}")
    verdicts += [f"only {len(verdicts)} of {count} trials were made"] * (len(verdicts) < count)
    shutil.rmtree(folder, ignore_errors=True)
    return verdicts


def in_a_process(name: str, count: int, program: Path, folder: Path) -> tuple[list[Verdict], float]:
    """Return the verdicts of a row that runs in a process of its own, whose crash is one more verdict, and seconds."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "tests.faults", "--one", name, str(count), str(program), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        verdicts = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        verdicts = [f"the row's process ended with {done.returncode}"]
    return verdicts, time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--sample", action="store_true", help="a few trials of each row: two minutes")
    parser.add_argument("--list", action="store_true", help="names of the rows and their trials")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    load_rows()
    if options.one:
        name, count, program, folder = options.one
        print(json.dumps(run_row(name, int(count), Path(program), Path(folder))))
        return 0
    rows = [row for row in ROWS.values() if not options.rows or any(part in row.name for part in options.rows)]
    if not rows:
        parser.error(f"no row with {' or '.join(options.rows)} in its name")
    if options.list:
        print("\n".join(f"{row.tried:6} {row.sample:6} {row.name}" for row in rows))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    begun, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as base:
        warm = subprocess.Popen([sys.executable, Path(__file__).parent.parent / "warm.py", base])
        program = Path(base, "perceiver")
        while not os.access(program, os.X_OK):
            time.sleep(0.05)
        print("| fault | passed / tried | s |\n|---|---|---|", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [
                pool.submit(
                    in_a_process,
                    row.name,
                    row.sample if options.sample else row.tried,
                    program,
                    Path(base, str(i)),
                )
                for i, row in enumerate(rows)
            ]
            for row, job in zip(rows, jobs, strict=True):
                verdicts, seconds = job.result()
                failed = [(number, verdict) for number, verdict in enumerate(verdicts, 1) if verdict]
                bad += len(failed)
                made = len(verdicts)
                print(f"| {row.name} | {made - len(failed):,} / {made:,} | {seconds:.0f} |", flush=True)
                for number, verdict in failed[:SHOWN]:
                    print(f"{row.name}, trial {number}: {verdict}", file=sys.stderr, flush=True)
        warm.terminate()
        warm.wait()
    print(f"{len(rows)} rows in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
