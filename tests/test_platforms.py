"""The commands on systems that lack what Linux has; tests/platforms/sitecustomize.py takes it away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

import pytest

from perceiver_cli.data.catalog import scan
from perceiver_cli.data.pairing import identity
from perceiver_cli.files import show_path
from perceiver_cli.run_folder import find_model
from tests.conftest import write_images

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `perceiver` as on Windows, which lacks all that macOS lacks, in a console of code page 1252."""

    def call(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PERCEIVER_")}
        folder = Path(__file__).parent / "platforms"
        path = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": path, "PERCEIVER_TEST_WITHOUT": "windows", "PYTHONIOENCODING": "cp1252"}
        command = [sys.executable, "-m", "perceiver_cli", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=170
        )
        assert done.returncode == status, done.stderr
        return done

    return call


@pytest.mark.slow
def test_train_preprocess_and_predict(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"red": 4, "猫": 4})
    trained = run("train", "data", "-o", "runs/one", "--steps", "2", "--workers", "1")
    assert Path(trained.stdout.strip()) == Path("runs/one/model.safetensors")
    run("preprocess", "data", "-o", "data.tar", "--workers", "1")
    (tmp_path / "broken.png").write_bytes(b"broken")
    answers = [json.loads(line) for line in run("predict", "data.tar", "broken.png", status=3).stdout.splitlines()]
    assert {answer.get("label") for answer in answers[:8]} <= {"red", "猫"}
    assert "broken.png" in answers[8]["error"]
    assert "already holds a run" in run("train", "data.tar", "-o", "runs/one", "--steps", "1", status=2).stderr


def test_ids_and_splits_are_the_same_on_any_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backslash in an id would give another split: its hash decides."""
    write_images(tmp_path / "folders", {"train/red": 9, "train/blue": 9, "val/red/deep": 2})
    write_images(tmp_path / "listed", {"a": 3, "b": 3})
    rows = [f"{label}\\{number:03d}.png,{label}" for label in "ab" for number in range(3)]
    (tmp_path / "listed" / "metadata.csv").write_text("file_name,label\n" + "\n".join(rows) + "\n")

    def found() -> list[object]:
        catalogs = [scan(tmp_path / name) for name in ("folders", "listed")]
        return [(catalog.fingerprint, catalog.accounted(), catalog.splits["train"][0].id) for catalog in catalogs]

    here = found()
    monkeypatch.setattr(os, "sep", "\\")
    assert found() == here
    assert identity(["red\\1.png"]) == "red/1.png"
    assert identity(["red\\1.png", "red/1.wav"]) == "red/1"


def test_latest_is_a_text_file_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "model.safetensors").write_bytes(b"")
    (tmp_path / "runs" / "latest").write_text("one")
    assert find_model("runs/latest") == Path("runs/one/model.safetensors")


def test_paths_of_windows_are_shown_as_one_safe_line() -> None:
    assert show_path(PureWindowsPath("C:\\Users\\a\\x.png")) == "'C:\\\\Users\\\\a\\\\x.png'"
