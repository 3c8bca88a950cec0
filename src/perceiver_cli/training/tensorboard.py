"""TensorBoard event files of a run (extra `[tensorboard]`; TensorFlow is not needed)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any

from perceiver_cli.errors import UsageError
from perceiver_cli.training.events import Evaluated, Event, Started, StepDone

FOLDER = "tensorboard"
FIGURES = {
    StepDone: {"train/loss": "loss", "train/lr": "lr", "train/samples_per_s": "samples_per_s"},
    Evaluated: {"val/accuracy": "accuracy", "val/loss": "loss", "train/mean_loss": "train_loss"},
}


def check_tensorboard() -> None:
    """Raise UsageError if the package is missing."""
    if find_spec("tensorboard") is None:
        raise UsageError("--log tensorboard needs the package tensorboard", "pip install 'perceiver-cli[tensorboard]'")


def logged(events: Iterator[Event]) -> Iterator[Event]:
    """Yield a run's events and write their figures into its folder for `tensorboard --logdir RUN`.

    A resumed run continues the same plots and drops the old figures after its first step.
    """
    writer: Any = None
    run = Path()
    try:
        for event in events:
            if isinstance(event, Started):
                run = Path(event.summary["output"])
            if isinstance(event, StepDone | Evaluated):
                if writer is None:
                    from torch.utils.tensorboard import SummaryWriter

                    writer = SummaryWriter(run / FOLDER, purge_step=event.step)
                for name, field in FIGURES[type(event)].items():
                    if not isnan(value := getattr(event, field)):  # NaN: no validation split
                        writer.add_scalar(name, value, event.step)
            yield event
    finally:
        if writer is not None:
            writer.close()
