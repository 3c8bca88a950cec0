"""Manifests: columns, labels, splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perceiver_cli.catalog import scan
from perceiver_cli.errors import DataError
from perceiver_cli.manifest import CONTENT, read_manifest
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
    rows, several = read_manifest(tmp_path / "m.csv")
    assert [row.paths for row in rows] == [{"image": "a.png", "audio": "b.wav"}, {"image": "a.png"}, {}]
    assert not several
    assert [row.paths for row in read_manifest(tmp_path / "m.jsonl")[0]] == [{"points": "c.off"}, {"video": "d.mp4"}]


def test_labels_are_not_needed_to_predict(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path\na.png\n")
    assert read_manifest(tmp_path / "m.csv", labelled=False)[0][0].paths == {CONTENT: "a.png"}
    with pytest.raises(DataError, match="columns are 'path'; expected path or some of"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "source,class\nx.png,a\n", "columns are 'source', 'class'; expected path or some of"),
        (
            "m.csv",
            "path,image,label\nx.png,y.png,a\n",
            "columns are 'path', 'image', 'label'; expected path or some of",
        ),
        ("m.csv", "path,label,split\nx.png,a,later\n", "row 1 has split 'later', expected train, val or test"),
        ("m.csv", "path,label\nx.png,a\ny.png,b,c\n", "row 2 has more cells than there are columns"),
        ("m.csv", "path,label\n,a\n", "no usable files in the manifest"),
        ("m.jsonl", '{"path": "x.png", "label": "a"}\n{"path": "y.png"}\n', "row 2 has no label"),
        ("m.jsonl", '{"path": "x.png", "label": "a"}\n[1]\n', "a line that is not an object"),
        ("m.jsonl", '{"image": ["x.png"], "label": "a"}\n', "row 1 has a path that is not text"),
        ("m.jsonl", "{", "not a .jsonl manifest"),
        ("m.csv", "path,label\nnone.png,a\n", "no usable files in the manifest"),
        ("m.csv", "", "the file is empty"),
    ],
)
def test_wrong_manifests_say_what_they_hold(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        scan(tmp_path / name)
    assert message in str(caught.value)
