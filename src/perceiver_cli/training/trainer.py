"""Training: make a plan, then yield the events of the run.

A run folder holds `model.safetensors` (the best model so far: the latest within one standard error of the highest
validation score), `last/` (the state to resume from), `metrics.jsonl`, `split.jsonl` (the validation examples) and
`config.toml` (resolved; `perceiver train --config` replays it on the same split).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from perceiver_cli.advice.base import Advice, some
from perceiver_cli.advice.training import Trained, after_training
from perceiver_cli.config import Config
from perceiver_cli.data.decoder import told_once
from perceiver_cli.data.likeness import leak_note
from perceiver_cli.data.loader import training_tasks
from perceiver_cli.data.splits import SPLIT_FILE, save_split
from perceiver_cli.data.survey import facts_of
from perceiver_cli.errors import DataError, counted
from perceiver_cli.files import write_text
from perceiver_cli.hardware import cores
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.model.machines import Name, training_estimate
from perceiver_cli.model.ranks import ALONE, Ranks
from perceiver_cli.report.model_card import card
from perceiver_cli.run_folder import MODEL_FILE, begin_run, claim_run, make_next_run, read_log
from perceiver_cli.training.cache import preload_shared
from perceiver_cli.training.events import Event, Finished, Loaded, Note, Saved, Started
from perceiver_cli.training.loop import Run
from perceiver_cli.training.plan import RunRequest, make_plan, too_large
from perceiver_cli.training.timing import TIMED_STEPS

MEASURED_S = 20.0  # longest measurement of a dry run


class Trainer:
    """One training run; `plan` holds its configuration, data, device and notes.

    Args:
        data: a folder of class folders; None takes `config.data.path`.
        output: the run folder; None makes runs/<preset>-<n>.
        config: a complete recipe; None takes the recipe of `init_from`, else a tiny one for the data's modalities.
        overrides: `key=value` changes, as in `--set`.
        resume: continue the run in `output` with its configuration and `overrides`.
        init_from: a run folder or model file whose weights the model starts from (new classes get a new head row).
        replace: start over in an output folder that already holds a run.
        latest: point runs/latest in the current folder at this run once it has saved a model.
        started_at: the start of the time limit by `time.monotonic`; None is now.
        dry_run: only for `dry_run`, which refuses no recipe for the size of this machine.
        ranks: the processes that share the run, each with a Trainer of the same arguments.
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
        dry_run: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        begun = time.monotonic() if started_at is None else started_at
        changes = list(overrides)
        request = RunRequest(data, output, config, changes, resume, init_from, latest, begun, dry_run, ranks)
        self.plan = make_plan(request)
        self.replace = replace
        self.looked_at = 0  # files decoded before the first step
        self.stopping = False

    def stop(self) -> None:
        """End and save the run after the step in progress. Safe to call from a signal handler."""
        self.stopping = True

    def new_run(self) -> Run:
        """Return the run with its model and optimiser, ready for its next step."""
        return Run(self.plan, self.looked_at)

    def dry_run(self, on: Name | None = None) -> dict[str, Any]:
        """Return the plan's summary with the time of a step and of the run; write nothing.

        on: a machine for which cost is estimated. Without it the time of a step is measured here; that too is estimated
        if the model does not fit here, or on a CPU would take longer than MEASURED_S.
        """
        plan = self.plan
        too_much = too_large(plan) if on is None else None
        plan.notes.extend([] if too_much is None else [str(too_much)])
        facts = {**plan.summary(), "files": plan.account.to_dict()}
        cost = training_estimate(on or "cpu", plan.config, plan.cost, plan.reader.layouts, len(plan.train_examples))
        slow = plan.compute.device.type == "cpu" and cost["seconds_per_step"] * TIMED_STEPS > MEASURED_S
        if on is not None or slow or too_much is not None:
            step_s = cost["seconds_per_step"]
            return {**facts, "seconds_per_step": step_s, "eta_s": 3600 * cost["hours"], "estimate": cost}
        step_s = self._measured()
        eta_s = plan.config.train.max_time_s or step_s * plan.planned_steps
        return {**facts, "seconds_per_step": step_s, "eta_s": eta_s}

    def _measured(self) -> float:
        """Return the measured seconds of a step of the process with the most batches, for which all others wait."""
        run, plan = self.new_run(), self.plan
        train, times = plan.config.train, []
        # A batch of all the data: the share of a process may be empty.
        tasks = training_tasks(plan.train_examples, train.batch_size, train.seed, 0, TIMED_STEPS)
        for batch in plan.reader.batches(tasks):
            if not batch.examples:
                raise DataError(f"no file of a batch can be read; the first: {batch.bad[0][2]}")
            before = time.perf_counter()
            run.backward(batch, 1)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.compute.device.type == "cuda":
                torch.cuda.synchronize(run.compute.device)
            times.append(time.perf_counter() - before)
        return median(times) * ceil(train.accumulate * train.split_inputs / plan.request.ranks.size)

    def fit(self) -> Iterator[Event]:
        """Train and yield events. A generator closed early leaves the last saved state to resume from.

        A stop before the first step yields no Finished, because nothing was trained.

        Raises DataError for too many unreadable files; DivergedError if the loss is not finite; ResourceError if the
        run folder cannot be written, holds another run, or is in use.
        """
        ranks = self.plan.request.ranks
        if self.plan.request.output is None:  # another process may have taken this number since
            name = ranks.from_first(lambda: os.fspath(make_next_run(self.plan.config.name)))
            self.plan = replace(self.plan, output=Path(name))
        plan, output, resume = self.plan, self.plan.output, self.plan.saved is not None
        with ExitStack() as claimed:
            ranks.from_first(lambda: claimed.enter_context(claim_run(output, resume=resume, replace=self.replace)))
            yield Started(plan.summary(), tuple(plan.notes), plan.account)
            num_told = len(plan.notes)
            yield from self._preload()
            if any(ranks.totals([self.stopping])):
                return
            run = self.new_run()
            # An older run is deleted only now, after everything but training itself has succeeded.
            ranks.from_first(lambda: self._begin(resume=resume))
            yield from map(Note, plan.notes[num_told:])
            for event in run.events(lambda: self.stopping):
                if isinstance(event, Finished) or (isinstance(event, Saved) and event.path == output / MODEL_FILE):
                    ranks.from_first(lambda: self._write_card(output))
                yield replace(event, advice=self._advice()) if isinstance(event, Finished) else event
            ranks.meet()

    def _begin(self, *, resume: bool) -> None:
        """Write the files that a run folder has before the first step."""
        output = self.plan.output
        begin_run(output, self.plan.config.to_toml(), fresh=not resume)
        if not (resume and (output / SPLIT_FILE).exists()):
            save_split(output / SPLIT_FILE, self.plan.catalog)

    def _write_card(self, output: Path) -> None:
        write_text(output / "README.md", card(self.plan.summary(), read_info(output / MODEL_FILE)))

    def _advice(self) -> tuple[Advice, ...]:
        """Return what to do after a run that was not stopped."""
        plan = self.plan
        if self.stopping:
            return ()
        start = plan.request.init_from
        trained = Trained(
            os.fspath(plan.request.data or plan.config.data.path or "-"), os.fspath(plan.output), plan.config,
            facts_of(plan.catalog), len(plan.val_examples), read_log(plan.output), len(plan.reader.bad),
            None if start is None else os.fspath(start),
        )  # fmt: skip
        return tuple(after_training(trained))

    def _preload(self) -> Iterator[Loaded]:
        """Decode the files that fit in memory and yield progress; raise DataError if too many are unreadable."""
        data, catalog, reader = self.plan.config.data, self.plan.catalog, self.plan.reader
        examples = [*self.plan.train_examples, *catalog.splits.get("val", ())]
        total, done = len(examples), 0
        if catalog.prepared is None:  # prepared arrays are mapped from disk, with nothing to decode or keep
            workers = cores() if data.workers is None else data.workers
            ranks, options = self.plan.request.ranks, (reader, examples, data.cache_bytes, workers)
            alone = ranks.size == 1
            steps = reader.preload(*options[1:]) if alone else preload_shared(*options, ranks, lambda: self.stopping)
            for done in steps:
                if done % 100 == 0 or done == total:
                    yield Loaded(done, total, len(reader.bad))
                if self.stopping and alone:
                    return
        self.looked_at = done or total
        self.plan.notes.extend(told_once(reader.notes))
        if (leak := leak_note(reader, self.plan.train_examples, self.plan.val_examples)) is not None:
            self.plan.notes.append(leak)
        if unreadable := self.plan.check_bad(reader.bad, self.looked_at):
            self.plan.notes.append(f"left out {counted(len(unreadable), 'unreadable file')}: {some(unreadable)}")
