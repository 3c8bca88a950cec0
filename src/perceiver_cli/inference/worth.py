"""The worth of each modality of a model: its exact Shapley share of the accuracy.

For a set S of modalities, v(S) is 1 if the model's first answer from S alone is right, else 0; for an example with none
of S it is chance, the share of its class. A modality's share is the mean, over all orders of the modalities, of what it
adds to those before it (Shapley 1953); the shares and chance add up to the accuracy. All 2^n sets are answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import UsageError
from perceiver_cli.inference.evaluation import Report, reader_of
from perceiver_cli.inference.labelled import label_logits
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.inference.statistics import Interval, figure_interval

MOST = 8  # modalities: 255 evaluations
RESAMPLES = 1000


@dataclass(frozen=True)
class Share:
    """A modality's part of an accuracy, and its 95 % bootstrap interval over examples."""

    share: float
    interval_95: Interval


@dataclass(frozen=True)
class Worth:
    """Shares of the accuracy. chance: the accuracy without any modality. alone: that of each modality alone.

    per_class: shares by name of each class that has examples.
    """

    accuracy: float
    chance: float
    alone: dict[str, float]
    shares: dict[str, Share]
    per_class: dict[str, dict[str, Share]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""

        def plain(shares: dict[str, Share]) -> dict[str, Any]:
            return {name: {"share": s.share, "interval_95": list(s.interval_95)} for name, s in shares.items()}

        by_class = {name: plain(shares) for name, shares in self.per_class.items()}
        facts = {"accuracy": self.accuracy, "chance": self.chance, "alone": self.alone}
        return facts | {"shares": plain(self.shares), "per_class": by_class}


def worth(
    predictor: Predictor,
    report: Report,
    batch_size: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Worth:
    """Return the worth of the modalities of a model on the examples of a report.

    Raises UsageError for a model of one modality or of more than MOST, or for examples with several labels.
    """
    names = report.modalities
    if report.confusion is None:
        raise UsageError("--worth measures accuracy with one label an example; this data has several")
    if not 2 <= len(names) <= MOST:
        raise UsageError(f"--worth compares 2 to {MOST} modalities; this evaluation reads {'+'.join(names)}")
    labels = np.array([example.labels[0] for example in report.examples])
    chance = (np.bincount(labels) / len(labels))[labels]
    right = {frozenset(names): np.array([float(record["correct"]) for record in report.records]), frozenset(): chance}
    sets = [frozenset(chosen) for size in range(1, len(names)) for chosen in combinations(names, size)]
    for done, chosen in enumerate(sets):
        right[chosen] = _right(predictor, report, chosen, chance, batch_size, workers)
        if progress is not None:
            progress(done + 1, len(sets))
    added = {name: _shapley(name, names, right) for name in names}
    whole = np.ones(len(labels), bool)
    present = [(label, name) for label, name in enumerate(report.classes) if (labels == label).any()]
    return Worth(
        accuracy=report.accuracy,
        chance=float(chance.mean()),
        alone={name: float(right[frozenset([name])].mean()) for name in names},
        shares=_shares(added, whole),
        per_class={name: _shares(added, labels == label) for label, name in present},
    )


def _right(
    predictor: Predictor,
    report: Report,
    chosen: frozenset[str],
    chance: NDArray[np.float64],
    batch_size: int | None,
    workers: int,
) -> NDArray[np.float64]:
    """Return for each example whether the answer from some modalities is right, or chance if it lacks them."""
    known = [example for example in report.examples if chosen & example.sources.keys()]
    right = chance.copy()
    if not known:
        return right
    scored = label_logits(
        predictor.model, reader_of(predictor, use=chosen), known, predictor.compute,
        batch_size or predictor.batch_that_fits, workers,
    )  # fmt: skip
    assert scored is not None  # one process answers
    hits = (scored.logits.argmax(dim=1) == scored.targets).tolist()
    by_id = {example.id: float(hit) for example, hit in zip(scored.examples, hits, strict=True)}
    for place, example in enumerate(report.examples):
        right[place] = by_id.get(example.id, right[place])
    return right


def _shapley(
    name: str, names: tuple[str, ...], right: dict[frozenset[str], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return for each example what a modality adds, the mean over all orders of modalities."""
    others = [other for other in names if other != name]
    total = np.zeros_like(next(iter(right.values())))
    for size in range(len(others) + 1):
        for before in map(frozenset, combinations(others, size)):
            total += (right[before | {name}] - right[before]) / (len(names) * comb(len(others), size))
    return total


def _shares(added: dict[str, NDArray[np.float64]], where: NDArray[np.bool_]) -> dict[str, Share]:
    """Return the mean of what each modality adds to some examples, with its interval."""
    count = int(where.sum())

    def share(values: NDArray[np.float64]) -> Share:
        interval = figure_interval(lambda times: float(times @ values / count), count, RESAMPLES)
        return Share(float(values.mean()), interval)

    return {name: share(values[where]) for name, values in added.items()}
