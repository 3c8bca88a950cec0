"""Several runs in one folder: seeds, folds and sweeps; the values that a sweep tries; the ensemble."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.errors import IntegrityError, UsageError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.checkpoint import load_model
from perceiver_cli.model.describe import describe
from perceiver_cli.report.compare import compare
from perceiver_cli.run_folder import runs_in
from perceiver_cli.training.events import StepDone
from perceiver_cli.training.search import Vary, parse_vary, proposer, settled
from perceiver_cli.training.several import Request, RunEntry, Several, load_request, name_of, repeated
from tests.conftest import SMALL, Perceive

SHORT = [*SMALL, "train.steps=2"]


def of(bars: Path, folder: Path, kind: str, count: int = 2) -> Several:
    runs = repeated(kind, count)  # type: ignore[arg-type]
    return Several(folder, Request(kind=kind, data=str(bars), overrides=SHORT, runs=runs))  # type: ignore[arg-type]


def test_folds_answer_for_every_example_once_and_make_one_model(bars: Path, tmp_path: Path) -> None:
    several = of(bars, tmp_path / "folds", "folds")
    list(several.events())
    assert [member.state for member in several.members] == ["done", "done"]
    rows = [json.loads(line) for line in (several.folder / "predictions.jsonl").read_text().splitlines()]
    assert Counter(row["path"] for row in rows).most_common(1)[0][1] == 1
    assert Counter(row["fold"] for row in rows) == {1: 60, 2: 60}
    facts = json.loads((several.folder / "metrics.json").read_text())
    assert facts["accuracy"] == sum(row["correct"] for row in rows) / 120 == np.mean([m.score for m in several.members])

    picture = next((bars / "test").rglob("*.png"))
    own = [next(Predictor(several.folder / m.name).predict(str(picture))).probs for m in several.members]
    whole = Predictor(several.folder)
    assert next(whole.predict(str(picture))).probs == pytest.approx(np.mean(own, axis=0), abs=1e-6)
    assert describe(str(several.folder))["members"] == 2
    assert evaluate(whole, bars).num_examples == 30
    assert any("the test split is fair" in note for note in evaluate(whole, bars, "all").notes)
    with pytest.raises(UsageError, match="have no mean"):
        list(whole.predict(str(picture), embeddings=True))
    (group,) = compare([str(several.folder)]).groups
    assert group.repeated == "fold"


def test_an_interrupted_set_goes_on_where_it_was(bars: Path, tmp_path: Path) -> None:
    whole = of(bars, tmp_path / "whole", "seeds")
    list(whole.events())
    cut = of(bars, tmp_path / "cut", "seeds")
    for event in cut.events():
        if isinstance(event, StepDone) and event.step == 1 and cut.members[0].state == "done":
            cut.stop()
    assert [member.state for member in cut.members] == ["done", "begun"]
    assert not (cut.folder / "model.safetensors").exists()
    again = Several(cut.folder, load_request(cut.folder))
    list(again.events())
    assert (cut.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert load_model(cut.folder / "model.safetensors")[1].members == 2
    assert (cut.folder / "split.jsonl").exists()
    assert evaluate(Predictor(cut.folder), bars, "val").split_from == "run"


@pytest.mark.slow
def test_a_sweep_finds_the_better_rate_and_says_its_command(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    small = [word for change in SMALL for word in ("--set", change)]
    rates = "train.lr=1e-9,0.01,1e30"  # learns nothing, learns, diverges
    done = perceive("sweep", bars, *small, "--vary", rates, "--epochs", "6", "-o", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, command = done.stdout.decode().splitlines()
    assert command.startswith(f"perceiver train {bars}")
    assert command.endswith("--set train.lr=0.01")
    request = load_request(tmp_path / "s")
    assert {member.values["train.lr"]: member.state for member in request.runs} == {
        1e-9: "done", 0.01: "done", 1e30: "failed",
    }  # fmt: skip
    assert "diverged" in request.runs[2].note
    assert not list((tmp_path / "s").glob("*/last"))
    assert [path.name for path in runs_in(tmp_path / "s") or []] == ["lr=1e-09", "lr=0.01"]
    done = perceive("sweep", "--resume", "-o", "s", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["best"]["name"] == "lr=0.01"
    assert perceive("sweep", bars, "--vary", "train.lrate=1,2", "-o", "t", cwd=tmp_path).returncode == 2
    assert perceive("sweep", bars, "-o", "s", "--vary", rates, cwd=tmp_path).returncode == 2  # holds runs


def test_a_run_behind_the_median_is_pruned(tmp_path: Path) -> None:
    several = Several(tmp_path, Request(kind="sweep", data="x", prune=True))
    for k, score in enumerate((0.2, 0.4, 0.6, 0.8)):
        several.members.append(RunEntry(name=f"r{k}", values={}, state="done", score=score))
        (tmp_path / f"r{k}").mkdir()
        lines = [{"step": step, "val_accuracy": score * step / 10} for step in (5, 10)]
        (tmp_path / f"r{k}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "below the median 0.2500 of 4 runs" in several._behind(0.24, 0.5)
    assert several._behind(0.26, 0.5) == ""
    assert several._behind(0.0, 0.1) == ""  # too early
    for member in several.members:  # with several labels an example the mAP decides, and many are as accurate
        lines = [{"step": step, "val_accuracy": 0.9, "val_mAP": (member.score or 0) * step / 10} for step in (5, 10)]
        (tmp_path / member.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "below the median 0.2500 of 4 runs" in several._behind(0.24, 0.5)
    assert several._behind(0.26, 0.5) == ""
    del several.members[0]
    assert several._behind(0.0, 0.5) == ""  # too few


def test_the_values_of_a_sweep() -> None:
    assert parse_vary("train.lr=log:1e-4:1e-2") == Vary("train.lr", (), 1e-4, 1e-2, True)
    assert parse_vary("train.batch_size=log:16:256").is_whole
    assert parse_vary("inputs.image.size=[28,28],[32,32]").values == ([28, 28], [32, 32])
    assert parse_vary("train.schedule=cosine,step").values == ("cosine", "step")
    assert parse_vary("train.clip_norm=none,1.0").values == (None, 1.0)
    for text in ("train.lr", "=1", "train.lr=", "train.lr=log:0:1", "train.lr=lin:2:1", "train.lr=log:a:b"):
        with pytest.raises(UsageError, match="--vary"):
            parse_vary(text)
    narrow = parse_vary("train.lr=log:0.0012345:0.0012349")  # narrower than the digits of a drawn number
    assert (narrow.at(0), narrow.at(1)) == (0.0012345, 0.0012345)
    two = [Vary("a", (1, 2, 3)), Vary("b", ("x", "y"))]
    assert settled("auto", two, None) == ("grid", 6)
    assert settled("random", two, 4) == ("random", 4)
    with pytest.raises(UsageError, match="a grid needs lists"):
        settled("grid", [parse_vary("a=lin:0:1")], None)
    with pytest.raises(UsageError, match="nothing to vary"):
        settled("auto", [], None)

    def tried(search: str, vary: list[Vary], runs: int) -> list[dict[str, object]]:
        propose, members = proposer(search, vary, runs, 0), list[RunEntry]()
        while (values := propose(members)) is not None:
            members.append(RunEntry(name=name_of(values, [m.name for m in members]), values=values))
        assert len({member.name for member in members}) == len(members)
        return [member.values for member in members]

    grid = tried("grid", two, 6)
    assert grid[:3] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}]
    drawn = tried("random", two, 4)
    assert all(values in grid for values in drawn)
    assert len({tuple(values.items()) for values in drawn}) == 4
    rates = [values["r"] for values in tried("random", [parse_vary("r=log:1e-4:1e-2")], 40)]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)  # type: ignore[operator]
    assert 10 < sum(rate < 1e-3 for rate in rates) < 30  # type: ignore[operator]


def test_optuna_learns_from_the_runs_so_far() -> None:
    pytest.importorskip("optuna")
    vary = [parse_vary("r=lin:0.0:1.0"), parse_vary("s=[1,2],[3,4]"), parse_vary("n=log:1:64")]
    propose, members = proposer("tpe", vary, 30, 0), list[RunEntry]()
    while (values := propose(members)) is not None:
        score = 1 - abs(values["r"] - 0.8)
        members.append(RunEntry(name=f"m{len(members)}", values=values, state="done", score=score))
    assert np.mean([m.values["r"] for m in members[15:]]) > np.mean([m.values["r"] for m in members[:10]])
    assert {type(m.values["n"]) for m in members} == {int}
    assert all(m.values["s"] in ([1, 2], [3, 4]) for m in members)


@pytest.mark.parametrize("text", ["{}", "[", '{"format": 1, "kind": "seeds", "data": "x", "runs": [{"name": "../x"}]}'])
def test_a_damaged_list_of_runs_is_said_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"runs\.json"):
        load_request(tmp_path)
    with pytest.raises(IntegrityError, match=r"runs\.json"):
        runs_in(tmp_path)


def test_the_command_trains_folds_and_goes_on(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    small = [word for change in SHORT for word in ("--set", change)]
    done = perceive("train", bars, *small, "--folds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "runs/folds-1/model.safetensors\n"
    assert b"not trained on" in done.stderr
    for words in (("--folds", "2", "--seeds", "2"), ("--folds", "2", "-o", "runs/folds-1")):
        assert perceive("train", bars, *small, *words, cwd=tmp_path).returncode == 2
    done = perceive("train", "--resume", "-o", "runs/folds-1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
