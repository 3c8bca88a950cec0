"""The loop of training: read, step, average, evaluate, save, and when; each run a generator of events."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.config import Config
from perceiver_cli.data.catalog import Catalog
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Batch, Reader, Task, training_tasks
from perceiver_cli.errors import DataError, DivergedError, IntegrityError, ResourceError, counted
from perceiver_cli.files import show_path
from perceiver_cli.inference.evaluation import Report, score
from perceiver_cli.model.checkpoint import ModelInfo, save_model
from perceiver_cli.model.device import Compute
from perceiver_cli.model.perceiver import Perceiver, compile_latents
from perceiver_cli.run_folder import MODEL_FILE, STATE_FOLDER, MetricsLog, mark_latest
from perceiver_cli.training.events import Evaluated, Event, Finished, Saved, StepDone
from perceiver_cli.training.mixing import mix
from perceiver_cli.training.optimizer import learning_rate, make_average, make_optimizer
from perceiver_cli.training.state import save_state, transfer
from perceiver_cli.training.timing import Timing

LIST_BAD = 20  # unreadable files named in an error
MIX_STREAM = 1  # tells the random numbers of mixing from those of order and augmentation
CUDA_CHECK_EVERY = 16  # steps between looks at the loss, each of which waits for the GPU


class Plan:
    """What a run works from, all of it settled before the first step.

    notes: what is worth saying of it; more may come up. looked_at: files decoded before the first step. stopping: set,
    the run ends after the step in progress.
    """

    config: Config
    catalog: Catalog
    reader: Reader
    compute: Compute
    output: Path
    latest: bool  # point runs/latest in the current folder at the run
    started_at: float  # by time.monotonic; a time limit counts from here
    notes: list[str]
    looked_at: int = 0
    stopping: bool = False

    @property
    def train_examples(self) -> Sequence[Example]:
        """The examples that are learned from."""
        return self.catalog.splits["train"]

    @property
    def val_examples(self) -> tuple[Example, ...]:
        """The examples that choose the best model; those known to be unreadable are left out. May be empty."""
        return tuple(e for e in self.catalog.splits.get("val", ()) if e.id not in self.reader.bad)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every training example is seen once, rounded."""
        return max(1, round(len(self.train_examples) / (self.config.train.batch_size * self.config.train.accumulate)))

    @property
    def planned_steps(self) -> int:
        """Optimiser steps of the run, where no time limit says otherwise."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        whole = max(1, ceil(train.epochs * len(self.train_examples) / (train.batch_size * train.accumulate)))
        return min(whole, train.max_steps or whole)

    def check_bad(self, bad: Mapping[str, str], looked_at: int) -> int:
        """Return how many of the files to train with are unreadable; raise DataError if it is more than allowed."""
        if not bad:
            return 0
        ids = {example.id for split in ("train", "val") for example in self.catalog.splits.get(split, ())}
        among = [error for identity, error in bad.items() if identity in ids]
        allowed = self.config.data.max_bad
        if len(among) > allowed * max(1, looked_at):
            listed = "\n  ".join(among[:LIST_BAD]) + ("\n  ..." if len(among) > LIST_BAD else "")
            raise DataError(
                f"{len(among)} of {counted(looked_at, 'file')} cannot be read, more than {allowed:.1%}; "
                f"pass --max-bad {min(1.0, ceil(1000 * len(among) / max(1, looked_at)) / 1000)} to go on without them:"
                f"\n  {listed}"
            )
        return len(among)


class Run:
    """Model, optimiser and position of a run in progress.

    Args:
        plan: what it works from.
        start: a run folder or model file whose weights it begins with.
        saved: tensors and state to go on from.
    """

    def __init__(
        self,
        plan: Plan,
        start: str | os.PathLike[str] | None = None,
        saved: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
    ) -> None:
        self.plan = plan
        self.config, self.compute, self.catalog = plan.config, plan.compute, plan.catalog
        train = self.config.train
        model = Perceiver(self.config.model, plan.reader.layouts, len(self.catalog.classes), train.seed)
        if start is not None:
            plan.notes += transfer(model, self.catalog.classes, start)
        if train.freeze == "trunk":
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        model.recompute = train.recompute
        if train.compile:
            compile_latents(model, self.compute)
        self.model = model.to(self.compute.device).train()
        self.average = make_average(self.model, train.ema_decay) if train.ema_decay else None
        self.optimizer = make_optimizer(self.model, train)
        self.scaler = torch.amp.GradScaler(self.compute.device.type, enabled=self.compute.precision == "fp16")
        counts = list(self.catalog.counts("train").values())
        weights = class_weights(counts, self.config.data.class_weight_power)
        self.class_weights = weights.to(self.compute.device) if self.config.data.class_weight_power else None
        self.step = 0
        self.total_steps = plan.planned_steps
        self.elapsed_before = 0.0
        self.best: dict[str, Any] = {}
        self.top = 0.0  # the highest validation score so far
        self.loss_sum = torch.zeros((), device=self.compute.device)  # since the last evaluation
        self.loss_count = 0
        if saved is not None:
            self._restore(*saved)

    @property
    def elapsed(self) -> float:
        """Seconds of training time, those before a resume counted in."""
        return self.elapsed_before + time.monotonic() - self.plan.started_at

    @property
    def epoch(self) -> float:
        """Epochs seen, as a fraction."""
        train = self.config.train
        return self.step * train.batch_size * train.accumulate / len(self.plan.train_examples)

    def tasks(self, batches: int) -> Iterator[Task]:
        """Return the tasks of the next `batches` batches."""
        train = self.config.train
        start = self.step * train.accumulate
        return training_tasks(self.plan.train_examples, train.batch_size, train.seed, start, start + batches)

    def events(self) -> Iterator[Event]:
        """Yield the events of the loop."""
        train, data = self.config.train, self.config.data
        timing = Timing(self)
        endless = 1 << 40 if train.max_time_s else (self.total_steps - self.step) * train.accumulate
        workers = self.compute.default_workers if data.workers is None else data.workers
        batches = self.plan.reader.batches(self.tasks(endless), workers, pin=self.compute.device.type == "cuda")
        check_every = CUDA_CHECK_EVERY if self.compute.device.type == "cuda" else 1
        metrics = MetricsLog(self.plan.output, self.step)
        last_loss, last_time, last_step = float("nan"), time.perf_counter(), self.step
        evaluated_at = self.step
        while not timing.over() and not self.plan.stopping:
            lr = learning_rate(train, self.step, self.total_steps, self.plan.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = self.update(batches)
            self.step += 1
            timing.stepped()
            if self.step % check_every == 0 or timing.over():
                last_loss = float(loss)
                if not isfinite(last_loss):
                    self._diverged(last_loss, lr)
                now = time.perf_counter()
                rate = (self.step - last_step) * train.batch_size * train.accumulate / max(1e-9, now - last_time)
                last_time, last_step = now, self.step
                yield StepDone(self.step, self.total_steps, self.epoch, last_loss, lr, rate)
            if timing.evaluation_due():
                self._check_finite(lr)
                evaluated = self._evaluate(metrics, lr)
                evaluated_at = self.step
                timing.evaluated()
                yield evaluated
                if evaluated.best:
                    yield Saved(self.plan.output / MODEL_FILE, self.step)
                yield self._save()
                last_time, last_step = time.perf_counter(), self.step
            elif timing.save_due():
                self._check_finite(lr)
                yield self._save()
                last_time, last_step = time.perf_counter(), self.step
        if evaluated_at != self.step and not self.plan.stopping:
            yield self._evaluate(metrics, lr)
            evaluated_at = self.step
        yield self._save()
        if not (self.plan.output / MODEL_FILE).exists():
            self._save_model({})  # stopped before the first evaluation
        yield Finished(self.plan.output / MODEL_FILE, self.step, self.plan.stopping, dict(self.best), self.elapsed)

    # ------------------------------------------------------------ one step

    def update(self, batches: Iterator[Batch]) -> Tensor:
        """Do one optimiser step; return its mean loss, still on the device."""
        train = self.config.train
        loss = torch.zeros((), device=self.compute.device)
        for micro in range(train.accumulate):
            batch = next(batches)
            if batch.bad:
                self._note_bad(batch)
            if batch.examples:
                loss += self.backward(batch, train.accumulate, micro)
        self.scaler.unscale_(self.optimizer)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.loss_sum += loss
        self.loss_count += 1
        return loss

    def backward(self, batch: Batch, accumulate: int, micro: int = 0) -> Tensor:
        """Add the gradients of one batch, the `micro`-th of its step; return its loss over `accumulate`."""
        device, train = self.compute.device, self.config.train
        targets = [(batch.labels, 1.0)]
        given = batch.segments
        if train.mixup or train.cutmix:
            # Its own stream: a function of seed and place in the run, like everything random here.
            rng = np.random.default_rng([train.seed, self.step, micro, MIX_STREAM])
            mixed = mix(batch, train.mixup, train.cutmix, rng)
            given, targets = mixed.segments, [(mixed.labels, mixed.share), (mixed.other_labels, 1 - mixed.share)]
        with self.compute.autocast():
            logits = self.model({name: segment.to(device) for name, segment in given.items()})
        loss = torch.zeros((), device=device)
        for labels, share in targets:
            loss = loss + share * self._loss(logits, labels.to(device, non_blocking=True))
        loss = loss / accumulate
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return softmax cross-entropy, or sigmoid cross-entropy where examples have several labels (paper 4.2)."""
        smoothing = self.config.train.label_smoothing
        if self.config.multi_label:
            # Summed over classes, so that the gradient does not shrink with their number.
            smoothed = labels * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smoothed, reduction="sum") / len(labels)
        return F.cross_entropy(logits, labels, self.class_weights, label_smoothing=smoothing)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()

    def _note_bad(self, batch: Batch) -> None:
        """Remember files that turned out unreadable in training; stop if they are too many."""
        reader = self.plan.reader
        fresh = {example.id: error for _, example, error in batch.bad if example.id not in reader.bad}
        if not fresh:
            return
        reader.bad.update(fresh)
        seen = min(self.step * self.config.train.batch_size + 1, len(self.plan.train_examples))
        seen = max(seen, self.plan.looked_at)
        if len(reader.bad) > 10 or seen == len(self.plan.train_examples):
            self.plan.check_bad(reader.bad, seen)

    def _check_finite(self, lr: float) -> None:
        if self.loss_count and not isfinite(float(self.loss_sum)):
            self._diverged(float(self.loss_sum), lr)

    def _diverged(self, loss: float, lr: float) -> None:
        raise DivergedError(
            f"training diverged: loss {loss} at step {self.step}, learning rate {lr:.3g}",
            f"the state before is kept in {show_path(self.plan.output / STATE_FOLDER)}; try a lower --lr, "
            "train.warmup or train.clip_norm",
        )

    # ------------------------------------------------------------ evaluation and saving

    @property
    def judged(self) -> Perceiver:
        """The model that is evaluated and saved: the average where there is one."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, Perceiver)
        return model

    def _evaluate(self, metrics: MetricsLog, lr: float) -> Evaluated:
        train_loss = float(self.loss_sum) / max(1, self.loss_count)
        self.loss_sum.zero_()
        self.loss_count = 0
        examples = self.plan.val_examples
        record: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "train_loss": train_loss, "lr": lr}
        if examples:
            train = self.config.train
            batch_size = max(train.batch_size, 64)
            classes = self.catalog.classes
            report: Report = score(self.judged, self.plan.reader, examples, classes, self.compute, batch_size)
            if not isfinite(report.loss):
                self._diverged(report.loss, lr)
            record |= {"val_accuracy": report.accuracy, "val_top5": report.top5, "val_loss": report.loss}
            if report.mean_average_precision is not None:
                record["val_mAP"] = report.mean_average_precision
        better = True  # without a validation split the latest model is the best known
        if examples:
            value = record.get("val_mAP", record["val_accuracy"])
            self.top = max(self.top, value)
            better = within_one_error(value, self.top, len(examples))
        if better:
            self.best = record
            self._save_model(record)
        # The time stays out of the model file: the same seed gives the same bytes.
        metrics.write({**record, "elapsed_s": round(self.elapsed, 3), "best": better})
        accuracy, loss = record.get("val_accuracy", float("nan")), record.get("val_loss", float("nan"))
        return Evaluated(self.step, self.epoch, train_loss, accuracy, loss, better, self.elapsed)

    def _save_model(self, metrics: Mapping[str, Any]) -> None:
        # The model travels; where the data lay does not.
        config = self.config.model_copy(
            update={"data": self.config.data.model_copy(update={"path": None, "split": None})}
        )
        info = ModelInfo(config, self.catalog.classes, self.step, metrics, self.catalog.fingerprint)
        save_model(self.plan.output / MODEL_FILE, self.judged.state_dict(), info)
        if self.plan.latest:
            with suppress(ResourceError):  # a convenience; the current folder may well be read-only
                mark_latest(self.plan.output)

    def _save(self) -> Saved:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.catalog.classes),
            "fingerprint": self.catalog.fingerprint,
            "step": self.step,
            "total_steps": self.total_steps,
            "elapsed_s": self.elapsed,
            "best": self.best,
            "top": self.top,
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "scaler": self.scaler.state_dict(),
        }
        return Saved(save_state(self.plan.output, tensors, state), self.step)

    def _restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        try:
            self.model.load_state_dict(part("model."))
            if self.average is not None:
                self.average.load_state_dict(part("average."))
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in part("optimizer.").items():
                index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict(
                {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
            )
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.best, self.top = int(state["step"]), dict(state["best"]), float(state["top"])
            self.loss_sum += float(state["loss_sum"])
            self.loss_count = int(state["loss_count"])
            self.elapsed_before = float(state["elapsed_s"])
            if self.config.train.max_time_s:
                self.total_steps = int(state["total_steps"])
            elif self.total_steps != state["total_steps"]:
                self.plan.notes.append(
                    f"the plan changed from {state['total_steps']} to {counted(self.total_steps, 'step')}: "
                    "the learning rate follows the new one"
                )
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise IntegrityError(f"{show_path(self.plan.output)}: the training state does not fit: {reason}") from error


def within_one_error(value: float, top: float, count: int) -> bool:
    """Return whether a validation score is within one standard error of the highest so far, on `count` examples.

    The latest such model counts as the best: on 30 examples a lead of one or two says nothing, and an early model that
    was lucky would win over one that has learned on at a falling rate (Breiman's one-standard-error rule).
    """
    return value >= top - sqrt(max(0.0, top * (1 - top)) / count)


def class_weights(counts: Sequence[int], power: float) -> Tensor:
    """Return loss weights (classes,): inverse frequency to a power, with mean 1 over the examples."""
    frequency = torch.tensor(counts, dtype=torch.float64).clamp_min(1)
    weights = frequency.pow(-power)
    return (weights * frequency.sum() / (weights * frequency).sum()).float()
