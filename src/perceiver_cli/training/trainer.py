"""Training: a plan is settled first, then the run goes as a generator of events.

A run folder holds `model.safetensors` (the best model so far: the latest within one standard error of the highest
validation score), `last/` (the state to resume from), `metrics.jsonl`, `split.jsonl` (who validates) and `config.toml`
(resolved; `perceiver train --config` replays it, on the same split).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

from perceiver_cli.config import Config
from perceiver_cli.data.examples import Example
from perceiver_cli.data.splits import SPLIT_FILE, save_split
from perceiver_cli.errors import counted
from perceiver_cli.hardware import cores
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.report.model_card import write_card
from perceiver_cli.run_folder import MODEL_FILE, begin_run, claim_run
from perceiver_cli.training.events import Event, Finished, Loaded, Note, Saved, Started
from perceiver_cli.training.loop import Run
from perceiver_cli.training.plan import Asked, make_plan
from perceiver_cli.training.timing import TIMED_STEPS


class Trainer:
    """One training run.

    Args:
        data: a folder of class folders; None takes `config.data.path`.
        output: the run folder; None makes runs/<preset>-<n>.
        config: a complete recipe; None takes that of `init_from`, else a tiny one for the data's modalities.
        overrides: `key=value` changes, as of `--set`.
        resume: continue the run in `output`. Its configuration is used; overrides apply on top.
        init_from: a run folder or model file whose weights are a start (the head is new where classes differ).
        replace: start over in an output folder that already holds a run.
        latest: point runs/latest in the current folder at this run once it has something to show.
        started_at: the moment, by `time.monotonic`, that a time limit counts from; None is now.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | None = None,
        output: str | os.PathLike[str] | None = None,
        config: Config | None = None,
        *,
        overrides: Sequence[str] = (),
        resume: bool = False,
        init_from: str | os.PathLike[str] | None = None,
        replace: bool = False,
        latest: bool = False,
        started_at: float | None = None,
    ) -> None:
        begun = time.monotonic() if started_at is None else started_at
        self.plan = make_plan(Asked(data, output, config, list(overrides), resume, init_from, latest, begun))
        self.config, self.catalog, self.reader = self.plan.config, self.plan.catalog, self.plan.reader
        self.output, self.notes, self.train_examples = self.plan.output, self.plan.notes, self.plan.train_examples
        self.replace = replace
        self.looked_at = 0  # files decoded before the first step
        self.stopping = False

    @property
    def val_examples(self) -> Sequence[Example]:
        """The examples that choose the best model, without those known to be unreadable. May be empty."""
        return self.plan.val_examples

    def summary(self) -> dict[str, Any]:
        """Return data, shapes, sizes, length and paths of the run as JSON types."""
        return self.plan.summary()

    def stop(self) -> None:
        """Ask the run to end after the step in progress, saved and resumable. Safe to call from a signal handler."""
        self.stopping = True

    def new_run(self) -> Run:
        """Return the run, with model and optimiser, before its next step."""
        return Run(self.plan, self.looked_at)

    def dry_run(self) -> dict[str, Any]:
        """Return the summary with a measured step and the time it adds up to. Nothing is written."""
        run = self.new_run()
        times = []
        for batch in self.reader.batches(run.tasks(TIMED_STEPS)):
            before = time.perf_counter()
            run.backward(batch, 1)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.compute.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        step_s = median(times) * self.config.train.accumulate
        eta_s = self.config.train.max_time_s or step_s * self.plan.planned_steps
        return {**self.summary(), "seconds_per_step": step_s, "eta_s": eta_s}

    def fit(self) -> Iterator[Event]:
        """Train, yielding events. Closing the generator early leaves the last saved state to resume from.

        Asked to stop before the first step, it ends without Finished: there is nothing to show or resume.

        Raises:
            DataError: too many unreadable files. DivergedError: the loss is not finite. ResourceError: the run folder
            cannot be written, holds another run, or is in use.
        """
        resume = self.plan.saved is not None
        with claim_run(self.output, resume=resume, replace=self.replace):
            yield Started(self.summary(), tuple(self.notes))
            num_told = len(self.notes)
            yield from self._preload()
            if self.stopping:
                return
            run = self.new_run()
            # Only now, when nothing but training is left to fail, does an older run give way.
            begin_run(self.output, self.config.to_toml(), fresh=not resume)
            if not (resume and (self.output / SPLIT_FILE).exists()):
                save_split(self.output / SPLIT_FILE, self.catalog)
            yield from map(Note, self.notes[num_told:])
            for event in run.events(lambda: self.stopping):
                if isinstance(event, Finished) or (isinstance(event, Saved) and event.path == self.output / MODEL_FILE):
                    write_card(self.output, self.summary(), read_info(self.output / MODEL_FILE))
                yield event

    def _preload(self) -> Iterator[Loaded]:
        """Decode what fits in memory and yield how far that is; raise DataError if too many files are unreadable."""
        data = self.config.data
        examples = [*self.train_examples, *self.catalog.splits.get("val", ())]
        total, done = len(examples), 0
        if self.catalog.prepared is None:  # of arrays on disk, mapped, there is nothing to decode or keep
            workers = cores() if data.workers is None else data.workers
            for done in self.reader.preload(examples, data.cache_bytes, workers):
                if done % 100 == 0 or done == total:
                    yield Loaded(done, total, len(self.reader.bad))
                if self.stopping:
                    return
        self.looked_at = done or total
        if unreadable := self.plan.check_bad(self.reader.bad, self.looked_at):
            self.notes.append(f"left out {counted(unreadable, 'unreadable file')}")
