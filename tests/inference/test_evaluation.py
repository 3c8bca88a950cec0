"""Reports: figures by hand, splits, classes by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score

from perceiver_cli.cli.predict import show_report
from perceiver_cli.config import load_config
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.inference.evaluation import Report, average_precision, evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.inference.statistics import average_precisions, share_interval
from perceiver_cli.report.html import save_report
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive, write_images


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return Predictor(trained)


def test_figures_are_those_of_the_predictions(predictor: Predictor, bars: Path) -> None:
    report = evaluate(predictor, bars)
    assert (report.split, report.num_examples) == ("test", 30)
    records = {record["id"]: record for record in report.records}
    right, losses = 0, []
    for prediction in predictor.predict(sorted((bars / "test").rglob("*.png"))):
        path = Path(prediction.path)
        record = records[str(path.relative_to(bars))]
        true = predictor.classes.index(path.parent.name)
        losses.append(-np.log(prediction.probs[true]))
        right += prediction.label == path.parent.name
        assert (record["path"], record["label"], record["truth"]) == (str(path), prediction.label, path.parent.name)
        assert record["correct"] == (prediction.label == path.parent.name)
    assert report.accuracy == pytest.approx(right / 30)
    assert report.accuracy > 0.9
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.top5 == 1.0


def test_per_class_rows_by_hand() -> None:
    report = Report(("a", "b", "c"), 0.5, 1.0, 0.1, ((3, 1, 0), (2, 2, 0), (0, 0, 0)), 8)
    rows = report.per_class
    assert rows["a"] == {"count": 4, "correct": 3, "accuracy": 0.75, "precision": 0.6, "f1": 6 / 9}
    assert rows["b"]["precision"] == pytest.approx(2 / 3)
    assert rows["c"] == {"count": 0, "correct": 0, "accuracy": None, "precision": None, "f1": None}
    json.dumps(report.to_dict(), allow_nan=False)


def test_which_split(predictor: Predictor, bars: Path, tmp_path: Path) -> None:
    assert evaluate(predictor, bars, "train").num_examples == 105
    held = evaluate(predictor, bars, "val")  # what this run held out of this very data
    assert held.num_examples == 15
    with pytest.raises(UsageError, match="no dev split; there are test, train, val, all"):
        evaluate(predictor, bars, "dev")
    other = write_images(tmp_path / "other", {"left": 3, "right": 3})
    report = evaluate(predictor, other)  # data the run never saw: all of it
    assert (report.split, report.num_examples) == ("all", 6)


def test_classes_are_matched_by_name_and_differences_said(predictor: Predictor, bars: Path, tmp_path: Path) -> None:
    shutil.copytree(bars / "test" / "right", tmp_path / "test" / "right")
    shutil.copytree(bars / "test" / "left", tmp_path / "test" / "unknown")
    report = evaluate(predictor, tmp_path)
    assert report.num_examples == 10
    assert report.accuracy > 0.8  # "right" is found by its name, though it is the first folder here
    assert report.strangers == 10
    assert any("'left', 'middle'" in note for note in report.notes)
    assert any("'unknown' 10" in note for note in report.notes)


def test_bad_files_are_counted(predictor: Predictor, bars: Path, tmp_path: Path) -> None:
    shutil.copytree(bars / "test", tmp_path / "test")
    (tmp_path / "test" / "left" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    report = evaluate(predictor, tmp_path)
    assert (report.num_examples, len(report.bad)) == (29, 1)


def test_report_files(predictor: Predictor, bars: Path, tmp_path: Path) -> None:
    report = evaluate(predictor, bars)
    save_report(report, tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["version"], metrics["accuracy"]) == (2, report.accuracy)
    assert np.sum(metrics["confusion"]) == 30
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 30
    assert {"path", "id", "truth", "label", "prob", "correct", "loss"} == set(json.loads(lines[0]))
    with Image.open(tmp_path / "out" / "confusion.png") as image:
        assert min(image.size) > 300


def test_figures_with_each_class_alike_are_those_of_scikit_learn(predictor: Predictor, bars: Path) -> None:
    report = evaluate(predictor, bars)
    truth = [record["truth"] for record in report.records]
    answers = [record["label"] for record in report.records]
    assert report.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, answers))
    assert report.macro_f1 == pytest.approx(f1_score(truth, answers, average="macro"))
    uneven = Report(("a", "b", "c"), 0.9, 1.0, 0.1, ((18, 0, 0), (1, 1, 0), (0, 0, 0)), 20)
    assert uneven.balanced_accuracy == 0.75  # c has no example
    assert uneven.macro_f1 == pytest.approx((36 / 37 + 2 / 3) / 2)


def test_thousands_of_classes_stay_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """metrics.json had 54 MB for 3,000 classes, and the table a line for each."""
    count = 3000
    rows = [(0,) * at + (1,) + (0,) * (count - at - 1) for at in range(count)]
    rows[7] = (1,) + (0,) * (count - 1)
    names = tuple(f"class {number:04d}" for number in range(count))
    report = Report(names, 0.5, 1.0, 0.1, tuple(rows), count)
    metrics = report.to_dict()
    assert "confusion" not in metrics
    assert metrics["confusion_pairs"][7:9] == [[7, 0, 1], [8, 8, 1]]
    assert len(json.dumps(metrics)) < 1e6
    show_report(report, False)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 23
    assert printed.out.splitlines()[3].startswith("class 0007")
    assert "the 20 of 3,000 classes with the lowest accuracy" in printed.err


def test_class_names_are_data_in_the_picture(tmp_path: Path) -> None:
    save_report(Report(("$x^", "a\nb 猫"), 0.5, 1.0, 0.7, ((1, 0), (1, 0)), 2, split="test"), tmp_path)
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_another_modality_names_both(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    with pytest.raises(DataError, match=r"holds points, but .*model\.safetensors' reads image"):
        evaluate(predictor, tmp_path)


# ---------------------------------------------------------------- several modalities


def test_a_model_of_several_is_measured_with_some_withheld_or_missing(
    paired: Path, pairs: Path, tmp_path: Path
) -> None:
    both = evaluate(Predictor(paired), pairs)
    assert both.accuracy > 0.9
    assert both.to_dict()["modalities"] == ["audio", "image"]
    assert {tuple(record["used"]) for record in both.records} == {("audio", "image")}
    withheld = evaluate(Predictor(paired, use=["image"]), pairs)
    assert withheld.split == "test"
    assert 0.2 < withheld.accuracy < 0.8  # the row is seen, the tone is guessed
    assert "answered from image alone; the model reads audio+image" in withheld.notes
    root = tmp_path / "pictures"
    for path in (pairs / "test").rglob("*.png"):
        (root / "test" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "test" / path.parent.name)
    missing = evaluate(Predictor(paired), root)
    assert (missing.accuracy, missing.modalities) == (withheld.accuracy, ("image",))
    assert set(withheld.notes) == {
        *missing.notes,
        "audio + image by stem: 128 of 128 examples; --pair none turns it off in training",
    }
    with pytest.raises(DataError, match=r"holds image, but .*model\.safetensors' reads audio"):
        evaluate(Predictor(paired, use=["audio"]), root)


def test_the_validation_split_of_a_run_is_found_again_whatever_is_used(paired: Path, pairs: Path) -> None:
    assert evaluate(Predictor(paired), pairs, "val").num_examples == 12
    assert evaluate(Predictor(paired, use=["audio"]), pairs, "val").num_examples == 12


# ---------------------------------------------------------------- several labels


def test_average_precision_is_scikit_learns_and_not_transposed() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((40, 6)) < 0.3
    targets[:, 4] = False
    scores = rng.random((40, 6)) + 0.5 * targets
    found = average_precision(scores, targets.astype(np.float64))
    present = [0, 1, 2, 3, 5]
    expected = [average_precision_score(targets[:, k], scores[:, k]) for k in present]
    assert found[4] is None
    np.testing.assert_allclose([found[k] for k in present], expected, rtol=1e-12)
    report = Report(tuple("abcdef"), 0, 0, 0, None, 40, found)
    right = average_precision_score(targets[:, present], scores[:, present], average="macro")
    wrong = average_precision_score(
        targets.T[:, targets.any(axis=1)], scores.T[:, targets.any(axis=1)], average="macro"
    )
    assert report.mean_average_precision == pytest.approx(right, rel=1e-12)
    assert abs(right - wrong) > 0.05  # the trap of the paper's first version would show


def test_average_precision_with_ties_and_weights_is_scikit_learns() -> None:
    """A weight counts an example so many times: those of one score stand in one place, in whatever order they come."""
    rng = np.random.default_rng(0)
    for levels in (1, 2, 5, 30):
        targets = (rng.random((60, 4)) < 0.3).astype(np.float64)
        scores = rng.integers(levels, size=(60, 4)) / levels
        targets[:, 3] = 0
        figure = average_precisions(scores, targets)
        for weights in (np.ones(60), np.bincount(rng.integers(60, size=60), minlength=60).astype(np.float64)):
            expected = [average_precision_score(targets[:, k], scores[:, k], sample_weight=weights) for k in range(3)]
            np.testing.assert_allclose(figure(weights), [*expected, np.nan], rtol=1e-12)
        order = rng.permutation(60)
        shuffled = average_precisions(scores[order], targets[order])
        np.testing.assert_allclose(shuffled(np.ones(60)), figure(np.ones(60)), rtol=1e-12)
    assert np.isnan(figure((targets[:, 0] == 0).astype(np.float64))[0])  # none of those that have the class counts


@pytest.mark.slow
def test_training_with_several_labels(tmp_path: Path) -> None:
    """Bars in two rows at once: each label has its own row, and the model finds both."""
    rng = np.random.default_rng(0)
    (tmp_path / "x").mkdir()
    lines = ["path,labels,split"]
    for i in range(160):
        pixels = rng.integers(0, 60, (12, 12), dtype=np.uint8)
        labels = [
            name
            for k, name in enumerate(("top", "middle", "low"))
            if rng.random() < 0.4 and not pixels[5 * k].fill(255)
        ]
        Image.fromarray(pixels).save(tmp_path / "x" / f"{i:03d}.png")
        lines.append(f"x/{i:03d}.png,{';'.join(labels)},{'test' if i % 4 == 0 else 'train'}")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    overrides = [*SMALL, "train.epochs=30", "train.lr=0.01", "train.label_smoothing=0"]
    list(Trainer(tmp_path / "m.csv", tmp_path / "run", overrides=overrides).fit())
    predictor = Predictor(tmp_path / "run")
    report = evaluate(predictor, tmp_path / "m.csv")
    facts = report.to_dict()
    assert (report.split, report.num_examples) == ("test", 40)
    assert facts["mAP"] > 0.95
    assert set(facts["per_class"]["top"]) == {"average_precision"}
    save_report(report, tmp_path / "report")
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"metrics.json", "predictions.jsonl"}
    both = next(r["id"] for r in report.records if set(r["truths"]) == {"low", "top"})
    (prediction,) = predictor.predict([tmp_path / both])
    assert {name for name, prob in zip(predictor.classes, prediction.probs, strict=True) if prob > 0.5} == {
        "low",
        "top",
    }


def test_the_columns_of_training_hold_for_the_same_manifest_and_are_no_condition_for_others(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", {"a": 8, "b": 8})
    (tmp_path / "lists").mkdir()
    rows = [(f"{name}/{number:03d}.png", name) for name in "ab" for number in range(8)]
    text = "photo;kind;label\n" + "".join(f"{path.replace('/', chr(92))};{name};x\n" for path, name in rows)
    manifest = tmp_path / "lists" / "m.csv"
    manifest.write_text(text)
    how = [f"data.root={tmp_path / 'pictures'}", "data.label_column=kind", "data.path_column.path=photo"]
    list(Trainer(manifest, tmp_path / "run", overrides=[*SMALL, *how, "train.steps=2", "data.workers=0"]).fit())
    predictor = Predictor(tmp_path / "run")
    assert predictor.info.config.data.root is None  # a model file may be shared
    assert evaluate(predictor, manifest, "all").num_examples == 16
    assert len([p for p in predictor.predict(str(manifest)) if p.error is None]) == 16
    plain = "path,label\n" + "".join(
        f"{path},{name if number % 3 else ''}\n" for number, (path, name) in enumerate(rows)
    )
    (tmp_path / "pictures" / "other.csv").write_text(plain)
    report = evaluate(predictor, tmp_path / "pictures" / "other.csv", "all")
    assert report.num_examples == 10
    assert "6 of 16 rows without a label in 'label', left out" in report.notes
    assert report.files.unlabelled.count == 6
    assert len(list(predictor.predict(str(tmp_path / "pictures" / "other.csv")))) == 16
    shutil.copytree(tmp_path / "pictures", tmp_path / "moved")
    predictor.options = {"root": str(tmp_path / "moved")}
    assert evaluate(predictor, manifest, "all").num_examples == 16
    resumed = Trainer(manifest, tmp_path / "run", overrides=["train.steps=3"], resume=True)
    assert resumed.plan.config.data.label_column == "kind"
    again = Trainer(None, tmp_path / "again", load_config(tmp_path / "run" / "config.toml"))
    assert len(again.plan.train_examples) + len(again.plan.val_examples) == 16


def test_accuracy_by_a_column_of_the_manifest(perceive: Perceive, trained: Path, bars: Path, tmp_path: Path) -> None:
    files = sorted((bars / "test").rglob("*.png"))
    rows = [f"{path},{path.parent.name if k % 3 else 'left'},{'ab'[k % 2]}" for k, path in enumerate(files)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,speaker", *rows]))
    done = perceive("evaluate", tmp_path / "m.csv", "-m", trained, "--by", "speaker", "-o", tmp_path / "r", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    answers = [json.loads(line) for line in (tmp_path / "r" / "predictions.jsonl").read_text().splitlines()]
    assert facts["by"]["speaker"].keys() == {"a", "b"}
    for value, row in facts["by"]["speaker"].items():
        own = [answers[k]["correct"] for k in range(len(rows)) if rows[k].endswith(value)]
        assert (row["count"], row["correct"]) == (15, sum(own))
        assert row["interval_95"] == list(share_interval(sum(own), 15))
    assert facts["num_examples"] == 30
    assert "<h2>By speaker</h2>" in (tmp_path / "r" / "report.html").read_text()
    table = perceive("evaluate", tmp_path / "m.csv", "-m", trained, "--by", "speaker").stdout.decode().splitlines()
    assert table[-3].split()[:2] == ["speaker", "count"]
    for column, data in (("age", tmp_path / "m.csv"), ("age", bars)):
        assert perceive("evaluate", data, "-m", trained, "--by", column).returncode == 3
    facts = json.loads(perceive("evaluate", bars, "-m", trained, "--by", "parent", "--json").stdout)
    assert facts["by"]["parent"].keys() == {"left", "middle", "right"}


def test_views_are_averaged_and_the_same_every_time(trained: Path, bars: Path) -> None:
    one, three, again = (evaluate(Predictor(trained, views=n), bars) for n in (None, 3, 3))
    assert three.records == again.records
    assert [record["prob"] for record in three.records] != [record["prob"] for record in one.records]
    assert three.accuracy > 0.9


def test_the_interval_comes_before_the_accuracy(
    predictor: Predictor, bars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(predictor, bars)
    show_report(report, False)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("test: accuracy between ")
    assert second.startswith("test: accuracy ")
