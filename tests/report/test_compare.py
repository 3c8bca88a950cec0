"""Runs side by side: what is read from them, how sure it is, what differs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from math import comb
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.cli.runs import columns_of, fitted
from perceiver_cli.errors import UsageError
from perceiver_cli.inference.statistics import mean_interval, paired_chance, share_interval
from perceiver_cli.report.compare import compare, short_keys, short_names
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive


@pytest.fixture(scope="module")
def short(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `bars` that ended before it had learned."""
    output = tmp_path_factory.mktemp("short") / "<b>$run"
    changes = ["inputs.image.stem=none", "train.steps=4", "train.lr=0.0001", "train.seed=3"]
    list(Trainer(bars, output, overrides=[*SMALL, *changes]).fit())
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
    link = short.parent / "linked"  # as runs/latest beside its run in runs/*
    link.symlink_to(short)
    assert [run.run for run in compare([str(trained), str(short), str(link)]).runs] == [str(trained), str(short)]
    link.unlink()


def test_runs_of_other_data_and_moved_models_are_said_so(trained: Path, filmed: Path, tmp_path: Path) -> None:
    moved = shutil.copy(trained / "model.safetensors", tmp_path / "mine.safetensors")
    found = compare([str(filmed), str(moved)])
    assert found.differences["inputs"] == ("image", "audio+video")  # the better one first
    assert not any(key.startswith("inputs.") for key in found.differences)
    assert "the runs have different data" in found.notes[0]
    assert found.runs[0].interval_95 is None
    assert found.runs[0].seconds is None
    assert any(
        "mine.safetensors" in note and "number of validation examples is unknown" in note for note in found.notes
    )
    with pytest.raises(UsageError, match="1 run to compare"):
        compare([str(trained)])
    with pytest.raises(UsageError, match="'none': no such run folder or model file"):
        compare(["none"])


def test_the_command(perceive: Perceive, trained: Path, short: Path, tmp_path: Path) -> None:
    done = perceive("compare", trained, short, "-o", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.decode().splitlines()
    assert head.split()[:5] == ["name", "accuracy", "interval", "p", "seconds"]
    assert {"seed", "steps", "lr"} <= set(head.split())
    assert "examples" not in head  # the same for both
    names = [os.path.relpath(run, os.path.commonpath([trained, short])) for run in (trained, short)]
    assert [row.split()[0] for row in rows] == names
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


def test_a_table_fits_a_terminal() -> None:
    columns = {
        "name": ["a" * 50, "b"],
        "accuracy": ["0.9312", "0.8211"],
        "lr": ["0.004", "0.001"],
        "schedule": ["c0 t0 (c1 t0)x7 c0 t0", "c0 t0"],
        "loss": ["0.2", "0.3"],
        "num_latents": ["128", "64"],
    }
    shown, rest = fitted(columns, 50)
    assert list(shown) == ["name", "accuracy", "lr"]
    assert len(shown["name"][0]) == 28
    assert "…" in shown["name"][0]
    assert rest == {key: columns[key] for key in ("schedule", "num_latents")}  # the loss is in --json
    assert fitted(columns, 80)[1] == {"schedule": columns["schedule"]}  # a long value is not cut
    assert short_keys(["train.lr", "inputs.image.size", "inputs.video.size"]) == {
        "train.lr": "lr",
        "inputs.image.size": "image.size",
        "inputs.video.size": "video.size",
    }
    assert short_names(["runs/x/a", "runs/x/b/c"]) == ["a", "b/c"]


def test_chance_and_means_are_those_of_the_textbook() -> None:
    right = np.array([True] * 10 + [False] * 2 + [True] * 20)
    other = np.array([False] * 10 + [True] * 2 + [True] * 20)
    assert paired_chance(right, other) == pytest.approx(2 * sum(comb(12, k) for k in range(3)) / 2**12)
    assert paired_chance(right, right) == 1
    low, high = mean_interval([0.8, 0.9, 1.0])
    assert (low, high) == pytest.approx((0.9 - 4.302653 * 0.1 / 3**0.5, 0.9 + 4.302653 * 0.1 / 3**0.5))


def test_seeds_make_a_group_and_runs_on_the_same_examples_are_paired(bars: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        list(Trainer(bars, tmp_path / f"s{seed}", overrides=[*SMALL, "train.steps=2", f"train.seed={seed}"]).fit())
    list(Trainer(bars, tmp_path / "other", overrides=[*SMALL, "train.steps=2", "train.lr=0.02"]).fit())
    runs = [str(tmp_path / name) for name in ("s0", "other", "s1")]
    found = compare(runs, str(bars))
    (group,) = found.groups
    assert set(group.runs) == {runs[0], runs[2]}
    assert group.repeated == "seed"
    assert group.mean == pytest.approx(np.mean([run.accuracy for run in found.runs if run.run in group.runs]))
    assert [run.chance is None for run in found.runs] == [True, False, False]
    assert {run.tested.split for run in found.runs if run.tested} == {"test"}
    assert {run.tested.num_examples for run in found.runs if run.tested} == {30}
    columns = columns_of(found)
    assert "mean of 2 seeds" in columns["name"]
    assert {"test", "test interval"} <= set(columns)
    assert len({len(cells) for cells in columns.values()}) == 1
