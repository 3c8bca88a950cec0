"""What to do after a data set was checked or prepared, or a learning rate or a model was found."""

from __future__ import annotations

import re
from collections.abc import Sequence

from perceiver_cli.advice.base import UNEVEN, WEIGHTS, Advice
from perceiver_cli.data.clean import is_listable
from perceiver_cli.data.lint import LintReport
from perceiver_cli.errors import counted

CLEAN = "clean.csv"  # name that is proposed for a list of the good files
ENOUGH_STEPS = 50  # of a range test: enough for the loss of a model that can learn to fall
MORE_STEPS = 3  # factor of the steps of a range test that ended too early


def after_lint(
    report: LintReport, options: Sequence[str] = (), output: str | None = None, recipe: Sequence[str] = ()
) -> list[Advice]:
    """Return what to do next: leave out what is bad, then train. options: how the data is read, as words.

    output: the list of good files, if it was written. recipe: the words of the option that names the recipe.
    """
    if report.data == "-" or not report.sizes.get("train"):
        return []
    data = [*([report.data, *options] if output is None else [output]), *recipe]
    weigh = WEIGHTS if report.imbalance is not None and report.imbalance >= UNEVEN else ()
    seen = (
        f"the largest class has {report.imbalance:.0f} times the files of the smallest; to train with weights"
        if weigh
        else "to train"
    )
    train = Advice(seen, ("perceiver", "train", *data, *weigh))
    bad = len(report.unreadable) + sum(map(len, report.faults.values()))
    groups = [group for group in report.copies if group.across or group.conflict]
    if output is not None or not (bad or report.copies) or not is_listable(report.catalog):
        return [train]
    faults = [counted(bad, "faulty file")] if bad else []
    faults += [f"{counted(len(report.copies), 'group')} of copies"] if report.copies else []
    harm = ", which make scores too good or labels wrong" if groups else ""
    listed = ("perceiver", "lint", *data, "-o", CLEAN)
    return [Advice(f"{' and '.join(faults)}{harm}; for a list without them, to train on", listed), train]


def after_lr_find(
    command: Sequence[str], steps: int, options: Sequence[str] = (), *, fell: bool, fell_to_the_end: bool
) -> list[Advice]:
    """Return what to do if a range test found no rate to trust.

    command: that repeats the test. options: how the data is read, as words.
    """
    if not fell and steps >= ENOUGH_STEPS:
        look = ("perceiver", "lint", command[2], *options)
        return [Advice("the loss never fell: are the labels right? To look at the data", look)]
    if fell_to_the_end or not fell:
        more = str(MORE_STEPS * steps)
        seen = (
            "the loss still fell at the end; a longer test finds where it stops"
            if fell
            else "a longer test may find a rate"
        )
        return [Advice(seen, (*command, "--steps", more))]
    return []


def after_preprocess(output: str, *, labelled: bool, model: str | None) -> list[Advice]:
    """Return the command that reads the records in `output`. model: the one they were prepared for, if any."""
    if output == "-":
        return []
    records = re.sub(r"%0?\d*d", "*", output)
    if model is None:
        return [Advice("to train on them", ("perceiver", "train", records))] if labelled else []
    if labelled:
        return [Advice("to measure the model on them", ("perceiver", "evaluate", records, "-m", model))]
    return [Advice("to classify them", ("perceiver", "predict", records, "-m", model))]


def after_import(output: str) -> list[Advice]:
    """Return the commands that use an imported model."""
    return [
        Advice("to classify pictures with it", ("perceiver", "predict", "-m", output, "FILE")),
        Advice("to train it on classes of your own", ("perceiver", "train", "DATA", "--init-from", output)),
    ]
