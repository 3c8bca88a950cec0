"""Several runs in one folder: seeds, folds, or the values of a sweep. One way to train, resume and list them.

The folder holds `runs.json` (what was asked and the state of each run), a run folder for each, and at the end
`model.safetensors`: the ensemble of seeds or folds, or the best model of a sweep. Folds also leave `predictions.jsonl`,
the answer to each example by the model that was not trained on it, and `metrics.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perceiver_cli.config import Config, Flag
from perceiver_cli.data.splits import SPLIT_FILE
from perceiver_cli.errors import (
    DataError,
    DivergedError,
    IntegrityError,
    PerceiverError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)
from perceiver_cli.files import cannot_write, make_folder, parse_json, show_path, write_text
from perceiver_cli.inference.statistics import share_interval
from perceiver_cli.model.checkpoint import read_info, read_tensors, save_model
from perceiver_cli.run_folder import (
    ANSWERS_FILE,
    LOCK_FILE,
    MANIFEST,
    MODEL_FILE,
    PREDICTIONS_FILE,
    RUN_NAME,
    RUNS_FILE,
    STATE_FOLDER,
    SUMMARY_FILE,
    damaged_runs,
    locked,
    mark_latest,
    read_log,
    read_runs,
    score_of,
)
from perceiver_cli.training.events import Evaluated, Event, Finished, StepDone
from perceiver_cli.training.trainer import Trainer

MEDIAN_OF = 4  # ended runs that a run is compared with before it is pruned
JUDGED_FROM = 0.2  # share of a run before which it is not pruned
HEAD = ("head.weight", "head.bias")  # tensors of the last layer of a model
Kind = Literal["seeds", "folds", "sweep"]


class RunEntry(BaseModel):
    """One run of the folder. values: its options by key. score: of its kept model, the figure that decides."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=RUN_NAME.pattern)]
    values: dict[str, Any]
    state: Literal["planned", "begun", "done", "pruned", "failed"] = "planned"
    score: float | None = None
    seconds: float | None = None
    note: str = ""  # why it failed or was pruned


class Request(BaseModel):
    """What was asked for: the runs, and their common options. words: of a command that trains one such run."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kind: Kind
    data: str
    config: dict[str, Any] | None = None
    overrides: list[str] = []
    init_from: str | None = None
    words: list[str] = []
    vary: list[str] = []
    search: str = ""
    seed: int = 0  # of the search
    num_runs: int = 0
    prune: bool = False
    runs: list[RunEntry] = []


@dataclass(frozen=True)
class Began:
    """A run of the folder began or goes on. place: its number, from 1; total: planned runs."""

    member: RunEntry
    place: int
    total: int


@dataclass(frozen=True)
class Ended:
    """A run of the folder ended, failed, or was interrupted: its state says which."""

    member: RunEntry


Propose = Callable[[Sequence[RunEntry]], "dict[str, Any] | None"]


def repeated(kind: Kind, count: int, first_seed: int = 0) -> list[RunEntry]:
    """Return the runs of `count` seeds or folds."""
    if kind == "seeds":
        return [RunEntry(name=f"seed-{s}", values={"train.seed": s}) for s in range(first_seed, first_seed + count)]
    return [RunEntry(name=f"fold-{k}", values={"data.fold": f"{k}/{count}"}) for k in range(1, count + 1)]


class Several:
    """The runs of one folder, trained one after the other.

    propose: returns the values of the next run of a sweep, or None after the last. until: `time.monotonic` at which the
    run in progress is saved and no other begins.
    """

    def __init__(
        self, folder: Path, request: Request, *, propose: Propose | None = None, until: float | None = None,
        latest: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.request, self.until, self.latest = folder, request, until, latest
        self.propose = propose or (lambda members: None)
        self.stopping = False
        self.trainer: Trainer | None = None

    @property
    def members(self) -> list[RunEntry]:
        """The runs so far."""
        return self.request.runs

    @property
    def done(self) -> list[RunEntry]:
        """The runs that ended as planned, the highest score first."""
        own = [member for member in self.members if member.state == "done" and member.score is not None]
        return sorted(own, key=lambda member: -(member.score or 0.0))

    def stop(self) -> None:
        """End and save the run in progress after its step, and begin no other. Safe to call from a signal handler."""
        self.stopping = True
        if self.trainer is not None:
            self.trainer.stop()

    def events(self) -> Iterator[Began | Ended | Event]:
        """Train the runs that have not ended, and yield events.

        Raises as `Trainer.fit` does; in a sweep a failed run is noted and the next one begins, unless it is the first.
        """
        try:
            make_folder(self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        with locked(self.folder):
            try:
                yield from self._events()
            finally:
                if not any((self.folder / member.name).exists() for member in self.members):
                    with suppress(OSError):  # no run began: leave no empty folder
                        (self.folder / RUNS_FILE).unlink()
                        (self.folder / LOCK_FILE).unlink()
                        self.folder.rmdir()

    def _events(self) -> Iterator[Began | Ended | Event]:
        self._save()
        while not self.is_over and (member := self._next()) is not None:
            yield Began(member, 1 + self.members.index(member), max(self.request.num_runs, len(self.members)))
            try:
                yield from self._train(member)
            except (PerceiverError, RuntimeError, MemoryError) as error:
                self._note_failure(member, error)
            self._save()
            yield Ended(member)
        if self.request.kind == "sweep" or all(member.state == "done" for member in self.members):
            self._finish()

    @property
    def is_over(self) -> bool:
        """Whether no other run begins: the time is over, or a signal came."""
        return self.stopping or (self.until is not None and time.monotonic() >= self.until)

    def _next(self) -> RunEntry | None:
        """Return the run to go on with: an interrupted one, a planned one, or a new one of the sweep."""
        for state in ("begun", "planned"):
            for member in self.members:
                if member.state == state:
                    return member
        values = self.propose(self.members)
        if values is None:
            return None
        member = RunEntry(name=name_of(values, [member.name for member in self.members]), values=values)
        self.members.append(member)
        return member

    def _train(self, member: RunEntry) -> Iterator[Event]:
        """Train one run and yield its events; set its state."""
        run, request = self.folder / member.name, self.request
        resumable = member.state == "begun" and (run / STATE_FOLDER / MANIFEST).exists()
        member.state = "begun"
        self._save()
        config = None if request.config is None else Config.parse(request.config, show_path(self.folder / RUNS_FILE))
        if resumable:
            trainer = Trainer(None, run, resume=True)
        else:
            changes = [*request.overrides, *map(assignment, member.values.items())]
            trainer = Trainer(
                request.data, run, config, overrides=changes, init_from=request.init_from, replace=True,
            )  # fmt: skip
        self.trainer, share, pruned = trainer, 0.0, ""
        if self.stopping:  # a signal came while the run was planned
            return
        try:
            for event in trainer.fit():
                if isinstance(event, StepDone):
                    share = event.step / max(1, event.total_steps)
                if isinstance(event, Evaluated) and event.score is not None and request.prune and not pruned:
                    pruned = self._behind(event.score, share)
                if pruned or self.is_over:
                    trainer.stop()
                yield event
                if isinstance(event, Finished):
                    self._note_end(member, event, pruned)
        finally:
            self.trainer = None

    def _note_end(self, member: RunEntry, event: Finished, pruned: str) -> None:
        score = score_of(event.metrics)
        member.score, member.seconds = None if score is None else float(score), round(event.elapsed_s, 3)
        if pruned:
            member.state, member.note = "pruned", pruned
        elif not event.stopped_early:
            member.state = "done"
        if self.request.kind == "sweep" and member.state != "begun":
            # Nothing resumes an ended run, and the states of many runs fill a disk.
            shutil.rmtree(self.folder / member.name / STATE_FOLDER, ignore_errors=True)

    def _behind(self, score: float, share: float) -> str:
        """Return why a run is pruned: it is below the median of the ended runs at the same share of the run."""
        if share < JUDGED_FROM or share >= 1:
            return ""
        others = [found for member in self.done if (found := self._score_at(member, share)) is not None]
        if len(others) < MEDIAN_OF or score >= (median := float(np.median(others))):
            return ""
        return f"{score:.4f} at {share:.0%} of the run, below the median {median:.4f} of {len(others)} runs"

    def _score_at(self, member: RunEntry, share: float) -> float | None:
        """Return the highest validation score of an ended run in its first share of steps."""
        log = read_log(self.folder / member.name)
        steps = log[-1]["step"] if log else 0
        found = [score_of(record) for record in log if record["step"] <= share * steps * 1.001]
        return max((float(score) for score in found if score is not None), default=None)

    def _note_failure(self, member: RunEntry, error: Exception) -> None:
        """Note why a run of a sweep failed; raise the error if other runs would fail too."""
        own = isinstance(error, DivergedError | UsageError | DataError | ResourceError) or is_out_of_memory(error)
        first = not any(other.state in ("done", "pruned") for other in self.members)
        if self.request.kind != "sweep" or not own or (first and not isinstance(error, DivergedError)):
            raise error
        member.state = "failed"
        member.note = "out of memory" if is_out_of_memory(error) else str(error)

    def _save(self) -> None:
        write_text(self.folder / RUNS_FILE, json.dumps(self.request.model_dump(mode="json"), indent=1) + "\n")

    def _finish(self) -> None:
        """Write the result of all runs: one model and, of folds, the answers to all examples."""
        if self.request.kind == "sweep":
            if not self.done:
                return
            best = self.folder / self.done[0].name / MODEL_FILE
            save_model(self.folder / MODEL_FILE, read_tensors(best)[1], read_info(best))
        else:
            write_ensemble(self.folder, self.request.kind, [self.folder / member.name for member in self.members])
        if self.latest:
            with suppress(ResourceError):
                mark_latest(self.folder)


def load_request(folder: Path) -> Request:
    """Return what was asked of a folder of runs. Raises UsageError for another folder, IntegrityError for damage."""
    if (found := read_runs(folder)) is None:
        raise UsageError(f"{show_path(folder)}: holds no {RUNS_FILE} to continue from", "leave out --resume")
    try:
        return Request.model_validate(found)
    except ValidationError as error:
        raise damaged_runs(folder, error.errors()[0]["msg"]) from error


def assignment(option: tuple[str, Any]) -> str:
    """Return the assignment of a value to a key, as in --set; errors show it in short."""
    key, value = option
    return f"{key}=none" if value is None else Flag(f"{key}={value}", key, value)


def name_of(values: Mapping[str, Any], taken: Sequence[str]) -> str:
    """Return the name of a run folder from its values, such as lr=0.003,batch_size=64, that no other has."""
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]
    plain = "".join(char if RUN_NAME.fullmatch(f"x{char}") else "_" for char in ",".join(words))[:80]
    return next(name for name in (plain, *(f"{plain}-{k}" for k in range(2, len(taken) + 3))) if name not in taken)


def write_ensemble(folder: Path, kind: Kind, runs: Sequence[Path]) -> None:
    """Write the model of several runs, whose probabilities are averaged, and the answers of folds.

    Raises IntegrityError if the runs do not read the same inputs for the same classes.
    """
    infos = [read_info(run / MODEL_FILE) for run in runs]
    first = infos[0]
    for run, info in zip(runs, infos, strict=True):
        if (info.config.model, info.config.inputs, info.classes) != (
            first.config.model, first.config.inputs, first.classes,
        ):  # fmt: skip
            shown = f"{show_path(run)}: other inputs or classes than {show_path(runs[0])}"
            raise IntegrityError(shown, "the data changed between the runs: train them anew")
    metrics = _whole_metrics(folder, kind, runs, [dict(info.metrics) for info in infos])
    data = first.config.data.model_copy(update={"fold": None})
    whole = replace(
        first, config=first.config.model_copy(update={"data": data}), step=max(info.step for info in infos),
        metrics=metrics, members=len(runs), calibration=None,
        data_fingerprint=first.data_fingerprint if kind == "seeds" else "",
    )  # fmt: skip
    tensors = {}
    for place, (run, info) in enumerate(zip(runs, infos, strict=True)):
        # Each member's temperature goes into its last layer, so that the mean is over calibrated probabilities.
        temperature = info.calibration.temperature if info.calibration is not None else 1.0
        for name, tensor in read_tensors(run / MODEL_FILE)[1].items():
            tensors[f"members.{place}.{name}"] = tensor / temperature if name in HEAD else tensor
    save_model(folder / MODEL_FILE, tensors, whole)


def _whole_metrics(folder: Path, kind: Kind, runs: Sequence[Path], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metrics of the ensemble: means over seeds, or the answers of all folds, which are written."""
    shared = [key for key in own[0] if key.startswith("val_") and all(key in metrics for metrics in own)]
    means: dict[str, Any] = {key: float(np.mean([metrics[key] for metrics in own])) for key in shared}
    if kind == "seeds":
        if (runs[0] / SPLIT_FILE).is_file():
            shutil.copyfile(runs[0] / SPLIT_FILE, folder / SPLIT_FILE)
        return means
    rows = [
        {**parse_json(line), "fold": place}
        for place, run in enumerate(runs, start=1)
        if (run / ANSWERS_FILE).is_file()
        for line in (run / ANSWERS_FILE).read_bytes().splitlines()
    ]
    if not rows:
        return means
    rows.sort(key=lambda row: str(row["path"]))
    right = sum(row["correct"] for row in rows)
    write_text(folder / PREDICTIONS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "accuracy": right / len(rows),
        "intervals_95": {"accuracy": list(share_interval(right, len(rows)))},
        "num_examples": len(rows),
        "split": "each fold's validation",
        "folds": [{"run": os.path.basename(run), **metrics} for run, metrics in zip(runs, own, strict=True)],
    }
    write_text(folder / SUMMARY_FILE, json.dumps(facts, indent=1) + "\n")
    return means | {"val_accuracy": right / len(rows)}
