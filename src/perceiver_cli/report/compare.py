"""Several runs side by side: validation scores with intervals, costs, options that differ, and tests of differences.

Everything is read from run folders, without torch; only scores on other data run the models.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perceiver_cli.config import Config
from perceiver_cli.data.splits import SPLIT_FILE, read_split
from perceiver_cli.errors import UsageError, counted
from perceiver_cli.files import open_file, parse_json, show_path, show_text
from perceiver_cli.inference.statistics import Interval, mean_interval, paired_chance, share_interval
from perceiver_cli.model.checkpoint import ModelInfo, read_info
from perceiver_cli.model.describe import describe
from perceiver_cli.report.charts import plotted
from perceiver_cli.run_folder import ANSWERS_FILE, find_model, read_log, run_of, runs_in

NAME_LENGTH = 40  # characters of a run's name in the plot
IN_LEGEND = 12  # runs in the legend of curves
MAX_ANSWERS_BYTES = 1 << 30
REPEATED = {"train.seed": "seed", "data.fold": "fold"}  # options whose values make repeated runs of one recipe
Answers = Mapping[str, bool]  # by id of an example: whether the answer is right
Axis = Literal["seconds", "steps"]


@dataclass(frozen=True)
class Tested:
    """The accuracy on the data of `--data`. chance: p of McNemar's test of the best run against this one."""

    split: str
    accuracy: float
    interval_95: Interval
    num_examples: int
    chance: float | None = None  # None for the best run, or for other examples


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
    curve_steps: tuple[int, ...] = ()  # steps of the evaluations in `curve`
    chance: float | None = None  # as in Tested, but on the validation examples
    tested: Tested | None = None

    @property
    def score(self) -> float:
        """The figure that decides: mAP or accuracy; below 0 if it was not evaluated."""
        return next((value for value in (self.mAP, self.accuracy) if value is not None), -1.0)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seed or fold: the mean of their scores."""

    runs: tuple[str, ...]
    repeated: str  # "seed" or "fold", or both: "seed, fold"
    mean: float
    std: float
    interval_95: Interval  # of the mean
    tested_split: str | None = None
    tested_mean: float | None = None
    tested_interval_95: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs, the highest score first, and the values of every option that differs between them, in the same order."""

    runs: tuple[RunFacts, ...]
    differences: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]
    groups: tuple[Group, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `compare --json`."""
        return asdict(self)


def compare(runs: Sequence[str], data: str | None = None, split: str | None = None) -> Comparison:
    """Return a comparison of run folders, folders of several runs, or model files; the best comes first.

    With `data` the models also answer its split, as in `evaluate`. Raises UsageError for fewer than two or
    without a model, IntegrityError if a model file, log or split is damaged.
    """
    every = [name for run in runs for name in _expanded(run)]
    # The pattern runs/* has a run and runs/latest, a link to it: the link is left out.
    own = {os.path.realpath(name) for name in every if not os.path.islink(name)}
    names = [name for name in every if not os.path.islink(name) or os.path.realpath(name) not in own]
    if gone := [name for name in names if not os.path.lexists(name)]:
        raise UsageError(f"{show_path(gone[0])}: no such run folder or model file")
    if len(names) < 2:
        raise UsageError(
            f"{counted(len(names), 'run')} to compare", "pass two or more: perceiver compare runs/a runs/b"
        )
    read = [_read(name) for name in names]
    tests: list[tuple[Tested | None, Answers]] = [(None, {}) for _ in names]
    if data is not None:
        tests = [_tested(name, data, split) for name in names]
    facts = [replace(facts, tested=tested) for (facts, _, _), (tested, _) in zip(read, tests, strict=True)]
    order = sorted(range(len(names)), key=lambda place: -facts[place].score)
    infos = [read[place][1] for place in order]
    rows = _with_chances(
        [facts[place] for place in order], [read[place][2] for place in order], [tests[place][1] for place in order]
    )
    groups = _groups(rows, infos)
    notes = (*_notes(rows, groups), *_notes_on_tests(rows))
    return Comparison(tuple(rows), _differences([info.config for info in infos]), notes, groups)


def _expanded(run: str) -> list[str]:
    """Return the run, or the runs with a model in a folder of several."""
    several = runs_in(run) if run else None
    return [run] if several is None else [os.fspath(each) for each in several]


def _read(run: str) -> tuple[RunFacts, ModelInfo, Answers]:
    """Return the row of a run, the header of its model, and its answers on the validation split."""
    path = find_model(run)
    info = read_info(path)
    in_run = run_of(path) is not None  # another model file does not belong to the run in its folder
    log = read_log(path.parent) if in_run else []
    split = path.parent / SPLIT_FILE
    count = int(read_split(split).held.sum()) if in_run and split.is_file() else 0
    accuracy = _number(info.metrics, "val_accuracy")
    timed = [(seconds, record) for record in log if (seconds := _number(record, "elapsed_s")) is not None]
    curve = [
        (at, share, record["step"]) for at, record in timed if (share := _number(record, "val_accuracy")) is not None
    ]
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
        curve=tuple((at, share) for at, share, _ in curve),
        curve_steps=tuple(step for _, _, step in curve),
    )
    return facts, info, _answers(path.parent / ANSWERS_FILE, accuracy) if in_run else {}


def _answers(path: Path, accuracy: float | None) -> Answers:
    """Return a run's answers on its validation split; none if the file is missing, damaged or of another model."""
    try:
        with open_file(path) as file:
            text = file.read(MAX_ANSWERS_BYTES)
        answers = {str(row["path"]): row["correct"] is True for row in map(parse_json, text.splitlines())}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    is_own = accuracy is not None and answers and abs(sum(answers.values()) - accuracy * len(answers)) < 0.5
    return answers if is_own else {}


def _tested(run: str, data: str, split: str | None) -> tuple[Tested, Answers]:
    """Return a model's accuracy on data, and its answers."""
    from perceiver_cli.inference.evaluation import evaluate
    from perceiver_cli.inference.predictor import Predictor

    report = evaluate(Predictor(run), data, split)
    answers = {str(record["path"]): bool(record["correct"]) for record in report.records}
    return Tested(report.split, report.accuracy, report.intervals_95["accuracy"], report.num_examples), answers


def _with_chances(rows: Sequence[RunFacts], answers: Sequence[Answers], tests: Sequence[Answers]) -> list[RunFacts]:
    """Return the runs; each but the first gets p of McNemar's test against the first on the same examples."""
    compared = []
    for row, own, on_test in zip(rows, answers, tests, strict=True):
        if row is not rows[0]:
            row = replace(row, chance=_chance(answers[0], own))
            if row.tested is not None:
                row = replace(row, tested=replace(row.tested, chance=_chance(tests[0], on_test)))
        compared.append(row)
    return compared


def _chance(best: Answers, other: Answers) -> float | None:
    if not best or best.keys() != other.keys():
        return None
    names = sorted(best)
    return paired_chance(*(np.array([answers[name] for name in names], bool) for answers in (best, other)))


def _groups(rows: Sequence[RunFacts], infos: Sequence[ModelInfo]) -> tuple[Group, ...]:
    """Return the groups of two runs or more whose configurations differ in REPEATED alone, the best mean first."""
    alike: dict[str, list[int]] = defaultdict(list)
    for place, info in enumerate(infos):
        options = dict(_flat(info.config.to_dict()))
        kept = {key: value for key, value in options.items() if key not in REPEATED}
        # Each fold divides the same data in its own way.
        kept["data"] = "" if options.get("data.fold") else info.data_fingerprint
        if rows[place].score >= 0:
            alike[json.dumps(kept, sort_keys=True)].append(place)
    groups = []
    for places in alike.values():
        own = [infos[place].config for place in places]
        repeated = [
            word for key, word in REPEATED.items() if len({dict(_flat(c.to_dict()))[key] for c in own}) > 1
        ]  # fmt: skip
        if len(places) > 1 and repeated:
            tests = [one for place in places if (one := rows[place].tested) is not None]
            tested = [one.accuracy for one in tests]
            scores = [rows[place].score for place in places]
            groups.append(
                Group(
                    tuple(rows[place].run for place in places), ", ".join(repeated), float(np.mean(scores)),
                    float(np.std(scores, ddof=1)), mean_interval(scores), tests[0].split if tests else None,
                    float(np.mean(tested)) if tested else None,
                    mean_interval(tested) if len(tested) > 1 else None,
                )
            )  # fmt: skip
    return tuple(sorted(groups, key=lambda group: -group.mean))


def _differences(configs: Sequence[Config]) -> dict[str, tuple[Any, ...]]:
    """Return the values of every option that differs; of inputs that not all runs have, the names."""
    tables = [dict(_flat(config.to_dict())) for config in configs]
    columns: dict[str, tuple[Any, ...]] = {"inputs": tuple("+".join(sorted(config.inputs)) for config in configs)}
    columns |= {key: tuple(table[key] for table in tables) for key in tables[0] if all(key in t for t in tables[1:])}
    del columns["name"]
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def _notes(rows: Sequence[RunFacts], groups: Sequence[Group]) -> Iterator[str]:
    folds = any("fold" in group.repeated for group in groups)
    same = len({row.fingerprint for row in rows}) == 1
    if not same and not folds:
        yield "the runs have different data, so their accuracies cannot be compared"
    for row in rows:
        if row.accuracy is None:
            yield f"{show_path(row.run)}: was not evaluated during training"
        elif row.interval_95 is None:
            yield f"{show_path(row.run)}: the number of validation examples is unknown without the run's split"
    if len(groups) > 1 and groups[1].interval_95[1] >= groups[0].interval_95[0]:
        yield f"the intervals of the best two groups of {groups[0].repeated}s overlap: their order may be chance"
    known = [row for row in rows if row.accuracy is not None and row.interval_95]
    if not same or groups or len(known) < 2:
        return
    best, second = known[:2]
    if second.chance is not None:
        if second.chance > 0.05:
            examples = f"p {second.chance:.2f} on the same validation examples"
            yield f"the order of the best two runs may be chance ({examples})"
    elif best.interval_95 and second.interval_95 and second.interval_95[1] >= best.interval_95[0]:
        yield "the intervals of the best two runs overlap: their order may be chance"


def _notes_on_tests(rows: Sequence[RunFacts]) -> Iterator[str]:
    sizes = {(row.tested.split, row.tested.num_examples) for row in rows if row.tested is not None}
    if len(sizes) > 1:
        yield f"the runs were tested on {', '.join(f'{count:,} of {split}' for split, count in sorted(sizes))}"


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


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return for each key of an option its shortest end that no other has: lr for train.lr."""
    ends = {key: [".".join(key.split(".")[-count:]) for count in range(1, key.count(".") + 2)] for key in keys}
    every = [end for own in ends.values() for end in own]
    return {key: next((end for end in own if every.count(end) == 1), key) for key, own in ends.items()}


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the names of runs without the folders that all of them share."""
    parts = [Path(run).parts for run in runs]
    folders = zip(*(own[:-1] for own in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
    return [os.path.join(*own[shared:]) for own in parts]


def draw_comparison(comparison: Comparison, path: str | os.PathLike[str], x: Axis = "seconds") -> None:
    """Write a plot as PNG or SVG: accuracy of each run over seconds or steps, and the accuracies with intervals."""
    runs = comparison.runs
    with plotted(path, 10.5, max(3.6, 1.2 + 0.35 * len(runs))) as figure:
        curves, scores = figure.subplots(1, 2)
        short = [f"…{name[-NAME_LENGTH:]}" if len(name) > NAME_LENGTH else name
                 for name in map(show_text, short_names([run.run for run in runs]))]  # fmt: skip
        for place, (run, name) in enumerate(zip(runs, short, strict=True)):
            colour = f"C{place % 10}"
            if run.curve:
                at = run.curve_steps if x == "steps" else [seconds for seconds, _ in run.curve]
                label = name if place < IN_LEGEND else None
                curves.plot(at, [share for _, share in run.curve], marker="o", markersize=3, color=colour, label=label)
            tests = [] if run.tested is None else [(run.tested.accuracy, run.tested.interval_95, "D", 0.15)]
            if run.accuracy is not None:
                tests.append(
                    (run.accuracy, run.interval_95 or (run.accuracy, run.accuracy), "o", -0.15 if tests else 0)
                )
            for share, ends, marker, shift in tests:
                scores.plot(ends, (place + shift, place + shift), color=colour, linewidth=2, alpha=0.5)
                scores.plot(share, place + shift, marker=marker, color=colour)
        scores.set_yticks(range(len(runs)), short)
        scores.tick_params(axis="y", labelsize=8)
        scores.set(ylim=(len(runs) - 0.5, -0.5), xlabel="accuracy, 95 % interval")
        splits = sorted({run.tested.split for run in runs if run.tested is not None})
        plain = partial(scores.plot, [], [], linestyle="", color="0.4")
        plain(marker="o", label="validation")
        if splits:
            plain(marker="D", label=", ".join(splits))
        curves.set(xlabel=f"{x} of training", ylabel="validation accuracy")
        for axes in (curves, scores):
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7, framealpha=0.8)
