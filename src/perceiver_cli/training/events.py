"""What a training run says of itself, one event after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Started:
    """The run is planned. summary: counts, shapes, sizes, as `--dry-run` prints them."""

    summary: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """Files decoded so far, of all; bad: those that could not be."""

    done: int
    total: int
    bad: int


@dataclass(frozen=True)
class Note:
    """Something worth knowing that came up after the start."""

    message: str


@dataclass(frozen=True)
class StepDone:
    """One optimiser step. loss: of its batch (as of the last look, on a GPU); samples_per_s: since the last."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    samples_per_s: float


@dataclass(frozen=True)
class Evaluated:
    """A look at the validation split. best: whether this is the best model so far."""

    step: int
    epoch: float
    train_loss: float
    accuracy: float
    loss: float
    best: bool
    elapsed_s: float


@dataclass(frozen=True)
class Saved:
    """A file was committed."""

    path: Path
    step: int


@dataclass(frozen=True)
class Finished:
    """The run ended: by its plan, or early because it was asked to. metrics: of the best model."""

    model: Path
    step: int
    stopped_early: bool
    metrics: Mapping[str, Any]
    elapsed_s: float


Event = Started | Loaded | Note | StepDone | Evaluated | Saved | Finished
