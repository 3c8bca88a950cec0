"""The set of spoken commands: what the program chooses and finds. Its training takes hours: see the script."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perceiver_cli.data.lint import lint
from perceiver_cli.training.trainer import Trainer
from tests.slow.spoken_commands import SIZES, make

NEEDED = ("espeak-ng", "sox")


@pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"needs {' and '.join(NEEDED)}")
def test_rate_and_faults(tmp_path: Path) -> None:
    make(tmp_path / "data", share=0.1)
    plan = Trainer(tmp_path / "data", tmp_path / "run", overrides=["data.max_bad=0.1"]).plan
    assert len(plan.catalog.classes) == len(SIZES)
    assert " at 16 kHz, 64 mel bands, behind a stem" in plan.reads["audio"]
    assert " files are 8 kHz; " in plan.reads["audio"]
    report = lint(tmp_path / "data")
    assert len(report.unreadable) == 4
    assert len(report.faults["silent"]) == 2
    assert len(report.copies) == 3
    assert [group.conflict for group in report.copies].count(True) == 1
