"""One training loop for any model on data of this package: the same batches, optimiser and schedule at equal compute.

Compute is seconds of the process's own CPU time (of a GPU: of the clock), so that a busy machine changes no result, or
a number of steps. `benchmarks/rivals.py` and `benchmarks/claims.py` compare by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from perceiver_cli.data.loader import Batch, Reader, ordered_tasks, training_tasks
from perceiver_cli.errors import UsageError
from perceiver_cli.inference.evaluation import choose_split
from perceiver_cli.inference.statistics import share_interval
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.preprocess.spec import InputSpec
from perceiver_cli.training.mixing import mixed
from perceiver_cli.training.optimizer import Average, make_optimizer
from perceiver_cli.training.plan import Plan

Make = Callable[[Mapping[str, Layout], int], nn.Module]  # (layouts, classes) -> model of segments
EVALUATION_BATCH = 64
ENDLESS = 1 << 40


@dataclass(frozen=True)
class Contender:
    """A model by name, with the changes to the inputs that it reads: {"image": {"patch": (1, 1)}}."""

    name: str
    make: Make
    inputs: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Budget:
    """The compute of one training: seconds or, if they are None, steps."""

    seconds: float | None
    steps: int = ENDLESS

    @classmethod
    def of(cls, seconds: float | None, steps: int | None) -> Budget:
        """Return the budget of `--seconds` or `--steps`. Raises UsageError unless one of them is given."""
        if (seconds is None) == (steps is None):
            raise UsageError("expected one of --seconds and --steps")
        return cls(seconds) if steps is None else cls(None, steps)


def perceiver(plan: Plan, seed: int, **changes: Any) -> Make:
    """Return the maker of the plan's Perceiver, with changes of its `[model]`."""
    config = plan.config.model.model_copy(update=changes)
    return lambda layouts, classes: Perceiver(config, layouts, classes, seed)


def specs_of(plan: Plan, contender: Contender) -> dict[str, InputSpec]:
    """Return the plan's inputs with the contender's changes."""
    return {n: spec.model_copy(update=dict(contender.inputs.get(n, {}))) for n, spec in plan.config.inputs.items()}


def learn(plan: Plan, contender: Contender, budget: Budget, seed: int, split: str) -> dict[str, Any]:
    """Return what a contender reaches on a split of the plan's data after training with a budget.

    Raises UsageError if there is no such split.

    Keys: name, seed, parameters, steps, epochs, seconds, accuracy, low and high (95 %), loss, train_accuracy.
    """
    _, examples = choose_split(plan.catalog, split)
    torch.manual_seed(seed)
    reader = Reader(specs_of(plan, contender), plan.config.data.limits, plan.catalog.bad)
    classes = len(plan.catalog.classes)
    model = contender.make(reader.layouts, classes).to(plan.compute.device)
    steps, seconds = fit(model, reader, plan, budget, seed)
    right, count, loss = scored(model, reader, plan, examples)
    seen = list(plan.train_examples)[:: max(1, len(plan.train_examples) // 1000)]
    train_right, train_count, _ = scored(model, reader, plan, seen)
    low, high = share_interval(right, count)
    return {
        "name": contender.name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps, "epochs": steps * plan.config.train.batch_size / len(plan.train_examples), "seconds": seconds,
        "accuracy": right / count, "low": low, "high": high, "loss": loss,
        "train_accuracy": train_right / train_count, "num_examples": count,
    }  # fmt: skip


def fit(model: nn.Module, reader: Reader, plan: Plan, budget: Budget, seed: int) -> tuple[int, float]:
    """Train a model in place, then give it its averaged weights; return steps and seconds."""
    train = plan.config.train
    optimizer, average = make_optimizer(model, train), Average(model, train.ema_decay) if train.ema_decay else None
    tasks = training_tasks(plan.train_examples, train.batch_size, seed, 0, ENDLESS)
    start = clock(plan)
    model.train()
    for steps, batch in enumerate(reader.batches(tasks)):
        spent = clock(plan) - start
        done = steps / budget.steps if budget.seconds is None else spent / budget.seconds
        if done >= 1:
            return _finished(model, average, steps, spent)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * min(1.0, (done + 1e-3) / 0.05) * 0.5 * (1 + cos(pi * done))
        segments, targets = mixed(batch, train, [seed, steps])
        with plan.compute.autocast():
            logits = model(_moved(segments, plan)).float()
        each = (
            share * F.cross_entropy(logits, labels.to(logits.device), label_smoothing=train.label_smoothing)
            for labels, share in targets
        )
        torch.stack(list(each)).sum().backward()  # type: ignore[no-untyped-call]
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
    raise AssertionError("tasks have no end")


def _finished(model: nn.Module, average: Average | None, steps: int, seconds: float) -> tuple[int, float]:
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return steps, seconds


@torch.no_grad()
def scored(model: nn.Module, reader: Reader, plan: Plan, examples: Sequence[Any]) -> tuple[int, int, float]:
    """Return right answers, examples and mean loss."""
    model.eval()
    right, count, loss = 0, 0, 0.0
    for batch in _batches(reader, examples):
        logits = model(_moved(batch.segments, plan)).float().cpu()
        right += int((logits.argmax(dim=1) == batch.labels).sum())
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        count += len(batch.labels)
    return right, count, loss / count


def _batches(reader: Reader, examples: Sequence[Any]) -> Iterator[Batch]:
    reader.asked_views = 1
    return (batch for batch in reader.batches(ordered_tasks(examples, EVALUATION_BATCH)) if batch.examples)


def _moved(segments: Mapping[str, Segment], plan: Plan) -> dict[str, Segment]:
    return {name: segment.to(plan.compute.device) for name, segment in segments.items()}


def clock(plan: Plan) -> float:
    """Return seconds of this process's CPU time, or of the clock with a GPU."""
    return time.process_time() if plan.compute.device.type == "cpu" else time.perf_counter()


def rows(
    each: Callable[[int], Iterable[tuple[Plan, Contender]]], budget: Budget, seeds: int, split: str
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender and seed, then the means. each: the contenders of a seed, with their plans."""
    done = []
    for seed in range(seeds):
        for plan, contender in each(seed):
            done.append(learn(with_seed(plan, seed), contender, budget, seed, split))
            yield done[-1]
    yield from ({**line, "seed": "mean"} for line in summed_up(done)) if seeds > 1 else ()


def with_seed(plan: Plan, seed: int) -> Plan:
    """Return the plan with another seed of weights, order and augmentation."""
    train = plan.config.train.model_copy(update={"seed": seed})
    return replace(plan, config=plan.config.model_copy(update={"train": train}))


def summed_up(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each name: means over the seeds, and the standard deviation of the accuracy."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        means = {
            key: sum(row[key] for row in own) / len(own)
            for key in ("accuracy", "low", "high", "loss", "train_accuracy", "steps", "epochs", "seconds")
        }
        spread = (sum((row["accuracy"] - means["accuracy"]) ** 2 for row in own) / max(1, len(own) - 1)) ** 0.5
        lines.append({"name": name, "seeds": len(own), "parameters": own[0]["parameters"], **means, "sd": spread})
    return lines
