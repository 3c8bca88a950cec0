"""Fuzz parsers for a while: `python -m tests.fuzz [--seconds N] [--merge] [TARGET ...]`, with atheris installed.

Each target runs in a process of its own, one after another, and begins with tests/fuzz/corpus. The folder `fuzz` gets
the inputs that reach new branches (fuzz/TARGET), those that end in an error, hang or take 2 GiB (fuzz/TARGET-crash-*),
and the log of each target. `--merge` adds the former to the corpus, as few as reach all branches. The exit status is 1
if a target failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS

FOUND = Path("fuzz")
MAX_BYTES = 1 << 14  # of an input
HANG_S = 20
MEMORY_MB = 2048


def run(target: str, seconds: int, merge: bool) -> bool:
    """Fuzz a target in a new process, or merge what was found; print a line. Return whether it failed."""
    own, log = FOUND / target, FOUND / f"{target}.log"
    own.mkdir(parents=True, exist_ok=True)
    corpus = CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    flags = [f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"]
    flags += [f"-artifact_prefix={FOUND}/{target}-"]
    flags += ["-merge=1", str(corpus), str(own)] if merge else [f"-max_total_time={seconds}", str(own), str(corpus)]
    command = [sys.executable, "-m", "tests.fuzz.run", target, *flags]
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    lines = log.read_text(errors="replace").splitlines()
    tried = next((line.split()[-1] for line in lines if line.startswith("stat::number_of_executed_units")), "0")
    kept = len(list((corpus if merge else own).iterdir()))
    print(f"{target}: {int(tried):,} inputs, {kept} kept, status {done.returncode}", flush=True)
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--merge", action="store_true", help="add to the corpus what was found")
    options = parser.parse_args()
    failed = [run(target, options.seconds, options.merge) for target in options.targets or TARGETS]
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
