"""TensorBoard's event files, read back with its own reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from math import nan
from pathlib import Path

import pytest

from perceiver_cli.data.account import Account
from perceiver_cli.errors import UsageError
from perceiver_cli.training import tensorboard
from perceiver_cli.training.events import Evaluated, Event, Started, StepDone
from perceiver_cli.training.tensorboard import check_tensorboard, logged
from tests.conftest import SMALL, Perceive

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None,
    reason="tensorboard is not installed: pip install 'perceiver-cli[tensorboard]'",
)
SETS = [part for change in SMALL for part in ("--set", change)]


def read(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / tensorboard.FOLDER)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_command(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    done = perceive("train", bars, *SETS, "--steps", "12", "-o", tmp_path / "run", "--log", "tensorboard")
    assert done.returncode == 0, done.stderr
    figures = read(tmp_path / "run")
    assert [step for step, _ in figures["train/loss"]] == list(range(1, 13))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], pytest.approx(row["val_loss"], rel=1e-6)) for row in rows]
    assert figures["val/loss"] == expected


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_goes_on_in_the_same_plot(tmp_path: Path) -> None:
    def events(first: int, last: int) -> Iterator[Event]:
        yield Started({"output": str(tmp_path)}, (), Account())
        for step in range(first, last):
            yield StepDone(step, 9, 0.0, 1.0 * first, 0.1, 5.0)
        yield Evaluated(last - 1, 0.0, nan, 0.5, nan, True, 1.0)

    for first, last in ((1, 6), (4, 9)):  # killed after step 5, resumed from step 3
        assert len(list(logged(events(first, last)))) == last - first + 2
    figures = read(tmp_path)
    assert figures["train/loss"] == [(1, 1), (2, 1), (3, 1), *((step, 4) for step in range(4, 9))]
    assert [step for step, _ in figures["val/accuracy"]] == [8]
    assert "val/loss" not in figures


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_evaluation_may_come_first(tmp_path: Path) -> None:
    """On a GPU the loss of a step is read every 16 steps only."""
    started = Started({"output": str(tmp_path)}, (), Account())
    list(logged(iter([started, Evaluated(3, 0.0, nan, 0.5, 0.25, True, 1.0)])))
    assert read(tmp_path)["val/loss"] == [(3, 0.25)]


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'perceiver-cli\[tensorboard\]'"):
        check_tensorboard()
