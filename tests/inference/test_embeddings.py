"""Embeddings beside predictions: the mean latents, in order, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file

from perceiver_cli.data.loader import collate
from perceiver_cli.inference.embeddings import keeping_embeddings
from perceiver_cli.inference.predictor import Prediction, Predictor, Windows
from tests.conftest import RATE_HZ, Perceive, tone_of


def test_rows_are_mean_latents_in_input_order(perceive: Perceive, trained: Path, bars: Path, tmp_path: Path) -> None:
    files = [*sorted((bars / "test" / "left").glob("*.png"))[:3], tmp_path / "no\nne.png", bars / "test" / "right"]
    done = perceive("predict", "-m", trained, "--embeddings", tmp_path / "e.npy", *files)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    rows = np.load(tmp_path / "e.npy", allow_pickle=False)
    assert done.returncode == 3  # one is bad: its row is not a number
    assert (rows.shape, rows.dtype) == ((len(lines), 16), np.float32)
    assert [bool(np.isnan(row).all()) for row in rows] == ["error" in line for line in lines]

    predictor = Predictor(trained)
    for line, row in zip(lines, rows, strict=True):
        if "error" not in line:
            (example,) = predictor.examples(line["path"])
            segments = collate(predictor.reader.views(predictor.reader.decode(example)))
            with torch.no_grad():
                latents = predictor.model.encode(segments)
            np.testing.assert_allclose(row, latents.mean(dim=1)[0], rtol=1e-4, atol=1e-5)

    assert perceive("predict", "-m", trained, "--embeddings", tmp_path / "e.safetensors", *files).returncode == 3
    tensors = load_file(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(tensors["embeddings"], rows)
    names = tensors["paths"].tobytes().split(b"\0")[:-1]
    assert [name.decode() for name in names] == [line["path"] for line in lines]


def test_windows_and_their_mean(filmed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", np.concatenate([tone_of(300, 1, rng), tone_of(2000, 1, rng)]), RATE_HZ)
    predictor = Predictor(filmed, use=["audio"])
    each = list(predictor.predict(tmp_path / "a.wav", windows=Windows(1, 1, "none"), embeddings=True))
    (mean,) = predictor.predict(tmp_path / "a.wav", windows=Windows(1, 1, "mean"), embeddings=True)
    assert mean.embedding is not None
    np.testing.assert_allclose(mean.embedding, np.mean([p.embedding for p in each], axis=0), rtol=1e-5)
    (without,) = predictor.predict(tmp_path / "a.wav")
    assert without.embedding is None


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_none_many_and_a_failure_on_the_way(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"e{suffix}"

    def made(count: int, fail: bool = False) -> list[Prediction]:
        def predictions() -> object:
            for i in range(count):
                yield Prediction(f"{i}\udc80", ("a",), (1.0,), embedding=np.full(3, i, np.float32))
            if fail:
                raise RuntimeError("reader")

        return list(keeping_embeddings(predictions(), path, 3))  # type: ignore[arg-type]

    for count in (0, 12_345):
        made(count)
        rows = np.load(path) if suffix == ".npy" else load_file(path)["embeddings"]
        np.testing.assert_array_equal(rows, np.repeat(np.arange(count, dtype=np.float32)[:, None], 3, axis=1))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="reader"):
        made(3, fail=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_formats_are_refused_before_anything_is_read(perceive: Perceive, trained: Path) -> None:
    done = perceive("predict", "-m", trained, "--embeddings", "e.csv", "x.png")
    assert done.returncode == 2
    assert b"expected .npy or .safetensors" in done.stderr
