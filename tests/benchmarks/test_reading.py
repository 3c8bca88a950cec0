"""Benchmarks of reading and of records: that each gives its rows. Figures are for benchmarks, not for tests."""

from __future__ import annotations

import pytest

from benchmarks import loaders
from tests.benchmarks.conftest import Benchmark


def test_videos_beside_plain_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    monkeypatch.setattr(loaders, "MADE_UP_FILES", 4)
    monkeypatch.setattr(loaders, "BATCH", 2)
    rows = {row["name"]: row for row in loaders.loaders(0.1, 1)}
    workers = [f"loader, {count}{way}" for count in ("1 worker", "2 workers") for way in ("", ", augmenting")]
    assert list(rows) == ["plain PyAV", *workers]
    assert rows["plain PyAV"]["over_plain"] == 1
    assert all(row["clips_per_s"] > 0 for row in rows.values())


def test_records_by_command(benchmark: Benchmark) -> None:
    lines = benchmark("records", "--rounds", "1", "--seconds", "0.1", "--records", "200")
    rows = {line.get("name"): line for line in lines}
    assert rows["read shards, shuffled"]["samples_per_s"] > 0
    assert rows["preprocess, 2 workers"]["over"] == "preprocess, 1 worker"
    assert rows["records through a pipe"]["MB_per_s"] > 0
    for name in ("indexed", "opened"):
        row = rows[f"200 records of 8 x 8 pixels, {name}"]
        assert 0 < row["training_examples"] < 200
        assert row["peak_MiB"] < 200  # without torch
