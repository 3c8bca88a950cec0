"""`perceiver bench`: samples per second of one's own training step, forward pass and loader."""

from __future__ import annotations

import pytest
import torch

from perceiver_cli.errors import UsageError
from perceiver_cli.machine import speed
from tests.conftest import Perceive


@pytest.mark.parametrize("workers", [0, 1])
def test_bench_gives_rates_and_the_machine(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MADE_UP_FILES", 8)
    facts = speed.bench("tiny-points", 4, 0.1, "cpu", "fp32", workers)
    for name in ("training", "forward", "loader"):
        assert facts[f"{name}_samples_per_s"] > 0
    assert facts["batch_size"] == 4
    assert facts["torch"] == torch.__version__


def test_a_batch_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench imagenet` took all memory of its machine, and was killed without a word."""
    monkeypatch.setattr(speed, "MADE_UP_FILES", 8)
    monkeypatch.setattr(speed, "memory_bytes", lambda: 40 << 20)
    told: list[str] = []
    facts = speed.bench("tiny-points", None, 0.1, "cpu", "fp32", 0, told.append)
    assert 1 <= facts["batch_size"] < 32
    assert told[1:] == ["training steps", "forward passes"]
    with pytest.raises(UsageError, match="a step of 1,024 needs about"):
        speed.bench("tiny-points", 1024, 0.1, "cpu", "fp32", 0)


def test_other_implementations_are_not_measured_by_the_package(perceive: Perceive) -> None:
    assert perceive("bench", "tiny-points", "--against", "usual").returncode == 2
    assert perceive("bench", "data").returncode == 2
