"""From a model file and files (or bytes) to predictions, in order, a batch at a time, whole or in windows of time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from math import inf, log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perceiver_cli.data.decoder import Row
from perceiver_cli.data.examples import Example
from perceiver_cli.data.inputs import Named, Pipe, examples_of
from perceiver_cli.data.loader import Batch, Reader, Task, collate, ordered_tasks
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.model.checkpoint import DEFAULT_THRESHOLD, Calibration, load_model
from perceiver_cli.model.cost import estimate
from perceiver_cli.model.device import Compute, choose
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.run_folder import find_model

FORWARD_BYTES = 256 << 20  # of activations on a CPU, where larger batches are no faster; on a GPU half of what is free
UNKNOWN = "unknown"  # what is answered where no class is probable enough
MOST_AT_ONCE = {"cpu": 32, "cuda": 256}  # answers come in batches: a reader of a pipe waits for one
NEVER = 1e-12  # least probability of a mean over windows, so that its logit is finite


@dataclass(frozen=True)
class Windows:
    """How inputs with a time axis are cut: windows of `window_s` seconds, one every `hop_s`.

    Each is answered like a file of that length. aggregate: the mean or the highest of each class's probabilities makes
    one prediction an input; "none": each window is a prediction.

    Raises:
        UsageError: a length that is not more than nothing.
    """

    window_s: float
    hop_s: float
    aggregate: Literal["mean", "max", "none"] = "mean"

    def __post_init__(self) -> None:
        if not (0 < self.window_s < inf and 0 < self.hop_s < inf):
            raise UsageError(f"windows of {self.window_s:g} s every {self.hop_s:g} s, expected more than 0 s of both")


@dataclass(frozen=True)
class Prediction:
    """The answer to one input, or to a window of it: class probabilities in the order of `classes`, or an error.

    With several labels an example the probabilities are independent of each other, and do not sum to 1; nor do the
    highest ones of several windows. used: of a model of several modalities, those that the input has. start_s, end_s:
    the window, where the answer is to one. thresholds: by class, with several labels an example; else empty. min_prob:
    below it a class is not given. embedding: (D,) float32, the mean latent, where it was asked for.
    """

    path: str
    classes: tuple[str, ...]
    probs: tuple[float, ...] = ()
    error: str | None = None
    used: tuple[str, ...] = ()
    start_s: float | None = None
    end_s: float | None = None
    thresholds: tuple[float, ...] = ()
    min_prob: float = 0.0
    embedding: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k most probable classes with their probabilities, best first; ties keep the class order."""
        order = sorted(range(len(self.probs)), key=lambda i: (-self.probs[i], i))[:k]
        return [(self.classes[i], self.probs[i]) for i in order]

    @property
    def label(self) -> str:
        """The most probable class; UNKNOWN where that is less probable than `min_prob`."""
        return self.top(1)[0][0] if self.prob >= self.min_prob else UNKNOWN

    @property
    def prob(self) -> float:
        """The probability of the most probable class."""
        return max(self.probs)

    @property
    def labels(self) -> tuple[str, ...]:
        """With several labels an example: the classes whose threshold is reached, and `min_prob`; may be none."""
        every = zip(self.classes, self.probs, self.thresholds, strict=True)
        return tuple(name for name, prob, least in every if prob >= max(least, self.min_prob))

    def to_dict(self, top_k: int = 5, *, all_probs: bool = False) -> dict[str, Any]:
        """Return the JSON line of this prediction."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        line: dict[str, Any] = {"path": self.path}
        if self.start_s is not None:
            line |= {"start_s": self.start_s, "end_s": self.end_s}
        line |= {"label": self.label, "prob": self.prob}
        if self.thresholds:
            line["labels"] = list(self.labels)
        line["top"] = [{"label": label, "prob": prob} for label, prob in self.top(top_k)]
        if all_probs:
            line["probs"] = dict(zip(self.classes, self.probs, strict=True))
        if self.used:
            line["used"] = list(self.used)
        return line


class Predictor:
    """A trained model, ready to answer.

    Args:
        model: a run folder or a model file; None looks at $PERCEIVER_MODEL, then runs/latest.
        device, precision: as on the command line; "auto" uses a GPU where there is one.
        limits: what one input may cost; None takes the model's.
        use: the modalities to answer from, of those that the model reads; None is all. The others are as if missing.

    Raises:
        UsageError: no model there, or a modality that it does not read. IntegrityError: a damaged one.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        limits: Limits | None = None,
        use: Iterable[str] | None = None,
    ) -> None:
        self.path: Path = find_model(None if model is None else os.fspath(model))
        self.compute = choose(device, precision)
        loaded, self.info = load_model(self.path)
        self.model = loaded.to(self.compute.device)
        config = self.info.config
        wanted = set(config.inputs if use is None else use)
        if not wanted or wanted - config.inputs.keys():
            asked, reads = ", ".join(sorted(wanted)), ", ".join(sorted(config.inputs))
            raise UsageError(f"cannot use {show_path(asked)}: {show_path(self.path)} reads {reads}")
        specs = {name: spec for name, spec in config.inputs.items() if name in wanted}
        several = len(self.classes) if config.multi_label else 0
        self.reader = Reader(specs, limits or config.data.limits, multi_label_classes=several)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.info.classes

    @property
    def calibration(self) -> Calibration:
        """The model's, or the one that changes nothing."""
        return self.info.calibration or Calibration()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads, sorted; it answers from those of its reader."""
        return tuple(sorted(self.info.config.inputs))

    @property
    def batch_that_fits(self) -> int:
        """How many inputs at once: as many as memory allows by the model's own cost, up to MOST_AT_ONCE."""
        layouts = Reader(self.info.config.inputs, self.reader.limits).layouts
        each = estimate(self.info.config.model, layouts, len(self.classes)).forward_bytes
        kind = self.compute.device.type
        budget = torch.cuda.mem_get_info(self.compute.device)[0] // 2 if kind == "cuda" else FORWARD_BYTES
        return max(1, min(MOST_AT_ONCE.get(kind, 32), budget // each))

    def predict(
        self,
        inputs: Named | Iterable[Named],
        batch_size: int | None = None,
        workers: int = 0,
        windows: Windows | None = None,
        *,
        min_prob: float = 0.0,
        embeddings: bool = False,
    ) -> Iterator[Prediction]:
        """Yield one prediction per input, in order; a bad one gives a prediction with `error` set.

        An input is a path or bytes, a mapping of these by modality, or a pipe. A folder stands for the files below it
        (those of one stem are one input of a model of several modalities), a manifest for its rows, a tar for its
        records, read one after another. With `windows` there may be several predictions an input, or one that sums
        them up; memory is bounded by a batch of windows, however long the input.
        `batch_size` is `batch_that_fits` unless given, of windows on a CPU 1, which is as fast. `workers` read whole
        inputs only. `min_prob`, `embeddings`: of each Prediction.

        Raises:
            DataError: a manifest that cannot be read, or records that were prepared otherwise.
            IntegrityError: records that are damaged or cut short, after those before are answered.
            UsageError: windows for a model without a time axis.
        """
        if isinstance(inputs, str | bytes | os.PathLike | Source | Mapping | Pipe | Example):
            inputs = [inputs]
        examples = (example for named in inputs for example in self.examples(named))
        if batch_size is None:
            one = windows is not None and self.compute.device.type == "cpu"
            batch_size = 1 if one else self.batch_that_fits
        asked = Prediction("", self.classes, thresholds=self._thresholds, min_prob=min_prob)
        if windows is not None:
            if not self.reader.timed:
                raise UsageError(f"windows are for audio and video, the model reads {', '.join(self.reader.specs)}")
            yield from self._in_windows(examples, windows, batch_size, asked, embeddings)
            return
        for batch, answers in run(self.model, self.reader, self._tasks(examples, batch_size), self.compute, workers):
            errors = {position: (example, error) for position, example, error in batch.bad}
            rows = iter(zip(batch.examples, batch.used, self._answers(answers, embeddings), strict=True))
            for position in range(len(batch.examples) + len(batch.bad)):
                if position in errors:
                    example, error = errors[position]
                    yield replace(asked, path=example.id, error=error)
                else:
                    example, used, answered = next(rows)
                    yield replace(asked, path=example.id, used=self._said(used), **answered)

    def _tasks(self, examples: Iterable[Example], batch_size: int) -> Iterator[Task]:
        return ordered_tasks(examples, max(1, batch_size // self.reader.num_views))

    def examples(self, named: Named) -> Iterator[Example]:
        """Yield the examples that an input stands for, as `predict` says."""
        return examples_of(named, self.info.config.inputs, self.reader.limits, self.reader.specs)

    def _said(self, used: tuple[str, ...]) -> tuple[str, ...]:
        """Return what a prediction says that it used: nothing where there is no choice."""
        return used if len(self.modalities) > 1 else ()

    @property
    def _thresholds(self) -> tuple[float, ...]:
        if not self.info.config.multi_label:
            return ()
        return self.calibration.thresholds or (DEFAULT_THRESHOLD,) * len(self.classes)

    def _answers(self, answers: Answers, embeddings: bool) -> Iterator[dict[str, Any]]:
        """Yield, by example, the fields of a Prediction that the model answers."""
        logits = answers.logits / self.calibration.temperature
        probabilities = logits.sigmoid() if self.info.config.multi_label else logits.softmax(dim=-1)
        for probs, embedding in zip(probabilities.tolist(), answers.embeddings.numpy(), strict=True):
            yield {"probs": tuple(probs)} | ({"embedding": embedding} if embeddings else {})

    # ------------------------------------------------------------ windows

    def _in_windows(
        self, examples: Iterable[Example], windows: Windows, batch_size: int, asked: Prediction, embeddings: bool
    ) -> Iterator[Prediction]:
        """Yield the predictions of examples that are cut into windows; `asked` holds what all of them share."""
        size = max(1, batch_size // self.reader.num_views)
        answered = self._answered(self._cut(examples, windows, asked), size, embeddings)
        for _, of_one in groupby(answered, key=lambda pair: pair[0]):
            predictions = (prediction for _, prediction in of_one)
            if windows.aggregate == "none":
                yield from predictions
            else:
                yield summed_up(predictions, windows.aggregate)

    def _cut(
        self, examples: Iterable[Example], windows: Windows, asked: Prediction
    ) -> Iterator[tuple[int, Prediction, list[Row]]]:
        """Yield the number of the example, a prediction still without its answer, and what the model is to see."""
        for number, example in enumerate(examples):
            try:
                for span, decoded in self.reader.windows(example, windows.window_s, windows.hop_s):
                    start_s, end_s = (None, None) if span is None else (round(span[0], 6), round(span[1], 6))
                    used = self._said(decoded.names)
                    one = replace(asked, path=example.id, used=used, start_s=start_s, end_s=end_s)
                    yield number, one, self.reader.views(decoded)
            except DataError as error:
                yield number, replace(asked, path=example.id, error=str(error)), []

    def _answered(
        self, asked: Iterator[tuple[int, Prediction, list[Row]]], batch_size: int, embeddings: bool
    ) -> Iterator[tuple[int, Prediction]]:
        while chunk := list(islice(asked, batch_size)):
            rows = [row for _, _, views in chunk for row in views]
            several = self.info.config.multi_label
            found = answer(self.model, collate(rows), self.reader.num_views, self.compute, several) if rows else None
            answers = iter(()) if found is None else self._answers(found, embeddings)
            for number, prediction, views in chunk:
                yield number, replace(prediction, **next(answers)) if views else prediction


def summed_up(predictions: Iterable[Prediction], aggregate: Literal["mean", "max"]) -> Prediction:
    """Return one prediction of those of an input's windows: the mean or the highest of each class's probabilities.

    Its embedding is the mean of theirs. If one of the windows could not be read, the input could not.
    """
    total, count = torch.zeros(0, dtype=torch.float64), 0
    embedding = None
    used: set[str] = set()
    last = None
    for last in predictions:
        if last.error is not None:
            return last
        probs = torch.tensor(last.probs, dtype=torch.float64)
        total = probs if count == 0 else total + probs if aggregate == "mean" else torch.maximum(total, probs)
        if last.embedding is not None:
            embedding = last.embedding if embedding is None else embedding + last.embedding
        count += 1
        used |= set(last.used)
    assert last is not None
    probs = total / count if aggregate == "mean" else total
    embedding = None if embedding is None else embedding / np.float32(count)
    whole: dict[str, Any] = {"start_s": None, "end_s": None, "embedding": embedding}
    return replace(last, probs=tuple(probs.tolist()), used=tuple(sorted(used)), **whole)


@dataclass(frozen=True)
class Answers:
    """What a model makes of a batch, on the CPU: logits (B, classes) float64, embeddings (B, D) float32."""

    logits: Tensor
    embeddings: Tensor


def run(
    model: Perceiver, reader: Reader, tasks: Iterable[Task], compute: Compute, workers: int = 0
) -> Iterator[tuple[Batch, Answers]]:
    """Yield each batch with its answers; B is 0 where every input was bad."""
    pin = compute.device.type == "cuda"
    for batch in reader.batches(tasks, workers, pin=pin):
        if batch.examples:
            yield batch, answer(model, batch.segments, batch.num_views, compute, reader.multi_label_classes > 0)
        else:
            classes, channels = model.head.weight.shape
            yield batch, Answers(torch.empty(0, classes, dtype=torch.float64), torch.empty(0, channels))


def answer(
    model: Perceiver, segments: Mapping[str, Segment], num_views: int, compute: Compute, multi_label: bool
) -> Answers:
    """Return the answers to segments with `num_views` rows an example.

    Of several views it is the logits of their mean probabilities, and their mean embedding.
    """
    given = {name: segment.to(compute.device) for name, segment in segments.items()}
    with torch.inference_mode(), compute.autocast():
        latents = model.encode(given)
        logits = model.classify(latents).cpu().double()
        embeddings = latents.float().mean(dim=1).cpu()
    if num_views == 1:
        return Answers(logits, embeddings)
    embeddings = embeddings.reshape(-1, num_views, embeddings.shape[-1]).mean(dim=1)
    logits = logits.reshape(-1, num_views, logits.shape[-1])
    if multi_label:
        return Answers(logits.sigmoid().mean(dim=1).logit(eps=NEVER), embeddings)
    return Answers(logits.log_softmax(dim=-1).logsumexp(dim=1) - log(num_views), embeddings)
