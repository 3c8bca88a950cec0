"""Two machines, played by two agents of torchrun: they answer, count and prepare what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL, write_images

WAIT_S = 120


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a model."""
    folder = tmp_path_factory.mktemp("machines")
    write_images(folder / "data" / "train", {"a": 12, "b": 12})
    write_images(folder / "data" / "test", {"a": 10, "b": 13})
    sets = [word for option in (*SMALL, "train.steps=10") for word in ("--set", option)]
    assert one(folder, "train", "data", "-o", "run", *sets).returncode == 0
    return folder


def one(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "perceiver_cli", *words], cwd=folder, capture_output=True, check=False)


def two(folder: Path, *words: str) -> list[bytes]:
    """Return the stdout of a command on each of two machines."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", f"localhost:{port}", "-m", "perceiver_cli", *words,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        ends = [agent.communicate(timeout=WAIT_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], ends
    return [out for out, _ in ends]


def test_the_first_machine_answers_for_all_in_input_order(here: Path) -> None:
    expected = [json.loads(line) for line in one(here, "predict", "-m", "run", "data/test").stdout.splitlines()]
    first, second = sorted(two(here, "predict", "-m", "run", "data/test"), key=len, reverse=True)
    answers = [json.loads(line) for line in first.splitlines()]
    assert second == b""
    assert [answer["path"] for answer in answers] == [answer["path"] for answer in expected]
    assert [answer["prob"] for answer in answers] == pytest.approx([answer["prob"] for answer in expected], abs=1e-6)


def test_counts_of_two_machines_add_up(here: Path) -> None:
    expected = json.loads(one(here, "evaluate", "data", "-m", "run", "--json").stdout)
    found = json.loads(b"".join(two(here, "evaluate", "data", "-m", "run", "--json")))
    assert (found["num_examples"], found["confusion"]) == (23, expected["confusion"])
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_each_machine_prepares_a_tar_and_together_they_are_the_data(here: Path) -> None:
    two(here, "preprocess", "data", "-m", "run", "-o", "x.tar")
    assert {path.name for path in here.glob("x-*.tar")} == {"x-1of2.tar", "x-2of2.tar"}
    expected = json.loads(one(here, "evaluate", "data", "-m", "run", "--json").stdout)
    found = json.loads(one(here, "evaluate", "x-{1,2}of2.tar", "-m", "run", "--json").stdout)
    assert (found["num_examples"], found["confusion"]) == (23, expected["confusion"])
