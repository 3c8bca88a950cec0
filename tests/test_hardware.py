"""Cores and memory, on systems that lack the calls of Linux."""

from __future__ import annotations

import os

import pytest

from perceiver_cli import hardware


def test_cores_by_whatever_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert hardware.cores() == 3
    monkeypatch.setattr(os, "process_cpu_count", lambda: None)
    assert hardware.cores() == 1
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert hardware.cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert hardware.cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware.cores() == 1


def test_memory_where_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    size = hardware.memory_bytes()
    assert size is None or size > 1 << 28

    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name: {name}")

    monkeypatch.setattr(os, "sysconf", unknown, raising=False)
    assert hardware.memory_bytes() is None
    monkeypatch.setattr(os, "sysconf", lambda _: -1)  # how sysconf says that it does not know
    assert hardware.memory_bytes() is None
    monkeypatch.delattr(os, "sysconf")
    assert hardware.memory_bytes() is None
