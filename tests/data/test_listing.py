"""Manifests: columns, labels, splits, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from perceiver_cli.data.account import Account
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.folders import walk
from perceiver_cli.data.manifest import read_manifest
from perceiver_cli.errors import DataError
from tests.conftest import write_images


def test_manifests_are_read_as_folders_are(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", {"a": 3, "b": 3})
    rows = [(p.relative_to(tmp_path), p.parent.name) for p in sorted((tmp_path / "pictures").rglob("*.png"))]
    (tmp_path / "m.csv").write_text("path,label,split\n" + "".join(f"{p},{name},train\n" for p, name in rows))
    (tmp_path / "m.tsv").write_text("label\tfile_name\n" + "".join(f"{name}\t{p}\n" for p, name in rows))
    lines = "".join(json.dumps({"path": str(p), "label": name}) + "\n" for p, name in rows)
    (tmp_path / "m.jsonl").write_text(lines)
    catalogs = [scan(tmp_path / f"m.{suffix}") for suffix in ("csv", "tsv", "jsonl")]
    assert all(catalog.counts("train") == {"a": 3, "b": 3} for catalog in catalogs)
    assert len({catalog.fingerprint for catalog in catalogs}) == 1
    assert not any(catalog.multi_label for catalog in catalogs)


def test_a_column_of_labels_holds_several(tmp_path: Path) -> None:
    write_images(tmp_path, {"x": 3})
    (tmp_path / "m.csv").write_text(
        'path,labels,split\nx/000.png,dog;cat,train\nx/001.png,,val\nx/002.png,"cat,bird",train\n'
    )
    catalog = scan(tmp_path / "m.csv")
    assert catalog.multi_label
    assert catalog.classes == ("bird", "cat", "dog")
    assert [e.labels for e in catalog.splits["train"]] == [(1, 2), (0, 1)]
    assert [e.labels for e in catalog.splits["val"]] == [()]


def test_a_column_for_each_modality(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,audio,author,label\na.png,b.wav,me,x\na.png,,me,x\n,,me,y\n")
    (tmp_path / "m.jsonl").write_text('{"label": "x", "points": "c.off"}\n{"label": "y", "video": "d.mp4"}\n')
    read = read_manifest(tmp_path / "m.csv")
    assert [row.columns for row in read.rows] == [{"image": "a.png", "audio": "b.wav"}, {"image": "a.png"}, {}]
    assert not read.multi_label
    assert [row.columns for row in read_manifest(tmp_path / "m.jsonl").rows] == [
        {"points": "c.off"},
        {"video": "d.mp4"},
    ]


def test_labels_are_not_needed_to_predict(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\na.png\n")
    assert read_manifest(tmp_path / "m.csv", labels="ignored").rows[0].path == "a.png"
    with pytest.raises(DataError, match="columns are 'path'; expected path or some of"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "source,class\nx.png,a\n", "columns are 'source', 'class'; expected path or some of"),
        ("m.csv", "pth,lable\nx.png,a\n", "and perhaps split; perhaps --path-column 'pth' --label-column 'lable'"),
        ("m.csv", "id,path,category_name\n1,x.png,a\n", "and perhaps split; perhaps --label-column 'category_name'"),
        ("m.txt", "x.png a\nalone.png\n", "not a .txt manifest: line 2 is 'alone.png', expected PATH LABEL"),
        (
            "m.csv",
            "path,image,label\nx.png,y.png,a\n",
            "columns are 'path', 'image', 'label'; expected path or some of",
        ),
        ("m.csv", "path,label,split\nx.png,a,later\n", "row 1 has split 'later', expected train, val or test"),
        ("m.csv", "path,label\nx.png,a\ny.png,b,c\n", "row 2 has more cells than columns"),
        ("m.csv", "path,label\n,a\n", "the manifest names no file"),
        ("m.jsonl", '{"path": "x.png", "label": "a"}\n{"path": "y.png"}\n', "row 2 has no label"),
        ("m.jsonl", '{"path": "x.png", "label": "a"}\n[1]\n', "row 2 is not an object"),
        ("m.jsonl", '{"image": ["x.png"], "label": "a"}\n', "row 1 has a path that is not text"),
        ("m.jsonl", "{", "not a .jsonl manifest"),
        ("m.csv", "path,label\nnone.png,a\n", "1 of 1 file do not exist, the first 'none.png'"),
        ("m.csv", "", "the file is empty"),
    ],
)
def test_wrong_manifests_say_what_they_hold(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        scan(tmp_path / name)
    assert message in str(caught.value)


# ---------------------------------------------------------------- lists of lines, metadata in folders


def test_lines_of_path_and_label(tmp_path: Path) -> None:
    write_images(tmp_path, {"a b": 2, "c": 2})
    (tmp_path / "m.txt").write_text("a b/000.png 0\r\na b/001.png\t0\n\nc/000.png 7\nc/001.png 7\n")
    catalog = scan(tmp_path / "m.txt")
    assert catalog.counts("train") == {"0": 2, "7": 2}
    assert [e.id for e in catalog.splits["train"]] == ["a b/000.png", "a b/001.png", "c/000.png", "c/001.png"]


def test_a_folder_with_a_list_of_each_split(tmp_path: Path) -> None:
    write_images(tmp_path, {"all": 6})
    for name, first in (("train.txt", 0), ("validation.txt", 2), ("test.csv", 4)):
        rows = [f"{first + i:03d}.png" for i in range(2)]
        if name.endswith(".csv"):
            text = "path,label\n" + "".join(f"all/{row},{i}\n" for i, row in enumerate(rows))
        else:
            text = "".join(f"all/{row} {i}\n" for i, row in enumerate(rows))
        (tmp_path / name).write_text(text)
    assert scan(tmp_path).classes == ("all",)  # class folders come first
    for path in sorted((tmp_path / "all").iterdir()):
        shutil.move(path, tmp_path)
    (tmp_path / "all").rmdir()
    for path in tmp_path.glob("*.[ct][sx][vt]"):
        path.write_text(path.read_text().replace("all/", ""))
    catalog = scan(tmp_path)
    assert set(catalog.splits) == {"train", "val", "test"}
    assert all(catalog.counts(split) == {"0": 1, "1": 1} for split in catalog.splits)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("where", ["top", "splits"])
def test_metadata_beside_the_files(tmp_path: Path, suffix: str, where: str) -> None:
    for split in ("train", "test"):
        write_images(tmp_path, {split: 4})

    def write(folder: Path, names: list[str]) -> None:
        rows = [(name, "ab"[i % 2]) for i, name in enumerate(names)]
        if suffix == "csv":
            text = "file_name,text,label\n" + "".join(f"{name},it is,{label}\n" for name, label in rows)
        else:
            text = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows)
        (folder / f"metadata.{suffix}").write_text(text)

    if where == "top":
        write(tmp_path, [f"{split}/{i:03d}.png" for split in ("train", "test") for i in range(4)])
    else:
        for split in ("train", "test"):
            write(tmp_path / split, [f"{i:03d}.png" for i in range(4)])
    catalog = scan(tmp_path)
    assert set(catalog.splits) == {"train", "test"}
    assert all(catalog.counts(split) == {"a": 2, "b": 2} for split in catalog.splits)
    assert catalog.splits["test"][0].id == "test/000.png"
    unused = ("path from 'file_name', label from 'label'; 1 column not used: 'text'",) if suffix == "csv" else ()
    assert catalog.notes == unused
    (tmp_path / "train" / "new.png").write_bytes((tmp_path / "train" / "000.png").read_bytes())
    assert scan(tmp_path).account.passed_over["named by no manifest"].first == [os.path.join("train", "new.png")]


def test_metadata_without_labels_leaves_the_classes_to_folders(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "metadata.csv").write_text("file_name,speaker\na/000.png,x\n")
    catalog = scan(tmp_path)
    assert catalog.classes == ("a", "b")
    assert "the classes are those of folders" in catalog.notes[0]
    assert "columns are 'file_name', 'speaker'" in catalog.notes[0]
    for path in (tmp_path / "a").iterdir():
        shutil.move(path, tmp_path)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "metadata.csv").write_text("file_name,lable\n000.png,x\n")
    with pytest.raises(DataError, match="perhaps --label-column 'lable'"):
        scan(tmp_path)


def test_metadata_of_several_modalities(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image_file_name,audio_file_name,label\na.png,b.wav,x\n")
    assert read_manifest(tmp_path / "m.csv").rows[0].columns == {"image": "a.png", "audio": "b.wav"}


def test_json_lines_end_at_newlines_only(tmp_path: Path) -> None:
    row = json.dumps({"path": "a\u2028b.png", "label": "x"}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_text(row + "\n", encoding="utf-8")
    assert read_manifest(tmp_path / "m.jsonl").rows[0].path == "a\u2028b.png"


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class was missing in silence. The system refuses root nothing, so a refusal is made up."""
    for name in ("a/x", "b/secret/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    scandir = os.scandir

    def refusing(path: str | os.PathLike[str]) -> Any:
        if os.fspath(path).endswith(closed):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for closed in ("secret", "b"):
        with pytest.raises(DataError, match=f"{closed}': cannot read: Permission denied"):
            list(walk(tmp_path, Account()))
