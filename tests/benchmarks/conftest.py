"""Benchmarks as a person runs them: from the top of the repository, by `python -m`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
Benchmark = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def benchmark() -> Benchmark:
    """A function that runs one of the benchmarks with --json and returns its lines."""

    def run(module: str, *arguments: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
