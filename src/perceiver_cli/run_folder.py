"""Run folders: their names and locks, runs/latest, and the log of metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from perceiver_cli.errors import IntegrityError, ResourceError, UsageError
from perceiver_cli.files import cannot_write, show_path, write_text

MODEL_FILE = "model.safetensors"
STATE_FOLDER = "last"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
MAX_LOG_BYTES = 64 << 20
MAX_LINK = 4096  # characters of a path in runs/latest


@contextmanager
def claim_run(run: Path, *, resume: bool, replace: bool) -> Iterator[None]:
    """Make a run folder and lock it for this process. Changes no other file in it.

    Raises UsageError if it already holds a run, without `resume` or `replace`; ResourceError if it cannot be written or
    another process holds its lock.
    """
    if not (resume or replace) and ((run / MODEL_FILE).exists() or (run / STATE_FOLDER).exists()):
        raise UsageError(f"{show_path(run)}: already holds a run", "pass --resume to continue it, or --replace")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / LOCK_FILE).open("w")
    except OSError as error:
        raise cannot_write(run, error) from error
    with lock:
        try:
            _lock(lock)
        except OSError as error:
            raise ResourceError(f"{show_path(run)}: in use by another training run") from error
        try:
            yield
        finally:
            if [path.name for path in run.iterdir()] == [LOCK_FILE]:  # the run never began: leave no empty folder
                with suppress(OSError):  # Windows removes no open file
                    (run / LOCK_FILE).unlink()
                    run.rmdir()


def _lock(file: IO[str]) -> None:
    """Lock an open file for this process. Raises OSError if another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        # Data workers outlive a killed run by seconds; they inherit flock's locks, but not POSIX locks.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def begin_run(run: Path, config_toml: str, *, fresh: bool) -> None:
    """Write a run's config.toml; with `fresh`, first remove the model, state and log of an earlier run."""
    if fresh:
        for old in [run / MODEL_FILE, *(run / STATE_FOLDER).glob("*")]:
            old.unlink(missing_ok=True)
        write_text(run / METRICS_FILE, "")
    write_text(run / "config.toml", config_toml)


def cut_log(run: Path, step: int) -> None:
    """Drop the lines of a run's log after the step from which the run continues; create a missing log."""
    kept = (json.dumps(record) + "\n" for record in read_log(run) if record["step"] <= step)
    write_text(run / METRICS_FILE, "".join(kept))


def append_log(run: Path, record: Mapping[str, Any]) -> None:
    """Append an evaluation to a run's log."""
    try:
        with (run / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
    except OSError as error:
        raise cannot_write(run / METRICS_FILE, error) from error


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the evaluations in a run's log, oldest first; none if it is missing. An incomplete line is skipped.

    Raises IntegrityError if the file is not a log of a run.
    """
    path = run / METRICS_FILE
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_LOG_BYTES).split(b"\n")
        records = [json.loads(line) for line in lines if line.endswith(b"}")]
        if not all(isinstance(record["step"], int) for record in records):
            raise ValueError("a step is not an integer")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{show_path(path)}: not the log of a run: {error}") from error
    return records


def next_run(name: str) -> Path:
    """Return the first free folder runs/<name>-<n>."""
    paths = (Path("runs", f"{name}-{number}") for number in count(1))
    return next(path for path in paths if not path.exists())


def mark_latest(run: Path) -> None:
    """Point runs/latest, a link or a text file with the path, at a run: other commands then use it without -m."""
    runs = Path("runs")
    try:
        runs.mkdir(exist_ok=True)
        temporary = runs / f".latest-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        target = os.path.relpath(run, runs)
        try:
            temporary.symlink_to(target)
        except OSError:  # a system that makes no links: Windows, without the privilege
            temporary.write_text(target, encoding="utf-8")
        os.replace(temporary, runs / "latest")
    except OSError as error:
        raise cannot_write(runs / "latest", error) from error


def find_model(name: str | None) -> Path:
    """Return the model file of a run folder, or the file itself; the default is $PERCEIVER_MODEL, then runs/latest.

    Raises a UsageError with the path if there is no such file.
    """
    wanted = name or os.environ.get("PERCEIVER_MODEL") or "runs/latest"
    path = Path(wanted)
    if path.name == "latest" and path.is_file():
        with path.open(encoding="utf-8", errors="replace") as pointer:
            path = path.parent / pointer.read(MAX_LINK)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        if name is None and "PERCEIVER_MODEL" not in os.environ:
            raise UsageError("no model: there is no runs/latest here", "pass -m RUN, or train one with perceiver train")
        raise UsageError(f"{show_path(wanted)}: no model file", f"expected a run folder with {MODEL_FILE}, or the file")
    return file
