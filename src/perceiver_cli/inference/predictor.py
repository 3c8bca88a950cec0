"""Predictions of a trained model, in input order, for whole inputs or for windows of time.

Axes: B batch, N latents, D latent channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby, islice, takewhile
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perceiver_cli.config import DataConfig
from perceiver_cli.data.account import Account
from perceiver_cli.data.decoder import View
from perceiver_cli.data.examples import PAUSE, Example
from perceiver_cli.data.inputs import Named, Pipe, examples_of
from perceiver_cli.data.listing import data_of_run, ways_to_read
from perceiver_cli.data.loader import Batch, Reader, Task, collate, ordered_tasks
from perceiver_cli.errors import DataError, IntegrityError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.model.checkpoint import DEFAULT_THRESHOLD, Calibration, load_model
from perceiver_cli.model.cost import estimate
from perceiver_cli.model.device import Compute, choose_compute
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.ensemble import Model, joined
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.run_folder import find_model

FORWARD_BYTES = 256 << 20  # activations on a CPU, where larger batches are no faster
UNKNOWN = "unknown"  # the label if no class reaches `min_prob`
MOST_AT_ONCE = {"cpu": 32, "cuda": 256}  # the largest batch; a reader of a pipe waits for one


@dataclass(frozen=True)
class Windows:
    """Windows of `window_s` seconds, one every `hop_s`, each predicted like a file of that length.

    aggregate: one prediction per input from the mean or the maximum of each class's probabilities; "none": one per
    window. Raises UsageError if a length is not above 0 s.
    """

    window_s: float
    hop_s: float
    aggregate: Literal["mean", "max", "none"] = "mean"

    def __post_init__(self) -> None:
        if not (0 < self.window_s < inf and 0 < self.hop_s < inf):
            raise UsageError(f"windows of {self.window_s:g} s every {self.hop_s:g} s, expected more than 0 s for both")


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of one input or one window, or an error."""

    path: str  # of its first file
    classes: tuple[str, ...]
    probs: tuple[float, ...] = ()  # by class; with several labels, or as maxima of windows, they do not sum to 1
    error: str | None = None
    used: tuple[str, ...] = ()  # modalities of the input, for a model of several
    notes: tuple[str, ...] = ()  # what was left out of the input
    start_s: float | None = None  # of the window
    end_s: float | None = None
    thresholds: tuple[float, ...] = ()  # by class, with several labels an example
    min_prob: float = 0.0  # smallest probability of a label
    embedding: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)  # (D,) mean latent
    names: Mapping[str, Any] = field(default_factory=dict)  # as of an Example

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k most probable classes with their probabilities, best first; ties keep the class order."""
        order = sorted(range(len(self.probs)), key=lambda i: (-self.probs[i], i))[:k]
        return [(self.classes[i], self.probs[i]) for i in order]

    @property
    def label(self) -> str:
        """The most probable class, or UNKNOWN if its probability is below `min_prob`."""
        return self.best if self.prob >= self.min_prob else UNKNOWN

    @property
    def best(self) -> str:
        """The most probable class, also below `min_prob`."""
        return self.top(1)[0][0]

    @property
    def prob(self) -> float:
        """The probability of the most probable class."""
        return max(self.probs)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that reach their threshold and `min_prob`, with several labels an example. May be empty."""
        every = zip(self.classes, self.probs, self.thresholds, strict=True)
        return tuple(name for name, prob, least in every if prob >= max(least, self.min_prob))

    def to_dict(self, top_k: int = 5, *, all_probs: bool = False) -> dict[str, Any]:
        """Return the JSON line of this prediction."""
        if self.error is not None:
            return {"path": self.path, **self.names, "error": self.error}
        line: dict[str, Any] = {"path": self.path, **self.names}
        if self.start_s is not None:
            line |= {"start_s": self.start_s, "end_s": self.end_s}
        line |= {"label": self.label, "prob": self.prob}
        if self.min_prob:
            line["best"] = self.best
        if self.thresholds:
            line["labels"] = list(self.labels)
        line["top"] = [{"label": label, "prob": prob} for label, prob in self.top(top_k)]
        if all_probs:
            line["probs"] = dict(zip(self.classes, self.probs, strict=True))
        if self.used:
            line["used"] = list(self.used)
        if self.notes:
            line["notes"] = list(self.notes)
        return line


class Predictor:
    """A trained model that is ready to predict.

    Args:
        model: a run folder or a model file; None looks at $PERCEIVER_MODEL, then runs/latest.
        device, precision: as on the command line; "auto" uses a GPU if there is one.
        limits: limits of one input; None takes the model's.
        use: the model's modalities to predict from; None is all. The others count as missing.
        views: views of each input whose answers are averaged: crops and mirrors, draws of points, clips of sound and
            video; None is the model's own number, mostly 1.

    Raises UsageError if there is no such model or it does not read a modality; IntegrityError for a damaged file.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        limits: Limits | None = None,
        use: Iterable[str] | None = None,
        views: int | None = None,
    ) -> None:
        self.path: Path = find_model(None if model is None else os.fspath(model))
        self.compute = choose_compute(device, precision)
        loaded, self.info = load_model(self.path)
        self.model = loaded.to(self.compute.device)
        config = self.info.config
        wanted = set(config.inputs if use is None else use)
        if not wanted or wanted - config.inputs.keys():
            names, reads = ", ".join(sorted(wanted)), ", ".join(sorted(config.inputs))
            raise UsageError(f"cannot use {show_path(names)}: {show_path(self.path)} reads {reads}")
        specs = {name: spec for name, spec in config.inputs.items() if name in wanted}
        several = len(self.classes) if config.multi_label else 0
        self.options: Mapping[str, Any] = {}  # options of `DataConfig` that replace the model's
        self.reader = Reader(specs, limits or config.data.limits, multi_label_classes=several)
        self.reader.asked_views = views

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.info.classes

    @property
    def calibration(self) -> Calibration:
        """The model's calibration, or the neutral one."""
        return self.info.calibration or Calibration()

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities of the model, sorted; `reader` has those to predict from."""
        return tuple(sorted(self.info.config.inputs))

    def check_timed(self) -> None:
        """Raise UsageError if no modality in use has a time axis that could be cut into windows."""
        if not self.reader.timed:
            raise UsageError(f"windows are for audio and video; the model reads {', '.join(self.reader.specs)}")

    @property
    def clip_s(self) -> float:
        """The seconds of sound or video that one answer is from. Raises UsageError for a model without a time axis."""
        self.check_timed()
        return max(timed.clip_s(self.reader.specs[name]) for name, timed in self.reader.timed.items())

    @property
    def batch_that_fits(self) -> int:
        """The largest batch that fits FORWARD_BYTES, or half of a GPU's free memory, up to MOST_AT_ONCE."""
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
        account: Account | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> Iterator[Prediction]:
        """Yield one prediction per input, in order; an unreadable input has `error` set.

        An input is a path or bytes, a mapping of these by modality, or a pipe. A folder stands for its files (files of
        one stem are one input of a model of several modalities), a manifest for its rows, a tar for its records. With
        `windows` an input has several predictions, or one that aggregates them; memory holds one batch of windows.
        `batch_size` is `batch_that_fits` by default; for windows on a CPU it is 1, which is as fast. `workers` read
        whole inputs only. `min_prob`, `embeddings`: see Prediction. `account` gets what became of every path.
        `progress` is called with the end of each window and the length of its input, in seconds. At a PAUSE among the
        inputs all before it are answered, whatever the size of the batch.

        Raises DataError for an unreadable manifest or records prepared with other options; IntegrityError for damaged
        records, after the predictions of those before them; UsageError for windows without a time axis.
        """
        if isinstance(inputs, str | bytes | os.PathLike | Source | Mapping | Pipe | Example):
            inputs = [inputs]
        if embeddings and self.info.members > 1:
            hint = "pass the run of one with -m"
            raise UsageError(f"{show_path(self.path)}: the latents of {self.info.members} models have no mean", hint)
        account = Account() if account is None else account
        examples = (example for named in inputs for example in self.examples(named, account))
        batch_size, blank = self.rows_at_once(batch_size, windows), self.blank(min_prob)
        if windows is not None:
            self.check_timed()
            yield from self._in_windows(examples, windows, batch_size, blank, embeddings, account, progress)
            return
        tasks = ordered_tasks(examples, batch_size)
        for batch, outputs in forward_batches(self.model, self.reader, tasks, self.compute, workers):
            fields = self._fields(outputs, [e.path for e in batch.examples], embeddings)
            for fault, seen in ((None, batch.examples), ("unreadable", [example for _, example, _ in batch.bad])):
                for example in seen:
                    account.use("predict", example.path, example.files, fault=fault)
            rows = zip(batch.examples, batch.used, batch.notes, fields, strict=True)
            predictions = [
                replace(blank, path=e.path, names=e.names, used=self._choice(used), notes=notes, **more)
                for e, used, notes, more in rows
            ]
            for position, example, error in batch.bad:  # in ascending order
                predictions.insert(position, replace(blank, path=example.path, names=example.names, error=error))
            yield from predictions

    def rows_at_once(self, batch_size: int | None, windows: Windows | None) -> int:
        """Return the number of examples of a batch, or of windows, where `batch_size` is the one asked for."""
        if batch_size is None:
            one = windows is not None and self.compute.device.type == "cpu"
            batch_size = 1 if one else self.batch_that_fits
        return max(1, batch_size // self.reader.num_views)

    def blank(self, min_prob: float = 0.0) -> Prediction:
        """Return a prediction without an answer: the fields that all predictions of an example share."""
        return Prediction("", self.classes, thresholds=self._thresholds, min_prob=min_prob)

    def examples(self, named: Named, account: Account | None = None) -> Iterator[Example]:
        """Yield the examples of an input of `predict`; `account` gets the paths that hold none."""
        reads, limits, use = self.info.config.inputs, self.reader.limits, self.reader.specs
        path = named if isinstance(named, str | os.PathLike) else None
        return examples_of(named, reads, limits, use, account, self.data_options(path))

    def data_options(self, path: str | os.PathLike[str] | None) -> tuple[DataConfig, DataConfig]:
        """Return how to read data at a path, see `ways_to_read`."""
        return ways_to_read(self._data_of_run, self.info.config.data, self.options, path)

    @cached_property
    def _data_of_run(self) -> DataConfig | None:
        return data_of_run(self.path)

    def _choice(self, used: tuple[str, ...]) -> tuple[str, ...]:
        """Return the used modalities for a model of several, else none."""
        return used if len(self.modalities) > 1 else ()

    @property
    def _thresholds(self) -> tuple[float, ...]:
        if not self.info.config.multi_label:
            return ()
        return self.calibration.thresholds or (DEFAULT_THRESHOLD,) * len(self.classes)

    def broken(self, path: str | None = None) -> IntegrityError:
        """Return the error of a model with an answer that is not finite, to the input at `path` or to any."""
        to = "" if path is None else f" to {show_path(path)}"
        hint = "" if self.compute.precision == "fp32" else "try --precision fp32"
        return IntegrityError(f"{show_path(self.path)}: an answer{to} is not finite", hint)

    def _fields(self, outputs: Outputs, paths: Sequence[str], embeddings: bool) -> Iterator[dict[str, Any]]:
        """Yield for each example what its Prediction gets from the model, or an error if the answer is not finite."""
        logits = outputs.logits / self.calibration.temperature
        probabilities = logits.sigmoid() if self.info.config.multi_label else logits.softmax(dim=-1)
        finite = logits.isfinite().all(dim=-1) & outputs.embeddings.isfinite().all(dim=-1)
        rows = zip(paths, finite.tolist(), probabilities.tolist(), outputs.embeddings.numpy(), strict=True)
        for path, fine, probs, embedding in rows:
            if fine:
                yield {"probs": tuple(probs)} | ({"embedding": embedding} if embeddings else {})
            else:
                yield {"error": str(self.broken(path))}

    def _in_windows(
        self,
        examples: Iterable[Example],
        windows: Windows,
        batch_size: int,
        blank: Prediction,
        embeddings: bool,
        account: Account,
        progress: Callable[[float, float], None] | None,
    ) -> Iterator[Prediction]:
        """Yield the predictions of examples cut into windows; `blank` holds their common fields."""
        rest = iter(examples)
        for first in rest:
            before_pause = takewhile(lambda example: example is not PAUSE, chain([first], rest))
            cut = self._cut(before_pause, windows, blank, account, progress)
            predicted = self._predicted(cut, batch_size, embeddings)
            for _, of_one in groupby(predicted, key=lambda pair: pair[0]):
                predictions = (prediction for _, prediction in of_one)
                if windows.aggregate == "none":
                    yield from predictions
                else:
                    yield aggregated(predictions, windows.aggregate)

    def _cut(
        self, examples: Iterable[Example], windows: Windows, blank: Prediction, account: Account,
        progress: Callable[[float, float], None] | None,
    ) -> Iterator[tuple[int, Prediction, list[View]]]:  # fmt: skip
        """Yield for each window the number of its example, its prediction without probabilities, and its views."""
        for number, example in enumerate(examples):
            fault = None
            try:
                for span, decoded in self.reader.windows(example, windows.window_s, windows.hop_s):
                    start_s, end_s = (None, None) if span is None else (round(span[0], 6), round(span[1], 6))
                    used = self._choice(decoded.names)
                    window = replace(
                        blank, path=example.path, names=example.names, used=used, notes=decoded.notes, start_s=start_s,
                        end_s=end_s,
                    )  # fmt: skip
                    yield number, window, self.reader.views(decoded)
                    if progress is not None:
                        progress(end_s or 0.0, decoded.whole_s)
            except DataError as error:
                fault = "unreadable"
                yield number, replace(blank, path=example.path, names=example.names, error=str(error)), []
            account.use("predict", example.path, example.files, fault=fault)

    def _predicted(
        self, cut: Iterator[tuple[int, Prediction, list[View]]], batch_size: int, embeddings: bool
    ) -> Iterator[tuple[int, Prediction]]:
        """Yield for each window of `_cut` the number of its example and its prediction, computed in batches."""
        several = self.info.config.multi_label
        while chunk := list(islice(cut, batch_size)):
            fields: Iterator[dict[str, Any]] = iter(())
            if rows := [row for _, _, views in chunk for row in views]:
                outputs = forward(self.model, collate(rows), self.reader.num_views, self.compute, several)
                fields = self._fields(outputs, [window.path for _, window, views in chunk if views], embeddings)
            for number, window, views in chunk:
                yield number, replace(window, **next(fields)) if views else window


def aggregated(predictions: Iterable[Prediction], aggregate: Literal["mean", "max"]) -> Prediction:
    """Return one prediction from an input's windows: the mean or the maximum of each class's probabilities.

    Its embedding is their mean. The error of a window is the error of the input.
    """
    combine = np.add if aggregate == "mean" else np.maximum
    total: Any = None
    embedding: Any = None
    used: set[str] = set()
    notes: list[str] = []
    count = 0
    for window in predictions:
        if window.error is not None:
            return window
        total = np.array(window.probs) if total is None else combine(total, window.probs)
        if window.embedding is not None:
            embedding = window.embedding if embedding is None else embedding + window.embedding
        used |= set(window.used)
        notes += window.notes
        count += 1
    probs = tuple((total / count if aggregate == "mean" else total).tolist())
    embedding = None if embedding is None else embedding / np.float32(count)
    return replace(
        window, probs=probs, used=tuple(sorted(used)), notes=tuple(notes), start_s=None, end_s=None, embedding=embedding
    )


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a batch, on the CPU: logits (B, classes) float64, embeddings (B, D) float32."""

    logits: Tensor
    embeddings: Tensor


def forward_batches(
    model: Model, reader: Reader, tasks: Iterable[Task], compute: Compute, workers: int = 0
) -> Iterator[tuple[Batch, Outputs]]:
    """Yield each batch with its outputs; B is 0 if every input was bad."""
    for batch in reader.batches(tasks, workers, pin=compute.device.type == "cuda"):
        if batch.examples:
            yield batch, forward(model, batch.segments, batch.num_views, compute, reader.multi_label_classes > 0)
        else:
            classes, channels = model.head.weight.shape
            yield batch, Outputs(torch.empty(0, classes, dtype=torch.float64), torch.empty(0, channels))


def forward(
    model: Model, segments: Mapping[str, Segment], num_views: int, compute: Compute, multi_label: bool
) -> Outputs:
    """Return the outputs for segments with `num_views` rows an example.

    Several views give the logits of their mean probabilities and their mean embedding.
    """
    with torch.inference_mode(), compute.autocast():
        latents = model.encode({name: segment.to(compute.device) for name, segment in segments.items()})
        logits = model.classify(latents).cpu().double()
        embeddings = latents.float().mean(dim=1).cpu()
    # (B V, ...) -> (B, V, ...)
    embeddings = embeddings.reshape(-1, num_views, embeddings.shape[-1]).mean(dim=1)
    views = logits.reshape(-1, num_views, logits.shape[-1]).unbind(dim=1)
    return Outputs(joined(views, multi_label=multi_label), embeddings)
