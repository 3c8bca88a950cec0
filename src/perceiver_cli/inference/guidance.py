"""From an evaluation to what can be done next."""

from __future__ import annotations

import os

from perceiver_cli.advice.base import Advice
from perceiver_cli.advice.evaluation import Measured, after_evaluation
from perceiver_cli.config import DataConfig
from perceiver_cli.inference.evaluation import Report
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.run_folder import CONFIG_FILE, run_of

FIGURES = ("accuracy", "ece", "intervals_95", "num_examples", "per_class", "split")  # the figures that the rules read


def advice_on(report: Report, predictor: Predictor, data: str, *, has_report: bool) -> list[Advice]:
    """Return what to do after an evaluation of `data`, as the user named it."""
    path, info = predictor.path, predictor.info
    folder = run_of(path)
    run = os.fspath(folder) if folder is not None and (folder / CONFIG_FILE).is_file() else None
    figures = {name: getattr(report, name) for name in FIGURES}
    measured = Measured(
        data, run or os.fspath(path), info.config, figures, run, info.metrics.get("val_accuracy"),
        report.facts, info.calibration is not None, has_report, DataConfig(**predictor.options).words(),
    )  # fmt: skip
    return after_evaluation(measured)
