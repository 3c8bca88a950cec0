"""Runs side by side: what is read from them, how sure it is, what differs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from perceiver_cli.errors import UsageError
from perceiver_cli.inference.statistics import share_interval
from perceiver_cli.report.compare import compare
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive


@pytest.fixture(scope="module")
def short(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `bars` that ended before it had learned."""
    output = tmp_path_factory.mktemp("short") / "<b>$run"
    list(Trainer(bars, output, overrides=[*SMALL, "train.steps=4", "train.lr=0.0001", "train.seed=3"]).fit())
    return output


def test_runs_as_they_logged_themselves(trained: Path, short: Path) -> None:
    found = compare([str(trained), str(short)])
    first, second = found.runs
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in log if record["best"]][-1]
    assert first.accuracy == kept["val_accuracy"]
    assert first.seconds == log[-1]["elapsed_s"]
    assert first.num_examples == 15
    assert first.interval_95 == share_interval(round(15 * kept["val_accuracy"]), 15)
    assert first.curve == tuple((record["elapsed_s"], record["val_accuracy"]) for record in log)
    assert second.steps in (1, 2, 3, 4)  # of the model that was kept
    assert first.parameters == second.parameters > 1000
    assert found.differences["train.seed"] == (0, 3)
    assert found.differences["train.steps"] == (None, 4)
    assert "inputs" not in found.differences
    assert not any(key.startswith("model.") for key in found.differences)
    assert not any("different data" in note for note in found.notes)
    assert any("may be chance" in note for note in compare([str(trained), str(trained)]).notes)


def test_runs_of_other_data_and_moved_models_are_said_so(trained: Path, filmed: Path, tmp_path: Path) -> None:
    moved = shutil.copy(trained / "model.safetensors", tmp_path / "mine.safetensors")
    found = compare([str(filmed), str(moved)])
    assert found.differences["inputs"] == ("audio+video", "image")
    assert not any(key.startswith("inputs.") for key in found.differences)
    assert "the runs have different data" in found.notes[0]
    assert found.runs[1].interval_95 is None
    assert found.runs[1].seconds is None
    assert any(
        "mine.safetensors" in note and "number of validation examples is unknown" in note for note in found.notes
    )
    with pytest.raises(UsageError, match="1 run to compare"):
        compare([str(trained)])


def test_the_command(perceive: Perceive, trained: Path, short: Path, tmp_path: Path) -> None:
    done = perceive("compare", trained, short, "-o", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.decode().splitlines()
    assert head.split()[:5] == ["name", "accuracy", "interval", "loss", "examples"]
    assert {"train.seed", "train.steps", "train.lr"} <= set(head.split())
    assert [row.split()[0] for row in rows] == [str(trained), str(short)]
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 600
    facts = json.loads(perceive("compare", trained, short, "--json").stdout)
    assert [run["run"] for run in facts["runs"]] == [str(trained), str(short)]
    assert facts["runs"][0]["accuracy"] > facts["runs"][1]["accuracy"]
    svg = perceive("compare", trained, short, "-o", tmp_path / "plot.svg")
    assert svg.returncode == 0
    words = [
        text.text or "" for text in ElementTree.parse(tmp_path / "plot.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    assert any(word.endswith("<b>$run") for word in words)  # a stranger's name is text, and starts no mathematics
    before = (tmp_path / "plot.svg").read_bytes()
    perceive("compare", trained, short, "-o", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_bytes() == before
    done = perceive("compare", trained, short, "-o", tmp_path / "plot.gif")
    assert (done.returncode, done.stdout) == (2, b"")
    assert perceive("compare", trained, tmp_path / "none").returncode == 2


def test_runs_are_compared_and_drawn_without_torch(trained: Path, short: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from perceiver_cli.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    arguments = ["compare", str(trained), str(short), "-o", str(tmp_path / "plot.png")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "plot.png").stat().st_size > 1000
