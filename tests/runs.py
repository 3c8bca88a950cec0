"""Whole runs that are hurt or looked at step by step, shared by tests/training and tests/faults."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from perceiver_cli.data.splits import SPLIT_FILE
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.checkpoint import load_model, read_tensors, save_model
from perceiver_cli.run_folder import MODEL_FILE, STATE_FOLDER
from perceiver_cli.training.events import Evaluated, Saved
from perceiver_cli.training.trainer import Trainer


def poison(trainer: Trainer, step: int, what: str, *, stop: bool = False) -> None:
    """Make a loss, gradient, weight, moment or average of a run NaN in one step, in which a signal may come."""
    run = trainer.new_run()
    update = run.update

    def broken(batches: Iterator[object]) -> torch.Tensor:
        bad = run.step + 1 == step
        trainer.stopping |= stop and bad
        head = run.model.head.weight
        hook = head.register_hook(lambda gradient: gradient * torch.nan) if bad and what == "gradient" else None
        loss = update(batches)  # type: ignore[arg-type]
        if hook is not None:
            hook.remove()
        if bad and what == "weight":
            head.data[0, 0] = torch.nan
        if bad and what == "moment":
            run.optimizer.state[head]["exp_avg"][0, 0] = torch.inf
        if bad and what == "average" and run.average is not None:
            next(run.average.module.parameters()).data[0] = torch.nan
        return loss * torch.nan if bad and what == "loss" else loss

    run.update = broken  # type: ignore[method-assign]
    trainer.new_run = lambda: run  # type: ignore[method-assign]


def finite(run: Path) -> bool:
    """Return whether every tensor of a run folder is finite."""
    files = [*(run / STATE_FOLDER).glob("*.safetensors"), *run.glob("*.safetensors")]
    return all(bool(t.isfinite().all()) for file in files for t in load_file(file).values())


def wrong_figures(data: Path, run: Path, overrides: Sequence[str], precision: str = "fp32") -> Iterator[str]:
    """Train; yield a line for each logged validation figure that `evaluate` of the state saved then does not give."""
    alone = run.with_name(f"{run.name}-state")
    alone.mkdir()
    evaluated: Evaluated | None = None
    for event in Trainer(data, run, overrides=[*overrides, f"train.precision={precision}"]).fit():
        if isinstance(event, Evaluated):
            evaluated = event
        if isinstance(event, Saved) and event.path.parent.name == STATE_FOLDER and evaluated is not None:
            _, tensors = read_tensors(event.path)
            kind = "average.module." if any(name.startswith("average.") for name in tensors) else "model."
            weights = {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            # What is logged is of the weights alone; the temperature is fitted on it afterwards.
            info = dataclasses.replace(load_model(run / MODEL_FILE)[1], calibration=None)
            save_model(alone / MODEL_FILE, weights, info)
            shutil.copy(run / SPLIT_FILE, alone)
            report = evaluate(Predictor(alone, precision=precision), data, "val")
            if max(abs(report.loss - evaluated.loss), abs(report.accuracy - evaluated.accuracy)) > 1e-6:
                found = f"the state gives {report.loss} and {report.accuracy}"
                yield f"step {event.step}: logged loss {evaluated.loss}, accuracy {evaluated.accuracy}; {found}"
            evaluated = None
