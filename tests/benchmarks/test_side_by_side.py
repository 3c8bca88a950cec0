"""Two checkouts measured in turn: whose package runs, who goes first, and the ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.side_by_side import Checkout
from perceiver_cli.errors import DataError, ResourceError
from tests.benchmarks.conftest import ROOT

SIDES = Checkout("base", Path("a")), Checkout("here", Path("b"))


def test_a_checkout_runs_its_own_package(tmp_path: Path) -> None:
    side = side_by_side.checkout("here", ROOT)
    assert side.perceiver(tmp_path, "--version").startswith("perceiver ")
    with pytest.raises(ResourceError, match=r"here: -m perceiver_cli info nothing ended with 2: perceiver: .*nothing"):
        side.perceiver(tmp_path, "info", "nothing")
    with pytest.raises(DataError, match="expected a checkout of this repository"):
        side_by_side.checkout("base", tmp_path)


def test_the_two_take_turns_and_ratios_are_made_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def perceiver(side: Checkout, place: Path, *arguments: str) -> str:
        if arguments[0] != "bench":
            return ""
        calls.append(side.name)
        round_ = (len(calls) + 1) // 2  # the machine slows down by each, the first of which is not counted
        rate = (1.0 if side.name == "base" else 2.0) / round_
        return json.dumps({f"{name}_samples_per_s": rate for name in side_by_side.RATES})

    monkeypatch.setattr(Checkout, "perceiver", perceiver)
    rows = list(side_by_side.compare_checkouts(*SIDES, ["bench"], 3, 0.1))
    assert calls == ["here", "base", "base", "here", "here", "base", "base", "here"]
    assert [row["name"] for row in rows] == [f"tiny-image {name}, samples/s" for name in side_by_side.RATES]
    for row in rows:
        assert row["here_over_base"] == {"min": 2, "median": 2, "max": 2}
        assert row["base"] == pytest.approx(1 / 3)
        assert row["better"] == "higher"


def test_help_is_measured_over_the_libraries_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Checkout, "python", lambda *_: "")
    figures = side_by_side.measurements(tmp_path, 0.1)["help"](SIDES[0])
    assert all(value > 0 for value in figures.values())
    assert len(figures) == 2
    assert set(side_by_side.measurements(tmp_path, 0.1)) == set(side_by_side.MEASUREMENTS)
