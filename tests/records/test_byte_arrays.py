"""Byte arrays in .npy and .safetensors are read as the files that they were made from."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from perceiver_cli.data.catalog import scan
from perceiver_cli.data.prepare import byte_array, input_recipe, write_byte_array
from perceiver_cli.errors import DataError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.byte_arrays import stored_rows
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL

SUFFIXES = ("npy", "safetensors")


@pytest.fixture(scope="module")
def arrays(bars: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test and training split of `bars` as byte arrays, by suffix."""
    folders = {suffix: tmp_path_factory.mktemp("rows") / suffix for suffix in SUFFIXES}
    files = sorted(bars.glob("train/*/*.png"))[::4] + sorted(bars.glob("test/*/*.png"))
    spec, limits = input_recipe(Source(str(files[0])), str(trained), None, {})
    for file in files:
        for suffix, folder in folders.items():
            path = (folder / file.relative_to(bars)).with_suffix(f".{suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_byte_array(Source(str(file)), spec, limits, str(path))
    return folders


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_answers_are_those_of_the_files(bars: Path, trained: Path, arrays: dict[str, Path], suffix: str) -> None:
    predictor = Predictor(trained)
    files, rows = list(predictor.predict(bars / "test")), list(predictor.predict(arrays[suffix] / "test"))
    assert [one.probs for one in files] == [one.probs for one in rows]
    assert all(one.error is None for one in rows)
    found, expected = evaluate(predictor, arrays[suffix]), evaluate(predictor, bars)
    assert (found.accuracy, found.loss) == (expected.accuracy, expected.loss)


def test_training_takes_its_sizes_from_what_they_say(arrays: dict[str, Path], tmp_path: Path) -> None:
    trainer = Trainer(arrays["safetensors"], tmp_path / "run", overrides=[*SMALL, "train.epochs=1"])
    list(trainer.fit())
    predictor = Predictor(tmp_path / "run")
    (one,) = predictor.predict(next((arrays["safetensors"] / "test").rglob("*.safetensors")))
    assert one.error is None


def test_what_does_not_fit_is_refused_in_words(
    bars: Path, trained: Path, arrays: dict[str, Path], tmp_path: Path
) -> None:
    predictor = Predictor(trained)

    def error(path: Path) -> str:
        (one,) = predictor.predict(path)
        assert one.error is not None
        assert one.error.count("\n") == 0
        return one.error

    np.save(tmp_path / "small.npy", np.zeros((9, 40), np.float32))
    assert "a byte array of 9 x 40, expected " in error(tmp_path / "small.npy")
    file = next((arrays["npy"] / "test").rglob("*.npy"))
    rows = np.load(file)
    rows[3, 3] = np.nan
    np.save(tmp_path / "nan.npy", rows)
    error(tmp_path / "nan.npy")
    np.save(tmp_path / "object.npy", np.array([[{}] * 40], dtype=object), allow_pickle=True)
    error(tmp_path / "object.npy")
    spec, limits = input_recipe(Source(str(next(bars.rglob("*.png")))), None, "imagenet", {})
    write_byte_array(Source(str(next(bars.rglob("*.png")))), spec, limits, str(tmp_path / "big.safetensors"))
    assert "prepared with inputs.image." in error(tmp_path / "big.safetensors")
    with pytest.raises(DataError, match="a byte array, which is not decoded"):
        byte_array(Source(str(file)), spec, Limits())


def test_a_table_of_few_columns_is_a_cloud_if_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "cloud.npy", np.zeros((50, 6), np.float32))
    assert detected(Source(str(tmp_path / "cloud.npy")), "points").kinds == ("points",)
    with pytest.raises(DataError, match=r"an array of float32 \(50, 6\), which could be anything; .* column points"):
        detected(Source(str(tmp_path / "cloud.npy")))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_data_errors(trained: Path, arrays: dict[str, Path], suffix: str) -> None:
    good = next((arrays[suffix] / "test").rglob(f"*.{suffix}")).read_bytes()
    predictor = Predictor(trained)
    rng = random.Random(0)
    for _ in range(30):
        bad = bytearray(good)
        if rng.random() < 0.5:
            del bad[rng.randrange(len(bad)) :]
        else:
            for _ in range(4):
                bad[rng.randrange(min(len(bad), 3000))] = rng.randrange(256)
        (one,) = predictor.predict(bytes(bad))
        assert one.error is None or "\n" not in one.error


def test_a_flipped_bit_of_a_safetensors_is_found(bars: Path, trained: Path, arrays: dict[str, Path]) -> None:
    spec, _ = input_recipe(Source(str(next(bars.rglob("*.png")))), str(trained), None, {})
    data = next(arrays["safetensors"].rglob("*.safetensors")).read_bytes()
    rows = stored_rows(Source("a", data), "image", spec, Limits()).prepared().values
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 60).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        try:
            same = stored_rows(Source("a", bytes(flipped)), "image", spec, Limits()).prepared().values
        except DataError:
            continue
        assert np.array_equal(same, rows)  # in JSON of the same meaning


def test_order_of_examples_is_of_names(bars: Path, arrays: dict[str, Path]) -> None:
    files, rows = scan(bars), scan(arrays["safetensors"])
    assert [e.id.rpartition(".")[0] for e in files.splits["test"]] == [
        e.id.rpartition(".")[0] for e in rows.splits["test"]
    ]
    assert rows.modalities == ("image",)
