"""Training: everything about a run is settled first, then it goes as a generator of events.

A run folder holds `model.safetensors` (the best model so far: the latest within one standard error of the highest
validation score), `last/` (the state to resume from), `metrics.jsonl`, `split.jsonl` (who validates) and `config.toml`
(resolved; `perceiver train --config` replays it, on the same split).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from perceiver_cli.config import Config, tiny_config
from perceiver_cli.data.catalog import Catalog, resolve_specs, scan
from perceiver_cli.data.loader import Reader
from perceiver_cli.data.splits import SPLIT_FILE, read_split, save_split
from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.files import show_path
from perceiver_cli.hardware import cores, memory_bytes
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.model.cost import Cost, estimate
from perceiver_cli.model.device import choose
from perceiver_cli.report.model_card import write_card
from perceiver_cli.run_folder import MODEL_FILE, begin, claim, find_model, next_run
from perceiver_cli.training.events import Event, Finished, Loaded, Note, Saved, Started
from perceiver_cli.training.loop import Plan, Run
from perceiver_cli.training.state import load_state
from perceiver_cli.training.timing import TIMED_STEPS

MAX_PARAMETERS = 2_000_000_000


class Trainer(Plan):
    """One training run.

    Args:
        data: a folder of class folders; None takes `config.data.path`.
        output: the run folder; None makes runs/<preset>-<n>.
        config: a complete recipe; None takes that of `init_from`, else a tiny one for the modalities found.
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
        self.started_at = time.monotonic() if started_at is None else started_at
        self.resume, self.init_from, self.replace, self.latest = resume, init_from, replace, latest
        self._tensors: dict[str, Tensor] = {}
        self._state: dict[str, Any] = {}
        self.notes = []
        if resume:
            if output is None:
                raise UsageError("--resume needs the run folder to continue", "pass -o RUN")
            self._tensors, self._state, damaged = load_state(Path(output))
            self.notes += [f"fell back to an older training state: {note}" for note in damaged]
            config = Config.parse(self._state["config"], show_path(output))
        elif config is None and init_from is not None:
            config = read_info(find_model(os.fspath(init_from))).config
        path = os.fspath(data) if data is not None else config.data.path if config is not None else None
        if path is None:
            raise UsageError("no data given", "pass a folder of class folders: perceiver train DATA")
        if config is not None:
            config = config.override(list(overrides))
        options = (config or tiny_config(["image"]).override([c for c in overrides if c.startswith("data.")])).data
        own = Path(output) / SPLIT_FILE if resume and output is not None else None
        split = options.split if own is None else os.fspath(own) if own.exists() else None
        catalog = self._scan(path, None if config is None else config.inputs, options.group_by, split)
        config = config or tiny_config(catalog.modalities).override(list(overrides))
        if set(config.inputs) - set(catalog.modalities):
            holds, reads = "+".join(catalog.holds), "+".join(sorted(config.inputs))
            raise DataError(f"{show_path(path)}: holds {holds}, but {config.name} reads {reads}")
        self.catalog = catalog.hold_out(config.data.val_fraction)
        self.catalog.check_groups()
        if resume and self._state["fingerprint"] != self.catalog.fingerprint:
            raise UsageError(
                f"{show_path(output or '')}: the data changed since this run was saved (fingerprint "
                f"{self._state['fingerprint']}, now {self.catalog.fingerprint})",
                "train anew with --init-from to start from its weights",
            )
        self.notes += catalog.notes + check_classes(catalog)
        if (config.train.mixup or config.train.cutmix) and set(config.inputs) != {"image"}:
            reads = "+".join(sorted(config.inputs))
            raise UsageError(f"train.mixup and train.cutmix are for images alone, this run reads {reads}")
        specs = resolve_specs(config.inputs, self.catalog, config.data.limits)
        several = catalog.multi_label
        if several and config.data.class_weight_power:
            raise UsageError("data.class_weight_power is for one label an example")
        self.config = config.model_copy(
            update={
                "multi_label": several,
                "inputs": specs,
                "data": config.data.model_copy(
                    update={"path": path if path == "-" else os.path.abspath(path), "split": SPLIT_FILE}
                ),
            }
        )
        self.compute = choose(config.train.device, config.train.precision)
        classes = len(self.catalog.classes)
        self.reader = Reader(specs, config.data.limits, self.catalog.bad, classes if several else 0)
        self.cost: Cost = estimate(config.model, self.reader.layouts, len(self.catalog.classes))
        self.output = Path(output) if output is not None else next_run(config.name)
        self._check_size()
        if resume:
            self._check_resumable()

    def stop(self) -> None:
        """Ask the run to end after the step in progress, saved and resumable. Safe to call from a signal handler."""
        self.stopping = True

    def summary(self) -> dict[str, Any]:
        """Return what the run is going to be: data, shapes, sizes, lengths, paths."""
        train, data = self.config.train, self.config.data
        splits = {name: len(examples) for name, examples in self.catalog.splits.items()}
        return {
            "preset": self.config.name,
            "data": data.path,
            "modalities": list(self.catalog.modalities),
            "splits": splits,
            "classes": self.catalog.counts("train"),
            "inputs": {
                name: {"shape": list(layout.grid), "channels": layout.num_channels}
                for name, layout in self.reader.layouts.items()
            },
            "parameters": self.cost.parameters,
            "flops": self.cost.flops,
            "training_bytes": self.cost.training_bytes(
                train.batch_size, averaged=train.ema_decay > 0, recompute=train.recompute
            ),
            "steps": None if train.max_time_s else self.planned_steps,
            "max_time_s": train.max_time_s,
            "batch_size": train.batch_size * train.accumulate,
            "device": str(self.compute.device),
            "precision": self.compute.precision,
            "output": os.fspath(self.output),
        }

    def dry_run(self) -> dict[str, Any]:
        """Return the summary with a measured step and the time it adds up to. Nothing is written."""
        run = self.new_run()
        batches = self.reader.batches(run.tasks(TIMED_STEPS))
        times = []
        for batch in batches:
            begin = time.perf_counter()
            run.backward(batch, 1)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.synchronize()
            times.append(time.perf_counter() - begin)
        per_step = sorted(times)[len(times) // 2] * self.config.train.accumulate
        eta = self.config.train.max_time_s or per_step * self.planned_steps
        return {**self.summary(), "seconds_per_step": per_step, "eta_s": eta}

    def fit(self) -> Iterator[Event]:
        """Train, yielding events. Closing the generator early leaves the last saved state to resume from.

        Asked to stop before the first step, it ends without Finished: there is nothing to show or resume.

        Raises:
            DataError: too many unreadable files. DivergedError: the loss is not finite. ResourceError: the run folder
            cannot be written, holds another run, or is in use.
        """
        with claim(self.output, resume=self.resume, replace=self.replace):
            yield Started(self.summary(), tuple(self.notes))
            told = len(self.notes)
            yield from self._preload()
            if self.stopping:
                return
            run = self.new_run()
            # Only now, when nothing but training is left to fail, does an older run give way.
            begin(self.output, self.config.to_toml(), fresh=not self.resume)
            if not (self.resume and (self.output / SPLIT_FILE).exists()):
                save_split(self.output / SPLIT_FILE, self.catalog)
            yield from map(Note, self.notes[told:])
            for event in run.events():
                if isinstance(event, Finished) or (isinstance(event, Saved) and event.path == self.output / MODEL_FILE):
                    write_card(self.output, self.summary(), read_info(self.output / MODEL_FILE))
                yield event

    # ------------------------------------------------------------ preparation

    def _scan(self, path: str, reads: Iterable[str] | None, group_by: str | None, split: str | None) -> Catalog:
        """Return the catalog of the data, divided as a file says, where one is given and is of this data."""
        saved = None if split is None else read_split(split)
        classes = self._state.get("classes") or (None if saved is None else saved.classes)
        catalog = scan(path, classes, reads, group_by)
        divided = None if saved is None else saved.apply(catalog)
        if divided is not None or saved is None or self.resume:
            return divided or catalog
        if path == "-":
            raise UsageError(f"{show_path(split or '')}: the split of other data", "pass --set data.split=none")
        self.notes.append(f"{show_path(split or '')} is the split of other data: this is split anew")
        return scan(path, None, reads, group_by)

    def new_run(self) -> Run:
        """Return model, optimiser and place of the run, before its next step."""
        return Run(self, self.init_from, (self._tensors, self._state) if self.resume else None)

    def _check_size(self) -> None:
        """Refuse what cannot be built or trained here, before anything is allocated."""
        if self.cost.parameters > MAX_PARAMETERS:
            raise UsageError(
                f"this model has {self.cost.parameters:,} parameters ({4 * self.cost.parameters / 1e9:.1f} GB)",
                f"at most {MAX_PARAMETERS:,} are built here",
            )
        needed = self.summary()["training_bytes"]
        memory = memory_bytes()
        if self.compute.device.type == "cpu" and memory is not None and needed > memory:
            raise UsageError(
                f"a step needs about {needed / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}",
                "pass a smaller --batch-size, perhaps with a larger --set train.accumulate=N, or --recompute",
            )

    def _check_resumable(self) -> None:
        before, now = self._state["config"], self.config.to_dict()
        changed = [f"model.{key}" for key, value in now["model"].items() if before["model"].get(key) != value]
        if before["train"]["optimizer"] != now["train"]["optimizer"]:
            changed.append("train.optimizer")
        saved = Reader(Config.parse(before).inputs, self.config.data.limits).layouts
        changed += [f"inputs.{key}" for key, layout in self.reader.layouts.items() if saved.get(key) != layout]
        if changed:
            raise UsageError(f"--resume cannot change {', '.join(changed)}", "train anew, perhaps with --init-from")

    def _preload(self) -> Iterator[Loaded]:
        data = self.config.data
        splits = [self.train_examples, self.catalog.splits.get("val", ())]
        total = sum(map(len, splits))
        done = 0
        if self.catalog.prepared is None:  # of arrays on disk, mapped, there is nothing to decode or keep
            workers = cores() if data.workers is None else data.workers
            for done in self.reader.preload([*chain(*splits)], data.cache_bytes, workers):
                if done % 100 == 0 or done == total:
                    yield Loaded(done, total, len(self.reader.bad))
                if self.stopping:
                    return
        self.looked_at = done or total
        unreadable = self.check_bad(self.reader.bad, self.looked_at)
        if unreadable:
            self.notes.append(f"left out {counted(unreadable, 'unreadable file')}")


def check_classes(catalog: Catalog) -> tuple[str, ...]:
    """Return notes on classes that are too small; raise DataError where there are not two classes to tell apart."""
    where = show_path(catalog.root)
    if not catalog.splits.get("train"):
        raise DataError(f"{where}: no training split", f"found {', '.join(sorted(catalog.splits))}")
    counts = {name: count for name, count in catalog.counts("train").items() if count}
    if len(counts) < 2:
        found = ", ".join(f"{show_path(name)} with {counted(count, 'file')}" for name, count in counts.items())
        raise DataError(f"{where}: one class to learn: {found}", "a classifier needs at least two")
    single = [show_path(name) for name, count in counts.items() if count == 1]
    return (f"only one training file in {counted(len(single), 'class')}: {', '.join(single[:10])}",) if single else ()
