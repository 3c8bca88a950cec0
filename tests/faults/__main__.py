"""Run the table of faults: `python -m tests.faults [--sample] [--jobs N] [--list] [ROW ...]`.

stdout gets a Markdown table of passed / tried, stderr the first verdicts of each row that failed. ROW: a part of a
row's name. Rows run in processes of their own, `--jobs` at a time. The exit status is 0 if every trial passed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.table import ROWS, load_rows, run_row

SHOWN = 3  # verdicts of a failed row


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--sample", action="store_true", help="a few trials of each row: two minutes")
    parser.add_argument("--list", action="store_true", help="names of the rows and their trials")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    load_rows()
    rows = [row for row in ROWS.values() if not options.rows or any(part in row.name for part in options.rows)]
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
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, context, max_tasks_per_child=1) as pool:
            jobs = [
                pool.submit(run_row, row.name, row.sample if options.sample else row.tried, program, Path(base, str(i)))
                for i, row in enumerate(rows)
            ]
            for row, job in zip(rows, jobs, strict=True):
                passed, made, seconds, failed = job.result()
                bad += len(failed)
                print(f"| {row.name} | {passed:,} / {made:,} | {seconds:.0f} |", flush=True)
                for verdict in failed[:SHOWN]:
                    print(f"{row.name}: {verdict}", file=sys.stderr, flush=True)
        warm.terminate()
        warm.wait()
    print(f"{len(rows)} rows in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
