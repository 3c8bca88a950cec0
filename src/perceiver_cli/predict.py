"""From a model file and files (or bytes) to predictions, in order, a batch at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver_cli.catalog import Example
from perceiver_cli.checkpoint import find_model, load_model
from perceiver_cli.config import Limits
from perceiver_cli.data import Batch, Reader, Task, ordered_tasks
from perceiver_cli.device import Compute, choose
from perceiver_cli.model import Perceiver
from perceiver_cli.preprocess.base import Source

Input = str | os.PathLike[str] | bytes | Source


@dataclass(frozen=True)
class Prediction:
    """The answer to one input: class probabilities in the order of `classes`, or an error.

    With several labels an example the probabilities are independent of each other, and do not sum to 1.
    """

    path: str
    classes: tuple[str, ...]
    probs: tuple[float, ...] = ()
    error: str | None = None

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k most probable classes with their probabilities, best first; ties keep the class order."""
        order = sorted(range(len(self.probs)), key=lambda i: (-self.probs[i], i))[:k]
        return [(self.classes[i], self.probs[i]) for i in order]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top(1)[0][0]

    @property
    def prob(self) -> float:
        """The probability of the most probable class."""
        return max(self.probs)

    def to_dict(self, top_k: int = 5, *, all_probs: bool = False) -> dict[str, Any]:
        """Return the JSON line of this prediction."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        line: dict[str, Any] = {"path": self.path, "label": self.label, "prob": self.prob}
        line["top"] = [{"label": label, "prob": prob} for label, prob in self.top(top_k)]
        if all_probs:
            line["probs"] = dict(zip(self.classes, self.probs, strict=True))
        return line


class Predictor:
    """A trained model, ready to answer.

    Args:
        model: a run folder or a model file; None looks at $PERCEIVER_MODEL, then runs/latest.
        device, precision: as on the command line; "auto" uses a GPU where there is one.
        limits: what one input may cost; None takes the model's.

    Raises:
        UsageError: no model there. IntegrityError: a damaged one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        limits: Limits | None = None,
    ) -> None:
        self.path: Path = find_model(None if model is None else os.fspath(model))
        self.compute = choose(device, precision)
        loaded, self.info = load_model(self.path)
        self.model = loaded.to(self.compute.device)
        self.reader = Reader(self.info.config.inputs, limits or self.info.config.data.limits)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.info.classes

    @property
    def modality(self) -> str:
        """The names of what the model reads, e.g. "image"."""
        return "+".join(spec.modality for spec in self.info.config.inputs.values())

    def predict(self, inputs: Input | Iterable[Input], batch_size: int = 32, workers: int = 0) -> Iterator[Prediction]:
        """Yield one prediction per input (a path or bytes), in order; a bad one gives a prediction with `error` set."""
        if isinstance(inputs, str | bytes | os.PathLike | Source):
            inputs = [inputs]
        (name,) = self.info.config.inputs  # one modality; several come with their own way of naming parts
        examples = (Example(source.name, {name: source}) for source in map(_source, inputs))
        for batch, logits in run(self.model, self.reader, ordered_tasks(examples, batch_size), self.compute, workers):
            errors = {position: (example, error) for position, example, error in batch.bad}
            probabilities = logits.sigmoid() if self.info.config.multi_label else logits.softmax(dim=-1)
            rows = iter(zip(batch.examples, probabilities.tolist(), strict=True))
            for position in range(len(batch.examples) + len(batch.bad)):
                if position in errors:
                    example, error = errors[position]
                    yield Prediction(example.id, self.classes, error=error)
                else:
                    example, probs = next(rows)
                    yield Prediction(example.id, self.classes, tuple(probs))


def run(
    model: Perceiver, reader: Reader, tasks: Iterable[Task], compute: Compute, workers: int = 0
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its logits (B, classes), float64 on the CPU; B is 0 where every input was bad."""
    pin = compute.device.type == "cuda"
    for batch in reader.batches(tasks, workers, pin=pin):
        if not batch.examples:
            yield batch, torch.empty(0, model.head.out_features, dtype=torch.float64)
            continue
        segments = {name: segment.to(compute.device) for name, segment in batch.segments.items()}
        with torch.inference_mode(), compute.autocast():
            logits = model(segments)
        yield batch, logits.cpu().double()


def _source(given: Input) -> Source:
    if isinstance(given, Source):
        return given
    return Source("-", given) if isinstance(given, bytes) else Source(os.fspath(given))
