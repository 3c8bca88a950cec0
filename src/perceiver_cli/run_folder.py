"""Run folders: their names and locks, runs/latest, and the log of metrics."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any
from zlib import crc32

from perceiver_cli.errors import IntegrityError, ResourceError, UsageError
from perceiver_cli.files import (
    BINARY,
    NO_LINK,
    NO_WAIT,
    cannot_read,
    cannot_write,
    make_folder,
    open_file,
    parse_json,
    remove_leftovers,
    show_path,
    similar_path,
    status_of,
    sync_folder,
    write_text,
)

MODEL_FILE = "model.safetensors"
STATE_FOLDER = "last"
MANIFEST = "MANIFEST.json"  # in STATE_FOLDER, with the files of the committed states
STATE_PATTERN = "step-*.safetensors"
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.toml"
RUNS_FILE = "runs.json"  # in a folder of several runs: its list of runs
PREDICTIONS_FILE, SUMMARY_FILE = "predictions.jsonl", "metrics.json"  # of an evaluation
ANSWERS_FILE = "validation.jsonl"  # the saved model's answer to each validation example, as in predictions.jsonl
LOCK_FILE = ".lock"
RUN_NAME = re.compile(r"[\w=+,-][\w=+,.-]{0,199}", re.ASCII)  # of a run in a folder of several
NO_LINKS = (LOCK_FILE, STATE_FOLDER, "tensorboard")  # must not be links: they are opened, other files are replaced
MAX_LOG_BYTES = 64 << 20
MAX_LINK = 4096  # characters of a path in runs/latest


@contextmanager
def claim_run(run: Path, *, resume: bool, replace: bool) -> Iterator[None]:
    """Make a run folder and lock it for this process. Changes no other file in it.

    Without `resume` or `replace`, raises UsageError if the folder already holds a run. Raises ResourceError if it
    cannot be written or another process holds its lock.
    """
    try:
        _check_own(run)
        resumable = (run / STATE_FOLDER / MANIFEST).exists()
        if not (resume or replace) and (resumable or (run / MODEL_FILE).exists()):
            ways = "pass --resume to continue it, or --replace" if resumable else "pass --replace to start over"
            raise UsageError(f"{show_path(run)}: already holds a run", ways)
        make_folder(run)
    except OSError as error:
        raise cannot_write(run, error) from error
    with locked(run):
        remove_leftovers(run)
        remove_leftovers(run / STATE_FOLDER)
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be gone, and Windows removes no open file
                if os.listdir(run) == [LOCK_FILE]:  # the run never began: leave no empty folder
                    (run / LOCK_FILE).unlink()
                    run.rmdir()


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run, into which a training may write."""
    return (folder / LOCK_FILE).exists() or (folder / STATE_FOLDER).exists()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run. Raises ResourceError if another process holds it or the folder cannot be written."""
    try:
        # A link that replaces the file meanwhile is neither followed nor truncated.
        lock = os.fdopen(os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT | BINARY | NO_LINK | NO_WAIT, 0o666), "r+b")
    except OSError as error:
        raise cannot_write(run, error) from error
    with lock:
        _lock(lock, run)
        yield


def _check_own(run: Path) -> None:
    """Raise UsageError for a link where a run writes: a folder from a stranger may point at any file."""
    for name in NO_LINKS:
        if (run / name).is_symlink():
            raise UsageError(f"{show_path(run / name)}: a link, expected no link in a run", "remove the link")


def _lock(file: IO[bytes], run: Path) -> None:
    """Lock an open file of a run. Raises ResourceError if another process holds the lock, or none can be made."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            # Data workers outlive a killed run by seconds; they inherit flock's locks, but not POSIX locks.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise cannot_write(run / LOCK_FILE, error) from error
        raise ResourceError(f"{show_path(run)}: in use by another training run") from error


def begin_run(run: Path, config_toml: str, *, fresh: bool) -> None:
    """Write a run's config.toml; with `fresh`, first remove the model, state and log of an earlier run."""
    if fresh:
        # The manifest goes first: without it no state counts, even if the rest is interrupted.
        state = run / STATE_FOLDER
        for old in [state / MANIFEST, run / MODEL_FILE, run / ANSWERS_FILE, *state.glob(STATE_PATTERN)]:
            _remove(old)
        write_text(run / METRICS_FILE, "")
    write_text(run / CONFIG_FILE, config_toml)


def _remove(path: Path) -> None:
    """Remove a file durably, if it is there. Raises ResourceError."""
    try:
        if os.path.lexists(path):
            path.unlink()
            sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def cut_log(run: Path, step: int) -> None:
    """Drop the lines of a run's log after the step from which the run continues; create a missing log."""
    kept = (_log_line(record) for record in read_log(run) if record["step"] <= step)
    write_text(run / METRICS_FILE, "".join(kept))


def _log_line(record: Mapping[str, Any]) -> str:
    """Return an evaluation as a line of JSON whose last value is the crc32 of the others."""
    text = json.dumps(record, allow_nan=False)
    return json.dumps({**record, "crc32": f"{crc32(text.encode()):08x}"}) + "\n"


def _log_record(line: bytes) -> dict[str, Any]:
    """Return the evaluation of a line; those of version 0.1.0 have no crc32. Raises ValueError, KeyError, TypeError."""
    record: dict[str, Any] = json.loads(line)
    if not isinstance(record["step"], int):
        raise ValueError("a step is not an integer")
    stated = record.pop("crc32", None)
    if stated is not None and stated != json.loads(_log_line(record))["crc32"]:
        raise ValueError(f"the line of step {record['step']} does not match its crc32")
    return record


def append_log(run: Path, record: Mapping[str, Any]) -> None:
    """Append an evaluation to a run's log."""
    try:
        handle = os.open(run / METRICS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY | NO_LINK, 0o666)
        with os.fdopen(handle, "ab") as file:
            file.write(_log_line(record).encode())
            file.flush()
            os.fsync(file.fileno())  # before the state that counts this evaluation
    except OSError as error:
        raise cannot_write(run / METRICS_FILE, error) from error


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the evaluations in a run's log, oldest first; none if it is missing. An incomplete last line is skipped.

    Raises IntegrityError if the file is not a log of a run.
    """
    path = run / METRICS_FILE
    try:
        with open_file(path) as file:
            *lines, last = file.read(MAX_LOG_BYTES).split(b"\n")
        return [_log_record(line) for line in ([*lines, last] if last.endswith(b"}") else lines)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        hint = "remove the damaged line"
        raise IntegrityError(f"{show_path(path)}: not the log of a run, or a damaged one: {error}", hint) from error


def score_of(record: Mapping[str, Any]) -> float | None:
    """Return the figure that decides between evaluations: mAP with several labels an example, else accuracy."""
    score: float | None = record.get("val_mAP", record.get("val_accuracy"))
    return score


def run_of(model: Path) -> Path | None:
    """Return the run that saved a model file, or None: another file in its folder does not belong to it."""
    return model.parent if model.name == MODEL_FILE else None


def read_runs(folder: Path) -> Any:
    """Return the list of runs of a folder of several, as JSON; None for another folder. Raises IntegrityError."""
    path = folder / RUNS_FILE
    try:
        with open_file(path) as file:
            return parse_json(file.read(MAX_LOG_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise damaged_runs(folder, error) from error


def damaged_runs(folder: Path, reason: object) -> IntegrityError:
    """Return the error of a broken list of runs."""
    return IntegrityError(f"{show_path(folder / RUNS_FILE)}: not a list of runs, or a damaged one: {reason}")


def runs_in(folder: str | os.PathLike[str]) -> list[Path] | None:
    """Return the runs in a folder of several that have a model, in their order; None for another folder.

    Raises IntegrityError if its list of runs is damaged.
    """
    path = Path(folder) / RUNS_FILE
    if (found := read_runs(path.parent)) is None:
        return None
    try:
        names = [run["name"] for run in found["runs"]]
    except (KeyError, TypeError) as error:
        raise damaged_runs(path.parent, error) from error
    if not all(
        isinstance(name, str) and RUN_NAME.fullmatch(name) for name in names
    ):  # a path must not lead out of the folder
        raise IntegrityError(f"{show_path(path)}: names a run that is not a folder here")
    return [path.parent / name for name in names if (path.parent / name / MODEL_FILE).is_file()]


def next_run(name: str) -> Path:
    """Return the first free folder runs/<name>-<n>."""
    return next(path for path in _numbered(name) if not path.exists())


def make_next_run(name: str) -> Path:
    """Make the first free folder runs/<name>-<n>; return it. Processes that run at once get different folders."""
    for path in _numbered(name):
        try:
            make_folder(path.parent)
            path.mkdir()
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(path, error) from error
    raise AssertionError


def _numbered(name: str) -> Iterator[Path]:
    return (Path("runs", f"{name}-{number}") for number in count(1))


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

    Raises a UsageError with the path if there is no such file. Raises as `status_of` does.
    """
    if name == "":  # a variable that is not set
        raise UsageError("no model given: the name is empty", "pass a run folder or a model file")
    wanted = name or os.environ.get("PERCEIVER_MODEL") or "runs/latest"
    path = Path(wanted)
    if path.name == "latest" and path.is_file():
        with path.open(encoding="utf-8", errors="replace") as pointer:
            path = path.parent / pointer.read(MAX_LINK)
    status = status_of(path)
    if status is not None and stat.S_ISDIR(status.st_mode):
        path = path / MODEL_FILE
        status = status_of(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        if name is None and "PERCEIVER_MODEL" not in os.environ:
            raise UsageError("no model: there is no runs/latest here", "pass -m RUN, or train one with perceiver train")
        fault = f"{show_path(wanted)}: no model file"
        if status is None and re.fullmatch(r"deepmind/[\w.-]+", wanted):
            raise UsageError(fault, f"to get it from the hub: perceiver import {wanted} -o {path.name}.safetensors")
        near = similar_path(wanted) if status_of(wanted) is None else ""
        raise UsageError(fault + near, f"expected a run folder with {MODEL_FILE}, or the file")
    return path
