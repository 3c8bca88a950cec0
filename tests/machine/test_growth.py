"""Growth over inputs: that the slope, the rows and the plot say what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perceiver_cli.config import load_preset
from perceiver_cli.errors import UsageError
from perceiver_cli.machine import growth
from perceiver_cli.machine.growth import Spent, Trial

TRIAL = Trial("imagenet", "forward", 0.01, "cpu", "fp32")


def at_once(name: str, measure: Callable[[Trial], Spent], trial: Trial) -> Spent:
    return measure(trial)


def in_a_microsecond_an_input(trial: Trial) -> Spent:
    assert trial.side is not None
    return Spent(1e-6 * trial.side**2, 1000)


def test_sides_are_of_images() -> None:
    assert growth.layouts_of(load_preset("imagenet"), 512)["image"].grid == (512, 512)
    with pytest.raises(UsageError, match="reads audio"):
        growth.layouts_of(load_preset("tiny-audio"), 512)


def test_slope_of_a_line() -> None:
    points = [(2**power, 3.0 * 2.0 ** (0.9 * power)) for power in (14, 16, 18)]
    assert growth.slope([(2**12, 1e9), *points]) == pytest.approx(0.9)


@pytest.mark.parametrize("names", [["ours"], ["ours", "usual (SDPA)"]])
def test_growth_and_its_plot(names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "in_new_process", at_once)
    rows: list[dict[str, Any]] = list(growth.growth(TRIAL, 1, dict.fromkeys(names, in_a_microsecond_an_input)))
    slopes = {(row["what"], row["name"]): row["slope"] for row in rows if "slope" in row}
    assert set(slopes) == {(what, name) for what in ("cross-attend", "model") for name in names}
    assert all(slope == pytest.approx(1.0) for slope in slopes.values())
    assert [row["inputs"] for row in rows if row["name"] == "ours" and "inputs" in row] == 2 * [*growth.GROWTH_INPUTS]
    growth.draw(rows, str(tmp_path / "growth.svg"))
    assert "<svg" in (tmp_path / "growth.svg").read_text()


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("alone", [False, True])
def test_our_model_is_measured(mode: str, alone: bool) -> None:
    spent = growth.measure_model(Trial("tiny-points", mode, 0.01, "cpu", "fp32", batch=2, alone=alone))
    assert spent.seconds > 0
    assert spent.peak_bytes >= 0
