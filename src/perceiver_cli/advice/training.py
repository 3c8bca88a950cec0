"""What to do after training, by the run's log and the sizes of its classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from perceiver_cli.advice.base import MOST, UNEVEN, WEIGHTS, Advice, error_of, ratio_of
from perceiver_cli.config import Config
from perceiver_cli.data.survey import DataFacts
from perceiver_cli.errors import counted
from perceiver_cli.run_folder import CONFIG_FILE, score_of

FEW_STEPS = 200  # with fewer, a model that has learned nothing, or whose time was over, was stopped too early
MANY_STEPS = 500  # proposed in their place
LEAST_EVALUATIONS = 6  # for a rule about the shape of a curve
NOISE = 1.2  # standard errors; a larger fall between evaluations of the same examples is not chance
JUMP = 0.03  # smallest such fall
SLOWER = 4  # divisor of the learning rate of a curve that jumps
PERFECT, LEAST_PERFECT = 0.995, 50  # a score that copies in both splits would explain, and how many examples it needs


@dataclass(frozen=True)
class Trained:
    """What is known at the end of a run.

    data, run: paths as the user named them. log: the evaluations, oldest first. num_bad: unreadable files.
    """

    data: str
    run: str
    config: Config
    facts: DataFacts
    num_val: int
    log: Sequence[Mapping[str, Any]]
    num_bad: int = 0
    init_from: str | None = None

    def again(self, *changes: str) -> tuple[str, ...]:
        """Return the command that trains once more with the options of this run and changes."""
        start = () if self.init_from is None else ("--init-from", self.init_from)
        return "perceiver", "train", self.data, "--config", os.path.join(self.run, CONFIG_FILE), *start, *changes

    def lint(self) -> tuple[str, ...]:
        """Return the command that looks at the data."""
        return "perceiver", "lint", self.data, *self.config.data.words()

    def scores(self) -> list[float]:
        """Return the validation scores, oldest first: mAP with several labels an example, else accuracy."""
        return [score for record in self.log if (score := score_of(record)) is not None]

    def error(self, score: float) -> float:
        """Return the standard error of a validation score."""
        return error_of(score, self.num_val)


def after_training(trained: Trained) -> list[Advice]:
    """Return what to do next, the most useful first: at most MOST pieces, the last of which is to evaluate."""
    if trained.data == "-":  # a pipe cannot be read again
        return []
    rules = (
        _cut_short, _drowned_classes, _knows_nothing, _jumps, _still_improves, _shared_folders, _too_good, _unreadable
    )  # fmt: skip
    found = [advice for rule in rules if (advice := rule(trained)) is not None]
    return [*found[: MOST - 1], _evaluate(trained)]


def _guess(trained: Trained) -> float:
    """Return the share of the largest class: the accuracy of always answering it."""
    return max(trained.facts.counts.values()) / max(1, sum(trained.facts.counts.values()))


def _learned(trained: Trained) -> bool:
    """Return whether a score beats that of one answer by more than chance, or by half of what is left to learn."""
    guess = _guess(trained)
    return max(trained.scores(), default=0) > guess + min(2 * trained.error(guess), (1 - guess) / 2)


def _cut_short(trained: Trained) -> Advice | None:
    """Advise more time if it was enough for a few steps only: what such a model lacks is steps, before all else."""
    limit, step = trained.config.train.max_time_s, trained.log[-1]["step"] if trained.log else FEW_STEPS
    if not limit or step >= FEW_STEPS or not _learned(trained) or max(trained.scores()) >= PERFECT:
        return None
    seen = f"the time was enough for {counted(step, 'step')}, which are few; go on for as long again"
    return Advice(seen, _longer(trained, 2 * step))


def _knows_nothing(trained: Trained) -> Advice | None:
    """Advise more steps after a few, else another learning rate, for a model that is no better than one answer."""
    if trained.config.multi_label or not trained.scores() or _learned(trained):
        return None
    seen = f"no better than always answering the largest class, {_guess(trained):.0%} of the files"
    if (step := trained.log[-1]["step"]) < FEW_STEPS:
        return Advice(f"{seen}; {counted(step, 'step')} are few", _longer(trained, MANY_STEPS))
    find = ("perceiver", "lr-find", trained.data, "--config", os.path.join(trained.run, CONFIG_FILE))
    return Advice(f"{seen}; another learning rate may learn", find)


def _jumps(trained: Trained) -> Advice | None:
    """Advise a lower learning rate if in the later half scores fall again and again, by more than chance."""
    scores = trained.scores()
    if len(scores) < LEAST_EVALUATIONS or not _learned(trained):
        return None
    later = scores[len(scores) // 2 - 1 :]
    falls = [before - after for before, after in pairwise(later) if after < before]
    if len(falls) < max(2, len(later) // 4) or fmean(falls) < max(JUMP, NOISE * trained.error(fmean(later))):
        return None
    seen = f"the validation score falls by {fmean(falls):.3f} again and again; a lower rate"
    return Advice(seen, trained.again("--lr", f"{trained.config.train.lr / SLOWER:.2g}"))


def _still_improves(trained: Trained) -> Advice | None:
    """Advise a longer run if the last third raised the score by more than chance and validation loss never rose."""
    scores = trained.scores()
    if len(scores) < LEAST_EVALUATIONS or not _learned(trained) or _cut_short(trained) is not None:
        return None
    losses = [record["val_loss"] for record in trained.log if "val_loss" in record]
    third = len(scores) // 3
    before, after = max(scores[:-third]), fmean(scores[-2:])
    if after < before + trained.error(before) or losses[-1] > 1.02 * min(losses):
        return None
    seen = f"still improving, {before:.3f} to {after:.3f} in the last third; continue for as long again"
    return Advice(seen, _longer(trained, 2 * trained.log[-1]["step"]))


def _longer(trained: Trained, steps: int) -> tuple[str, ...]:
    """Return the command that continues a run, to a number of steps or to twice its time."""
    if limit := trained.config.train.max_time_s:
        return "perceiver", "train", "--resume", "-o", trained.run, "--max-time", f"{2 * limit:g}"
    return "perceiver", "train", "--resume", "-o", trained.run, "--steps", str(steps)


def _drowned_classes(trained: Trained) -> Advice | None:
    """Advise class weights for classes of very different sizes."""
    config, ratio = trained.config, ratio_of(trained.facts.counts.values())
    if config.multi_label or config.data.class_weight_power or ratio < UNEVEN or max(trained.scores(), default=0) == 1:
        return None
    seen = f"the largest class has {ratio:.0f} times the files of the smallest; to answer rare ones more often"
    return Advice(seen, trained.again(*WEIGHTS))


def _shared_folders(trained: Trained) -> Advice | None:
    """Advise groups if files of one folder are in both splits: the model then knows a speaker, patient or video."""
    if not trained.facts.shared_folders:
        return None
    shared = f"files of {counted(trained.facts.shared_folders, 'folder')} are in both train and val"
    seen = f"{shared}; if a folder is one speaker or video, the score is too good"
    return Advice(seen, trained.again("--set", "data.split=none", "--group-by", "parent"))


def _too_good(trained: Trained) -> Advice | None:
    """Advise a look for copies if nearly every validation answer is right."""
    scores = trained.scores()
    if trained.num_val < LEAST_PERFECT or max(scores, default=0) < PERFECT:
        return None
    return Advice("nearly every answer is right; to check that no copies are in both splits", trained.lint())


def _unreadable(trained: Trained) -> Advice | None:
    if not trained.num_bad:
        return None
    return Advice(f"{counted(trained.num_bad, 'file')} could not be read; to see all faults", trained.lint())


def _evaluate(trained: Trained) -> Advice:
    """Advise to measure the model on test, or to look at its mistakes on val."""
    seen = "to measure it on test" if trained.facts.has_test else "to see its mistakes"
    report = os.path.join(trained.run, "report")
    return Advice(seen, ("perceiver", "evaluate", trained.data, "-m", trained.run, "-o", report))
