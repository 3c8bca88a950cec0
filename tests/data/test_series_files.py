"""Series in class folders and in a manifest's column, from training to every answer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from perceiver_cli.config import DataConfig
from perceiver_cli.data.catalog import resolve_specs, scan
from perceiver_cli.data.decoder import Decoder
from perceiver_cli.data.lint import lint
from perceiver_cli.data.manifest import Labels, Row, read_manifest
from perceiver_cli.errors import DataError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.explain import explain
from perceiver_cli.inference.predictor import Predictor, Windows
from perceiver_cli.preprocess.series import SeriesSpec
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.report.explanation import to_arrays, to_picture
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive

SAMPLES, RATE_HZ = 200, 100
SERIES = ("inputs.series.bands=4", "train.steps=60", "train.lr=0.01", "data.workers=0")


def recorded(rng: np.random.Generator, label: int) -> np.ndarray:
    """Return rows of time and two channels, of which one swings faster in the second class, in its first half."""
    seconds = np.arange(SAMPLES) / RATE_HZ
    waves = rng.normal(0, 0.3, (2, SAMPLES))
    waves[1] += np.sin(2 * np.pi * (20 if label else 6) * seconds) * (seconds < 1)
    return np.column_stack([seconds, *waves])


def write(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, "%.4f", ",", header="time,ax,ay", comments="")


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Predictor]:
    """Class folders of CSV files, and a model trained on them."""
    folder, rng = tmp_path_factory.mktemp("moved"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 8)):
        for label, name in enumerate(("slow", "fast")):
            for number in range(count):
                write(folder / "data" / split / name / f"{number}.csv", recorded(rng, label))
    for _ in Trainer(folder / "data", folder / "run", None, overrides=[*SMALL, *SERIES]).fit():
        pass
    return folder / "data", Predictor(folder / "run")


def test_class_folders_of_tables_are_series(moved: tuple[Path, Predictor]) -> None:
    data, predictor = moved
    catalog = scan(data)
    assert catalog.modalities == ("series",)
    assert any("are read as series; --preset" in note for note in catalog.notes)
    spec = predictor.info.config.inputs["series"]
    assert spec.channels == ("ax", "ay")  # type: ignore[attr-defined]
    assert spec.rate_hz == RATE_HZ  # type: ignore[attr-defined]
    report = evaluate(predictor, data)
    assert (report.num_examples, report.accuracy) == (16, 1.0)


def test_tables_without_names_are_asked_for(moved: tuple[Path, Predictor], tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "ab"[number % 2] / f"{number}.csv"
        path.parent.mkdir(exist_ok=True)
        np.savetxt(path, recorded(np.random.default_rng(number), 0), "%.4f", ",")
    with pytest.raises(DataError, match="pass --preset tiny-points or --preset tiny-series"):
        scan(tmp_path)
    assert scan(tmp_path, reads=["series"]).modalities == ("series",)
    assert len(list(moved[1].predict(tmp_path))) == 4


def test_sensors_in_sound_files_are_series_where_they_are_asked_for(tmp_path: Path, perceive: Perceive) -> None:
    rng = np.random.default_rng(1)
    for label, name in enumerate(("slow", "fast")):
        for number in range(12):
            path = tmp_path / "data" / name / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, recorded(rng, label)[:, 1:] / 4, RATE_HZ, "FLOAT")
    sets = [word for each in (*SMALL, *SERIES) for word in ("--set", each)]
    trained = perceive("train", "data", "--preset", "tiny-series", "-o", "run", *sets, cwd=tmp_path)
    assert b"2 channels ('1', '2'), 2 s at 100 Hz" in trained.stderr
    (tmp_path / "data/slow/0.wav").rename(tmp_path / "x")
    (tmp_path / "data/fast/bad.wav").write_bytes((tmp_path / "x").read_bytes()[:500])
    of_folder = perceive("predict", "-m", "run", "data", cwd=tmp_path)
    answers = [json.loads(line) for line in of_folder.stdout.splitlines()]
    assert sum(answer.get("label") == Path(answer["path"]).parent.name for answer in answers) >= 20
    assert [answer["path"] for answer in answers if "error" in answer] == ["data/fast/bad.wav"]
    piped = perceive("predict", "-m", "run", "-", cwd=tmp_path, stdin=(tmp_path / "x").read_bytes())
    assert json.loads(piped.stdout)["label"] == "slow"


def test_a_folder_of_parquet_files_is_a_folder_of_series(moved: tuple[Path, Predictor], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in (1, 2):
        rows = recorded(np.random.default_rng(number), number % 2)
        parquet.write_table(
            pyarrow.table(dict(zip(("time", "ax", "ay"), rows.T, strict=True))), tmp_path / f"{number}.parquet"
        )
    (tmp_path / "0.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-9])
    answers = [*moved[1].predict(tmp_path)]
    assert [Path(answer.path).name for answer in answers] == ["0.parquet", "1.parquet", "2.parquet"]
    assert [answer.error is None and answer.label for answer in answers] == [False, "fast", "slow"]


def test_arrays_of_many_channels_are_series_not_byte_arrays(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "ab"[number % 2] / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.random.default_rng(number).normal(size=(20, 60)).astype(np.float32))  # channels, time
    catalog = scan(tmp_path, reads=["series"])
    specs = resolve_specs({"series": SeriesSpec()}, catalog, Limits())
    assert len(specs["series"].channels) == 20  # type: ignore[attr-defined]
    (decoded,) = {Decoder(specs, Limits()).decode(e).arrays["series"].shape for e in catalog.splits["train"]}
    assert decoded == (60, 20, 2)


def test_a_list_of_files_stays_a_list(moved: tuple[Path, Predictor], perceive: Perceive) -> None:
    data, predictor = moved
    rows = [(f"data/test/{name}/{n}.csv", name) for name in ("slow", "fast") for n in range(8)]
    with (data.parent / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("vib", "label"), *rows])
    options = DataConfig(path_column={"series": "vib"})
    assert scan(data.parent / "list.csv", options=options).modalities == ("series",)
    words = ("--column", "vib=series", "-m", predictor.path, "--json")
    report = json.loads(perceive("evaluate", data.parent / "list.csv", *words).stdout)
    assert (report["num_examples"], report["accuracy"]) == (16, 1.0)
    answers = perceive("predict", data.parent / "list.csv", "--column", "vib=series", "-m", predictor.path).stdout
    assert [json.loads(line)["label"] for line in answers.splitlines()] == [name for _, name in rows]


def test_records_windows_and_pipes_answer_the_same(
    moved: tuple[Path, Predictor], perceive: Perceive, tmp_path: Path
) -> None:
    data, predictor = moved
    tar = str(tmp_path / "series.tar")
    perceive("preprocess", data, "-m", predictor.path, "-o", tar)
    assert evaluate(predictor, tar).loss == pytest.approx(evaluate(predictor, data).loss, abs=1e-6)
    path = data / "test" / "fast" / "0.csv"
    (whole,) = predictor.predict(path)
    piped = json.loads(perceive("predict", "-", "-m", predictor.path, stdin=path.read_bytes()).stdout)
    assert (piped["label"], piped["prob"]) == ("fast", pytest.approx(whole.prob, abs=1e-6))
    perceive("preprocess", path, "-m", predictor.path, "-o", tmp_path / "rows.npy")
    (rows,) = predictor.predict(tmp_path / "rows.npy")
    assert rows.prob == pytest.approx(whole.prob, abs=1e-5)
    parts = perceive("predict", path, "-m", predictor.path, "--window", "1", "--hop", "1", "--aggregate", "none").stdout
    assert [json.loads(line)["start_s"] for line in parts.splitlines()] == [0.0, 1.0]


def test_windows_without_samples_are_left_out_and_noted(moved: tuple[Path, Predictor], tmp_path: Path) -> None:
    rows = recorded(np.random.default_rng(0), 1)
    rows[100:, 0] += 5  # a gap from 1 to 6 s
    write(tmp_path / "a.csv", rows)
    each = [*moved[1].predict(tmp_path / "a.csv", windows=Windows(1, 1, "none"))]
    assert [answer.start_s for answer in each] == [0, 6]
    assert [answer.notes for answer in each] == [(), ("the windows from 1 s on to this one have no samples",)]
    (whole,) = moved[1].predict(tmp_path / "a.csv", windows=Windows(1, 1))
    assert whole.notes == each[1].notes


def test_time_and_channel_are_explained_and_shown(moved: tuple[Path, Predictor]) -> None:
    data, predictor = moved
    explanation = explain(predictor, data / "test" / "fast" / "0.csv")
    told = explanation.to_dict()["inputs"]["series"]
    assert (told["start_s"], told["end_s"]) == (0.0, 2.0)
    assert told["channels"]["ay"] > 0.8
    half = len(told["heat"]) // 2
    assert sum(told["heat"][:half]) > 0.7
    arrays = to_arrays(explanation)
    assert arrays["series"].shape == (SAMPLES, 2, 2)
    assert arrays["series_heat"].shape == (len(arrays["series_attention"]), 2)
    assert to_picture(explanation).size[0] > 100


def test_lint_finds_copies_and_what_is_constant(moved: tuple[Path, Predictor], tmp_path: Path) -> None:
    assert not lint(moved[0], workers=0).failed
    rng = np.random.default_rng(0)
    for number in range(6):
        write(tmp_path / "ab"[number % 2] / f"{number}.csv", recorded(rng, 0))
    write(tmp_path / "a" / "copy.csv", recorded(np.random.default_rng(0), 0))
    write(tmp_path / "b" / "flat.csv", recorded(rng, 0) * [1, 0, 0])
    report = lint(tmp_path, workers=0)
    assert [len(copies.examples) for copies in report.copies] == [2]
    assert [name for _, name, _ in report.faults["constant"]] == ["b/flat.csv"]


@pytest.mark.parametrize("labels", ["needed", "ignored"])
def test_a_column_called_series_is_of_paths_only_if_its_cells_are_files(tmp_path: Path, labels: Labels) -> None:
    """Each column of this name was one of paths: images were dropped, and tables of products were missing files."""

    def read(text: str, **options: Any) -> list[Row]:
        (tmp_path / "m.csv").write_text(text)
        return read_manifest(tmp_path / "m.csv", DataConfig(**options), labels).rows

    (row,) = read("path,series,label\na.png,S1,x\n")
    assert (row.path, dict(row.columns)) == ("a.png", {})
    (row,) = read("path,series,label\na.png,b.csv,x\n")
    assert (row.path, dict(row.columns)) == ("a.png", {})
    kinds = {"price": "number", "series": "category"}
    for options in ({"columns": kinds}, {} if labels == "needed" else {"columns": {"price": "number"}}):
        (row, _) = read("price,series,label\n1,S1,x\n2,S2,y\n", **options)
        assert (row.path, dict(row.columns), [*row.cells]) == ("", {}, ["table"])
    for options in ({}, {"path_column": {"series": "series"}}):
        (row,) = read("series,label\na/b.CSV,x\n", **options)
        assert dict(row.columns) == {"series": "a/b.CSV"}
    (row,) = read("series,label\na/b,x\n", path_column={"series": "series"})
    assert dict(row.columns) == {"series": "a/b"}
