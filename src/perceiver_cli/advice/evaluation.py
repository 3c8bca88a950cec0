"""What to do after an evaluation, by its figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perceiver_cli.advice.base import MOST, WEIGHTS, Advice, ratio_of, some
from perceiver_cli.config import Config
from perceiver_cli.data.survey import DataFacts
from perceiver_cli.errors import counted
from perceiver_cli.run_folder import CONFIG_FILE

UNEVEN_ENOUGH = 3.0  # the largest class over the smallest, from which weights help a class that is never answered
BELOW_VAL = 0.03  # the least distance of a test score's interval below the validation score
LARGE_ECE = 0.05  # the least calibration error for which a temperature is advised


@dataclass(frozen=True)
class Measured:
    """What is known after an evaluation. report: as in metrics.json. val_accuracy: the model's when it was saved.

    run: its run folder, None if the model lies elsewhere. has_report: whether the report was written. options: how the
    data is read, as words.
    """

    data: str
    model: str
    config: Config
    report: Mapping[str, Any]
    run: str | None = None
    val_accuracy: float | None = None
    facts: DataFacts = field(default_factory=DataFacts)
    is_calibrated: bool = False
    has_report: bool = False
    options: Sequence[str] = ()

    def again(self, *changes: str) -> tuple[str, ...]:
        """Return the command that trains once more with the model's options and changes."""
        recipe = ("--init-from", self.model) if self.run is None else ("--config", os.path.join(self.run, CONFIG_FILE))
        return "perceiver", "train", self.data, *self.options, *recipe, *changes

    def evaluate(self, *changes: str) -> tuple[str, ...]:
        """Return the command that measures the model once more with changes."""
        return "perceiver", "evaluate", self.data, *self.options, "-m", self.model, *changes


def after_evaluation(measured: Measured) -> list[Advice]:
    """Return what to do next, the most useful first, at most MOST pieces."""
    if measured.data == "-":  # a pipe cannot be read again
        return []
    rules = (_never_answered, _below_validation, _not_calibrated, _mistakes)
    return [advice for rule in rules if (advice := rule(measured)) is not None][:MOST]


def _never_answered(measured: Measured) -> Advice | None:
    """Advise class weights for classes with examples that are never answered, if classes differ in size."""
    rows = measured.report["per_class"]
    if measured.config.multi_label or measured.config.data.class_weight_power == 1:
        return None
    never = [name for name, row in rows.items() if row["count"] and row["precision"] is None]
    counts = {name: count for name, count in measured.facts.counts.items() if count} or {
        name: row["count"] for name, row in rows.items()
    }
    if not never or ratio_of(counts.values()) < UNEVEN_ENOUGH:
        return None
    files = sum(rows[name]["count"] for name in never)
    seen = f"{some(never)} {'is' if len(never) == 1 else 'are'} never answered, {counted(files, 'file')}"
    power = WEIGHTS if not measured.config.data.class_weight_power else ("--set", "data.class_weight_power=1")
    return Advice(f"{seen}; to weigh rare classes more", measured.again(*power))


def _below_validation(measured: Measured) -> Advice | None:
    """Advise groups if other data scores far lower than the validation split: that split resembles training files."""
    ends, before = measured.report["intervals_95"].get("accuracy"), measured.val_accuracy
    if measured.report["split"] == "val" or ends is None or before is None or ends[1] > before - BELOW_VAL:
        return None
    counts = [row["count"] for row in measured.report["per_class"].values() if "count" in row]
    if measured.config.data.group_by is not None or ratio_of(counts) < ratio_of(measured.facts.counts.values()) / 2:
        return None  # groups are in use already, or another mix of classes explains it
    seen = f"{before:.3f} on the run's validation files, {measured.report['accuracy']:.3f} here"
    if not measured.facts.shared_folders:
        return Advice(
            f"{seen}: if train and val both had files of one speaker, patient or video, pass a column of a manifest to "
            "--group-by for a validation score to trust"
        )
    group = ("--set", "data.split=none", "--group-by", "parent")
    return Advice(f"{seen}; for a score to trust, with each folder in one split", measured.again(*group))


def _not_calibrated(measured: Measured) -> Advice | None:
    """Advise a temperature if probabilities are far from shares of right answers."""
    ece, ends = measured.report["ece"], measured.report["intervals_95"].get("ece")
    if (
        measured.is_calibrated
        or not measured.facts.has_val
        or not ece
        or ece < LARGE_ECE
        or not ends
        or ends[0] < LARGE_ECE / 2
    ):
        return None
    return Advice(f"probabilities are off by {ece:.2f} on average; to calibrate them", measured.evaluate("--calibrate"))


def _mistakes(measured: Measured) -> Advice | None:
    """Advise a look at the mistakes, if there are any and no report was written."""
    report = measured.report
    if measured.has_report or report["accuracy"] == 1:
        return None
    wrong = round((1 - report["accuracy"]) * report["num_examples"])
    place = os.path.join(measured.run or ".", "report")
    return Advice(f"to see the {counted(wrong, 'mistake')}", measured.evaluate("--split", report["split"], "-o", place))
