"""Predictions: order, errors in their place, names, formats."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perceiver_cli.errors import UsageError
from perceiver_cli.predict import Prediction, Predictor


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return Predictor(trained)


def test_answers_in_the_order_asked_with_bad_inputs_in_their_place(
    predictor: Predictor, bars: Path, tmp_path: Path
) -> None:
    good = sorted((bars / "test").rglob("*.png"))
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:40])
    (tmp_path / "text.png").write_text("hello\n")
    inputs = [good[3], tmp_path / "cut.png", good[29], tmp_path / "none.png", tmp_path / "text.png", good[3]]
    for batch_size in (1, 2, 50):
        found = list(predictor.predict(inputs, batch_size))
        assert [p.path for p in found] == [str(path) for path in inputs]
        assert [p.error is None for p in found] == [True, False, True, False, False, True]
        assert found[0].probs == pytest.approx(found[5].probs)
        assert [found[0].label, found[2].label] == ["left", "right"]
        assert sum(found[0].probs) == pytest.approx(1)
        assert "cut.png" in str(found[1].error)
        assert "No such file" in str(found[3].error)


def test_bytes_and_workers_answer_the_same(predictor: Predictor, bars: Path) -> None:
    files = sorted((bars / "test").rglob("*.png"))[:9]
    plain = list(predictor.predict(files, 4))
    assert [p.probs for p in predictor.predict(files, 4, workers=2)] == [p.probs for p in plain]
    assert [p.probs for p in predictor.predict([f.read_bytes() for f in files], 4)] == [p.probs for p in plain]


def test_prediction_lines() -> None:
    prediction = Prediction("x", ("a", "b", "c"), (0.2, 0.5, 0.3))
    assert prediction.to_dict(2) == {
        "path": "x",
        "label": "b",
        "prob": 0.5,
        "top": [{"label": "b", "prob": 0.5}, {"label": "c", "prob": 0.3}],
    }
    assert prediction.to_dict(1, all_probs=True)["probs"] == {"a": 0.2, "b": 0.5, "c": 0.3}
    assert Prediction("x", ("a",), error="why").to_dict() == {"path": "x", "error": "why"}


def test_another_modality_names_both(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "cube.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    (prediction,) = predictor.predict([tmp_path / "cube.off"])
    assert "points by its content, expected image" in str(prediction.error)


def test_a_moved_model_file_still_predicts(trained: Path, bars: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "model.safetensors", tmp_path / "m.safetensors")
    (prediction,) = Predictor(tmp_path / "m.safetensors").predict([next((bars / "test" / "middle").iterdir())])
    assert prediction.label == "middle"


@pytest.mark.parametrize(("device", "precision"), [("nonsense", "auto"), ("cuda:99", "auto"), ("cpu", "fp16")])
def test_devices_that_are_not_there(trained: Path, device: str, precision: str) -> None:
    with pytest.raises(UsageError):
        Predictor(trained, device, precision)
