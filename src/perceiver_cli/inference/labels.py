"""Probably wrong labels, by what a model and its latents say about an example without its label.

Three answers are multiplied: the model's, that of a classifier on mean latents that learned from other examples only,
and the vote of the nearest latents. Where another class has by far the larger product, the label is suspect.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perceiver_cli.data.examples import Example
from perceiver_cli.data.likeness import near_pairs, sketches, stacked
from perceiver_cli.data.loader import ordered_tasks
from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.files import show_path
from perceiver_cli.inference.evaluation import labelled_catalog, reader_of
from perceiver_cli.inference.predictor import Predictor, forward_batches

Floats = NDArray[np.float64]
FOLDS = 5
PENALTY = 1e-3  # of the squared weights of the classifier on latents
ITERATIONS = 200
NEIGHBOURS, BLOCK = 10, 1024  # latents that vote on an example; rows compared at a time
LEAST_VOTE = 0.05  # share of a vote that is spread over all classes, so that none has the probability 0
MARGIN = 0.6  # the suggested class is more probable by at least this
LEAST = 20  # examples that are enough to judge labels


@dataclass(frozen=True)
class Suspect:
    """An example whose label is probably wrong, with the probabilities of its label and of the suggested one."""

    path: str
    split: str
    label: str
    prob: float
    suggested: str
    suggested_prob: float


@dataclass(frozen=True)
class NearCopy:
    """Two examples that are nearly the same; distance: 1 - cosine of their sketches."""

    path: str
    split: str
    other: str
    other_split: str
    distance: float
    labels: tuple[str, str]

    @property
    def across(self) -> bool:
        """Whether they lie in several splits."""
        return self.split != self.other_split


@dataclass(frozen=True)
class LabelReport:
    """What a model says about labels. examples: those of `suspects`, the most suspect first, then those of `copies`."""

    num_examples: int
    suspects: tuple[Suspect, ...]
    copies: tuple[NearCopy, ...]
    notes: tuple[str, ...]
    examples: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `lint --labels --json`."""
        return {
            "num_examples": self.num_examples,
            "suspects": [vars(suspect) for suspect in self.suspects],
            "near_copies": [{**vars(copy), "labels": list(copy.labels), "across": copy.across} for copy in self.copies],
            "notes": list(self.notes),
        }


def check_labels(
    predictor: Predictor, data: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> LabelReport:
    """Return suspect labels and near-copies in all splits of labelled data.

    Raises UsageError for several labels an example, DataError for fewer than LEAST examples, IntegrityError for a model
    whose answers are not finite.
    """
    catalog, _ = labelled_catalog(predictor, data)
    if catalog.multi_label or predictor.info.config.multi_label:
        raise UsageError("--labels judges one label an example; this data or model has several")
    reader = reader_of(predictor, catalog.bad)
    split_of = {example.id: split for split, examples in catalog.splits.items() for example in examples}
    every = [example for example in catalog.merged(catalog.splits) if example.labels]
    examples: list[Example] = []
    logits, latents = [], []
    tasks = ordered_tasks(every, predictor.rows_at_once(None, None))
    for batch, outputs in forward_batches(predictor.model, reader, tasks, predictor.compute):
        if not (outputs.logits.isfinite().all() and outputs.embeddings.isfinite().all()):
            raise predictor.broken()
        examples += batch.examples
        logits.append(outputs.logits)
        latents.append(outputs.embeddings)
        if progress is not None:
            progress(len(examples), len(every))
    if len(examples) < LEAST:
        raise DataError(f"{show_path(data)}: {counted(len(examples), 'labelled example')} of the model's classes, "
                        f"expected {LEAST} or more to judge labels")  # fmt: skip
    labels = np.array([example.labels[0] for example in examples])
    own = torch.cat(logits).div(predictor.calibration.temperature).softmax(dim=1).numpy()
    rows_of_latents, classes = torch.cat(latents).double().numpy(), len(predictor.classes)
    probs = combined(own, out_of_fold(rows_of_latents, labels, classes), votes(rows_of_latents, labels, classes))
    names = predictor.classes
    found = suspect_labels(probs, labels)
    suspects = tuple(
        Suspect(examples[i].id, split_of[examples[i].id], names[labels[i]], float(probs[i, labels[i]]), names[other],
                float(probs[i, other]))
        for i, other in found
    )  # fmt: skip
    there, rows = stacked(list(sketches(reader, examples)))
    pairs = [(examples[there[pair.first]], examples[there[pair.second]], pair.distance) for pair in near_pairs(rows)]
    copies = tuple(
        NearCopy(one.id, split_of[one.id], other.id, split_of[other.id], distance,
                 (names[one.labels[0]], names[other.labels[0]]))
        for one, other, distance in pairs
    )  # fmt: skip
    shown = (*(examples[i] for i, _ in found), *(one for pair in pairs for one in pair[:2]))
    return LabelReport(len(examples), suspects, copies, tuple(catalog.notes), shown)


def suspect_labels(probs: Floats, labels: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (example, suggested class) of suspect labels, the most suspect first. probs: (n, classes)."""
    places = np.arange(len(labels))
    own, others = probs[places, labels], probs.copy()
    others[places, labels] = -1
    suggested = others.argmax(axis=1)
    margin = others[places, suggested] - own
    suspect = np.flatnonzero(margin >= MARGIN)
    return [(int(i), int(suggested[i])) for i in suspect[np.argsort(-margin[suspect], kind="stable")]]


def combined(*answers: Floats) -> Floats:
    """Return the product of several answers (n, classes), each row with the sum 1."""
    product = np.exp(sum(np.log(answer + 1e-9) for answer in answers) / len(answers))
    return np.asarray(product / product.sum(axis=1, keepdims=True))


def votes(latents: Floats, labels: NDArray[np.int64], classes: int) -> Floats:
    """Return the shares (n, classes) of labels among the nearest latents of other examples, by their cosine."""
    rows = _standard(latents)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12
    hot, count = np.eye(classes)[labels], min(NEIGHBOURS, len(rows) - 1)
    shares = np.zeros((len(rows), classes))
    for start in range(0, len(rows), BLOCK):
        likeness = rows[start : start + BLOCK] @ rows.T
        places = np.arange(len(likeness))
        likeness[places, start + places] = -np.inf
        nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        shares[start : start + BLOCK] = hot[nearest].mean(axis=1)
    return (1 - LEAST_VOTE) * shares + LEAST_VOTE / classes


def _standard(latents: Floats) -> Floats:
    return np.asarray((latents - latents.mean(axis=0)) / (latents.std(axis=0) + 1e-6))


def out_of_fold(latents: Floats, labels: NDArray[np.int64], classes: int) -> Floats:
    """Return probabilities (n, classes) of a linear classifier that has not seen the example. latents: (n, D)."""
    rows = np.hstack([_standard(latents), np.ones((len(latents), 1))])
    fold = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    probs = np.zeros((len(rows), classes))
    for k in range(FOLDS):
        inside = fold != k
        probs[~inside] = _softmax(rows[~inside] @ _regression(rows[inside], labels[inside], classes))
    return probs


def _softmax(scores: Floats) -> Floats:
    from scipy.special import softmax

    return np.asarray(softmax(scores, axis=1))


def _regression(rows: Floats, labels: NDArray[np.int64], classes: int) -> Floats:
    """Return the weights (D, classes) of the softmax regression of labels on rows (n, D)."""
    from scipy.optimize import minimize

    hot = np.eye(classes)[labels]

    def cost(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(rows.shape[1], classes)
        probs = _softmax(rows @ weights)
        loss = -np.log(probs[np.arange(len(labels)), labels] + 1e-12).mean() + PENALTY * np.square(weights).sum() / 2
        return float(loss), (rows.T @ (probs - hot) / len(labels) + PENALTY * weights).ravel()

    start = np.zeros(rows.shape[1] * classes)
    found = minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    return np.asarray(found.x).reshape(rows.shape[1], classes)
