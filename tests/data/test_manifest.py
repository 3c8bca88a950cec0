"""Manifests as programs write them: separators, encodings, line ends, labels, columns, and paths of other machines."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from perceiver_cli.config import DataConfig
from perceiver_cli.data.catalog import Catalog, scan
from perceiver_cli.data.inputs import Pipe, examples_of
from perceiver_cli.data.listing import listed
from perceiver_cli.data.manifest import Labels, read_manifest
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import write_images, write_pairs

ROWS = [(f"{name}/{number:03d}.png", name) for name in ("cat", "hen") for number in range(2)]
IMAGE = {"image": ImageSpec()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path, {"cat": 2, "hen": 2})


def table(rows: Sequence[Sequence[str]], separator: str = ",", end: str = "\n") -> str:
    return "".join(separator.join(row) + end for row in rows)


def scanned(folder: Path, content: str | bytes, name: str = "m.csv", **options: Any) -> Catalog:
    """Return the catalog of a manifest with this content in a folder."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return scan(folder / name, options=DataConfig(**options))


def labels_in(folder: Path, content: str, name: str = "m.csv", **options: Any) -> list[tuple[str, ...]]:
    (folder / name).write_text(content)
    return [row.labels for row in read_manifest(folder / name, DataConfig(**options)).rows]


# ---------------------------------------------------------------- dialects


def with_text(text: str, separator: str = ",") -> str:
    """Return a manifest with a column of text that is not read."""
    return table([("path", "text", "label"), *((path, text, name) for path, name in ROWS)], separator)


PLAIN = table([("path", "label"), *ROWS])
OF_EXCEL = table([("path", "label"), *ROWS], ";", "\r\n")
DIALECTS = {
    "byte order mark": ("m.csv", PLAIN.encode("utf-8-sig")),
    "semicolons": ("m.csv", OF_EXCEL.encode()),
    "sep line": ("m.csv", b"sep=;\r\n" + OF_EXCEL.encode()),
    "mark and sep line": ("m.csv", ("sep=;\r\n" + OF_EXCEL).encode("utf-8-sig")),
    "tabs in csv": ("m.csv", PLAIN.replace(",", "\t").encode()),
    "commas in tsv": ("m.tsv", PLAIN.encode()),
    "utf-16 le": ("m.tsv", b"\xff\xfe" + PLAIN.replace(",", "\t").encode("utf-16-le")),
    "utf-16 be": ("m.csv", b"\xfe\xff" + PLAIN.encode("utf-16-be")),
    "utf-16 without mark": ("m.csv", PLAIN.encode("utf-16-le")),
    "cr only": ("m.csv", PLAIN.replace("\n", "\r").encode()),
    "blank lines": ("m.csv", PLAIN.replace("\n", "\n\n").encode()),
    "empty rows at the end": ("m.csv", (OF_EXCEL + ";\r\n;\r\n").encode()),
    "empty columns at the end": ("m.csv", PLAIN.replace("\n", ",,\n").encode()),
    "quoted": ("m.csv", table([("path", "label"), *((f'"{path}"', f'"{name}"') for path, name in ROWS)]).encode()),
    "a quoted newline": ("m.csv", with_text('"a\nb"').encode()),
    "backslashed quotes": ("m.csv", with_text('"a \\"b\\", c"').encode()),
    "bare quotes in tsv": ("m.tsv", with_text('"a" b', "\t").encode()),
    "blanks in the header": ("m.csv", PLAIN.replace("path,label", " Path , Label ").encode()),
    "an array of objects": ("m.json", json.dumps([{"path": p, "label": n} for p, n in ROWS], indent=1).encode()),
    "json lines called json": ("m.json", "".join(json.dumps({"path": p, "label": n}) + "\n" for p, n in ROWS).encode()),
    "an array called jsonl": ("m.jsonl", json.dumps([{"path": p, "label": n} for p, n in ROWS]).encode()),
    "ndjson": ("m.ndjson", "".join(json.dumps({"path": p, "label": n}) + "\r\n" for p, n in ROWS).encode()),
    "json lines, cr": ("m.jsonl", "\r".join(json.dumps({"path": p, "label": n}) for p, n in ROWS).encode("utf-8-sig")),
    "lines of utf-16": ("m.txt", "\r\n".join(map(" ".join, ROWS)).encode("utf-16")),
    "lines, cr": ("m.txt", "\r".join(map(" ".join, ROWS)).encode()),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIALECTS)
def test_a_manifest_of_each_dialect_is_read(data: Path, kind: str) -> None:
    name, content = DIALECTS[kind]
    catalog = scanned(data, content, name)
    assert catalog.counts("train") == {"cat": 2, "hen": 2}
    assert [example.id for example in catalog.splits["train"]] == [path for path, _ in ROWS]


def test_text_of_windows_is_read_as_such_and_paths_keep_their_bytes(data: Path) -> None:
    (data / "cat" / "é.png").write_bytes((data / "cat" / "000.png").read_bytes())
    raw = os.fsdecode(b"hen/\xe9.png")
    (data / raw).write_bytes((data / "hen" / "000.png").read_bytes())
    text = "path;label\ncat/é.png;Café\nhen/é.png;hen\ncat/001.png;Café\n"
    catalog = scanned(data, text.encode("cp1252"))
    assert catalog.classes == ("Café", "hen")
    assert [example.id for example in catalog.splits["train"]] == ["cat/001.png", "cat/é.png", raw]
    assert "not UTF-8: read as Windows-1252" in catalog.notes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "cat/000.png,cat\nhen/000.png,hen\n", "is the first line a header? It must name the columns"),
        ("m.csv", "path,label,label\na.png,x,y\n", "2 columns 'label'; rename all but one"),
        ("m.csv", "path,label\na.png,x\nb.png,y,z\n", "row 2 has more cells than columns: 3, expected 2"),
        ("m.csv", "path,label\na.png,x\nb.png\n", "row 2 has no label: its column 'label' is empty"),
        ("m.csv", 'path,label\na.png,"x\nb.png,y\n', "not a .csv manifest: line 3: unexpected end of data"),
        (
            "m.json",
            '{"images": [], "info": {"year": 1}}',
            "one object that holds objects, expected an array with an object",
        ),
        ("m.json", '{\n "path": {"0": "a.png"},\n "label": {"0": "x"}\n}\n', "one object that holds objects"),
        ("m.csv", "class,category,path\nx,y,a.png\n", "perhaps --label-column 'class' or 'category'"),
        ("m.jsonl", '{"path": "a.png", "label": {"a": 1}}\n{"path": "b.png", "label": 1}', "a label that is an object"),
        ("m.csv", "path,label\n", "the manifest names no file; add rows to it"),
        ("m.json", "[]", "columns are none"),
        ("m.csv", "path,label\ncat,x\nhen,y\n", "no usable files in the manifest, the first: "),
        ("m.csv", "PK\x03\x04", "a spreadsheet or another zip, not a .csv manifest; save it as CSV"),
        ("m.csv", "id,species\na.png,x\n", "perhaps --path-column NAME --label-column NAME"),
        ("m.jsonl", '{"path": "a.png", "labels": [["a"]]}', "row 1 has a label that is a list"),
        ("m.jsonl", '{"path": "a.png", "label": 1}\n{bad', "line 2: Expecting property name"),
    ],
)
def test_what_cannot_be_read_is_one_line(data: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        scanned(data, text, name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("label", ["0", "false", "0.0", "NaN", "null", "None", "-", "no"])
def test_any_text_is_a_label(tmp_path: Path, label: str) -> None:
    assert labels_in(tmp_path, f"path,label\na.png,{label}\n") == [(label,)]
    assert labels_in(tmp_path, f"path,labels\na.png,{label}\n") == [(label,)]


def test_numbers_and_truths_of_json_are_labels(tmp_path: Path) -> None:
    values = [0, 1, 1.0, True, False, "0", 12345678901234567890]
    text = "".join(json.dumps({"path": "a.png", "label": value}) + "\n" for value in values)
    found = labels_in(tmp_path, text, "m.jsonl")
    assert found == [("0",), ("1",), ("1.0",), ("true",), ("false",), ("0",), ("12345678901234567890",)]
    text = "".join(json.dumps({"path": "a.png", "labels": value}) + "\n" for value in ([0, True, " x "], [], 0, False))
    assert labels_in(tmp_path, text, "m.jsonl") == [("0", "true", "x"), (), ("0",), ("false",)]
    text = json.dumps([{"path": "a.png", "label": ["a", 0]}, {"path": "b.png", "label": ["a"]}])
    (tmp_path / "m.json").write_text(text)
    assert read_manifest(tmp_path / "m.json").multi_label


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\u3000", "\ufeff", "\u200b", "\t"])
def test_blanks_around_a_label_are_no_part_of_it(tmp_path: Path, blank: str) -> None:
    assert labels_in(tmp_path, f"path,label\na.png,{blank}red{blank}\n") == [("red",)]


def test_line_ends_in_a_label_are_blanks(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b'path,label\na.png,"red\r"\nb.png,"dark\r\nred"\nc.png,red\r\r\n')
    assert [row.labels for row in read_manifest(tmp_path / "m.csv").rows] == [("red",), ("dark red",), ("red",)]


@pytest.mark.parametrize("empty", ["", " ", "\u00a0"])
def test_an_empty_label_stops_training_and_is_counted_in_evaluation(data: Path, empty: str) -> None:
    rows = [(path, name if number else empty) for number, (path, name) in enumerate(ROWS)]
    text = table([("path", "class"), *rows])
    with pytest.raises(DataError, match="row 1 has no label: its column 'class' is empty; fill it in, or remove"):
        scanned(data, text)
    catalog = scan(data / "m.csv", ["cat", "hen"], labels="scored")
    assert len(catalog.splits["train"]) == 3
    assert "1 of 4 rows without a label in 'class', left out" in catalog.notes
    with pytest.raises(DataError, match="no row has a label: column 'label' is empty"):
        read_manifest(write(data, "path,label\na.png,\n"), labels="scored")
    kept = read_manifest(data / "m.csv", labels="optional")
    assert ([row.path for row in kept.rows], kept.rows[0].labels) == (["a.png"], ())


def write(folder: Path, text: str, name: str = "m.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_rows_of_the_test_split_need_no_label(data: Path) -> None:
    rows = [(path, name, "train") for path, name in ROWS[1:]] + [(ROWS[0][0], "", "test")]
    catalog = scanned(data, table([("path", "label", "split"), *rows]))
    assert "1 of 4 rows without a label in 'label', left out" in catalog.notes
    assert set(catalog.splits) == {"train"}


@pytest.mark.parametrize(
    ("one", "other"), [("Red", "red"), ("dark red", "darkred"), ("e\u0301", "\u00e9"), ("1", "1.0"), ("ﬁ", "fi")]
)
def test_classes_that_look_the_same_are_told(data: Path, one: str, other: str) -> None:
    rows = [(path, (one, other)[number % 2]) for number, (path, _) in enumerate(ROWS)]
    catalog = scanned(data, table([("path", "label"), *rows]))
    assert len(catalog.classes) == 2
    assert any(note.startswith("classes that differ only in case, blanks or the like: ") for note in catalog.notes)
    (data / "cat").rename(data / "Hen")
    assert "classes that differ only in case, blanks or the like: 'Hen' and 'hen'" in scan(data).notes


def test_a_class_that_looks_like_no_label_is_told(data: Path) -> None:
    rows = [(path, ("nan", "hen")[number % 2]) for number, (path, _) in enumerate(ROWS)]
    assert "'nan' is a class like any other" in scanned(data, table([("path", "label"), *rows])).notes


# ---------------------------------------------------------------- columns


def test_nothing_is_read_from_a_column_that_was_not_asked_for(data: Path) -> None:
    """pandas writes its index as a column without a name: it was the group of each row."""
    rows = [(str(number), path, name) for number, (path, name) in enumerate(ROWS)]
    catalog = scanned(data, table([("", "path", "label"), *rows]))
    assert {example.group for example in catalog.splits["train"]} == {""}
    assert catalog.notes == ("path from 'path', label from 'label'; 1 column not used: ''",)
    unlabelled = read_manifest(data / "m.csv", labels="ignored")
    assert {(row.labels, row.group) for row in unlabelled.rows} == {((), "")}


def test_options_name_the_columns(data: Path) -> None:
    rows = [(path, name, "x") for path, name in ROWS]
    text = table([("photo", "kind", "label"), *rows])
    catalog = scanned(data, text, label_column="kind", path_column={"path": "photo"})
    assert catalog.classes == ("cat", "hen")
    assert catalog.notes == ("path from 'photo', label from 'kind'; 1 column not used: 'label'",)
    by_kind = scanned(data, text, label_column="kind", path_column={"image": "photo"})
    assert by_kind.modalities == ("image",)
    assert by_kind.notes[0].startswith("image from 'photo', label from 'kind'; ")
    assert scanned(data, text.replace(",", ";"), label_column="kind", path_column={"path": "photo"}).classes
    with pytest.raises(DataError, match="expected 'sort' for --label-column"):
        scanned(data, text, label_column="sort", path_column={"path": "photo"})
    with pytest.raises(DataError, match="--label-column applies; name the manifest"):
        scan(data, options=DataConfig(label_column="kind"))


@pytest.mark.parametrize("path", ["filepath", "File Name", "FILE", "file-path"])
@pytest.mark.parametrize("label", ["class", "Category", "target"])
def test_usual_names_are_taken_with_a_word(data: Path, path: str, label: str) -> None:
    catalog = scanned(data, table([(path, label), *ROWS]))
    assert catalog.counts("train") == {"cat": 2, "hen": 2}
    assert catalog.notes == (f"path from '{path}', label from '{label}'",)


def test_metadata_and_lists_of_splits_are_read_alike(data: Path) -> None:
    rows = [(str(number), path, name) for number, (path, name) in enumerate(ROWS)]
    text = table([("", "file_name", "class"), *rows], ";", "\r\n")
    (data / "metadata.csv").write_text(text, encoding="utf-8-sig")
    catalog = scan(data)
    assert catalog.classes == ("cat", "hen")
    said = "path from 'file_name', label from 'class'; 1 column not used: ''"
    assert said in catalog.notes
    (data / "metadata.csv").unlink()
    flat = data / "flat"
    flat.mkdir()
    for split in ("train", "test"):
        for number, (path, _) in enumerate(ROWS):
            (flat / f"{number}.png").write_bytes((data / path).read_bytes())
        own = table([("", "file_name", "class"), *((str(i), f"{i}.png", ROWS[i][1]) for i in range(4))], ";")
        (flat / f"{split}.csv").write_text(own)
    lists = scan(flat)
    assert lists.counts("train") == lists.counts("test") == {"cat": 2, "hen": 2}
    assert list(lists.notes).count(said) == 1


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "form",
    [
        lambda path, folder: path.replace("/", "\\"),
        lambda path, folder: ".\\" + path.replace("/", "\\"),
        lambda path, folder: (folder / path).as_uri(),
        lambda path, folder: "file:" + str(folder / path),
        lambda path, folder: "C:\\Users\\me\\animals\\" + path.replace("/", "\\"),
        lambda path, folder: "file:///C:/Users/me/animals/" + path,
        lambda path, folder: "\\\\server\\share\\animals\\" + path.replace("/", "\\"),
        lambda path, folder: "/home/else/animals/" + path,
        lambda path, folder: f"  {path} ",
        lambda path, folder: path.removesuffix(".png"),  # Kaggle's ids
    ],
)
def test_paths_of_other_machines_are_found(data: Path, form: Any) -> None:
    catalog = scanned(data, table([("path", "label"), *((form(path, data), name) for path, name in ROWS)]))
    assert catalog.counts("train") == {"cat": 2, "hen": 2}
    assert not catalog.bad
    assert any("4 paths read in another form, such as " in note for note in catalog.notes)


def test_unicode_of_another_form_and_blanks_in_urls_are_found(data: Path) -> None:
    for name in ("caf\u00e9 1.png", "cafe\u0301 2.png"):
        (data / name).write_bytes((data / "cat" / "000.png").read_bytes())
    rows = [("cafe\u0301 1.png", "a"), ("caf\u00e9 2.png", "b"), ((data / "caf\u00e9 1.png").as_uri(), "c")]
    assert not scanned(data, table([("path", "label"), *rows])).bad


def test_missing_files_are_looked_for_further_below(data: Path) -> None:
    with pytest.raises(DataError, match=r"pass --root with the folder that holds them; there is '.*/001\.png'"):
        scanned(data, "path,label\n001.png,a\n001.png,b\n")


def test_a_name_without_suffix_that_two_files_have_is_missing(data: Path) -> None:
    (data / "cat" / "000.json").write_text("{}")
    catalog = scanned(data, table([("path", "label"), *ROWS, ("cat/000", "cat")]))
    assert any("the suffix is missing, and there are '000.json' and '000.png'" in note for note in catalog.notes)
    assert catalog.bad.keys() == {"cat/000"}


def test_a_label_after_a_tab_may_have_blanks(data: Path) -> None:
    catalog = scanned(data, table([(path, f"big {name}") for path, name in ROWS], "\t"), "m.txt")
    assert catalog.counts("train") == {"big cat": 2, "big hen": 2}


def test_examples_in_several_splits_are_told(data: Path) -> None:
    rows = [(path, name, split) for split in ("train", "test") for path, name in ROWS[: 4 if split == "train" else 1]]
    (note,) = scanned(data, table([("path", "label", "split"), *rows])).notes
    assert note.startswith("1 example in several splits, such as 'cat/000.png' in test and train")


def test_absolute_paths_of_another_machine_never_fall_together(data: Path) -> None:
    """cat/000.png and hen/000.png are no 000.png."""
    for path in sorted((data / "cat").iterdir()):
        path.rename(data / path.name)
    rows = [("/mnt/x/" + path, name) for path, name in ROWS]
    with pytest.raises(DataError, match="4 of 4 files do not exist"):
        scanned(data, table([("path", "label"), *rows]))


def test_paths_are_below_the_root(data: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    text = table([("path", "label"), *ROWS])
    with pytest.raises(DataError, match=r"4 of 4 files do not exist, the first 'cat/000\.png'; paths are relative to"):
        scanned(tmp_path / "lists", text)
    catalog = scanned(tmp_path / "lists", text, root=str(data))
    assert [example.id for example in catalog.splits["train"]] == [path for path, _ in ROWS]
    (tmp_path / "lists" / "metadata.csv").write_text(text)
    assert not scan(tmp_path / "lists", options=DataConfig(root=str(data))).bad
    with pytest.raises(DataError, match="no manifest to which --root applies"):
        scan(data, options=DataConfig(root=str(data)))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("https://x.org/a.png", "nothing is downloaded: name local files"),
        ("s3://bucket/a.png", "nothing is downloaded: name local files"),
        ("D:\\pictures\\a.png", "this is a Windows path: pass --root"),
        ("pictures\\a.png", "backslashes are read as slashes too"),
        ("CAT/000.PNG", "upper and lower case differ: there is "),
        ("else/a.png", "pass --root with the folder that holds them"),
        ("file://server/a.png", "no such file here"),
    ],
)
def test_missing_files_are_counted_with_a_hint(data: Path, path: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        scanned(data, table([("path", "label"), *((path + "x" * i, "a") for i in range(2))]))
    assert f"of 2 files do not exist, the first '{path}'".replace("\\", "\\\\") in str(caught.value)
    assert hint in str(caught.value)
    catalog = scanned(data, table([("path", "label"), *ROWS, (path, "cat")]))
    assert [note for note in catalog.notes if note.startswith("1 of 5 files do not exist, the first ") and hint in note]
    assert len(catalog.bad) == 1
    predicted = list(examples_of(str(data / "m.csv"), IMAGE, Limits()))
    assert len(predicted) == 5
    assert hint in str(predicted[-1].error)


@pytest.mark.parametrize("path", ["cat\0/000.png", "cat/000\0", "\0"])
def test_a_nul_in_a_path_is_told(data: Path, path: str) -> None:
    """Python's glob raised ValueError: `predict` of a damaged listing ended as a bug."""
    scanned(data, table([("path", "label"), *ROWS, (path, "cat")]))
    *good, bad = examples_of(str(data / "m.csv"), IMAGE, Limits())
    assert [example.error for example in good] == [None] * len(ROWS)
    assert "no path has a NUL character" in str(bad.error)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_pairs_files_in_prediction_as_in_training(tmp_path: Path, suffix: str) -> None:
    """It was taken for a broken file; now its rows say which files belong together."""
    write_pairs(tmp_path, 2)
    folder = tmp_path / "top-low"
    (folder / "001.wav").rename(folder / "sound.wav")
    row = {"image_file_name": "001.png", "audio_file_name": "sound.wav", "label": "x"}
    text = json.dumps(row) + "\n" if suffix == "jsonl" else table([[*row], [*row.values()]], ";", "\r\n")
    write(folder, text, f"metadata.{suffix}")
    both = IMAGE | {"audio": AudioSpec()}
    found = list(examples_of(str(folder), both, Limits()))
    assert [(example.error, sorted(example.sources)) for example in found] == [(None, ["audio", "image"])] * 2
    assert found[0].id == "001.png+sound.wav"
    write(folder, "id,speaker\n1,x\n" if suffix == "csv" else '{"id": 1}\n', f"metadata.{suffix}")
    assert len(list(examples_of(str(folder), both, Limits()))) == 3  # it is about something else


def test_a_list_of_paths_on_stdin_is_told(data: Path) -> None:
    for content, option in (
        (f"{data}/cat/000.png\r\n", "--files-from -"),
        (f"{data}/cat/000.png\0", "--files-from - -0"),
    ):
        (example,) = examples_of(Pipe("-", io.BytesIO(content.encode())), IMAGE, Limits())
        assert example.error is not None
        assert "a list of paths, such as '" in example.error
        assert example.error.endswith(f"pass {option}")


def test_a_pattern_that_no_shell_expanded(data: Path) -> None:
    """The error of an unmatched *.jpg expected tars of records."""
    for labels in get_args(Labels):
        with pytest.raises(DataError, match="no file matches this pattern; expected files, a folder, a manifest or"):
            listed(str(data / "*.jpg"), labels=labels)
    with pytest.raises(
        DataError, match=r"2 files without labels, such as '.*/cat/000\.png'; expected a folder of class"
    ):
        scan(data / "cat" / "*.png")
    found = list(examples_of(str(data / "cat" / "*.png"), IMAGE, Limits()))
    assert [Path(example.id).name for example in found] == ["000.png", "001.png"]
    assert [sorted(example.sources) for example in found] == [["image"]] * 2
