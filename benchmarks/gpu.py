"""Everything of this program that needs a GPU, in one command of at most eight minutes, without a network.

    bash benchmarks/gpu.sh --out FOLDER

Each part (`benchmarks/gpu_parts.py`) runs in a process of its own, which is killed with its children at its limit: a
failure, a hang, a crash or a lack of memory ends one part. Parts run in the order of their value, so that the total
cuts those worth least. stdout gets one table, FOLDER/gpu.json all rows; the exit status is 0 if every part passed.
Only the standard library is imported here: a missing package is named in one line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))
# Seconds that a part may take, in the order of value.
LIMITS_S = {
    "machine": 60, "kernels": 45, "equality": 60, "precisions": 110, "speed": 205, "compile": 100, "loader": 60,
    "nccl": 40, "tests": 60,
}  # fmt: skip
LEAST_S = 10.0  # with less left, a part is not begun
CHECK_S = 120.0  # for importing the package and finding the device
LAST_LINES = 8  # of what a failed part wrote
MODULES = {"pillow": "PIL"}  # packages whose module has another name
COLUMNS = "{:<10} {:<60} {:>12} {:<20} {}"
CHECK = """
import sys
from perceiver_cli.errors import PerceiverError
from perceiver_cli.model.device import choose_compute
try:
    choose_compute(sys.argv[1])
except PerceiverError as error:
    sys.exit(str(error))
"""


@dataclass
class Outcome:
    """A part that has run. verdict: "passed", or "failed", "cut" or "not begun" with a reason."""

    part: str
    verdict: str
    seconds: float = 0.0
    limit_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)


def missing_packages() -> list[str]:
    """Return the package's requirements that cannot be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in project["dependencies"]]
    return [name for name in names if find_spec(MODULES.get(name, name.replace("-", "_"))) is None]


def device_problem(device: str) -> str:
    """Return why a device cannot be used, in one line, or nothing."""
    command = [sys.executable, "-c", CHECK, device]
    try:
        check = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, timeout=CHECK_S
        )
    except subprocess.TimeoutExpired:
        return f"the package and the device were not ready after {CHECK_S:.0f} s"
    lines = check.stderr.strip().splitlines() or [f"exit status {check.returncode}"]
    return lines[-1] if check.returncode else ""


def run_part(part: str, command: Sequence[str], limit_s: float, folder: Path) -> Outcome:
    """Return the outcome of a part: `command` with a file for its rows, killed with its children at the limit."""
    rows_file, log_file = folder / f"{part}.jsonl", folder / f"{part}.log"
    begun = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, str(rows_file)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": PYTHONPATH}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    ended = None
    try:
        while ended is None and time.monotonic() < begun + limit_s:
            # The process is left as a zombie, whose number nobody else gets before its group is killed.
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is None:
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    records = _records(rows_file)
    rows = [{"part": part, **record} for record in records if "facts" not in record]
    facts = {name: value for record in records for name, value in record.get("facts", {}).items()}
    failed = sum(row["verdict"].startswith("failed") for row in rows)
    if ended is None:
        verdict = f"cut at its limit of {limit_s:.0f} s"
    elif code:
        verdict = f"failed: killed by {signal.Signals(-code).name}" if code < 0 else f"failed: exit status {code}"
    else:
        verdict = f"failed: {failed} of {len(rows)} rows" if failed or not rows else "passed"
    last = [] if verdict == "passed" else log_file.read_text(errors="replace").splitlines()[-LAST_LINES:]
    return Outcome(part, verdict, round(time.monotonic() - begun, 1), limit_s, rows, facts, last)


def _records(file: Path) -> list[dict[str, Any]]:
    """Return the records in a file of JSON lines, of which the last may be cut."""
    records = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def show(part: str, what: str, value: object, unit: str, verdict: str) -> None:
    """Print one row of the table."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    print(COLUMNS.format(part, what, value, unit, verdict).rstrip(), flush=True)


def show_outcome(outcome: Outcome) -> None:
    """Print the rows of a part, then its verdict and the last lines that a failed part wrote."""
    for row in outcome.rows:
        show(outcome.part, row["what"], row["value"], row["unit"], row["verdict"])
    show(outcome.part, "all of this part", outcome.seconds, "s", outcome.verdict)
    for line in outcome.last_lines:
        print(f"{'':<10} | {line}", flush=True)


def _finite(value: Any) -> Any:
    """Return a JSON value with the words of numbers that JSON does not have, such as "nan"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, device: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Write all outcomes so far, whole or not at all."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    told = ("part", "verdict", "seconds", "limit_s")
    document = {
        **{name: value for outcome in outcomes for name, value in outcome.facts.items()},
        "device": device,
        "passed": all(outcome.verdict == "passed" for outcome in outcomes),
        "seconds": round(seconds, 1),
        "parts": [{name: getattr(outcome, name) for name in told} for outcome in outcomes],
        "failures": [
            {"part": outcome.part, "verdict": outcome.verdict, "last_lines": outcome.last_lines}
            for outcome in outcomes
            if outcome.verdict != "passed"
        ],
        "rows": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", "utf-8")
    temporary.replace(path)


def run_parts(parts: Sequence[str], device: str, minutes: float, out: Path) -> list[Outcome]:
    """Return the outcomes of parts, run one after another until the time is over; show and write each at once."""
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            left_s = begun + 60 * minutes - time.monotonic()
            if left_s < LEAST_S:
                outcome = Outcome(part, f"not begun: the {minutes:g} minutes were over")
            else:
                limit_s = min(float(LIMITS_S[part]), left_s)
                command = [sys.executable, "-m", "benchmarks.gpu_parts", part, device, str(limit_s)]
                outcome = run_part(part, command, limit_s, Path(folder))
            outcomes.append(outcome)
            show_outcome(outcome)
            write_json(out / "gpu.json", device, outcomes, time.monotonic() - begun)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description="Check and measure this program on a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(LIMITS_S)} [default: all]")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json [default: gpu]")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal at small sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything [default: 8]")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - LIMITS_S.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: expected some of {', '.join(LIMITS_S)}")
    begun = time.monotonic()
    if names := missing_packages():
        print(f"gpu.sh: missing in {sys.executable}: {', '.join(names)}", file=sys.stderr)
        return 2
    if problem := device_problem(options.device):
        print(f"gpu.sh: {problem}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is killed too
    options.out.mkdir(parents=True, exist_ok=True)
    show("part", "what", "value", "unit", "verdict")
    parts = [part for part in LIMITS_S if part in (options.parts or LIMITS_S)]
    left = options.minutes - (time.monotonic() - begun) / 60
    outcomes = run_parts(parts, options.device, left, options.out)
    failed = [outcome.part for outcome in outcomes if outcome.verdict != "passed"]
    seconds = time.monotonic() - begun
    show("total", f"not passed: {', '.join(failed)}" if failed else "every part", seconds, "s",
         "failed" if failed else "passed")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
