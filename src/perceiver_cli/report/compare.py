"""Several runs side by side: validation scores with intervals, costs, and the options that differ.

Everything is read from the run folders; no model is built, so torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from perceiver_cli.config import Config
from perceiver_cli.data.splits import SPLIT_FILE, read_split
from perceiver_cli.errors import UsageError
from perceiver_cli.files import show_path, show_text
from perceiver_cli.inference.statistics import Interval, share_interval
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.model.describe import describe
from perceiver_cli.report.charts import plotted
from perceiver_cli.run_folder import MODEL_FILE, find_model, read_log

NAME_LENGTH = 40  # characters of a run's name in the plot


@dataclass(frozen=True)
class RunFacts:
    """Scores of a run's best model on the validation split, and the cost of the run."""

    run: str
    preset: str
    accuracy: float | None
    interval_95: Interval | None  # of the accuracy; None if the run's split is missing
    mAP: float | None
    loss: float | None
    num_examples: int | None
    seconds: float | None  # until the last evaluation; None without a log
    steps: int
    parameters: int
    fingerprint: str
    curve: tuple[tuple[float, float], ...]  # (seconds, accuracy) of every evaluation


@dataclass(frozen=True)
class Comparison:
    """Runs in the order of the arguments, and the values of every option that differs between them."""

    runs: tuple[RunFacts, ...]
    differences: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `compare --json`."""
        return asdict(self)


def compare(runs: Sequence[str]) -> Comparison:
    """Return a comparison of run folders or model files.

    Raises UsageError for fewer than two or without a model, IntegrityError if a model file, log or split is damaged.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run to compare", "pass two or more: perceiver compare runs/a runs/b")
    rows, configs = [], []
    for run in runs:
        path = find_model(run)
        info = read_info(path)
        in_run = path.name == MODEL_FILE  # another model file does not belong to the run in its folder
        log = read_log(path.parent) if in_run else []
        split = path.parent / SPLIT_FILE
        count = int(read_split(split).held.sum()) if in_run and split.is_file() else 0
        accuracy = _number(info.metrics, "val_accuracy")
        timed = [(seconds, record) for record in log if (seconds := _number(record, "elapsed_s")) is not None]
        curve = [(at, share) for at, record in timed if (share := _number(record, "val_accuracy")) is not None]
        right = None if accuracy is None or not count else round(accuracy * count)
        facts = RunFacts(
            run=run,
            preset=info.config.name,
            accuracy=accuracy,
            interval_95=None if right is None or not 0 <= right <= count else share_interval(right, count),
            mAP=_number(info.metrics, "val_mAP"),
            loss=_number(info.metrics, "val_loss"),
            num_examples=count or None,
            seconds=timed[-1][0] if timed else None,
            steps=info.step,
            parameters=describe(str(path))["parameters"],
            fingerprint=info.data_fingerprint,
            curve=tuple(curve),
        )
        rows.append(facts)
        configs.append(info.config)
    return Comparison(tuple(rows), _differences(configs), tuple(_notes(rows)))


def _differences(configs: Sequence[Config]) -> dict[str, tuple[Any, ...]]:
    """Return the values of every option that differs; of inputs that not all runs have, the names."""
    tables = [dict(_flat(config.to_dict())) for config in configs]
    columns: dict[str, tuple[Any, ...]] = {"inputs": tuple("+".join(sorted(config.inputs)) for config in configs)}
    columns |= {key: tuple(table[key] for table in tables) for key in tables[0] if all(key in t for t in tables[1:])}
    del columns["name"]
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def _notes(rows: Sequence[RunFacts]) -> Iterator[str]:
    same = len({row.fingerprint for row in rows}) == 1
    if not same:
        yield "the runs have different data, so their accuracies cannot be compared"
    for row in rows:
        if row.accuracy is None:
            yield f"{show_path(row.run)}: was not evaluated during training"
        elif row.interval_95 is None:
            yield f"{show_path(row.run)}: the number of validation examples is unknown without the run's split"
    known = [(row.accuracy, row.interval_95) for row in rows if row.accuracy is not None and row.interval_95]
    if same and len(known) > 1:
        (_, best), (_, second) = sorted(known, key=lambda pair: pair[0], reverse=True)[:2]
        if second[1] >= best[0]:
            yield "the intervals of the best two runs overlap: their order may be chance"


def _number(record: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number from a record, or None."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def draw_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write a plot as PNG or SVG: accuracy over seconds of each run, and the final accuracies with intervals."""
    runs = comparison.runs
    with plotted(path, 9.5, max(3.2, 1.2 + 0.35 * len(runs))) as figure:
        over_time, kept = figure.subplots(1, 2)
        for place, run in enumerate(runs):
            colour = f"C{place % 10}"
            if run.curve:
                over_time.plot(*zip(*run.curve, strict=True), marker="o", markersize=3, color=colour)
            if run.accuracy is not None:
                low, high = run.interval_95 or (run.accuracy, run.accuracy)
                kept.plot((low, high), (place, place), color=colour, linewidth=2, alpha=0.5)
                kept.plot(run.accuracy, place, marker="o", color=colour)
        names = [show_text(run.run) for run in runs]
        short = [f"…{name[-NAME_LENGTH:]}" if len(name) > NAME_LENGTH else name for name in names]
        kept.set_yticks(range(len(runs)), short)
        kept.tick_params(axis="y", labelsize=8)
        kept.set(ylim=(len(runs) - 0.5, -0.5), xlabel="accuracy of the saved model, 95 % interval")
        over_time.set(xlabel="seconds of training", ylabel="validation accuracy")
        for axes in (over_time, kept):
            axes.grid(alpha=0.3)
