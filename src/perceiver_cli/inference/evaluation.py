"""Metrics of a model on labelled examples, the choice of their split, and the calibration of a model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli.data.account import Account
from perceiver_cli.data.catalog import PARENT, Catalog, scan
from perceiver_cli.data.examples import Example
from perceiver_cli.data.folders import parent
from perceiver_cli.data.listing import Stdin, fitting
from perceiver_cli.data.loader import Reader
from perceiver_cli.data.splits import SPLIT_FILE, read_split, validated
from perceiver_cli.data.survey import DataFacts, facts_of
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.inference.labelled import LabelledLogits, label_logits
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.inference.statistics import (
    RESAMPLES,
    Bin,
    Interval,
    Selective,
    average_precisions,
    calibration_error,
    calibration_gaps,
    figure_interval,
    fit_temperature,
    fit_thresholds,
    reliability,
    selective,
    share_interval,
)
from perceiver_cli.model.checkpoint import Calibration, store_calibration
from perceiver_cli.model.ensemble import Model
from perceiver_cli.model.ranks import ALONE, Ranks
from perceiver_cli.run_folder import run_of

VERSION = 2  # of metrics.json and predictions.jsonl: since 2, `label` is the answer and `truth` the truth
TOP = 5
WHOLE_MATRIX = 256  # classes; JSON has a larger confusion matrix as [true, answer, count] of its cells
MAX_RESAMPLED, LEAST_RESAMPLES = 5e8, 100  # probabilities read for the mAP's interval, about 10 s


@dataclass(frozen=True)
class Report:
    """Metrics of a model on labelled examples, with a record of each example."""

    classes: tuple[str, ...]
    accuracy: float  # share of examples whose first answer is one of their labels
    top5: float  # share of examples with one of their labels among the first five answers
    loss: float  # mean cross-entropy in nats; with several labels binary, and mean over classes
    confusion: tuple[tuple[int, ...], ...] | None  # (classes, classes) counts, rows are true; None with several labels
    num_examples: int
    average_precision: tuple[float | None, ...] | None = None  # by class, with several labels; None without examples
    split: str = ""
    split_from: str = "data"  # who defines the split: the "data", or the "run" that held it out
    modalities: tuple[str, ...] = ()  # modalities that the model read
    records: tuple[dict[str, Any], ...] = field(default=(), repr=False)  # one per example, as in predictions.jsonl
    bad: tuple[tuple[Example, str], ...] = ()  # unreadable examples, each with its error
    strangers: int = 0  # examples left out because the model does not know their class
    notes: tuple[str, ...] = ()
    ece: float | None = None  # expected calibration error of the first answer; with several labels of all classes
    ece_uncalibrated: float | None = None  # ECE with a temperature of 1
    temperature: float = 1.0
    bins: tuple[Bin | None, ...] = ()  # bins of the ECE
    intervals_95: Mapping[str, Interval] = field(default_factory=dict)  # of the headline figures, by name
    examples: tuple[Example, ...] = field(default=(), repr=False)  # examples of the records
    files: Account = field(default_factory=Account)  # what became of every path of the data
    facts: DataFacts = field(default_factory=DataFacts)  # about the data, for advice
    by: str | None = None  # column of a manifest, or "parent", whose values divide the examples
    worth: Mapping[str, Any] | None = None  # worth of each modality, see `inference.worth`

    @cached_property
    def by_value(self) -> dict[str, dict[str, Any]]:
        """By value of the column `by`: count, right answers, accuracy and its 95 % interval."""
        right: dict[str, list[bool]] = defaultdict(list)
        for example, record in zip(self.examples, self.records, strict=True):
            value = example.group or (parent(example.id) if self.by == PARENT else "")
            right[value].append(bool(record["correct"]))
        rows = {value: (sum(own), len(own)) for value, own in sorted(right.items())}
        return {
            value: {
                "count": count, "correct": hits, "accuracy": hits / count,
                "interval_95": list(share_interval(hits, count)),
            }
            for value, (hits, count) in rows.items()
        }  # fmt: skip

    @property
    def min_probs(self) -> tuple[Selective, ...]:
        """What a few values of `predict --min-prob` would leave answered."""
        prob, correct = (np.array([record[key] for record in self.records]) for key in ("prob", "correct"))
        return selective(prob, correct)

    @property
    def mean_average_precision(self) -> float | None:
        """Mean over the classes with examples (mAP); None with one label an example."""
        averages = [value for value in self.average_precision or () if value is not None]
        return float(np.mean(averages)) if averages else None

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean accuracy of the classes with examples; None with several labels an example."""
        return self._mean_over_classes("accuracy")

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 over the classes with examples or answers; None with several labels an example."""
        return self._mean_over_classes("f1")

    def _mean_over_classes(self, figure: str) -> float | None:
        rows = self.per_class.values() if self.confusion is not None else ()
        known = [value for row in rows if (value := row[figure]) is not None]
        return float(np.mean(known)) if known else None

    @cached_property
    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """By class name: count, recall, precision, F1, or average precision; None for 0 / 0."""
        if self.confusion is None:
            averages = zip(self.classes, self.average_precision or (), strict=True)
            return {name: {"average_precision": value} for name, value in averages}
        table = np.array(self.confusion, dtype=np.int64)
        rows: dict[str, dict[str, float | int | None]] = {}
        for i, name in enumerate(self.classes):
            right, count, answers = int(table[i, i]), int(table[i].sum()), int(table[:, i].sum())
            rows[name] = {
                "count": count,
                "correct": right,
                "accuracy": right / count if count else None,
                "precision": right / answers if answers else None,
                "f1": 2 * right / (count + answers) if count + answers else None,
            }
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `evaluate --json`."""
        facts: dict[str, Any] = {
            "version": VERSION,
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "top5": self.top5,
            "loss": self.loss,
            "ece": self.ece,
            "ece_uncalibrated": self.ece_uncalibrated,
            "temperature": self.temperature,
            "min_probs": [vars(each) for each in self.min_probs],
            "intervals_95": {name: list(ends) for name, ends in self.intervals_95.items()},
            "num_examples": self.num_examples,
            "split": self.split,
            "split_from": self.split_from,
            "modalities": list(self.modalities),
            "per_class": self.per_class,
            **({} if self.by is None else {"by": {self.by: self.by_value}}),
            "num_bad": len(self.bad),
            "bad": [{"path": example.path, **example.names, "error": error} for example, error in self.bad],
            "num_unknown_class": self.strangers,
            "notes": list(self.notes),
            "files": self.files.to_dict(),
        }
        facts |= {} if self.worth is None else {"worth": self.worth}
        if self.confusion is None:
            return facts | {"mAP": self.mean_average_precision}
        if len(self.classes) <= WHOLE_MATRIX:
            return facts | {"confusion": [list(row) for row in self.confusion]}
        table = np.array(self.confusion)
        pairs = np.argwhere(table)
        return facts | {"confusion_pairs": [[*pair, int(table[tuple(pair)])] for pair in pairs.tolist()]}


def report_of(
    model: Model,
    scored: LabelledLogits,
    classes: tuple[str, ...],
    temperature: float = 1.0,
    *,
    with_intervals: bool = False,
) -> Report:
    """Return the Report of a model's logits.

    with_intervals: compute `intervals_95`, which takes seconds on 100,000 examples.
    """
    logits, targets = scored.logits / temperature, scored.targets
    multi_label = targets.ndim == 2
    if multi_label:
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        probabilities = logits.sigmoid()
    else:
        losses = F.cross_entropy(logits, targets, reduction="none")
        probabilities = logits.softmax(dim=1)
    ranked = logits.topk(min(TOP, len(classes))).indices
    records = _records(scored, classes, ranked[:, 0], probabilities, losses, with_used=len(model.encoding.layouts) > 1)
    count, right = len(records), sum(record["correct"] for record in records)
    right_top5 = sum(not set(top).isdisjoint(e.labels) for e, top in zip(scored.examples, ranked.tolist(), strict=True))
    confidence, true = _judged(probabilities, targets)
    intervals_95: dict[str, Interval] = {}
    if with_intervals:
        intervals_95 = {"accuracy": share_interval(right, count), "top5": share_interval(right_top5, count)}
        intervals_95 |= _resampled(losses.numpy(), confidence, true)
    return Report(
        classes=classes,
        accuracy=right / count,
        top5=right_top5 / count,
        loss=float(losses.mean()),
        confusion=None if multi_label else _confusion(targets, ranked[:, 0], len(classes)),
        num_examples=count,
        ece=calibration_error(confidence, true),
        ece_uncalibrated=calibration_error(
            *_judged(scored.logits.sigmoid() if multi_label else scored.logits.softmax(dim=1), targets)
        ),
        temperature=temperature,
        bins=reliability(confidence, true),
        intervals_95=intervals_95,
        examples=scored.examples,
        average_precision=average_precision(probabilities.numpy(), targets.numpy()) if multi_label else None,
        records=records,
        bad=scored.bad,
        strangers=scored.strangers,
    )


def _records(
    scored: LabelledLogits, classes: tuple[str, ...], best: Tensor, probabilities: Tensor, losses: Tensor,
    *, with_used: bool,
) -> tuple[dict[str, Any], ...]:  # fmt: skip
    """Return a line of predictions.jsonl for each example; best: (n,) class indices."""
    prob = probabilities.gather(1, best[:, None])[:, 0]
    columns = (scored.examples, best.tolist(), prob.tolist(), losses.tolist(), scored.used)
    records = []
    for example, first, p, loss, modalities in zip(*columns, strict=True):
        names = [classes[label] for label in example.labels]
        record = {
            "path": example.path,
            **example.names,
            **({"truths": names} if scored.targets.ndim == 2 else {"truth": names[0]}),
            "label": classes[first],
            "prob": p,
            "correct": first in example.labels,
            "loss": loss,
            **({"used": list(modalities)} if with_used else {}),
        }
        records.append(record)
    return tuple(records)


def _confusion(targets: Tensor, best: Tensor, num_classes: int) -> tuple[tuple[int, ...], ...]:
    """Return (classes, classes) counts: a row for each true class, a column for each first answer."""
    counts = torch.bincount(targets * num_classes + best, minlength=num_classes**2)
    return tuple(map(tuple, counts.view(num_classes, num_classes).tolist()))


def _judged(probabilities: Tensor, targets: Tensor) -> tuple[Any, Any]:
    """Return probabilities and their truth: (n,) of the first answer or, with several labels, (n, classes)."""
    if targets.ndim == 2:
        return probabilities.numpy(), targets.numpy()
    confidence, best = probabilities.max(dim=1)
    return confidence.numpy(), (best == targets).numpy()


def _resampled(losses: Any, confidence: Any, true: Any) -> dict[str, Interval]:
    """Return by name the bootstrap intervals of loss, ECE and, with several labels, mAP."""
    if not (np.isfinite(losses).all() and np.isfinite(confidence).all()):
        return {}
    count = len(losses)
    gaps = calibration_gaps(confidence, true)
    low, high = figure_interval(lambda times: float(times @ losses / count), count)
    intervals = {"loss": (max(0.0, low), high)}
    shares = {"ece": figure_interval(lambda times: float(np.abs(times @ gaps).sum() / true.size), count)}
    if true.ndim == 2 and true.any():
        draws = int(np.clip(MAX_RESAMPLED / true.size, LEAST_RESAMPLES, RESAMPLES))
        averages = average_precisions(confidence, true)
        shares["mAP"] = figure_interval(lambda times: _mean_of_known(averages(times)), count, draws)
    return intervals | {name: (max(0.0, low), min(1.0, high)) for name, (low, high) in shares.items()}


def _mean_of_known(averages: Any) -> float:
    """Return the mean without NaN, or 0 if all are NaN."""
    known = averages[~np.isnan(averages)]
    return float(known.mean()) if len(known) else 0.0


def average_precision(scores: Any, targets: Any) -> tuple[float | None, ...]:
    """Return each class's average precision, None without examples. Arguments: (examples, classes)."""
    averages = average_precisions(scores, targets)(np.ones(len(scores)))
    return tuple(None if np.isnan(value) else value for value in averages.tolist())


def evaluate(
    predictor: Predictor,
    data: str | os.PathLike[str],
    split: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return the Report of a model on labelled data; classes are matched by name.

    Without `split`: the test split, else the validation split (the run's if it was trained on this data, else the
    data's), else everything. The data may lack some of the model's modalities.

    Raises UsageError if there is no such split; DataError without usable files or without the model's modalities.
    """
    report = evaluate_shared(predictor, data, ALONE, split, batch_size, workers, progress)
    assert report is not None, "a process alone is the first"
    return report


def evaluate_shared(
    predictor: Predictor,
    data: str | os.PathLike[str],
    ranks: Ranks,
    split: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report | None:
    """Return what `evaluate` does in the first of several processes, None in the others."""
    reads, (catalog, used) = predictor.modalities, labelled_catalog(predictor, data)
    divided, origin = split_of_run(catalog, predictor)
    if split in ("test", "all") or (split is None and "test" in catalog.splits):
        origin = "data"  # these need no split of the run
    else:
        catalog = divided
    name, examples = choose_split(catalog, split)
    present = {predictor.classes[label] for e in examples for label in e.labels}
    missing = [c for c in predictor.classes if c not in present]
    notes = list(catalog.notes)
    if len(used) < len(reads):
        notes.append(f"answered from {'+'.join(used)} alone; the model reads {'+'.join(reads)}")
    if missing:
        notes.append(f"no examples of {len(missing)} of the model's classes: {', '.join(map(show_path, missing[:10]))}")
    if predictor.info.members > 1 and not predictor.info.data_fingerprint and name != "test":
        notes.append("each model of the ensemble was trained on most of these examples: the test split is fair")
    if name == "val":
        notes += note_on_calibration(predictor, same=origin == "run" or is_data_of_run(catalog, predictor))
    scored = label_logits(
        predictor.model, reader_of(predictor, catalog.bad), examples, predictor.compute,
        batch_size or predictor.batch_that_fits, workers,
        None if progress is None else lambda done: progress(done, len(examples)), ranks,
    )  # fmt: skip
    if scored is None:
        return None
    temperature = predictor.calibration.temperature
    report = report_of(predictor.model, scored, predictor.classes, temperature, with_intervals=True)
    if not isfinite(report.loss):
        raise predictor.broken()
    files = catalog.accounted({example.id for example, _ in report.bad}, name, scored=True)
    facts = facts_of(divided)
    report = replace(
        report, split=name, split_from=origin, modalities=used, notes=tuple(notes), files=files, facts=facts
    )
    if (by := predictor.options.get("group_by")) is None:
        return report
    report = replace(report, by=by)
    if set(report.by_value) == {""}:
        raise UsageError(f"{show_path(data)}: no column {show_path(by)}", "pass a manifest with this column, or parent")
    return report


def calibrate(
    predictor: Predictor,
    data: str | os.PathLike[str],
    batch_size: int | None = None,
    workers: int = 0,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Fit a calibration on the validation split of `data`, store it in the model file and the predictor; return it.

    Raises UsageError without a validation split or for a predictor that does not use all modalities; DataError if
    nothing can be scored, or for several labels an example with a model of one; ResourceError if it cannot be written.
    """
    if predictor.reader.specs.keys() != set(predictor.modalities):
        raise UsageError("a calibration needs all modalities of the model", "leave out --use")
    catalog, _ = split_of_run(labelled_catalog(predictor, data)[0], predictor)
    _, examples = choose_split(catalog, "val")
    scored = label_logits(
        predictor.model, reader_of(predictor, catalog.bad), examples, predictor.compute,
        batch_size or predictor.batch_that_fits, workers, None, ranks,
    )  # fmt: skip
    temperature, thresholds = ranks.from_first(lambda: _fitted(predictor, scored))
    calibration = Calibration(temperature, tuple(thresholds))
    ranks.from_first(lambda: store_calibration(predictor.path, calibration, predictor.info))
    predictor.info = replace(predictor.info, calibration=calibration)
    return calibration


def _fitted(predictor: Predictor, scored: LabelledLogits | None) -> tuple[float, tuple[float, ...]]:
    """Return the temperature and the thresholds that fit answers. Raises IntegrityError for broken ones."""
    assert scored is not None, "the first process has the answers of all"
    from scipy.special import expit

    logits, targets = scored.logits.numpy(), scored.targets.numpy()
    if not np.isfinite(logits).all():
        raise predictor.broken()
    temperature = fit_temperature(logits, targets)
    thresholds = fit_thresholds(expit(logits / temperature), targets) if targets.ndim == 2 else ()
    return temperature, thresholds


def calibrated(scored: LabelledLogits) -> tuple[float, float]:
    """Return the temperature that training stores, and the ECE with it, on validation examples.

    Targets are smoothed by one example's weight, as Platt did: few examples may all be right.
    """
    logits, targets = scored.logits.numpy(), scored.targets.numpy()
    temperature = fit_temperature(logits, targets, 1 / (len(logits) + 2))
    soft = scored.logits / temperature
    probabilities = soft.sigmoid() if targets.ndim == 2 else soft.softmax(dim=1)
    return temperature, calibration_error(*_judged(probabilities, scored.targets))


def reader_of(predictor: Predictor, bad: Mapping[str, str] | None = None, use: Collection[str] | None = None) -> Reader:
    """Return a reader as the predictor's. bad: errors by id of examples; use: the modalities to read, None for all."""
    reader = predictor.reader
    specs = {name: spec for name, spec in reader.specs.items() if use is None or name in use}
    mine = Reader(specs, reader.limits, bad, reader.multi_label_classes)
    mine.asked_views = reader.asked_views
    return mine


def labelled_catalog(predictor: Predictor, data: str | os.PathLike[str]) -> tuple[Catalog, tuple[str, ...]]:
    """Return labelled data for the model and the modalities that both have. Raises DataError if there are none."""
    classes, reads = predictor.classes, predictor.modalities
    stdin, ways = Stdin(), predictor.data_options(data)
    catalog = fitting(lambda options: scan(data, classes, reads, options, "scored", stdin), ways)
    used = tuple(name for name in predictor.reader.specs if name in catalog.modalities)
    if not used:
        wanted = "+".join(predictor.reader.specs)
        raise DataError(
            f"{show_path(data)}: holds {'+'.join(catalog.holds)}, but {show_path(predictor.path)} reads {wanted}"
        )
    if catalog.prepared is not None:
        catalog.prepared.check(show_path(data), predictor.reader.specs, "the model")
    if catalog.multi_label and not predictor.info.config.multi_label:
        raise DataError(f"{show_path(data)}: has several labels an example, but the model was trained for one")
    return catalog, used


def is_data_of_run(catalog: Catalog, predictor: Predictor) -> bool:
    """Return whether the examples and their splits are those of the model's run."""
    return catalog.fingerprint == predictor.info.data_fingerprint


def note_on_calibration(predictor: Predictor, *, same: bool) -> list[str]:
    """Return a note if the temperature was, or may have been, fitted on the validation split to measure.

    same: whether this is the run's validation split, on which `train` fits the temperature.
    """
    calibration, by_training = predictor.info.calibration, predictor.info.metrics.get("temperature")
    if calibration is None or (not same and calibration.temperature == by_training):
        return []
    if calibration.temperature == by_training:
        return ["the temperature was fitted on these examples: the ECE is too low, expect a higher one on others"]
    return ["the temperature was fitted on a validation split: if on this one, the ECE is too low"]


def split_of_run(catalog: Catalog, predictor: Predictor) -> tuple[Catalog, str]:
    """Return the catalog split as in the model's run, and the source of the split: "run" or "data".

    A run's saved split is valid even if files were added since. Outside its run a model file has the split by hash, if
    the data are unchanged.
    """
    catalog = replace(catalog, group_by=predictor.info.config.data.group_by)  # not the column of `--by`
    path = predictor.path.parent / SPLIT_FILE
    saved = read_split(path).apply(catalog) if run_of(predictor.path) is not None and path.is_file() else None
    if saved is not None:
        return saved, "run"
    trained = predictor.info.config.data
    with suppress(DataError):  # other data, too small for this split
        held = catalog if "val" in catalog.splits and trained.fold is None else validated(catalog, trained)
        if held is not catalog and held.fingerprint == predictor.info.data_fingerprint:
            return replace(held, notes=(*held.notes, "val is the split that the run held out, by hash")), "run"
    return catalog, "data"


def choose_split(catalog: Catalog, split: str | None) -> tuple[str, Sequence[Example]]:
    """Return the name and the examples of the split to evaluate. Raises UsageError if it does not exist."""
    if split is None:
        split = next((name for name in ("test", "val") if name in catalog.splits), "all")
    if split == "all":
        return split, catalog.merged(catalog.splits)
    if split not in catalog.splits:
        raise UsageError(
            f"{show_path(catalog.root)}: no {split} split", f"there are {', '.join(sorted(catalog.splits))}, all"
        )
    return split, catalog.splits[split]
