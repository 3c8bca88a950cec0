"""Files that version 0.1.0 wrote are still read, and mean the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from perceiver_cli import Predictor, Trainer
from perceiver_cli.training.events import Finished
from tests.conftest import Perceive

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1"
EXPECTED = {line["path"]: line for line in map(json.loads, (FIXTURES / "expected.jsonl").read_text().splitlines())}
TAR_MTIME_NS = 1_700_000_000_000_000_000  # which the kept index holds, and no checkout keeps


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of the fixtures, with the time of the tar as it was."""
    folder = shutil.copytree(FIXTURES, tmp_path / "kept")
    os.utime(folder / "records.tar", ns=(TAR_MTIME_NS, TAR_MTIME_NS))
    return folder


def lines(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def check(found: list[dict[str, Any]], *paths: str) -> None:
    """Ask that predictions are the expected ones of these files."""
    assert [line["path"] for line in found] == list(paths)
    for line in found:
        assert line["label"] == EXPECTED[line["path"]]["label"]
        assert line["probs"] == pytest.approx(EXPECTED[line["path"]]["probs"], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("run", ["one.png", "two.png"]),
        ("run/model.safetensors", ["one.png", "two.png"]),
        ("audio.safetensors", ["tone.wav"]),
    ],
)
def test_a_model_answers_as_it_did(kept: Path, monkeypatch: pytest.MonkeyPatch, model: str, inputs: list[str]) -> None:
    monkeypatch.chdir(kept)
    check([found.to_dict(all_probs=True) for found in Predictor(model, device="cpu").predict(inputs)], *inputs)


def test_records_are_read_as_they_were(perceive: Perceive, kept: Path) -> None:
    done = perceive("predict", "records.tar", "-m", "run", "--all-probs", "--device", "cpu", cwd=kept)
    assert done.returncode == 0, done.stderr
    check(lines(done.stdout), "one.png", "two.png")


def test_the_kept_index_is_used(perceive: Perceive, kept: Path) -> None:
    """An index that does not fit would be replaced by a new file."""
    index = kept / "records.tar.index"
    before, content = index.stat(), index.read_bytes()
    done = perceive("lint", "records.tar", "--json", "--workers", "0", cwd=kept)
    assert done.returncode == 0, done.stderr
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert index.read_bytes() == content
    os.utime(kept / "records.tar")  # and one of another time does not fit
    assert perceive("lint", "records.tar", "--json", "--workers", "0", cwd=kept).returncode == 0
    assert index.stat().st_ino != before.st_ino


def test_a_run_goes_on(kept: Path) -> None:
    run = kept / "run"
    *_, last = Trainer(kept / "images", run, overrides=["train.steps=43"], resume=True).fit()
    assert isinstance(last, Finished)
    steps = [line["step"] for line in lines((run / "metrics.jsonl").read_bytes())]
    assert steps[:4] == [10, 20, 30, 40]
    assert steps[-1] == 43
    assert (run / "last" / "step-00000043.safetensors").exists()


def test_a_configuration_is_a_recipe(perceive: Perceive, kept: Path) -> None:
    done = perceive("train", "images", "--config", "run/config.toml", "--dry-run", cwd=kept)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] == 40
    assert plan["classes"] == {"left": 3, "middle": 3, "right": 3}
