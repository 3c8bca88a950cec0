"""Cores and memory, on systems that lack the calls of Linux."""

from __future__ import annotations

import os

import pytest

from perceiver_cli import hardware
from perceiver_cli.errors import UsageError


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


STEP = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
}  # fmt: skip
PLACES = {
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, hardware.Place(3, 4, 1, 2)
    ),
    "a step of SLURM": (STEP, hardware.Place(5, 7, 1, 3)),
    "a script of SLURM, no step": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
    "no launcher": ({"RANK": "1"}, (0, 1, 0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_the_place_of_a_process(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variables, expected = PLACES[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert hardware.place() == expected


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "2"}, {**STEP, "SLURM_NODEID": "9"}],
    ids=["rank too high", "no number", "no such node"],
)
def test_a_place_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=r"unset (them|WORLD_SIZE)"):
        hardware.place()


def test_processes_of_a_job_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = hardware.memory_bytes()
    monkeypatch.setattr(hardware, "machine_cores", lambda: 8)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert hardware.cores() == 2
    assert alone is None or hardware.memory_bytes() == alone // 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")  # then the eight are those of one task
    assert hardware.cores() == 8
