"""Temperature, thresholds and calibration error: by hand, by search, and through the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax

from perceiver_cli.errors import IntegrityError, ResourceError, UsageError
from perceiver_cli.inference.evaluation import calibrate, evaluate
from perceiver_cli.inference.predictor import UNKNOWN, Prediction, Predictor
from perceiver_cli.inference.statistics import Selective, calibration_error, fit_temperature, fit_thresholds, selective
from perceiver_cli.model.checkpoint import Calibration, load_model, read_info, read_table, save_model, store_calibration
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive, write_images


def drawn(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for the labels drawn from them."""
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 2, (4000, 5))
    labels = np.array([rng.choice(5, p=p) for p in softmax(honest, axis=1)])
    return temperature * honest, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    logits, labels = drawn(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.06)

    def loss(t: float) -> float:
        return float(-np.log(softmax(logits / t, axis=1)[np.arange(len(labels)), labels]).mean())

    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01))
    several = np.eye(5)[labels]
    both = fit_temperature(logits, several)
    grid = np.exp(np.linspace(-3, 3, 400))
    binary = [np.logaddexp(0, np.where(several == 1, -1, 1) * logits / t).mean() for t in grid]
    assert both == pytest.approx(grid[np.argmin(binary)], rel=0.02)


def test_a_model_that_is_always_right_gets_a_finite_temperature() -> None:
    logits = 3.0 * np.eye(3)[[0, 1, 2, 0]]
    assert fit_temperature(logits, np.array([0, 1, 2, 0])) == pytest.approx(0.05)
    assert fit_temperature(-logits, np.array([0, 1, 2, 0])) == pytest.approx(20)


def test_the_least_probability_of_an_answer_is_chosen_by_what_stays_answered() -> None:
    prob = np.array([0.9996, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4567, 0.3])
    correct = np.array([1, 1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    low, middle, high = selective(prob, correct)
    assert low == Selective(0.456, 0.9, 7 / 9)
    assert middle == Selective(0.5, 0.8, 7 / 8)
    assert high == Selective(0.8, 0.5, 1.0)
    assert selective(np.ones(4), np.ones(4, bool)) == ()  # any value leaves all of them
    assert selective(np.array([np.nan, 0.5]), np.ones(2, bool)) == selective(np.array([]), np.array([])) == ()
    (only,) = selective(np.array([0.2, 1.0, 1.0, 1.0, 1.0]), np.ones(5, bool))
    assert (only.min_prob, only.answered) == (1.0, 0.8)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.05, 0.95, 0.96, 1.0, 0.0, 1 / 15])
    correct = np.array([0, 1, 0, 1, 0, 1])
    # Bins: (0, 1/15] holds 0.05, 0.0 and 1/15; the last 0.95, 0.96 and 1.0.
    low, high = abs(1 - 0.05 - 1 / 15), abs(2 - 2.91)
    assert calibration_error(confidence, correct) == pytest.approx((low + high) / 6)
    assert calibration_error(np.array([0.8] * 5), np.array([1, 1, 1, 1, 0])) == pytest.approx(0)
    assert np.isnan(calibration_error(np.array([0.5, np.nan]), np.array([0, 1])))


def test_thresholds_have_the_highest_f1() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((200, 4)) < 0.3
    targets[:, 3] = False
    probs = np.clip(0.4 * targets + rng.random((200, 4)) * 0.6, 0, 1).round(2)  # with ties

    def f1(threshold: float, k: int) -> float:
        said = probs[:, k] >= threshold
        return float(2 * (said & targets[:, k]).sum() / (said.sum() + targets[:, k].sum()))

    thresholds = fit_thresholds(probs, targets.astype(float))
    for k in range(3):
        assert f1(thresholds[k], k) == pytest.approx(max(f1(t, k) for t in np.linspace(0, 1, 501)))
    assert thresholds[3] == 0.5  # nothing to learn from


@pytest.mark.parametrize(
    "fields", [{"temperature": 0, "thresholds": []}, {"temperature": 1, "thresholds": [0.5]}, {"temperature": 1}]
)
def test_nonsense_in_a_header_is_damage(trained: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    model, info = load_model(trained / "model.safetensors")
    path = tmp_path / "model.safetensors"
    with pytest.raises((ValueError, KeyError)):
        Calibration.parse(fields, 3)
    bad = Calibration(float(fields["temperature"]), tuple(fields.get("thresholds", (2.0, 0, 0))))  # type: ignore[arg-type]
    save_model(path, model.state_dict(), type(info)(**{**vars(info), "calibration": bad}))
    with pytest.raises(IntegrityError, match="incomplete header"):
        read_info(path)


def test_storing_changes_nothing_else(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((trained / "model.safetensors").read_bytes())
    before, old = load_file(path), read_table(path)
    store_calibration(path, Calibration(1.5), read_info(path))
    store_calibration(path, Calibration(2.5), read_info(path))
    after, new = load_file(path), read_table(path)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())
    assert old[0] == new[0]
    was, now = (json.loads(metadata["perceiver"]) for _, metadata in (old, new))
    assert now.pop("calibration") == {"temperature": 2.5, "thresholds": []}
    assert was.pop("sha256") != now.pop("sha256")
    assert was == now
    assert list(tmp_path.iterdir()) == [path]


def test_a_calibration_is_stored_only_in_its_own_model(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model, info = load_model(trained / "model.safetensors")
    save_model(path, model.state_dict(), replace(info, step=info.step + 1))
    newer = path.read_bytes()
    with pytest.raises(ResourceError, match=f"holds another model than the calibrated one, of step {info.step}; calib"):
        store_calibration(path, Calibration(2.0), info)
    (tmp_path / ".lock").touch()
    training = "import sys; from perceiver_cli.run_folder import *\nwith locked(Path(sys.argv[1])): print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", training, tmp_path], **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        with pytest.raises(ResourceError, match="in use by another"):
            store_calibration(path, Calibration(2.0), read_info(path))
        other.communicate(b"\n")
    assert path.read_bytes() == newer


def test_calibrating_a_run(perceive: Perceive, trained: Path, bars: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((trained / "model.safetensors").read_bytes())
    plain = Predictor(path)
    files = sorted((bars / "test").rglob("*.png"))
    before = list(plain.predict(files))
    report = evaluate(plain, bars)
    assert report.ece == report.ece_uncalibrated

    done = perceive("evaluate", bars, "-m", path, "--calibrate", "--json")
    assert done.returncode == 0, done.stderr
    fitted = json.loads(done.stdout)
    temperature = read_info(path).calibration
    assert temperature is not None
    assert b"temperature" in done.stderr
    assert (fitted["split"], fitted["accuracy"]) == ("test", report.accuracy)
    assert fitted["temperature"] == temperature.temperature != 1
    assert fitted["ece_uncalibrated"] == pytest.approx(report.ece)
    assert fitted["ece"] != fitted["ece_uncalibrated"]
    assert b"without temperature" in perceive("evaluate", bars, "-m", path).stdout

    val = evaluate(Predictor(path), bars, "val")
    assert val.loss < evaluate(plain, bars, "val").loss  # what was minimised
    for old, new in zip(before, Predictor(path).predict(files), strict=True):
        assert [name for name, _ in old.top(3)] == [name for name, _ in new.top(3)]
        assert new.probs != old.probs
        expected = softmax(np.log(old.probs) / temperature.temperature)
        np.testing.assert_allclose(new.probs, expected, rtol=1e-4)


def test_nothing_to_calibrate_on(trained: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "test", {"left": 3, "right": 3}).parent
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="no val split; there are test, all"):
        calibrate(Predictor(tmp_path / "model.safetensors"), other)
    assert read_info(tmp_path / "model.safetensors").calibration is None


# ---------------------------------------------------------------- decisions


def test_what_is_not_probable_enough_is_unknown(perceive: Perceive, trained: Path, bars: Path) -> None:
    answer = Prediction("x", ("a", "b"), (0.4, 0.6), min_prob=0.7)
    assert (answer.label, answer.prob, answer.top(1)) == (UNKNOWN, 0.6, [("b", 0.6)])
    assert answer.to_dict()["label"] == "unknown"
    files = sorted((bars / "test").rglob("*.png"))
    probs = [p.prob for p in Predictor(trained).predict(files)]
    limit = str(float(np.median(probs)))
    done = perceive("predict", "-m", trained, "--min-prob", limit, *files)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["label"] == "unknown" for line in found] == [line["prob"] < float(limit) for line in found]
    assert {line["label"] == "unknown" for line in found} == {True, False}
    table = perceive("predict", "-m", trained, "--min-prob", "1", "--format", "csv", "--top-k", "1", *files[:2])
    assert table.stdout.splitlines()[1].split(b",")[1] == b"unknown"
    assert perceive("predict", "-m", trained, "--min-prob", "1.5", *files[:1]).returncode == 2


def test_several_labels_have_thresholds(perceive: Perceive, tmp_path: Path) -> None:
    names = ("first", "second", "third")
    write_images(tmp_path, dict.fromkeys(names, 30))
    rows = ["path,labels"] + [
        f"{name}/{i:03d}.png,{name}{';odd' if i % 2 else ''}" for name in names for i in range(30)
    ]
    (tmp_path / "set.csv").write_text("\n".join(rows) + "\n")
    run = tmp_path / "run"
    list(Trainer(tmp_path / "set.csv", run, overrides=[*SMALL, "train.steps=60", "train.lr=0.01"]).fit())
    files = sorted((tmp_path / "first").glob("*.png"))[:6]
    (first, *_) = Predictor(run).predict(files)
    assert first.labels == tuple(c for c, p in zip(first.classes, first.probs, strict=True) if p >= 0.5)

    calibration = calibrate(Predictor(run), tmp_path / "set.csv")
    assert len(calibration.thresholds) == 4
    assert len(set(calibration.thresholds)) > 1
    assert read_info(run / "model.safetensors").calibration == calibration
    report = evaluate(Predictor(run), tmp_path / "set.csv")
    assert report.ece is not None
    assert 0 <= report.ece < 1
    done = perceive("predict", "-m", run, "--all-probs", *files)
    for line in map(json.loads, done.stdout.splitlines()):
        limits = zip(line["probs"].items(), calibration.thresholds, strict=True)
        assert line["labels"] == [name for (name, prob), least in limits if prob >= least]
    table = perceive("predict", "-m", run, "--format", "tsv", "--min-prob", "1", *files[:1]).stdout.splitlines()
    assert table[0].split(b"\t")[:3] == [b"path", b"labels", b"label"]
    assert table[1].split(b"\t")[1:3] == [b"", b"unknown"]


def test_smoothed_targets_bound_the_temperature_of_answers_that_are_all_right() -> None:
    logits = 3.0 * np.eye(3)[[0, 1, 2, 0] * 8]
    labels = np.array([0, 1, 2, 0] * 8)
    assert 0.3 < fit_temperature(logits, labels, 1 / 34) < 1.5
    logits, labels = drawn(2.5)
    assert fit_temperature(logits, labels, 1 / 4002) == pytest.approx(2.5, rel=0.06)
