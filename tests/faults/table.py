"""The rows of the table of faults: each injects one kind of fault many times and judges what the program did."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Verdict = str  # why a trial failed; empty if it passed
ROWS: dict[str, Row] = {}


@dataclass
class Place:
    """Where the trials of a row run: an empty folder, a source of chance, and the program.

    count: trials to make. program: `perceiver`, which starts at once (tests/warm.py).
    """

    folder: Path
    count: int
    program: Path
    random: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a program that is started here; its temporary files stay in the folder."""
        mine = {name: value for name, value in os.environ.items() if name != "PERCEIVER_MODEL"}
        (self.folder / "tmp").mkdir(exist_ok=True)
        return mine | {"TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str | Path, **more: object) -> subprocess.Popen[bytes]:
        """Return `perceiver ARGUMENTS`, started in the folder, with pipes for stdout and stderr."""
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            [self.program, *arguments],
            **{
                "cwd": self.folder, "env": self.environment, "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more,
            },
        )  # fmt: skip

    def run(self, *arguments: str | Path, timeout: float = 60, **more: object) -> subprocess.CompletedProcess[bytes]:
        """Return `perceiver ARGUMENTS`, ended; its status is -9 if it took longer than `timeout` seconds."""
        with self.start(*arguments, **more) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@dataclass(frozen=True)
class Row:
    """A row of the table. tried: trials of the whole suite; sample: of the short one; trials: yields a verdict each."""

    name: str
    tried: int
    sample: int
    trials: Callable[[Place], Iterator[Verdict]]


def row(name: str, tried: int, sample: int) -> Callable[[Callable[[Place], Iterator[Verdict]]], Row]:
    """Make a row of the table of a function that makes `place.count` trials."""

    def add(trials: Callable[[Place], Iterator[Verdict]]) -> Row:
        assert name not in ROWS, f"two rows {name!r}"
        ROWS[name] = Row(name, tried, sample, trials)
        return ROWS[name]

    return add
