"""Metrics of a model on labelled examples, and the files that keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_cli.checkpoint import ModelInfo
from perceiver_cli.data import Catalog, Example, Reader, ordered_tasks, scan_folder
from perceiver_cli.device import Compute
from perceiver_cli.errors import DataError
from perceiver_cli.files import atomic_write, show_path, write_text
from perceiver_cli.model import Perceiver
from perceiver_cli.predict import Predictor, run

TOP = 5


@dataclass(frozen=True)
class Report:
    """What a model did on a set of examples.

    accuracy, top5: shares in 0..1; loss: mean cross-entropy in nats; confusion: (classes, classes) counts, rows the
    true class; records: one per example, as in predictions.jsonl; bad: (example id, error); strangers: examples of a
    class that the model does not know, which are left out.
    """

    classes: tuple[str, ...]
    accuracy: float
    top5: float
    loss: float
    confusion: tuple[tuple[int, ...], ...]
    split: str = ""
    records: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    bad: tuple[tuple[str, str], ...] = ()
    strangers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_examples(self) -> int:
        """Examples that were scored."""
        return sum(map(sum, self.confusion))

    @property
    def per_class(self) -> dict[str, dict[str, float | int | None]]:
        """Count, recall, precision and F1 by class name; None where there is nothing to divide by."""
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
        return {
            "accuracy": self.accuracy,
            "top5": self.top5,
            "loss": self.loss,
            "num_examples": self.num_examples,
            "split": self.split,
            "per_class": self.per_class,
            "confusion": [list(row) for row in self.confusion],
            "num_bad": len(self.bad),
            "bad": [{"path": path, "error": error} for path, error in self.bad],
            "num_unknown_class": self.strangers,
            "notes": list(self.notes),
        }


def score(
    model: Perceiver,
    reader: Reader,
    examples: Sequence[Example],
    classes: tuple[str, ...],
    compute: Compute,
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Return the Report of a model on examples, in evaluation mode. Raises DataError if none could be scored."""
    known = [example for example in examples if example.label is not None]
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    losses: list[float] = []
    in_top = 0
    records: list[dict[str, Any]] = []
    bad: list[tuple[str, str]] = []
    was_training = model.training
    model.eval()
    for batch, logits in run(model, reader, ordered_tasks(known, batch_size), compute, workers):
        log_probs = logits.log_softmax(dim=-1)
        top = logits.topk(min(TOP, len(classes))).indices.tolist()
        for example, label, row, best in zip(batch.examples, batch.labels.tolist(), log_probs, top, strict=True):
            loss = -float(row[label])
            losses.append(loss)
            in_top += label in best
            confusion[label, best[0]] += 1
            records.append(
                {
                    "path": example.id,
                    "label": classes[label],
                    "prediction": classes[best[0]],
                    "prob": float(row[best[0]].exp()),
                    "correct": label == best[0],
                    "loss": loss,
                }
            )
        bad += [(example.id, error) for _, example, error in batch.bad]
        if progress is not None:
            progress(len(losses) + len(bad))
    model.train(was_training)
    if not losses:
        raise DataError(
            f"nothing to score: {len(examples)} examples, {len(bad)} unreadable, "
            f"{len(examples) - len(known)} of classes that the model does not know",
            *(error for _, error in bad[:1]),
        )
    return Report(
        classes=classes,
        accuracy=float(np.trace(confusion) / len(losses)),
        top5=in_top / len(losses),
        loss=float(np.mean(losses)),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        records=tuple(records),
        bad=tuple(bad),
        strangers=len(examples) - len(known),
    )


def evaluate(
    predictor: Predictor,
    data: str | os.PathLike[str],
    split: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Return the Report of a model on a folder of class folders; classes are matched by name.

    Without `split`: the test split, else the validation split (the folder's, or the one that the run held out of this
    very data), else everything.

    Raises:
        DataError: no such split, nothing usable, or data of another modality than the model's.
    """
    catalog = scan_folder(data, predictor.classes)
    if catalog.modality != predictor.modality:
        raise DataError(
            f"{show_path(data)}: holds {catalog.modality}, but {show_path(predictor.path)} reads {predictor.modality}"
        )
    name, examples = choose_split(catalog, predictor.info, split)
    present = {predictor.classes[e.label] for e in examples if e.label is not None}
    missing = [c for c in predictor.classes if c not in present]
    notes = list(catalog.notes)
    if missing:
        notes.append(f"no examples of {len(missing)} of the model's classes: {', '.join(map(show_path, missing[:10]))}")
    reader = Reader(predictor.reader.specs, predictor.reader.limits, catalog.bad)
    total = len(examples)
    report = score(
        predictor.model, reader, examples, predictor.classes, predictor.compute, batch_size, workers,
        None if progress is None else lambda done: progress(done, total),
    )  # fmt: skip
    return Report(**{**vars(report), "split": name, "notes": tuple(notes)})


def choose_split(catalog: Catalog, info: ModelInfo, split: str | None) -> tuple[str, tuple[Example, ...]]:
    """Return the name and the examples of the split to evaluate."""
    held = catalog.hold_out(info.config.data.val_fraction)
    same_data = "val" in catalog.splits or held.fingerprint == info.data_fingerprint
    splits = dict(held.splits if same_data else catalog.splits)
    everything = tuple(e for name in sorted(catalog.splits) for e in catalog.splits[name])
    if split == "all":
        return "all", everything
    if split is not None:
        if split not in splits:
            raise DataError(
                f"{show_path(catalog.root)}: no {split} split", f"there are {', '.join(sorted(splits))}, all"
            )
        return split, splits[split]
    for name in ("test", "val"):
        if name in splits:
            return name, splits[name]
    return "all", everything


def save_report(report: Report, folder: Path) -> None:
    """Write metrics.json, predictions.jsonl and confusion.png into `folder`."""
    write_text(folder / "metrics.json", json.dumps(report.to_dict(), indent=1) + "\n")
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in report.records))
    with atomic_write(folder / "confusion.png") as file:
        _plot_confusion(report).savefig(file, format="png", dpi=120)


def _plot_confusion(report: Report) -> Any:
    """Return a figure of the confusion matrix: shares of each true class by colour, counts in the cells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array(report.confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    size = min(16.0, 3.0 + 0.42 * len(report.classes))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    # A class name is data: a dollar sign in it must not start mathematics.
    names = [show_path(name)[1:-1].replace("$", r"\$") for name in report.classes]
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 25:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"accuracy {report.accuracy:.4f} on {report.num_examples} examples ({report.split})", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure
