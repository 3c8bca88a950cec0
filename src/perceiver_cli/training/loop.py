"""The training loop, a generator of events: read, step, average, evaluate, save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.config import DataConfig
from perceiver_cli.data.loader import Batch, Task, training_tasks
from perceiver_cli.errors import DataError, DivergedError, IntegrityError, ResourceError, counted
from perceiver_cli.files import show_path, write_text
from perceiver_cli.inference.evaluation import calibrated, report_of
from perceiver_cli.inference.labelled import LabelledLogits, label_logits
from perceiver_cli.model.checkpoint import Calibration, ModelInfo, not_finite, save_model
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver, compile_latents
from perceiver_cli.model.slices import share_encoding, slice_logits, slices_of
from perceiver_cli.run_folder import (
    ANSWERS_FILE,
    MANIFEST,
    MODEL_FILE,
    STATE_FOLDER,
    append_log,
    cut_log,
    mark_latest,
    score_of,
)
from perceiver_cli.training.events import Evaluated, Event, Finished, Note, Saved, StepDone
from perceiver_cli.training.mixing import mixed
from perceiver_cli.training.optimizer import Average, learning_rate, make_optimizer
from perceiver_cli.training.plan import Plan
from perceiver_cli.training.state import TrainingState, save_state, transfer_weights
from perceiver_cli.training.sums import BatchStatistics, Node, TreeSum, flat_total, tree_total
from perceiver_cli.training.timing import Progress, Timing, steps_after_resume

MIX_STREAM = 1  # separates the random numbers of mixing from those of order and augmentation
CUDA_CHECK_EVERY = 16  # steps between reads of the loss, each of which waits for the GPU
CALIBRATED_EXAMPLES = 20  # validation examples that are enough to fit a temperature, one number
MAX_LABEL_WEIGHT = 100.0  # of a rare label, so that one example in a thousand does not outweigh the rest
FEW_STEPS = 500  # with fewer, the smallest sets still gain from more
ENDLESS = 1 << 40  # batches


class Decision(NamedTuple):
    """What comes after a step, the same in all processes."""

    total_steps: int
    over: bool
    evaluate: bool
    save: bool
    stopped: bool


class StepFacts(NamedTuple):
    """The loss of each batch of a step, and how many batches had a readable file."""

    losses: Tensor
    read: int


class Run:
    """Model, optimiser and position of a run in progress. looked_at: files decoded before the first step."""

    def __init__(self, plan: Plan, looked_at: int = 0) -> None:
        self.plan, self.looked_at = plan, looked_at
        self.config, self.compute, self.catalog = plan.config, plan.compute, plan.catalog
        train = self.config.train
        model = Perceiver(self.config.model, plan.reader.layouts, len(self.catalog.classes), train.seed)
        if plan.request.init_from is not None:
            plan.notes.append(transfer_weights(model, self.catalog.classes, plan.request.init_from))
        if train.freeze == "trunk":
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        model.recompute = train.recompute
        if train.compile:
            compile_latents(model, self.compute)
        self.model = model.to(self.compute.device).train()
        self.ranks, self.team = plan.request.ranks.in_teams(train.split_inputs)
        if self.team.size > 1:
            share_encoding(self.model, self.team)
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.statistics = BatchStatistics(self.model)
        self.average = Average(self.model, train.ema_decay) if train.ema_decay else None
        self.optimizer = make_optimizer(self.model, train)
        self.scaler = torch.amp.GradScaler(self.compute.device.type, enabled=self.compute.precision == "fp16")
        self.class_weights: Tensor | None = None
        if power := self.config.data.class_weight_power:
            counts = list(self.catalog.counts("train").values())
            several = len(plan.train_examples) if self.config.multi_label else None
            self.class_weights = class_weights(counts, power, several).to(self.compute.device)
        self.step = 0
        self.lr = train.lr  # of the last step
        self.learned = plan.saved is not None  # from at least one example
        self.total_steps = plan.planned_steps
        self.elapsed_before = 0.0
        self.best: dict[str, Any] = {}
        self.records: tuple[dict[str, Any], ...] = ()  # of the last evaluation, one for each validation example
        self.top = 0.0  # the highest validation score so far
        self.stale = 0  # evaluations since
        self.loss_sum = torch.zeros((), device=self.compute.device)  # since the last evaluation
        self.loss_count = 0
        if plan.saved is not None:
            self._restore(plan.saved)

    @property
    def elapsed(self) -> float:
        """Seconds of training, including those before a resume."""
        return self.elapsed_before + time.monotonic() - self.plan.request.started_at

    @property
    def progress(self) -> Progress:
        """The current step, planned steps and elapsed seconds."""
        return Progress(self.step, self.total_steps, self.elapsed)

    @property
    def out_of_patience(self) -> bool:
        """Whether too many evaluations in a row had no higher score than an earlier one."""
        patience = self.config.train.patience
        return patience is not None and self.stale >= patience

    @property
    def epoch(self) -> float:
        """Epochs trained so far, as a fraction."""
        return self.step * self.plan.examples_per_step / len(self.plan.train_examples)

    def tasks(self, batches: int) -> Iterator[Task]:
        """Return the reading tasks of this process's share of the next `batches` batches."""
        train = self.config.train
        start = self.step * train.accumulate
        examples, own = self.plan.train_examples, self.ranks.share(train.accumulate)
        stop = start + batches
        return training_tasks(examples, train.batch_size, train.seed, start, stop, train.accumulate, own)

    def events(self, stopping: Callable[[], bool]) -> Iterator[Event]:
        """Yield the events of the loop; end after the current step once `stopping` returns True."""
        plan, train = self.plan, self.config.train
        timing = Timing(train, plan.steps_per_epoch, len(plan.val_examples), self.progress)
        workers = self.compute.default_workers if self.config.data.workers is None else self.config.data.workers
        count = ENDLESS if train.max_time_s else (self.total_steps - self.step) * train.accumulate
        on_cuda = self.compute.device.type == "cuda"
        batches = plan.reader.batches(self.tasks(count), workers, pin=on_cuda)
        self.ranks.from_first(lambda: cut_log(plan.output, self.step))
        check_every = CUDA_CHECK_EVERY if on_cuda else 1
        read_s, read_step = time.perf_counter(), self.step  # time and step of the last read of the loss
        evaluated_at = self.step
        saved_at = self.step if plan.saved is not None else None
        now = self._decide(timing, stopping, self.progress)
        while not (now.over or now.stopped or self.out_of_patience or (self.ranks.size == 1 and stopping())):
            self.lr = learning_rate(train, self.step, self.total_steps, plan.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            loss = self.update(batches)
            self.step += 1
            self.total_steps = timing.stepped(self.progress)
            now = self._decide(timing, stopping, self.progress)
            self.total_steps = now.total_steps
            if timing.planned_first(self.step):
                yield Note(self._length_note())
            if self.step % check_every == 0 or now.over:
                step_loss = float(loss)
                self._check_loss(step_loss)
                now_s = time.perf_counter()
                rate = (self.step - read_step) * plan.examples_per_step / max(1e-9, now_s - read_s)
                read_s, read_step = now_s, self.step
                yield StepDone(self.step, self.total_steps, self.epoch, step_loss, self.lr, rate, self.elapsed)
            if now.evaluate or (self.learned and now.save):
                self._check_loss(float(self.loss_sum))
                if now.evaluate:
                    evaluated = self._evaluate()
                    evaluated_at = self.step
                    timing.evaluated(self.elapsed)
                    yield evaluated
                    if evaluated.best:
                        yield Saved(plan.output / MODEL_FILE, self.step)
                yield self._save()
                saved_at = self.step
                read_s, read_step = time.perf_counter(), self.step
                now = self._decide(timing, stopping, self.progress)
        stopped = now.stopped or (self.ranks.size == 1 and stopping())
        if self.out_of_patience:
            found = f"no validation score above {self.top:.4f} in {counted(self.stale, 'evaluation')}"
            yield Note(f"{found}: the run ends at step {self.step:,} (train.patience)")
        if evaluated_at != self.step and not stopped:
            yield self._evaluate()
            saved_at = None
        if saved_at != self.step:
            yield self._save()
        # A run that stops before its first evaluation has no model file yet.
        self.ranks.from_first(lambda: None if (plan.output / MODEL_FILE).exists() else self._save_model({}))
        yield Finished(plan.output / MODEL_FILE, self.step, stopped, dict(self.best), self.elapsed)

    def _length_note(self) -> str:
        """Return a line about the steps and epochs that fit in the time, with a hint if they are few."""
        epochs = self.total_steps * self.plan.examples_per_step / len(self.plan.train_examples)
        line = f"about {counted(self.total_steps, 'step')}, {epochs:.3g} epochs, fit in the time"
        if self.total_steps < FEW_STEPS:
            return f"{line}, too few to learn much; a longer --max-time, or a smaller --batch-size or model, gives more"
        return line

    def _decide(self, timing: Timing, stopping: Callable[[], bool], at: Progress) -> Decision:
        """Return what comes next by the clock of the first process; all stop if one is asked to."""
        mine = (at.total_steps, timing.over(at), timing.evaluation_due(at), timing.save_due(at))
        total, over, evaluate, save, stops = self.ranks.totals([*(n * self.ranks.first for n in mine), stopping()])
        return Decision(int(total), bool(over), bool(evaluate), bool(save), bool(stops))

    def update(self, batches: Iterator[Batch]) -> Tensor:
        """Do one optimiser step; return its mean loss, on the device."""
        train = self.config.train
        facts = self._gradients(batches)
        loss = torch.zeros((), device=self.compute.device)
        for each in facts.losses:  # in their order, at any number of processes
            loss = loss + each
        self.scaler.unscale_(self.optimizer)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        if facts.read:  # a batch without a readable file has no loss
            self.learned = True
            self.loss_sum += loss if facts.read == train.accumulate else loss * (train.accumulate / facts.read)
            self.loss_count += 1
        return loss

    def _gradients(self, batches: Iterator[Batch]) -> StepFacts:
        """Set the gradients of a step, from the batches of all processes; return the facts of these."""
        count, ranks = self.config.train.accumulate, self.ranks
        facts = torch.zeros(count, 2 + self.statistics.size, device=self.compute.device)
        tree = TreeSum() if self.config.train.exact_sum and (count > 1 or ranks.size > 1) else None
        bad: dict[str, str] = {}
        used = [False] * len(self.learning)  # whether a parameter has a gradient
        read = 0
        self.statistics.begin()
        for micro in ranks.share(count):
            batch = next(batches)
            bad |= {example.id: error for _, example, error in batch.bad if example.id not in self.plan.reader.bad}
            loss = self.backward(batch, count, micro) if batch.examples else None
            if loss is not None and ranks.leads():
                read += 1
                facts[micro, 0], facts[micro, 1] = 1, loss
                facts[micro, 2:] = self.statistics.of_batch()
            used = [before or p.grad is not None for before, p in zip(used, self.learning, strict=True)]
            if not ranks.leads():
                self._taken()
            elif tree is not None:
                tree.add(Node(0, micro, self._taken()))
        read, num_bad, *users = map(int, ranks.totals([read, len(bad), *used]))
        self._note_bad(bad, new=num_bad > 0)
        flat_total([facts], ranks)  # exact: only one process has a number for each place
        if tree is not None or ranks.size > 1:
            if tree is not None:
                gradients = tree_total(tree, self.learning, count, ranks)
            else:
                flat_total(gradients := self._taken(), ranks)
            for parameter, gradient, there in zip(self.learning, gradients, users, strict=True):
                parameter.grad = gradient if there else None
        self.statistics.replay(facts[:, 2:], facts[:, 0])
        return StepFacts(facts[:, 1], read)

    def _taken(self) -> list[Tensor]:
        """Return the gradients of the parameters that learn, zeros where there is none; clear them."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.learning]
        for parameter in self.learning:
            parameter.grad = None
        return gradients

    def backward(self, batch: Batch, accumulate: int, micro: int = 0) -> Tensor:
        """Add the gradients of one batch, the `micro`-th of its step; return its loss divided by `accumulate`."""
        device, train = self.compute.device, self.config.train
        segments, targets = mixed(batch, train, [train.seed, self.step, micro, MIX_STREAM])
        with self.compute.autocast():
            logits = self._logits(segments)
        loss = torch.zeros((), device=device)
        for labels, share in targets:
            loss = loss + share * self._loss(logits, labels.to(device, non_blocking=True))
        loss = loss / accumulate
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _logits(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return the logits of a batch; a process of a team computes those of its slice of the inputs."""
        device = self.compute.device
        if self.team.size == 1:
            return self.model({name: segment.to(device) for name, segment in segments.items()})  # type: ignore[no-any-return]
        parts, sides = slices_of(segments, self.team)
        return slice_logits(self.model, {name: part.to(device) for name, part in parts.items()}, sides, self.team)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return softmax cross-entropy, or sigmoid cross-entropy if examples have several labels (paper 4.2)."""
        smoothing = self.config.train.label_smoothing
        if self.config.multi_label:
            # A sum over classes, so that the gradient does not shrink with their number.
            smoothed = labels * (1 - smoothing) + smoothing / 2
            loss = F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=self.class_weights, reduction="sum")
            return loss / len(labels)
        return F.cross_entropy(logits, labels, self.class_weights, label_smoothing=smoothing)

    def _note_bad(self, bad: Mapping[str, str], *, new: bool) -> None:
        """Record the unreadable files that a process met in a step, by id; raise DataError if there are too many.

        new: whether any process met one.
        """
        plan, reader = self.plan, self.plan.reader
        for found in self.ranks.exchange(bad) if new else ():
            reader.bad.update(found)
        seen = min((self.step + 1) * plan.examples_per_step, len(plan.train_examples))
        if new or self.looked_at < seen == len(plan.train_examples):
            self.looked_at = max(self.looked_at, seen)
            plan.check_bad(reader.bad, self.looked_at)

    def _check_loss(self, loss: float) -> None:
        """Raise DivergedError if a loss is not finite."""
        if not isfinite(loss):
            raise self._diverged(f"loss {loss}")

    def _check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise DivergedError if a tensor is not finite, DataError if nothing was learned: neither is ever saved."""
        if not self.learned:
            raise DataError("none of the files read in training can be used", *list(self.plan.reader.bad.values())[:1])
        if broken := not_finite(tensors):
            raise self._diverged(f"{counted(len(broken), 'tensor')} not finite, such as {broken[0]},")

    def _diverged(self, found: str) -> DivergedError:
        """Return the error of a run whose numbers are not finite; it names the saved state."""
        folder = self.plan.output / STATE_FOLDER
        kept = f"the saved state is kept in {show_path(folder)}" if (folder / MANIFEST).exists() else "nothing is saved"
        return DivergedError(
            f"training diverged: {found} at step {self.step}, learning rate {self.lr:.3g}",
            f"{kept}; try a lower --lr, train.warmup or train.clip_norm",
        )

    @property
    def judged(self) -> Perceiver:
        """The model that is evaluated and saved: the average of the weights if the run keeps one."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, Perceiver)
        return model

    def _evaluate(self) -> Evaluated:
        """Score the validation split, log the scores and save a best model; return the event."""
        train_loss = float(self.loss_sum) / max(1, self.loss_count)
        self.loss_sum.zero_()
        self.loss_count = 0
        record: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "train_loss": train_loss, "lr": self.lr}
        better = True  # without a validation split the latest model counts as the best
        if examples := self.plan.val_examples:
            least = 64 if self.team.size == 1 else 1  # inputs in slices are too large for more than a step has
            batch_size = max(self.config.train.batch_size, least)
            scored = label_logits(self.judged, self.plan.reader, examples, self.compute, batch_size, ranks=self.ranks)
            record |= self.ranks.from_first(lambda: self._scores(scored))
            self._check_loss(record["val_loss"])
            value = score_of(record) or 0.0
            self.stale = 0 if value > self.top else self.stale + 1
            self.top = max(self.top, value)
            better = within_one_error(value, self.top, len(examples))
        if better:
            self.best = record
        # Only the log holds the time, so that the same seed gives the same model file.
        log = {**record, "elapsed_s": round(self.elapsed, 3), "best": better}
        self.ranks.from_first(lambda: self._write_evaluation(log))
        accuracy, loss = record.get("val_accuracy", float("nan")), record.get("val_loss", float("nan"))
        return Evaluated(self.step, self.epoch, train_loss, accuracy, loss, better, self.elapsed, score_of(record))

    def _scores(self, scored: LabelledLogits | None) -> dict[str, float]:
        """Return the validation scores of a record."""
        assert scored is not None, "the first process has the answers of all"
        report = report_of(self.judged, scored, self.catalog.classes)
        scores = {"val_accuracy": report.accuracy, "val_top5": report.top5, "val_loss": report.loss}
        self.records = report.records
        if len(scored.examples) >= CALIBRATED_EXAMPLES and report.ece is not None:
            temperature, ece = calibrated(scored)
            scores |= {"val_ece": ece, "val_ece_uncalibrated": report.ece, "temperature": temperature}
        several = report.mean_average_precision
        return scores if several is None else {**scores, "val_mAP": several}

    def _write_evaluation(self, log: Mapping[str, Any]) -> None:
        """Write a line of the log and, of the best model so far, its answers to the validation split and the model."""
        if log["best"]:
            if self.records:
                lines = (json.dumps(record) + "\n" for record in self.records)
                write_text(self.plan.output / ANSWERS_FILE, "".join(lines))
            self._save_model(self.best)
        append_log(self.plan.output, log)

    def _save_model(self, metrics: Mapping[str, Any]) -> None:
        """Write the model file without paths of data and options of this machine, because it may be shared."""
        weights = self.judged.state_dict()
        self._check_tensors(weights)
        fixed = {"path": None, "root": None, "split": None, "workers": None, "cache_bytes": DataConfig().cache_bytes}
        data = self.config.data.model_copy(update=fixed)
        config = self.config.model_copy(update={"data": data})
        calibration = Calibration(metrics["temperature"]) if "temperature" in metrics else None
        info = ModelInfo(config, self.catalog.classes, self.step, metrics, self.catalog.fingerprint, calibration)
        save_model(self.plan.output / MODEL_FILE, weights, info)
        if self.plan.request.latest:
            with suppress(ResourceError):  # runs/latest is a convenience, and the current folder may be read-only
                mark_latest(self.plan.output)

    def _save(self) -> Saved:
        """Save the state to resume from; return the event."""
        return Saved(Path(self.ranks.from_first(self._save_state)), self.step)

    def _save_state(self) -> str:
        """Save the state to resume from; return its file."""
        modules = {"model": self.model} | ({} if self.average is None else {"average": self.average})
        tensors = {f"{kind}.{name}": t for kind, module in modules.items() for name, t in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        self._check_loss(float(self.loss_sum))
        self._check_tensors(tensors)
        state = {
            "config": self.config.to_dict(),
            "classes": list(self.catalog.classes),
            "fingerprint": self.catalog.fingerprint,
            "step": self.step,
            "total_steps": self.total_steps,
            "elapsed_s": self.elapsed,
            "best": self.best,
            "top": self.top,
            "stale": self.stale,
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "scaler": self.scaler.state_dict(),
        }
        return os.fspath(save_state(self.plan.output, tensors, state))

    def _restore(self, saved: TrainingState) -> None:
        """Load weights, optimiser and step of a saved run; raise IntegrityError if they do not fit."""
        fields = saved.fields
        try:
            self.model.load_state_dict(_below("model.", saved.tensors))
            if self.average is not None:
                self.average.load_state_dict(_below("average.", saved.tensors))
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _below("optimizer.", saved.tensors).items():
                index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            if fields["scaler"]:
                self.scaler.load_state_dict(fields["scaler"])
            self.step, self.best, self.top = int(fields["step"]), dict(fields["best"]), float(fields["top"])
            self.stale = int(fields.get("stale", 0))  # states of version 0.1.0 have none
            self.loss_sum += float(fields["loss_sum"])
            self.loss_count = int(fields["loss_count"])
            self.elapsed_before = float(fields["elapsed_s"])
            planned = int(fields["total_steps"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise IntegrityError(f"{show_path(self.plan.output)}: the training state does not fit: {reason}") from error
        if limit := self.config.train.max_time_s:
            before = fields["config"]["train"].get("max_time_s")
            self.total_steps = steps_after_resume(Progress(self.step, planned, self.elapsed_before), limit, before)
        elif self.total_steps != planned:
            change = f"the plan changed from {planned} to {counted(self.total_steps, 'step')}"
            self.plan.notes.append(f"{change}: the learning rate follows the new plan")
        if self.step >= self.total_steps:
            self.plan.notes.append(f"this run ended at step {self.step:,}: --steps or --max-time above its own go on")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def within_one_error(value: float, top: float, count: int) -> bool:
    """Return whether a validation score is within one standard error of the highest so far, on `count` examples.

    The latest such model counts as the best (Breiman's one-standard-error rule): on few examples a lead of one or two
    is chance, and a lucky early model would win over one that has trained longer.
    """
    return value >= top - sqrt(max(0.0, top * (1 - top)) / count)


def class_weights(counts: Sequence[int], power: float, several: int | None = None) -> Tensor:
    """Return loss weights (classes,): inverse frequency to a power, with mean 1 over the examples.

    several: number of examples, if they have several labels. Then a label's weight where it is present is the ratio of
    examples without it to examples with it, to the power, at most MAX_LABEL_WEIGHT.
    """
    frequency = torch.tensor(counts, dtype=torch.float64).clamp_min(1)
    if several is not None:
        return ((several - frequency) / frequency).clamp_min(0).pow(power).clamp(max=MAX_LABEL_WEIGHT).float()
    weights = frequency.pow(-power)
    return (weights * frequency.sum() / (weights * frequency).sum()).float()
