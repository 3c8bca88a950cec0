"""The events of a training run, in the order in which they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perceiver_cli.advice.base import Advice
from perceiver_cli.data.account import Account


@dataclass(frozen=True)
class Started:
    """The run is planned. summary: counts, shapes and sizes, as `--dry-run` prints them. account: of all paths."""

    summary: Mapping[str, Any]
    notes: tuple[str, ...]
    account: Account


@dataclass(frozen=True)
class Loaded:
    """Files were read. done, bad: files read and files found unreadable so far; total: files to read."""

    done: int
    total: int
    bad: int


@dataclass(frozen=True)
class Note:
    """A message for the user after the start."""

    message: str


@dataclass(frozen=True)
class StepDone:
    """An optimiser step ended. loss: mean of its batches; samples_per_s: since the last StepDone, 16 steps on a GPU.

    elapsed_s: seconds of training, as a time limit counts them.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    samples_per_s: float
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """The validation split was evaluated. best: whether the model is the best so far. score: what decides."""

    step: int
    epoch: float
    train_loss: float
    accuracy: float
    loss: float
    best: bool
    elapsed_s: float
    score: float | None = None


@dataclass(frozen=True)
class Saved:
    """A file was saved."""

    path: Path
    step: int


@dataclass(frozen=True)
class Finished:
    """The run ended, as planned or early. metrics: those of the best model. advice: what to do next."""

    model: Path
    step: int
    stopped_early: bool
    metrics: Mapping[str, Any]
    elapsed_s: float
    advice: tuple[Advice, ...] = ()


Event = Started | Loaded | Note | StepDone | Evaluated | Saved | Finished
