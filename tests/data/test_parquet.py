"""Data sets in Parquet and Arrow files, as Hugging Face stores them."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from perceiver_cli.config import DataConfig
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.inputs import examples_of
from perceiver_cli.errors import DataError, PerceiverError, UsageError
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, lack, write_images
from tests.data.test_archives import adds_up

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Twelve PNG."""
    folder = write_images(tmp_path_factory.mktemp("of"), {"x": 12})
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


def sound(number: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(800) * (1 + number) / 9), 8000, format="WAV")
    return out.getvalue()


def files(data: Sequence[bytes | None], path: Sequence[str | None] | None = None) -> Any:
    """Return a column of Hugging Face's Image or Audio."""
    paths = path or [None] * len(data)
    return pa.array([{"bytes": d, "path": p} for d, p in zip(data, paths, strict=True)], FILE)


def table(metadata: dict[str, Any] | None = None, **columns: Any) -> Any:
    made = pa.table(columns)
    return made if metadata is None else made.replace_schema_metadata({"huggingface": json.dumps(metadata)})


def test_a_data_set_of_hugging_face(pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "hf" / "data").mkdir(parents=True)
    (tmp_path / "hf" / "README.md").write_text("---")
    parts = {
        "train-00000-of-00002": slice(0, 4),
        "train-00001-of-00002": slice(4, 9),
        "test-00000-of-00001": slice(9, 12),
    }
    for name, part in parts.items():
        labels = [n % 2 for n in range(12)][part]
        made = table(NAMES, image=files(pictures[part]), label=pa.array(labels), caption=["x"] * len(labels))
        pq.write_table(made, tmp_path / "hf" / "data" / f"{name}.parquet", row_group_size=2)
    catalog = scan(tmp_path / "hf")
    assert catalog.classes == ("cat", "dog")
    assert {split: len(examples) for split, examples in catalog.splits.items()} == {"train": 9, "test": 3}
    train = catalog.splits["train"]
    assert [e.id for e in train[:0] or [train[0], train[8]]] == [
        "train-00000-of-00002/000000",
        "train-00001-of-00002/000004",
    ]
    assert [s.read(Limits()) for e in train for s in e.sources.values()] == pictures[:9]
    assert [e.labels for e in train] == [(n % 2,) for n in range(9)]
    adds_up(catalog)
    list(Trainer(tmp_path / "hf", tmp_path / "run", overrides=[*SMALL, "train.steps=1"]).fit())
    assert (tmp_path / "run" / "model.safetensors").exists()
    one = scan(tmp_path / "hf" / "data" / "train-00000-of-00002.parquet")
    assert [e.id for e in one.splits["train"]] == [f"train-00000-of-00002/{n:06d}" for n in range(4)]
    assert len(list(examples_of(str(tmp_path / "hf"), {"image": ImageSpec(size=(8, 8))}, Limits()))) == 12


def test_splits_are_folders_or_a_column_too(pictures: list[bytes], tmp_path: Path) -> None:
    made = table(image=files(pictures[:4]), label=["a", "b", "a", "b"])
    for split in ("train", "validation"):
        (tmp_path / "a" / split).mkdir(parents=True)
        pq.write_table(made, tmp_path / "a" / split / "0000.parquet")
    catalog = scan(tmp_path / "a")
    assert {split: examples[0].id for split, examples in catalog.splits.items()} == {
        "train": "train/0000/000000", "val": "validation/0000/000000",
    }  # fmt: skip
    pq.write_table(made.append_column("split", [["train", "test", "train", "train"]]), tmp_path / "b.parquet")
    assert {split: len(examples) for split, examples in scan(tmp_path / "b.parquet").splits.items()} == {
        "train": 3,
        "test": 1,
    }


LABELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "text": ([" a", "b", "a "], ("a", "b")),
    "numbers": ([0, 1, 0], ("0", "1")),
    "truths": ([True, False, True], ("false", "true")),
    "dictionary": (pa.array(["a", "b", "a"]).dictionary_encode(), ("a", "b")),
    "large text": (pa.array(["a", "b", "a"], pa.large_string()), ("a", "b")),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("form", ["struct", "binary", "large_binary"])
def test_columns_of_files_and_labels(pictures: list[bytes], tmp_path: Path, kind: str, form: str) -> None:
    column, classes = LABELS[kind]
    image = files(pictures[:3]) if form == "struct" else pa.array(pictures[:3], getattr(pa, form)())
    pq.write_table(table(jpg=image, embedding=[b"x", b"y", b"z"], label=column), tmp_path / "x.parquet")
    catalog = scan(tmp_path / "x.parquet")
    assert catalog.classes == classes
    pq.write_table(table(**{"": image, "label": column}), tmp_path / "unnamed.parquet")
    assert len(scan(tmp_path / "unnamed.parquet").splits["train"]) == 3
    assert any("1 column of bytes not used: 'embedding'" in note for note in catalog.notes)
    adds_up(catalog)
    catalog = scan(tmp_path / "x.parquet", options=DataConfig(label_column="label", group_by="label"))
    assert {e.group.strip() for e in catalog.splits["train"]} == set(classes)


def test_several_modalities_and_labels(pictures: list[bytes], tmp_path: Path) -> None:
    names = {"info": {"features": {"labels": {"_type": "Sequence", "feature": NAMES["info"]["features"]["label"]}}}}
    made = table(
        names, image=files([*pictures[:3], None]), mask=files(pictures[:4]), audio=files([sound(n) for n in range(4)]),
        labels=[[0], [0, 1], [1], [1]],
    )  # fmt: skip
    pq.write_table(made, tmp_path / "x.parquet")
    catalog = scan(tmp_path / "x.parquet")
    assert catalog.modalities == ("audio", "image")
    assert catalog.multi_label
    assert [e.labels for e in catalog.splits["train"]] == [(0,), (0, 1), (1,), (1,)]
    assert [sorted(e.sources) for e in catalog.splits["train"]][2:] == [["audio", "image"], ["audio"]]
    account = catalog.accounted()
    assert account.passed_over["an empty cell"].first == ["x/000003.image"]
    adds_up(catalog)


def test_files_that_a_table_only_names(pictures: list[bytes], tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(pictures[number])
    made = table(image=files([None, None, pictures[2]], ["0.png", "1.png", "2.png"]), label=["a", "b", "b"])
    pq.write_table(made, tmp_path / "x.parquet")
    examples = scan(tmp_path / "x.parquet").splits["train"]
    assert [s.read(Limits()) for e in examples for s in e.sources.values()] == pictures[:3]


def test_a_manifest_in_parquet(pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "of").mkdir()
    for number in range(4):
        (tmp_path / "of" / f"{number}.png").write_bytes(pictures[number])
    paths = [f"of/{number}.png" for number in range(4)]
    pq.write_table(
        table(path=paths, label=[0, 1, 0, 1], split=["train", "train", "train", "test"]), tmp_path / "m.parquet"
    )
    catalog = scan(tmp_path / "m.parquet")
    assert [e.id for e in catalog.splits["train"]] == paths[:3]
    assert catalog.classes == ("0", "1")
    pq.write_table(
        table(file_name=[path[3:] for path in paths], label=["a", "b"] * 2), tmp_path / "of" / "metadata.parquet"
    )
    catalog = scan(tmp_path / "of")
    assert [(e.id, e.labels) for e in catalog.splits["train"]] == [(f"{n}.png", (n % 2,)) for n in range(4)]


def test_rows_without_a_label_are_counted(pictures: list[bytes], tmp_path: Path) -> None:
    pq.write_table(table(NAMES, image=files(pictures[:4]), label=[0, 1, -1, None]), tmp_path / "x.parquet")
    catalog = scan(tmp_path / "x.parquet")
    account = catalog.accounted()
    assert (account.num_used, account.unlabelled.count) == (2, 2)
    adds_up(catalog)


@pytest.mark.parametrize("writer", ["new_stream", "new_file"])
def test_what_save_to_disk_wrote(pictures: list[bytes], tmp_path: Path, writer: str) -> None:
    made = table(NAMES, image=files(pictures[:6]), label=[0, 1] * 3)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        path = tmp_path / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as file, getattr(pa.ipc, writer)(file, made.schema) as out:
            out.write_table(made, max_chunksize=2)
        (tmp_path / split / "state.json").write_text("{}")
    catalog = scan(tmp_path)
    assert {split: len(examples) for split, examples in catalog.splits.items()} == {"train": 6, "test": 6}
    assert [s.read(Limits()) for e in catalog.splits["test"] for s in e.sources.values()] == pictures[:6]
    adds_up(catalog)


def test_what_tables_lack_is_told(pictures: list[bytes], tmp_path: Path) -> None:
    image = files(pictures[:2])
    for columns, options, message in (
        ({"image": image, "kind": ["a", "b"]}, {}, "no column of labels: columns are 'image', 'kind'; name it: "),
        ({"image": image, "label": ["a", "b"]}, {"label_column": "kind"}, "no column 'kind'; found 'image', 'label'"),
        ({"image": image, "label": ["a", "b"]}, {"group_by": "who"}, "no column 'who'; found"),
        ({"image": image, "label": [{"a": 1}] * 2}, {}, "row x/000000 has an object as label or group; expected"),
        ({"image": image, "label": [0, 2]}, {}, "row x/000001 has label 2; the table names 2 classes"),
    ):  # fmt: skip
        pq.write_table(table(NAMES, **columns), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=message):
            scan(tmp_path / "x.parquet", options=DataConfig(**options))


def test_damaged_tables_are_one_line(pictures: list[bytes], tmp_path: Path) -> None:
    pq.write_table(table(image=files(pictures[:6]), label=["a", "b"] * 3), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    for cut in (10, len(data) // 2, len(data) - 1):
        (tmp_path / "x.parquet").write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"x\.parquet': cannot decode the table: ") as caught:
            scan(tmp_path / "x.parquet")
        assert "\n" not in str(caught.value)


def test_without_pyarrow_a_line_says_what_to_install(
    pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(table(image=files(pictures[:2]), label=["a", "b"]), tmp_path / "x.parquet")
    lack(monkeypatch, "pyarrow")
    with pytest.raises(UsageError, match=r"pyarrow, .*, is missing; pip install 'perceiver-cli\[parquet\]'"):
        scan(tmp_path / "x.parquet")


def test_nothing_is_left_of_the_copy(pictures: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    pq.write_table(table(image=files(pictures[:2]), label=["a", "b"]), tmp_path / "x.parquet")
    catalog = scan(tmp_path / "x.parquet")
    assert f"'{tmp_path}/x.parquet': 0.0 MB, copied to '{tmp_path}/tmp' until this process ends" in catalog.notes
    assert os.listdir(tmp_path / "tmp") == []
    monkeypatch.setattr("perceiver_cli.data.members.FREE", 0.0)
    with pytest.raises(PerceiverError, match="half of what is free there; set TMPDIR"):
        scan(tmp_path / "x.parquet")
