"""Metrics of a model on labelled examples; the splits that they are of; the calibration of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli.data.catalog import Catalog, scan
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader, ordered_tasks
from perceiver_cli.data.splits import SPLIT_FILE, read_split
from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.files import show_path
from perceiver_cli.inference.predictor import Predictor, forward_batches
from perceiver_cli.inference.statistics import (
    RESAMPLES,
    Bin,
    Interval,
    average_precisions,
    calibration_error,
    calibration_gaps,
    figure_interval,
    fit_temperature,
    fit_thresholds,
    reliability,
    share_interval,
)
from perceiver_cli.model.checkpoint import Calibration, store_calibration
from perceiver_cli.model.device import Compute
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.run_folder import MODEL_FILE

TOP = 5
MAX_RESAMPLED, LEAST_RESAMPLES = 5e8, 100  # probabilities gone through for the interval of the mAP, about 10 s


@dataclass(frozen=True)
class Report:
    """Metrics of a model on examples, and a record of each.

    accuracy, top5: shares in 0..1 of examples whose label is the first, or among the first five; with several labels an
    example: of which any label is. loss: mean cross-entropy in nats (several labels: binary, mean over classes).
    confusion: (classes, classes) counts, rows the true class; None with several labels. average_precision: by class,
    with several labels; None where no example has the class. modalities: those that the model saw. records: one per
    example, as in predictions.jsonl. bad: (example id, error). strangers: examples of no class that the model knows,
    which are left out. ece: expected calibration error of the first label's probability, in 15 bins of equal width
    (several labels: of the probabilities of all classes); ece_uncalibrated: what it would be without `temperature`;
    bins: those of the ECE. intervals_95: of the headline figures, by name, where they were asked for. examples: those
    of the records. split_from: who says what is in the split, "data" or the "run" that held it out.
    """

    classes: tuple[str, ...]
    accuracy: float
    top5: float
    loss: float
    confusion: tuple[tuple[int, ...], ...] | None
    num_examples: int
    average_precision: tuple[float | None, ...] | None = None
    split: str = ""
    split_from: str = "data"
    modalities: tuple[str, ...] = ()
    records: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    bad: tuple[tuple[str, str], ...] = ()
    strangers: int = 0
    notes: tuple[str, ...] = ()
    ece: float | None = None
    ece_uncalibrated: float | None = None
    temperature: float = 1.0
    bins: tuple[Bin | None, ...] = ()
    intervals_95: Mapping[str, Interval] = field(default_factory=dict)
    examples: tuple[Example, ...] = field(default=(), repr=False)

    @property
    def mean_average_precision(self) -> float | None:
        """mAP: the mean over the classes that have examples; None with one label an example."""
        averages = [value for value in self.average_precision or () if value is not None]
        return float(np.mean(averages)) if averages else None

    @property
    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """By class name: count, recall, precision, F1, or average precision; None where there is nothing to divide."""
        if self.confusion is None:
            return {
                name: {"average_precision": value}
                for name, value in zip(self.classes, self.average_precision or (), strict=True)
            }
        table = np.array(self.confusion, dtype=np.int64)
        rows: dict[str, dict[str, float | int | None]] = {}
        for i, name in enumerate(self.classes):
            right, count, said = int(table[i, i]), int(table[i].sum()), int(table[:, i].sum())
            rows[name] = {
                "count": count,
                "correct": right,
                "accuracy": right / count if count else None,
                "precision": right / said if said else None,
                "f1": 2 * right / (count + said) if count + said else None,
            }
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `evaluate --json`."""
        facts: dict[str, Any] = {
            "accuracy": self.accuracy,
            "top5": self.top5,
            "loss": self.loss,
            "ece": self.ece,
            "ece_uncalibrated": self.ece_uncalibrated,
            "temperature": self.temperature,
            "intervals_95": {name: list(ends) for name, ends in self.intervals_95.items()},
            "num_examples": self.num_examples,
            "split": self.split,
            "split_from": self.split_from,
            "modalities": list(self.modalities),
            "per_class": self.per_class,
            "num_bad": len(self.bad),
            "bad": [{"path": path, "error": error} for path, error in self.bad],
            "num_unknown_class": self.strangers,
            "notes": list(self.notes),
        }
        if self.confusion is not None:
            return facts | {"confusion": [list(row) for row in self.confusion]}
        return facts | {"mAP": self.mean_average_precision}


def score(
    model: Perceiver,
    reader: Reader,
    examples: Sequence[Example],
    classes: tuple[str, ...],
    compute: Compute,
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    temperature: float = 1.0,
    *,
    with_intervals: bool = False,
) -> Report:
    """Return the Report of a model on examples, in evaluation mode. Raises DataError if none could be scored.

    with_intervals: also say how sure the headline figures are, which takes seconds on 100,000 examples.
    """
    scored = label_logits(model, reader, examples, compute, batch_size, workers, progress)
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
    among = sum(not set(top).isdisjoint(e.labels) for e, top in zip(scored.examples, ranked.tolist(), strict=True))
    confidence, true = _judged(probabilities, targets)
    intervals_95: dict[str, Interval] = {}
    if with_intervals:
        intervals_95 = {"accuracy": share_interval(right, count), "top5": share_interval(among, count)}
        intervals_95 |= _resampled(losses.numpy(), confidence, true)
    return Report(
        classes=classes,
        accuracy=right / count,
        top5=among / count,
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


@dataclass(frozen=True)
class LabelledLogits:
    """Logits of labelled examples: logits (n, classes) float64; targets (n,) or, with several labels, (n, classes) of 0
    and 1; used: by example, the modalities there are of it; bad, strangers: as of a Report."""

    examples: tuple[Example, ...]
    logits: Tensor
    targets: Tensor
    used: tuple[tuple[str, ...], ...]
    bad: tuple[tuple[str, str], ...]
    strangers: int


def label_logits(
    model: Perceiver,
    reader: Reader,
    examples: Sequence[Example],
    compute: Compute,
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LabelledLogits:
    """Return a model's logits of examples, in evaluation mode. Raises DataError if none could be read."""
    multi_label = reader.multi_label_classes > 0
    batch_size = max(1, batch_size // reader.num_views)
    known = [example for example in examples if example.labels or multi_label]
    scored: list[Example] = []
    used: list[tuple[str, ...]] = []
    rows: list[Tensor] = []
    bad: list[tuple[str, str]] = []
    was_training = model.training
    model.eval()
    for batch, outputs in forward_batches(model, reader, ordered_tasks(known, batch_size), compute, workers):
        scored += batch.examples
        used += batch.used
        rows.append(outputs.logits)
        bad += [(example.id, error) for _, example, error in batch.bad]
        if progress is not None:
            progress(len(scored) + len(bad))
    model.train(was_training)
    if not scored:
        raise DataError(
            f"nothing to score: {counted(len(examples), 'example')}, {len(bad)} unreadable, "
            f"{len(examples) - len(known)} of classes that the model does not know",
            *(error for _, error in bad[:1]),
        )
    logits = torch.cat(rows)
    if multi_label:
        targets = torch.zeros_like(logits)
        for row, example in enumerate(scored):
            targets[row, list(example.labels)] = 1.0
    else:
        targets = torch.tensor([e.labels[0] for e in scored])
    return LabelledLogits(tuple(scored), logits, targets, tuple(used), tuple(bad), len(examples) - len(known))


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
        records.append(
            {
                "path": example.id,
                **({"labels": names} if scored.targets.ndim == 2 else {"label": names[0]}),
                "prediction": classes[first],
                "prob": p,
                "correct": first in example.labels,
                "loss": loss,
                **({"used": list(modalities)} if with_used else {}),
            }
        )
    return tuple(records)


def _confusion(targets: Tensor, best: Tensor, num_classes: int) -> tuple[tuple[int, ...], ...]:
    """Return (classes, classes) counts: a row for each true class, a column for each first answer."""
    counts = torch.bincount(targets * num_classes + best, minlength=num_classes**2)
    return tuple(map(tuple, counts.view(num_classes, num_classes).tolist()))


def _judged(probabilities: Tensor, targets: Tensor) -> tuple[Any, Any]:
    """Return probabilities and whether they came true: (n,) of the first label or, with several, (n, classes)."""
    if targets.ndim == 2:
        return probabilities.numpy(), targets.numpy()
    confidence, best = probabilities.max(dim=1)
    return confidence.numpy(), (best == targets).numpy()


def _resampled(losses: Any, confidence: Any, true: Any) -> dict[str, Interval]:
    """Return the bootstrap intervals of loss and ECE and, with several labels, of the mAP, by name."""
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
    """Return the mean without NaN, 0 if there is nothing else."""
    known = averages[~np.isnan(averages)]
    return float(known.mean()) if len(known) else 0.0


def average_precision(scores: Any, targets: Any) -> tuple[float | None, ...]:
    """Return the average precision of each class, None for a class without examples. Arguments: (examples, classes)."""
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
    """Return the Report of a model on a folder of class folders; classes are matched by name.

    Without `split`: the test split, else the validation split (that of the run, if it was trained on this very data, or
    the data's own), else everything.

    The data may lack some of the modalities of a model of several: they are missing, as those that are not used.

    Raises:
        DataError: no such split, nothing usable, or data of another modality than the model's.
    """
    reads, (catalog, used) = predictor.modalities, _catalog(predictor, data)
    catalog, origin = split_of_run(catalog, predictor, split)
    name, examples = choose_split(catalog, split)
    present = {predictor.classes[label] for e in examples for label in e.labels}
    missing = [c for c in predictor.classes if c not in present]
    notes = list(catalog.notes)
    if len(used) < len(reads):
        notes.append(f"answered from {'+'.join(used)} alone, the model reads {'+'.join(reads)}")
    if missing:
        notes.append(f"no examples of {len(missing)} of the model's classes: {', '.join(map(show_path, missing[:10]))}")
    if name == "val" and predictor.info.calibration is not None:
        notes.append("the temperature was fitted on a validation split: if it is this one, the ECE is too good")
    total = len(examples)
    report = score(
        predictor.model, _reader(predictor, catalog), examples, predictor.classes, predictor.compute,
        batch_size or predictor.batch_that_fits, workers,
        None if progress is None else lambda done: progress(done, total), predictor.calibration.temperature,
        with_intervals=True,
    )  # fmt: skip
    return replace(report, split=name, split_from=origin, modalities=used, notes=tuple(notes))


def calibrate(
    predictor: Predictor, data: str | os.PathLike[str], batch_size: int | None = None, workers: int = 0
) -> Calibration:
    """Return the calibration fitted on the validation split of `data`, stored in the model file and used from now on.

    Raises:
        UsageError: no validation split, or not all modalities are used. DataError: nothing in it that could be scored,
        or several labels an example for a model of one. ResourceError: the model file cannot be written.
    """
    if predictor.reader.specs.keys() != set(predictor.modalities):
        raise UsageError("a calibration is of all of the model's modalities", "leave out --use")
    catalog, _ = split_of_run(_catalog(predictor, data)[0], predictor, "val")
    _, examples = choose_split(catalog, "val")
    from scipy.special import expit

    scored = label_logits(
        predictor.model, _reader(predictor, catalog), examples, predictor.compute,
        batch_size or predictor.batch_that_fits, workers,
    )  # fmt: skip
    logits, targets = scored.logits.numpy(), scored.targets.numpy()
    temperature = fit_temperature(logits, targets)
    thresholds = fit_thresholds(expit(logits / temperature), targets) if targets.ndim == 2 else ()
    calibration = Calibration(temperature, thresholds)
    store_calibration(predictor.path, calibration)
    predictor.info = replace(predictor.info, calibration=calibration)
    return calibration


def _reader(predictor: Predictor, catalog: Catalog) -> Reader:
    several = len(predictor.classes) if predictor.info.config.multi_label else 0
    return Reader(predictor.reader.specs, predictor.reader.limits, catalog.bad, several)


def _catalog(predictor: Predictor, data: str | os.PathLike[str]) -> tuple[Catalog, tuple[str, ...]]:
    """Return labelled data that the model can be measured on, and the modalities it has. Raises DataError."""
    catalog = scan(data, predictor.classes, predictor.modalities)
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


def split_of_run(catalog: Catalog, predictor: Predictor, split: str | None) -> tuple[Catalog, str]:
    """Return the catalog with the training and validation split of the model's run, and who says so: "run" or "data".

    The run saved its split, which holds even if files were added since. A model file that lies outside its run has the
    split by hash of its data, if they did not change. A test split, or all of the data, needs neither.
    """
    if split in ("test", "all") or (split is None and "test" in catalog.splits):
        return catalog, "data"
    path = predictor.path.parent / SPLIT_FILE
    saved = read_split(path).apply(catalog) if predictor.path.name == MODEL_FILE and path.is_file() else None
    if saved is not None:
        return saved, "run"
    held = catalog.hold_out(predictor.info.config.data.val_fraction)
    if "val" not in catalog.splits and held.fingerprint == predictor.info.data_fingerprint:
        return replace(held, notes=(*held.notes, "val is the split that the run held out, by hash")), "run"
    return catalog, "data"


def choose_split(catalog: Catalog, split: str | None) -> tuple[str, Sequence[Example]]:
    """Return the name and the examples of the split to evaluate."""
    if split is None:
        split = next((name for name in ("test", "val") if name in catalog.splits), "all")
    if split == "all":
        return split, catalog.merged(catalog.splits)
    if split not in catalog.splits:
        raise UsageError(
            f"{show_path(catalog.root)}: no {split} split", f"there are {', '.join(sorted(catalog.splits))}, all"
        )
    return split, catalog.splits[split]
