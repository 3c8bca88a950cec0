"""The code blocks of README.md and docs/, and the examples, run as they stand: `make slow`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import blocks
from tests.conftest import shared

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PAGES = [page for page in blocks.PAGES if any(block.runs for block in blocks.blocks(page))]


def run(command: list[str | Path], cwd: Path, *programs: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PERCEIVER_MODEL"}
    environment["PATH"] = os.pathsep.join([*map(str, programs), str(BIN), environment["PATH"]])
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, warm_bin: Path) -> Path:
    """A folder with the data and the models that pages need, made once for all processes of the suite."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", os.pathsep.join([str(warm_bin), str(BIN), os.environ["PATH"]]))
            blocks.prepare(folder)

    return shared(tmp_path_factory, "docs-place", make)


@pytest.fixture
def place(prepared: Path, tmp_path: Path, warm_bin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, with the program in PATH."""
    monkeypatch.delenv("PERCEIVER_MODEL", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(warm_bin), str(BIN), os.environ["PATH"]]))
    shutil.copytree(prepared, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_and_print_what_the_page_shows(place: Path, page: Path) -> None:
    for block in blocks.blocks(page):
        if block.runs:
            fresh = blocks.run_block(block, place)
            assert blocks.without_numbers(fresh) == blocks.without_numbers(block.text), fresh


def test_quickstart_and_pipe_examples(tmp_path: Path, warm_bin: Path) -> None:
    done = run(["bash", ROOT / "examples" / "quickstart.sh", "demo", "--steps 25"], tmp_path, warm_bin)
    assert "Everything is in demo/" in done.stderr
    accuracy = re.search(r"test: accuracy ([\d.]+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.3
    assert done.stdout.count('"label"') >= 5
    assert (tmp_path / "demo" / "report" / "confusion.png").exists()
    piped = run(
        ["bash", ROOT / "examples" / "predict_in_a_pipe.sh", "demo/run", "demo/digits/test/1"], tmp_path, warm_bin
    )
    assert '"path": "camera"' in piped.stdout
    assert "status 3" in piped.stdout


def test_train_from_python_example(place: Path) -> None:
    script = ROOT / "examples" / "train_from_python.py"
    done = run(["python", script, "digits", "from-python", "train.steps=20"], place)
    assert "best model: from-python/model.safetensors" in done.stdout
    assert "test: 0." in done.stdout


def test_custom_modality_example(tmp_path: Path, warm_bin: Path) -> None:
    done = run(["python", ROOT / "examples" / "custom_modality.py", tmp_path], tmp_path, warm_bin)
    accuracy = re.search(r"test: accuracy ([\d.]+) of 40", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


def test_wine_example(tmp_path: Path, warm_bin: Path) -> None:
    run(["python", ROOT / "examples" / "write_wine.py", "wine"], tmp_path, warm_bin)
    options = ["--column", "bars=image,*=auto", "--steps", "10", "-o", "wine/run"]
    run(["perceiver", "train", "wine/wine.csv", *options], tmp_path, warm_bin)
    done = run(["perceiver", "evaluate", "wine/wine.csv", "-m", "wine/run", "--worth"], tmp_path, warm_bin)
    assert "(35 examples of image+table)" in done.stdout
    assert re.search(r"worth: accuracy [\d.]+ = [\d.]+ by chance \+ the share of each modality", done.stdout)


@pytest.mark.parametrize("modality", ["image", "audio", "points", "video"])
def test_explain_examples(modality: str, tmp_path: Path, warm_bin: Path) -> None:
    done = run(["python", ROOT / "examples" / "explain.py", modality, "out", "2"], tmp_path, warm_bin)
    assert f"{modality}: " in done.stdout
    assert (tmp_path / "out" / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "out.ply").exists() == (modality == "points")
