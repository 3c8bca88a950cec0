"""Predictions: order, errors in their place, names, formats."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from perceiver_cli.config import load_preset
from perceiver_cli.data import prepare
from perceiver_cli.data.examples import PAUSE, Example
from perceiver_cli.data.inputs import Pipe
from perceiver_cli.data.loader import collate
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Prediction, Predictor, Windows, aggregated, forward
from perceiver_cli.model.cost import estimate
from perceiver_cli.preprocess import modality
from tests.conftest import RATE_HZ, TONES_HZ, tone_of, write_clip


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


def test_records_of_another_modality_are_refused_once(predictor: Predictor, tmp_path: Path) -> None:
    """Each record had an error of its own: "no image"."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", tone_of(300 + number, 0.3, np.random.default_rng(0)), RATE_HZ)
    tar = tmp_path / "sounds.tar"
    job = prepare.plan([*map(str, sorted(tmp_path.glob("*.wav")))])
    assert [*prepare.write_records(job, str(tar), lambda data: None)][-1].total == 3
    told = r"sounds\.tar': holds audio, expected image; pass a model of audio with -m$"
    with pytest.raises(DataError, match=told):
        list(predictor.predict(tar))
    with tar.open("rb") as file, pytest.raises(DataError, match="'stdin': holds audio, expected image"):
        list(predictor.predict(Pipe("-", file)))
    with pytest.raises(DataError, match=r"holds audio, but '.*' reads image"):
        evaluate(predictor, tar)


@pytest.mark.parametrize("named", [[np.zeros((4, 4))], np.zeros((4, 4)), [3.5], [None]])
def test_what_is_no_input_is_told(predictor: Predictor, named: Any) -> None:
    """It had no answer, and no error."""
    with pytest.raises(TypeError, match="an input is a path, bytes, or a mapping of these by modality; found"):
        list(predictor.predict(named))


def test_bytes_and_workers_answer_the_same(predictor: Predictor, bars: Path) -> None:
    files = sorted((bars / "test").rglob("*.png"))[:9]
    plain = list(predictor.predict(files, 4))
    assert [p.probs for p in predictor.predict(files, 4, workers=2)] == [p.probs for p in plain]
    assert [p.probs for p in predictor.predict([f.read_bytes() for f in files], 4)] == [p.probs for p in plain]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pause_is_answered_before_more_is_asked_for(predictor: Predictor, bars: Path, workers: int) -> None:
    files = sorted((bars / "test").rglob("*.png"))[:7]
    asked: list[int] = []

    def pauses() -> Iterator[Path | Example]:
        for number, file in enumerate(files):
            asked.append(number)
            yield file
            if number in (0, 3):
                yield PAUSE

    answers = predictor.predict(pauses(), 32, workers)
    first = next(answers)
    assert (first.path, asked[-1]) == (str(files[0]), 0)
    assert [next(answers).path for _ in range(3)] == [str(file) for file in files[1:4]]
    assert asked[-1] == 3
    assert [answer.path for answer in answers] == [str(file) for file in files[4:]]


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


# ---------------------------------------------------------------- several modalities


@pytest.fixture(scope="module")
def pair_predictor(paired: Path) -> Predictor:
    return Predictor(paired)


def test_pairs_of_a_folder_a_manifest_and_a_mapping_answer_the_same(
    pair_predictor: Predictor, pairs: Path, tmp_path: Path
) -> None:
    folder = pairs / "test" / "top-low"
    by_folder = list(pair_predictor.predict(folder))
    assert [p.names["id"] for p in by_folder] == [f"{i:03d}" for i in range(8)]
    files = {"audio": str(folder / "000.wav"), "image": str(folder / "000.png")}
    assert (by_folder[0].path, by_folder[0].names["paths"]) == (files["audio"], files)
    assert [(p.label, p.used) for p in by_folder] == [("top-low", ("audio", "image"))] * 8
    rows = "".join(f"{folder}/{i:03d}.png,{folder}/{i:03d}.wav\n" for i in range(8))
    (tmp_path / "m.csv").write_text("image,audio\n" + rows)
    assert [p.probs for p in pair_predictor.predict(tmp_path / "m.csv")] == [p.probs for p in by_folder]
    parts = ({"image": folder / f"{i:03d}.png", "audio": (folder / f"{i:03d}.wav").read_bytes()} for i in range(8))
    assert [p.probs for p in pair_predictor.predict(parts)] == [p.probs for p in by_folder]
    (one,) = pair_predictor.predict({"image": folder / "000.png"})
    assert one.used == ("image",)


def test_what_is_missing_does_not_change_the_others_of_a_batch(pair_predictor: Predictor, pairs: Path) -> None:
    folder = pairs / "test" / "top-low"
    inputs = [folder / "000.png", folder / "000.wav", {"image": folder / "000.png", "audio": folder / "000.wav"}]
    together = list(pair_predictor.predict(inputs))
    assert [p.used for p in together] == [("image",), ("audio",), ("audio", "image")]
    for alone, one in zip((next(iter(pair_predictor.predict([given]))) for given in inputs), together, strict=True):
        torch.testing.assert_close(torch.tensor(alone.probs), torch.tensor(one.probs), rtol=1e-4, atol=1e-6)


def test_withheld_is_missing(paired: Path, pair_predictor: Predictor, pairs: Path) -> None:
    folder = pairs / "test" / "bottom-high"
    sounds = list(Predictor(paired, use=["audio"]).predict(folder))
    assert {p.used for p in sounds} == {("audio",)}
    assert {p.label.split("-")[1] for p in sounds} == {"high"}  # what sound alone can tell
    assert [p.names["id"] for p in sounds] == [f"{i:03d}" for i in range(8)]  # pairs still, as the model knows
    expected = pair_predictor.predict(sorted(folder.glob("*.wav")))
    np.testing.assert_allclose([p.probs for p in sounds], [p.probs for p in expected], rtol=1e-5)
    (bad,) = Predictor(paired, use=["audio"]).predict([folder / "000.png"])
    assert "image by its content, expected audio" in str(bad.error)
    for use in (["smell"], [], ["audio", "points"]):
        with pytest.raises(UsageError, match=r"cannot use .*: .* reads audio, image"):
            Predictor(paired, use=use)


def test_videos_without_picture_or_sound_are_answered(filmed: Path, tmp_path: Path) -> None:
    paths = [
        write_clip(tmp_path / "both.mp4", 1, 300),
        write_clip(tmp_path / "silent.mp4", 1, None),
        write_clip(tmp_path / "dark.mp4", None, 300),
    ]
    found = list(Predictor(filmed).predict(paths))
    assert [p.used for p in found] == [("audio", "video"), ("video",), ("audio",)]
    assert found[0].to_dict()["used"] == ["audio", "video"]
    pictures = list(Predictor(filmed, use=["video"]).predict(paths))
    assert [p.error is None for p in pictures] == [True, True, False]
    np.testing.assert_allclose(pictures[1].probs, found[1].probs)


# ---------------------------------------------------------------- windows


def test_windows_answer_like_files_of_their_own(filmed: Path, tmp_path: Path) -> None:
    predictor = Predictor(filmed, use=["audio"])
    rng = np.random.default_rng(0)
    tones = [tone_of(hz, 1.0, rng) for hz in (*TONES_HZ.values(), *TONES_HZ.values())]
    soundfile.write(tmp_path / "whole.wav", np.concatenate(tones), RATE_HZ, subtype="FLOAT")
    for i, tone in enumerate(tones):
        soundfile.write(tmp_path / f"{i}.wav", tone, RATE_HZ, subtype="FLOAT")
    apart = [p.probs for p in predictor.predict(tmp_path / f"{i}.wav" for i in range(4))]
    whole = tmp_path / "whole.wav"
    for batch_size in (1, 3, 32):
        found = list(predictor.predict([whole], batch_size, windows=Windows(1.0, 1.0, "none")))
        assert [(p.start_s, p.end_s) for p in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
        np.testing.assert_allclose([p.probs for p in found], apart, rtol=1e-5)
    for aggregate, sum_up in (("mean", np.mean), ("max", np.max)):
        (one,) = predictor.predict([whole], windows=Windows(1.0, 1.0, aggregate))  # type: ignore[arg-type]
        np.testing.assert_allclose(one.probs, sum_up(apart, axis=0), rtol=1e-5)
        assert "start_s" not in one.to_dict()


def test_windows_of_several_inputs_keep_the_order_and_the_bad(filmed: Path, tmp_path: Path) -> None:
    long, short = write_clip(tmp_path / "a.mp4", 1, 300, 3.0), write_clip(tmp_path / "b.mp4", 1, None, 0.5)
    inputs = [long, tmp_path / "none.mp4", short, long]
    found = list(Predictor(filmed).predict(inputs, 4, windows=Windows(1.0, 1.0, "mean")))
    assert [p.path for p in found] == [str(path) for path in inputs]
    assert [p.error is None for p in found] == [True, False, True, True]
    assert found[0].probs == found[3].probs
    assert [p.used for p in found] == [("audio", "video"), (), ("video",), ("audio", "video")]
    each = list(Predictor(filmed).predict(inputs, 4, windows=Windows(1.0, 1.0, "none")))
    assert [p.path for p in each if p.start_s == 0] == [str(long), str(short), str(long)]
    assert [p.end_s for p in each if p.path == str(short)] == [0.5]


def test_windows_before_a_pause_are_answered(filmed: Path, tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / f"{n}.mp4", 0, 300, 1.0) for n in range(2)]
    asked: list[Path] = []

    def pauses() -> Iterator[Path | Example]:
        for clip in clips:
            asked.append(clip)
            yield clip
            yield PAUSE

    answers = Predictor(filmed).predict(pauses(), 8, windows=Windows(0.5, 0.5))
    assert next(answers).path == str(clips[0])
    assert asked == clips[:1]
    assert [answer.path for answer in answers] == [str(clips[1])]


def test_an_input_with_a_bad_window_is_bad() -> None:
    good, bad = Prediction("x", ("a", "b"), (0.2, 0.8), used=("audio",)), Prediction("x", ("a", "b"), error="why")
    assert aggregated([good, bad], "mean").error == "why"
    assert aggregated([good, Prediction("x", ("a", "b"), (0.6, 0.4))], "max").probs == (0.6, 0.8)


def test_windows_need_time_and_a_length(trained: Path, bars: Path) -> None:
    with pytest.raises(UsageError, match="windows are for audio and video; the model reads image"):
        list(Predictor(trained).predict([next(bars.rglob("*.png"))], windows=Windows(1, 1)))
    for window_s, hop_s in ((0, 1), (1, 0), (float("nan"), 1), (1, float("inf"))):
        with pytest.raises(UsageError, match="expected more than 0 s"):
            Windows(window_s, hop_s)


@pytest.mark.slow
def test_a_long_file_in_windows_takes_no_more_memory_than_a_short_one(filmed: Path, tmp_path: Path) -> None:
    """By the highest resident size of a process for each; a quarter of an hour decoded at once would be 29 MB more."""
    script = (
        "import sys; from perceiver_cli.inference.predictor import Predictor, Windows\n"
        "list(Predictor(sys.argv[1], use=['audio']).predict(sys.argv[2], windows=Windows(0.5, 0.5)))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    peaks = []
    sound = tone_of(300, 4, np.random.default_rng(0))
    for seconds in (4, 900):
        path = tmp_path / f"{seconds}.wav"
        soundfile.write(path, np.tile(sound, seconds // 4), RATE_HZ)
        done = subprocess.run([sys.executable, "-c", script, filmed, path], capture_output=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 10, peaks


def test_views_are_averaged_as_probabilities(filmed: Path, tmp_path: Path) -> None:
    """A model evaluated in three windows answers the mean of their three answers."""
    path = write_clip(tmp_path / "c.mp4", 1, 300, 2.0)
    predictor = Predictor(filmed)
    reader = predictor.reader
    reader.specs = {name: spec.model_copy(update={"eval_windows": 3}) for name, spec in reader.specs.items()}
    (mean,) = predictor.predict([path])
    rows = reader.views(reader.decode(*predictor.examples(path)))
    each = [
        forward(predictor.model, collate([row]), 1, predictor.compute, False).logits.softmax(dim=-1) for row in rows
    ]
    assert len(each) == 3
    np.testing.assert_allclose(mean.probs, torch.cat(each).mean(dim=0), rtol=1e-5)
    logits = forward(predictor.model, collate(rows), 3, predictor.compute, multi_label=True).logits
    singly = [forward(predictor.model, collate([row]), 1, predictor.compute, True).logits.sigmoid() for row in rows]
    np.testing.assert_allclose(logits.sigmoid()[0], torch.cat(singly).mean(dim=0), rtol=1e-5)


def test_batches_are_shaped_by_memory(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(trained)
    assert predictor.batch_that_fits == 32
    layouts = predictor.reader.layouts
    each = estimate(predictor.info.config.model, layouts, len(predictor.classes)).forward_bytes
    monkeypatch.setattr("perceiver_cli.inference.predictor.FORWARD_BYTES", 3 * each + 1)
    assert predictor.batch_that_fits == 3
    monkeypatch.setattr("perceiver_cli.inference.predictor.FORWARD_BYTES", 1)
    assert predictor.batch_that_fits == 1


def test_a_large_picture_needs_no_byte_array() -> None:
    """The estimate that batches are shaped by: 1,048,576 inputs of the ImageNet model in less than 1 GiB."""
    config = load_preset("imagenet")
    image = config.inputs["image"].model_copy(update={"size": (1024, 1024)})
    cost = estimate(config.model, {"image": modality("image").layout(image)}, 1000)
    assert cost.num_inputs == 1 << 20
    assert cost.forward_bytes < 1 << 28
