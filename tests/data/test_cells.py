"""Cells of a manifest as inputs: text and numbers, alone and beside files, from training to every answer."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.cli.options import data_changes
from perceiver_cli.config import DataConfig, tiny_config
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.inputs import Pipe, examples_of
from perceiver_cli.data.lint import lint
from perceiver_cli.data.loader import Reader
from perceiver_cli.data.manifest import ColumnError, read_manifest
from perceiver_cli.data.prepare import plan
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.explain import explain
from perceiver_cli.inference.predictor import Predictor, forward_batches
from perceiver_cli.inference.worth import worth
from perceiver_cli.model.checkpoint import ModelInfo, save_model
from perceiver_cli.model.ensemble import Model
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.report.explanation import to_picture
from perceiver_cli.report.html import page
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive, write_images

COLOURS = ("red", "blue")


def write_rows(path: Path, count: int, **changes: object) -> Path:
    """Write a CSV whose class is in the words of its title or, where that is empty, in its price. Returns the path."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["id", "title", "price", "day", "label", "split"])
        table.writeheader()
        for number in range(count):
            label = number % 2
            title = f"one {COLOURS[label]} shoe of size {rng.integers(30, 50)} in a box" if number % 4 < 3 else ""
            cells = {"id": number, "title": title, "price": f"{10 + 5 * label + rng.normal():.2f}", "label": label}
            cells |= {"day": f"2024-0{1 + number % 5}-01", "split": "test" if number % 5 == 4 else "train"}
            table.writerow(cells | changes)
    return path


@pytest.fixture(scope="module")
def sold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Predictor]:
    """Rows of text and numbers, and a model trained on them."""
    folder = tmp_path_factory.mktemp("sold")
    data = write_rows(folder / "sold.csv", 100)
    changes = [*SMALL, "train.steps=40", "train.lr=0.01", "inputs.text.ngram_vectors=256", "data.workers=0"]
    for _ in Trainer(data, folder / "run", None, overrides=changes).fit():
        pass
    return data, Predictor(folder / "run")


def test_columns_are_inferred_and_said(sold: tuple[Path, Predictor]) -> None:
    catalog = scan(sold[0])
    assert catalog.modalities == ("table", "text")
    assert catalog.columns == {"title": "text", "price": "number", "day": "date"}
    assert catalog.account.paths == 100
    (note,) = (note for note in catalog.notes if "from" in note)
    assert note.startswith("text from 'title', number from 'price', date from 'day', label from 'label'")
    assert "1 column not used: 'id'" in note
    assert any("examples have no text" in note for note in catalog.notes)


def test_columns_can_be_set(sold: tuple[Path, Predictor]) -> None:
    def columns(**kinds: str) -> dict[str, str]:
        return dict(read_manifest(sold[0], DataConfig(columns=kinds)).columns)

    assert columns(price="category") == {"price": "category"}
    assert columns(**{"*": "auto", "day": "none"}) == {"title": "text", "price": "number"}
    assert columns(title="text", id="auto", price="auto") == {"title": "text", "price": "number"}
    with pytest.raises(ColumnError, match="prize"):
        columns(prize="number")
    with pytest.raises(ValueError, match=r"columns\.price is 'colour', expected one of"):
        columns(price="colour")


def test_a_model_keeps_columns_and_statistics(sold: tuple[Path, Predictor]) -> None:
    config = sold[1].info.config
    assert config.data.columns == {"title": "text", "price": "number", "day": "date"}
    assert [(column.name, column.part) for column in config.inputs["table"].columns[:2]] == [
        ("price", ""),
        ("day", "day"),
    ]  # type: ignore[attr-defined]
    assert config.inputs["table"].columns[0].mean == pytest.approx(12.5, abs=0.7)  # type: ignore[attr-defined]


def test_a_model_answers_from_rows(sold: tuple[Path, Predictor], tmp_path: Path) -> None:
    data, predictor = sold
    report = evaluate(predictor, data)
    assert (report.num_examples, report.modalities) == (20, ("table", "text"))
    assert report.accuracy > 0.9
    first = next(iter(predictor.predict(data)))
    assert (first.path, first.label, first.used) == ("row 1", "0", ("table", "text"))
    # A column that a table lacks is missing in each row; without any there is nothing to answer from.
    (tmp_path / "a.csv").write_text("title\none blue shoe\n")
    (answer,) = predictor.predict(tmp_path / "a.csv")
    assert (answer.label, answer.used) == ("1", ("text",))
    (tmp_path / "b.csv").write_text("name\none blue shoe\n")
    with pytest.raises(DataError, match="expected"):
        list(predictor.predict(tmp_path / "b.csv"))
    # A cell of another kind is the error of its row.
    (tmp_path / "c.csv").write_text("title,price\none red shoe,cheap\none red shoe,9\n")
    wrong, right = predictor.predict(tmp_path / "c.csv")
    assert wrong.error is not None
    assert "expected a number" in wrong.error
    assert right.label == "0"


@pytest.mark.parametrize(
    "data",
    [
        b'{"title": "one red shoe", "price": 10}\n{"title": "one blue shoe", "price": "15"}\n',
        b"price;title\n10;one red shoe\n15;one blue shoe\n",
        b'\xef\xbb\xbf"title","price"\n"one red shoe",10\n"one blue shoe",15\n',
    ],
)
def test_rows_on_stdin(sold: tuple[Path, Predictor], data: bytes) -> None:
    answers = list(sold[1].predict(Pipe("-", io.BytesIO(data))))
    assert [(answer.path, answer.label) for answer in answers] == [("row 1", "0"), ("row 2", "1")]


def test_one_row_on_the_command_line(sold: tuple[Path, Predictor], perceive: Perceive) -> None:
    row = ("--row", "title=one blue shoe", "--row", "price=15")
    done = perceive("predict", "-m", sold[1].path, *row)
    answer = json.loads(done.stdout)
    assert (answer["label"], answer["used"]) == ("1", ["table", "text"])
    assert b"each key once" in perceive("predict", "-m", sold[1].path, "--row", "price").stderr
    wrong = perceive("predict", "-m", sold[1].path, "--row", "prize=15")
    assert b"'--row': columns are 'prize'; the model reads 'title' or 'price'" in wrong.stderr
    no_header = perceive("predict", "-m", sold[1].path, "-", stdin=b"one red shoe,10\n")
    assert b"'-': no rows; expected JSON lines, or a CSV whose first line names 'title' or 'price'" in no_header.stderr
    assert b"--row is the only input" in perceive("predict", "a.png", "-m", sold[1].path, *row).stderr
    several = perceive("explain", "-", "-m", sold[1].path, "--json", stdin=b"title,price\na shoe,1\na shoe,2\n")
    assert b"several inputs; explain one row: --row KEY=VALUE, or a line of JSON on stdin" in several.stderr


def test_the_worth_of_inputs_adds_up(sold: tuple[Path, Predictor]) -> None:
    data, predictor = sold
    report = evaluate(predictor, data)
    measured = worth(predictor, report)
    assert sum(each.share for each in measured.shares.values()) + measured.chance == pytest.approx(report.accuracy)
    assert measured.shares["text"].share > 0.1
    for each in measured.shares.values():
        assert each.interval_95[0] <= each.share <= each.interval_95[1]
    assert {*measured.per_class} == {"0", "1"}
    with pytest.raises(UsageError, match="2 to 8 modalities"):
        worth(predictor, replace(report, modalities=("text",)))


def test_the_worth_is_measured_with_the_views_of_the_evaluation(
    sold: tuple[Path, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, predictor = sold
    views = []

    def noted(model: Model, reader: Reader, *rest: Any) -> Any:
        views.append(reader.num_views)
        return forward_batches(model, reader, *rest)

    monkeypatch.setattr("perceiver_cli.inference.labelled.forward_batches", noted)
    monkeypatch.setattr(predictor.reader, "asked_views", 2)
    worth(predictor, evaluate(predictor, data))
    assert views == [2, 2, 2]  # the evaluation and each input alone


def test_words_and_columns_are_explained_and_shown(sold: tuple[Path, Predictor], tmp_path: Path) -> None:
    data, predictor = sold
    example = next(iter(predictor.examples(data)))
    explanation = explain(predictor, example)
    inputs = explanation.to_dict()["inputs"]
    words = {part["name"]: part["heat"] for part in inputs["text"]["parts"]}
    assert {"one", "red", "shoe"} <= words.keys()
    assert inputs["table"]["parts"][0]["name"].startswith("price = ")
    heat = sum(part["heat"] for each in inputs.values() for part in each["parts"])
    assert heat == pytest.approx(1, abs=0.05)
    assert to_picture(explanation).size[0] > 100
    report = evaluate(predictor, data)
    assert "shoe" in page(report, predictor, str(data), ["perceiver"]) or report.accuracy == 1


def test_records_answer_as_the_rows(sold: tuple[Path, Predictor], perceive: Perceive, tmp_path: Path) -> None:
    data, predictor = sold
    tar = str(tmp_path / "rows.tar")
    perceive("preprocess", data, "-m", predictor.path, "-o", tar)
    assert evaluate(predictor, tar).loss == pytest.approx(evaluate(predictor, data).loss, abs=1e-6)


def test_a_manifest_is_prepared_by_the_columns_of_its_model(tmp_path: Path, perceive: Perceive) -> None:
    """They were those of a model without options, and `--model-input` passed over the options of its command."""
    write_images(tmp_path / "in", {"a": 2, "b": 2})
    rows = [f"{path.relative_to(tmp_path / 'in')},{path.parent.name},old" for path in sorted(tmp_path.rglob("*.png"))]
    data, folder = tmp_path / "m.csv", tmp_path / "run"
    data.write_text("\n".join(["photo,animal,label", *rows]) + "\n")
    read = {"path_column": {"image": "photo"}, "label_column": "animal", "root": str(tmp_path / "in")}
    config = tiny_config(["image"]).override([*SMALL, *data_changes(read)])
    config = config.model_copy(update={"inputs": {"image": settled(config.inputs["image"])}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})})
    model = Perceiver(config.model, {"image": modality("image").layout(config.inputs["image"])}, 2)
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    save_model(folder / "model.safetensors", model.state_dict(), ModelInfo(config, ("a", "b"), 1, {}))
    catalog = plan([str(data)], model=str(folder)).catalog
    assert (catalog.classes, len(catalog.splits["train"])) == (("a", "b"), 4)
    other = tmp_path / "other.csv"
    other.write_text(data.read_text().replace("photo", "picture"))
    done = perceive(
        "preprocess", other, "-m", folder, "--model-input", "--root", tmp_path / "in", "--path-column", "image=picture",
        "-o", tmp_path / "x.npz",
    )  # fmt: skip
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [row.partition(",")[0] for row in rows]


def test_lint_reads_cells(sold: tuple[Path, Predictor], tmp_path: Path) -> None:
    assert not lint(sold[0], workers=0).failed
    copies = write_rows(tmp_path / "copies.csv", 10, title="the same words in each row", price=1, day="2024-01-01")
    report = lint(copies, workers=0, options=DataConfig(columns={"title": "text"}))
    assert len(report.copies[0].examples) == 10


def test_cells_beside_files(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("L", (8, 8), 30 * number).save(tmp_path / f"{number}.png")
    lines = [f"{n}.png,a few words of {COLOURS[n % 2]},{n % 2}" for n in range(8)]
    (tmp_path / "rows.csv").write_text("photo,title,label\n" + "\n".join([*lines, ",alone,1", "0.png,,1"]) + "\n")
    options = DataConfig(path_column={"image": "photo"}, columns={"title": "text"})
    catalog = scan(tmp_path / "rows.csv", options=options)
    assert catalog.modalities == ("image", "text")
    assert {*catalog.splits["train"][0].sources} == {"image", "text"}
    assert [example.id for example in catalog.splits["train"]][-2:] == ["7.png", "row 9"]
    assert "0.png (2)" in {example.id for example in catalog.splits["train"]}
    # Beside files nothing is read that was not asked for: a caption may tell the class.
    plain = scan(tmp_path / "rows.csv", options=DataConfig(path_column={"image": "photo"}))
    assert plain.modalities == ("image",)
    assert not plain.columns


def test_rows_have_one_id_wherever_they_are_read(tmp_path: Path) -> None:
    """A prediction had the whole path as id, and rows of one file had one id; a cell was named as a file."""
    for name in ("0.png", "1.png"):
        Image.new("L", (8, 8), 30).save(tmp_path / name)
    data = tmp_path / "rows.csv"
    data.write_text(
        "photo,title,label\n0.png,red words,0\n1.png,blue words,1\n0.png,other words,0\n0.png,,1\n,alone,1\n"
    )
    options = DataConfig(path_column={"image": "photo"}, columns={"title": "text"})
    reads = tiny_config(["image", "text"]).inputs
    predicted = list(examples_of(data, reads, Limits(), options=(options,)))
    trained = {example.id: example for example in scan(data, options=options).splits["train"]}
    assert [example.id for example in predicted] == ["0.png", "1.png", "0.png (2)", "0.png (3)", "row 5"]
    assert {example.id: {*example.sources} for example in predicted} == {
        name: {*example.sources} for name, example in trained.items()
    }
    assert [example.paths for example in predicted[-2:]] == [{"image": str(tmp_path / "0.png")}, {}]
    assert [example.path for example in predicted[-2:]] == [str(tmp_path / "0.png"), "row 5"]
    assert predicted[0].names == {"id": "0.png"}


def test_the_command_line_names_columns(sold: tuple[Path, Predictor], perceive: Perceive, tmp_path: Path) -> None:
    done = perceive("train", sold[0], "-o", tmp_path / "run", "--column", "price=table,title=text", "--dry-run")
    assert json.loads(done.stdout)["modalities"] == ["table", "text"]
    failed = perceive("train", sold[0], "--column", "price", "--dry-run")
    assert (failed.returncode, b"expected NAME=KIND" in failed.stderr) == (2, True)


def test_a_folder_of_tables_is_divided_by_their_names(tmp_path: Path) -> None:
    for name, cells in (("train", ["1", "2.5", "x", "4"]), ("test", ["5", "6"])):
        rows = [f"{cell},some words of row {n},{'ab'[n % 2]}" for n, cell in enumerate(cells)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["price,title,label", *rows]) + "\n")
    catalog = scan(tmp_path)
    assert catalog.columns == {"price": "category", "title": "text"}  # those of train
    assert {split: len(examples) for split, examples in catalog.splits.items()} == {"train": 4, "test": 2}
    assert catalog.splits["test"][0].id == "test.csv: row 1"
    account = catalog.accounted()
    assert account.total == account.paths + account.linked + account.absent
