"""The README's blocks and the examples, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"<!-- test: digits -->\n```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(command: list[str | Path], cwd: Path, *programs: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PERCEIVER_MODEL"}
    environment["PATH"] = os.pathsep.join([*map(str, programs), str(BIN), environment["PATH"]])
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits/ in it, as the README's commands expect."""
    folder = tmp_path_factory.mktemp("readme")
    run([sys.executable, ROOT / "examples" / "write_digits.py", "digits"], folder)
    return folder


def test_the_readme_has_blocks_to_run() -> None:
    assert [language for language, _ in BLOCKS] == ["sh", "sh", "python", "python"]


@pytest.mark.parametrize(
    ("language", "text"), BLOCKS, ids=[f"{i}-{language}" for i, (language, _) in enumerate(BLOCKS)]
)
def test_readme_blocks_run(place: Path, warm_bin: Path, language: str, text: str) -> None:
    command: list[str | Path] = ["bash", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    done = run(command, place, warm_bin)
    if "preprocess digits |" in text:
        assert "runs/piped/model.safetensors" in done.stdout
        assert done.stdout.count('"label"') >= 2
        assert done.stdout.endswith("(8, 8, 1)\n")
    elif language == "sh":
        assert '"path": "digits/test/7/0300.png", "label": ' in done.stdout
        assert "path,label,prob,label_2,prob_2,error" in done.stdout
        assert "44,912,254" in done.stdout
        assert "50176 x 261 float32" in done.stderr
    else:
        assert "Finished(" in done.stdout or "torch.Size([2, 10])" in done.stdout


def test_the_page_of_rooms_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "perceiver_cli").rglob("*.py"):
        if not path.name.startswith("__"):
            assert re.search(rf"`{path.stem}(\.py)?`", text), path


def test_quickstart_and_pipe_examples(tmp_path: Path, warm_bin: Path) -> None:
    done = run(["bash", ROOT / "examples" / "quickstart.sh", "demo", "8s"], tmp_path, warm_bin)
    assert "Everything is in demo/" in done.stderr
    accuracy = re.search(r"test: accuracy ([\d.]+)", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.2  # seconds of training, on shared cores
    assert done.stdout.count('"label"') >= 5
    assert (tmp_path / "demo" / "report" / "confusion.png").exists()
    piped = run(
        ["bash", ROOT / "examples" / "predict_in_a_pipe.sh", "demo/run", "demo/digits/test/1"], tmp_path, warm_bin
    )
    assert '"path": "camera"' in piped.stdout
    assert "status 3" in piped.stdout


def test_train_from_python_example(place: Path) -> None:
    script = ROOT / "examples" / "train_from_python.py"
    done = run([sys.executable, script, "digits", "from-python", "train.steps=20"], place)
    assert "best model: from-python/model.safetensors" in done.stdout
    assert "test: 0." in done.stdout


def test_custom_modality_example(tmp_path: Path) -> None:
    done = run([sys.executable, ROOT / "examples" / "custom_modality.py", tmp_path], tmp_path)
    accuracy = re.search(r"test: accuracy ([\d.]+) of 40", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


@pytest.mark.parametrize("modality", ["image", "audio", "points", "video"])
def test_explain_examples(modality: str, tmp_path: Path) -> None:
    done = run([sys.executable, ROOT / "examples" / "explain.py", modality, "out", "2"], tmp_path)
    assert f"{modality}: " in done.stdout
    assert (tmp_path / "out" / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "out.ply").exists() == (modality == "points")


def test_every_command_and_option_is_documented() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_cli import PAGE, page
    finally:
        sys.path.remove(str(ROOT / "docs"))
    text = page()
    assert PAGE.read_text() == text, "renew it: python docs/make_cli.py"
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert rows
    assert [row[0] for row in rows if not row[1].strip()] == []  # each says what it means
