"""Data sets in tars and zips: read in place, the same as the folder; hostile members; every member accounted for."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_cli.config import DataConfig
from perceiver_cli.data.archives import opened
from perceiver_cli.data.catalog import Catalog, scan
from perceiver_cli.data.containers import containers
from perceiver_cli.data.inputs import examples_of
from perceiver_cli.data.lint import lint
from perceiver_cli.data.loader import Reader, ordered_tasks
from perceiver_cli.data.prepare import plan, write_records
from perceiver_cli.errors import DataError, LimitError
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive, write_images, write_pairs

Members = Iterable[tuple[str, bytes]]
PNG = write_images(Path(tempfile.mkdtemp()), {"x": 1}).joinpath("x", "000.png").read_bytes()


def tar_of(path: Path, members: Members, mode: str = "w", form: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar of (name, bytes); a name with a slash at its end is a folder. Returns the path."""
    with tarfile.open(path, mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def zip_of(path: Path, members: Members, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write a zip of (name, bytes). Returns the path."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def files_in(folder: Path, top: str = "") -> list[tuple[str, bytes]]:
    """Return (name, bytes) of every file below a folder, its name after `top`."""
    return [
        (top + str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()
    ]


def labelled(catalog: Catalog) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (split, id, labels) of each example."""
    return [
        (split, example.id, tuple(catalog.classes[label] for label in example.labels))
        for split, examples in sorted(catalog.splits.items())
        for example in examples
    ]


def adds_up(catalog: Catalog) -> None:
    """Every path is in one group of the account."""
    account = catalog.accounted()
    assert account.total == account.found, account.lines()
    if os.path.isdir(catalog.root):
        assert account.paths == 1 + len(list(Path(catalog.root).rglob("*")))


JUNK = [("__MACOSX/cat/._000.png", b"x"), (".DS_Store", b"x"), ("cat/Thumbs.db", b"x"), ("README.md", b"hello")]
WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "dot.tar": lambda d, t: tar_of(t / "a.tar", [("./", b""), *files_in(d, "./")]),
    "top.tar": lambda d, t: tar_of(t / "a.tar", [("data/", b""), *files_in(d, "data/")]),
    "pax.tar": lambda d, t: tar_of(t / "a.tar", files_in(d), form=tarfile.PAX_FORMAT),
    "v7.tar": lambda d, t: without_magic(tar_of(t / "a.tar", files_in(d), form=tarfile.USTAR_FORMAT)),
    "junk.tar": lambda d, t: tar_of(t / "a.tar", [("./._cat", b"x"), *files_in(d), *JUNK]),
    "tar.gz": lambda d, t: tar_of(t / "a.tar.gz", files_in(d), "w:gz"),
    "tgz": lambda d, t: tar_of(t / "A.TGZ", files_in(d, "data/"), "w:gz"),
    "bare name": lambda d, t: tar_of(t / "archive", files_in(d), "w:gz"),
    "tar.bz2": lambda d, t: tar_of(t / "a.tar.bz2", files_in(d), "w:bz2"),
    "tar.xz": lambda d, t: tar_of(t / "a.tar.xz", files_in(d), "w:xz"),
    "joined.tar": lambda d, t: joined(d, t),
    "zip": lambda d, t: zip_of(t / "a.zip", files_in(d)),
    "stored.zip": lambda d, t: zip_of(t / "a.zip", files_in(d), zipfile.ZIP_STORED),
    "top.zip": lambda d, t: Path(shutil.make_archive(str(t / "a"), "zip", d.parent, d.name)),
    "junk.zip": lambda d, t: zip_of(t / "a.zip", [*files_in(d, "data/"), *JUNK]),
    "windows.zip": lambda d, t: windows(t / "a.zip", files_in(d)),
}


def without_magic(path: Path) -> Path:
    """Make the headers of a tar those of the seventh Unix."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 257 : at + 512] = bytes(255)
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return path


def joined(folder: Path, top: Path) -> Path:
    """Write two tars one after the other: `cat a.tar b.tar`."""
    files = files_in(folder)
    parts = [tar_of(top / f"{n}.part", files[n::2]).read_bytes() for n in range(2)]
    (top / "a.tar").write_bytes(b"".join(parts))
    return top / "a.tar"


def windows(path: Path, members: Members) -> Path:
    """Write a zip whose names have backslashes, as .NET's old library did."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name.replace("/", "\\"), 0
            archive.writestr(info, data)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six pictures, one of them below another folder."""
    root = write_images(tmp_path_factory.mktemp("of") / "data", {"cat": 6, "dog": 6})
    (root / "cat" / "more").mkdir()
    (root / "cat" / "005.png").rename(root / "cat" / "more" / "005.png")
    return root


@pytest.mark.parametrize("kind", WRITERS)
def test_an_archive_of_a_folder_is_the_folder(folder: Path, tmp_path: Path, kind: str) -> None:
    catalog, expected = scan(WRITERS[kind](folder, tmp_path)), scan(folder)
    assert catalog.fingerprint == expected.fingerprint
    assert labelled(catalog.hold_out(0.3)) == labelled(expected.hold_out(0.3))
    assert [s.read(Limits()) for e in catalog.splits["train"] for s in e.sources.values()] == [
        (folder / e.id).read_bytes() for e in expected.splits["train"]
    ]
    adds_up(catalog)
    if "junk" in kind:
        over = catalog.accounted().passed_over
        assert {name: paths.count for name, paths in over.items() if name != "in no class folder"} == {
            "hidden": 2 if "tar" in kind else 1, "of the system": 2,
        }  # fmt: skip


def test_the_model_of_an_archive_is_that_of_its_folder_to_the_byte(folder: Path, tmp_path: Path) -> None:
    paths = [folder, WRITERS["dot.tar"](folder, tmp_path), WRITERS["top.zip"](folder, tmp_path)]
    models = set()
    for number, path in enumerate(paths):
        list(Trainer(path, tmp_path / f"run{number}", overrides=[*SMALL, "train.steps=2"]).fit())
        models.add((tmp_path / f"run{number}" / "model.safetensors").read_bytes())
    assert len(models) == 1


@pytest.mark.parametrize("layout", ["split/class/file", "class/split/file"])
@pytest.mark.parametrize("top", ["", "ModelNet/"])
def test_splits_in_archives(folder: Path, tmp_path: Path, layout: str, top: str) -> None:
    names = {"train": ["a", "b", "c"], "test": ["d"]}
    paths = []
    for split, files in names.items():
        for label in ("cat", "dog"):
            place = f"{split}/{label}" if layout.startswith("split") else f"{label}/{split}"
            paths += [f"{place}/{name}.png" for name in files]
    members = [(top + path, PNG) for path in paths]
    for path in paths:
        (tmp_path / "d" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / path).write_bytes(PNG)
    expected = labelled(scan(tmp_path / "d"))
    assert labelled(scan(tar_of(tmp_path / "a.tar", members))) == expected
    assert labelled(scan(zip_of(tmp_path / "a.zip", members))) == expected


NAMES = {
    "x" * 150: "GNU and PAX long names",
    "Zoë/ü": "UTF-8",
    "\udcff\udcfe": "bytes that are not UTF-8",
    "a\nb'": "a new line and a quote",
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_tars(tmp_path: Path, form: int) -> None:
    members = [(f"{label}/{name}.png", PNG) for label in ("a", "b") for name in NAMES]
    with tarfile.open(tmp_path / "a.tar", "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert sorted(e.id for e in scan(tmp_path / "a.tar").splits["train"]) == sorted(name for name, _ in members)


def test_names_in_zips(tmp_path: Path) -> None:
    names = ["a/Zoë.png", "b/日本.png", "b/c.png"]
    path = zip_of(tmp_path / "a.zip", [(name, PNG) for name in names])
    raw = bytearray(path.read_bytes())
    for at in range(len(raw)):  # without the flag that says UTF-8, as the Finder writes them
        if raw[at : at + 4] == b"PK\x03\x04":
            raw[at + 7] &= ~8
        if raw[at : at + 4] == b"PK\x01\x02":
            raw[at + 9] &= ~8
    (tmp_path / "b.zip").write_bytes(raw)
    for each in ("a.zip", "b.zip"):
        assert [e.id for e in scan(tmp_path / each).splits["train"]] == sorted(names)


def test_names_of_members_are_only_ids(tmp_path: Path) -> None:
    names = ["/etc/a/1.png", "../../etc/b/2.png", "etc/./b//3.png", "etc/a/../b/4.png"]
    expected = ["a/1.png", "b/2.png", "b/3.png", "b/4.png"]
    for path in (
        tar_of(tmp_path / "x.tar", [(n, PNG) for n in names]),
        zip_of(tmp_path / "x.zip", [(n, PNG) for n in names]),
    ):
        catalog = scan(path)
        assert [e.id for e in catalog.splits["train"]] == expected
        assert all(
            np.asarray(len(s.read(Limits()))) == len(PNG) for e in catalog.splits["train"] for s in e.sources.values()
        )
    assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.zip"]


def test_members_that_are_not_files_are_passed_over_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("a/1.png", PNG), ("b/1.png", PNG), ("b/1.png", PNG)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in [
            ("a/hard.png", tarfile.LNKTYPE, "a/1.png"), ("a/soft.png", tarfile.SYMTYPE, "1.png"),
            ("a/chain.png", tarfile.SYMTYPE, "soft.png"), ("a/out.png", tarfile.SYMTYPE, "../../../etc/passwd"),
            ("a/abs.png", tarfile.SYMTYPE, "/etc/passwd"), ("a/self.png", tarfile.SYMTYPE, "self.png"),
            ("a/fifo", tarfile.FIFOTYPE, ""), ("a/null", tarfile.CHRTYPE, ""),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    catalog = scan(tmp_path / "a.tar")
    assert [e.id for e in catalog.splits["train"]] == ["a/1.png", "a/chain.png", "a/hard.png", "a/soft.png", "b/1.png"]
    over = {name: paths.first for name, paths in catalog.accounted().passed_over.items()}
    assert over == {
        "a link to no file of the archive": ["a/out.png", "a/abs.png", "a/self.png"],
        "no regular file": ["a/fifo", "a/null"],
        "replaced by a later member of the same name": ["b/1.png"],
    }
    adds_up(catalog)


def keyed(count: int, first: int = 0, **files: Callable[[int], bytes]) -> list[tuple[str, bytes]]:
    """Return members of WebDataset: `count` keys, each with a file of every suffix."""
    return [
        (f"{n:06d}.{suffix.replace('_', '.')}", make(n))
        for n in range(first, first + count)
        for suffix, make in files.items()
    ]


def picture(_: int) -> bytes:
    return PNG


LABELS: dict[str, tuple[dict[str, Callable[[int], bytes]], str | None]] = {
    "an index": ({"cls": lambda n: b"%d" % (n % 2)}, None),
    "a name": ({"cls": lambda n: b" dog\n" if n % 2 else b"cat"}, None),
    "a name with a mark": ({"cls": lambda n: b"\xef\xbb\xbfdog" if n % 2 else b"cat"}, None),
    "an index beside JSON": ({"cls": lambda n: b"%d" % (n % 2), "json": lambda n: b'{"label": "x"}'}, None),
    "a field": ({"json": lambda n: json.dumps({"label": "dog" if n % 2 else "cat"}).encode()}, None),
    "an index in a field": (
        {"json": lambda n: json.dumps({"cls": n % 2}).encode(), "txt": lambda n: b"a caption"},
        None,
    ),
    "a named field": ({"json": lambda n: json.dumps({"kind": n % 2 == 1, "label": 1}).encode()}, "kind"),
    "an upper case": ({"CLS": lambda n: b"%d" % (n % 2)}, None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_webdataset(tmp_path: Path, kind: str) -> None:
    files, column = LABELS[kind]
    path = tar_of(tmp_path / "x.tar", keyed(6, png=picture, **files))
    catalog = scan(path, options=DataConfig(label_column=column))
    assert len(catalog.classes) == 2
    assert [(e.id, e.labels) for e in catalog.splits["train"]] == [(f"{n:06d}.png", (n % 2,)) for n in range(6)]
    assert catalog.modalities == ("image",)
    adds_up(catalog)


def test_names_of_classes_stand_in_the_tar_or_beside_it(tmp_path: Path) -> None:
    files = keyed(4, png=picture, cls=lambda n: b"%d" % (n % 2))
    tar_of(tmp_path / "x.tar", [("classnames.txt", b"tabby cat\ndog\n"), *files])
    catalog = scan(tmp_path / "x.tar")
    assert catalog.classes == ("dog", "tabby cat")
    assert any("the names of the classes are those in " in note for note in catalog.notes)
    adds_up(catalog)
    for split in ("train", "test"):  # as CLIP's benchmark has them
        (tmp_path / "wds" / split).mkdir(parents=True)
        tar_of(tmp_path / "wds" / split / "0.tar", files)
    (tmp_path / "wds" / "classnames.txt").write_text("cat\ndog\nnever")
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("1")
    catalog = scan(tmp_path / "wds")
    assert catalog.classes == ("cat", "dog")
    assert {split: len(examples) for split, examples in catalog.splits.items()} == {"train": 4, "test": 4}
    adds_up(catalog)
    (tmp_path / "wds" / "classnames.txt").write_text("cat\n")
    with pytest.raises(DataError, match="label 1, but there are names of 1 class"):
        scan(tmp_path / "wds")


@pytest.mark.parametrize("pattern", ["x-{000000..000002}.tar", "x-*.tar", "x-00000{0,1,2}.tar", ""])
def test_shards_by_range_pattern_and_folder(tmp_path: Path, pattern: str) -> None:
    for shard in range(3):
        files = keyed(4, 4 * shard, png=picture, cls=lambda n: b"%d" % (n % 2))
        tar_of(tmp_path / f"x-{shard:06d}.tar", files)
    catalog = scan(os.path.join(tmp_path, pattern))
    assert [e.id for e in catalog.splits["train"]] == [f"{n:06d}.png" for n in range(12)]
    (tmp_path / "x-000001.tar").unlink()
    if "0" in pattern:
        with pytest.raises(DataError, match=r"1 of 3 files do not exist; the first is '.*x-000001.tar'"):
            scan(os.path.join(tmp_path, pattern))


def test_a_key_of_two_shards_is_two_examples(tmp_path: Path) -> None:
    files = {"png": picture, "wav": lambda n: b"RIFF", "cls": lambda n: b"%d" % (n % 2)}
    for shard in range(2):
        tar_of(tmp_path / f"x-{shard}.tar", keyed(2, **files))
    catalog = scan(tmp_path)
    assert [e.id for e in catalog.splits["train"]] == ["000000.png", "000001.png", "x-1/000000.png", "x-1/000001.png"]
    adds_up(catalog)


def test_shards_are_named_after_splits(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "valid-0", "imagenet-test-0"):
        tar_of(
            tmp_path / f"{name}.tar",
            [(f"{name}-{n}.{s}", d) for n in range(2) for s, d in (("png", PNG), ("cls", b"%d" % n))],
        )
    counts = {split: len(examples) for split, examples in scan(tmp_path).splits.items()}
    assert counts == {"train": 4, "val": 2, "test": 2}
    assert set(scan(tmp_path / "valid-0.tar").splits) == {"train"}  # alone it is all there is


def test_files_of_a_key_are_one_example(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "d", 2)
    members = []
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        key = f"{number:04d}"
        members += [(f"{key}.img.png", path.read_bytes()), (f"{key}.sound.wav", path.with_suffix(".wav").read_bytes())]
        members += [(f"{key}.cls", path.parent.name.encode()), (f"{key}.mask.png", PNG)]
    catalog = scan(tar_of(tmp_path / "x.tar", members))
    assert catalog.modalities == ("audio", "image")
    first = catalog.splits["train"][0]
    assert first.id == "0000"
    assert {name: source.read(Limits()) for name, source in first.sources.items()} == {  # type: ignore[union-attr]
        "image": members[0][1], "audio": members[1][1],
    }  # fmt: skip
    assert catalog.accounted().passed_over["a second file of its key and suffix"].count == 8
    adds_up(catalog)


def test_a_key_without_a_label_is_counted(tmp_path: Path) -> None:
    members = [
        *keyed(4, png=picture, cls=lambda n: b"%d" % (n % 2)),
        ("000009.png", PNG),
        ("000008.png", PNG),
        ("000008.cls", b" "),
    ]
    catalog = scan(tar_of(tmp_path / "x.tar", members))
    account = catalog.accounted()
    assert (account.unlabelled.count, account.unlabelled.first) == (2, ["000008.png", "000009.png"])
    assert account.num_used == 4
    adds_up(catalog)


def test_archives_named_after_classes(tmp_path: Path) -> None:
    """ImageNet comes so: a tar for each class, its pictures at the top."""
    for number, name in enumerate(["n01440764", "n01443537"]):
        files = [(f"{name}_{n}.JPEG", picture(3 * number + n)) for n in range(3)]
        for folder in ("imagenet", "shards", "split/train", "split/val"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        tar_of(tmp_path / "imagenet" / f"{name}.tar", files)
        tar_of(tmp_path / "shards" / f"part-{number:04d}.tar", files)
        for split in ("train", "val"):
            tar_of(tmp_path / "split" / split / f"{name}.tar", files)
    catalog = scan(tmp_path / "imagenet")
    assert [row[1:] for row in labelled(catalog)][::3] == [
        ("n01440764/n01440764_0.JPEG", ("n01440764",)),
        ("n01443537/n01443537_0.JPEG", ("n01443537",)),
    ]
    assert "each archive is a class: 2 names, the first 'n01440764'" in catalog.notes
    adds_up(catalog)
    catalog = scan(tmp_path / "split")
    assert (catalog.counts("train"), catalog.counts("val")) == ({"n01440764": 3, "n01443537": 3},) * 2
    adds_up(catalog)
    with pytest.raises(DataError, match="no label in 6 files"):
        scan(tmp_path / "shards")


def test_captions_are_no_labels(tmp_path: Path) -> None:
    facts = lambda n: json.dumps({"caption": "a cat", "url": "http://x", "width": 12, "animal": f"{n % 2}"}).encode()  # noqa: E731
    for shard in range(2):
        tar_of(tmp_path / f"{shard:05d}.tar", keyed(3, 3 * shard, jpg=picture, txt=lambda n: b"a cat", json=facts))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    with pytest.raises(
        DataError,
        match=r"no label in 18 files: found 6 captions and KEY.json with 'animal', 'caption', .*--label-column",
    ):
        scan(tmp_path)
    catalog = scan(tmp_path, options=DataConfig(label_column="animal", group_by="caption"))
    assert catalog.classes == ("0", "1")
    assert {example.group for example in catalog.splits["train"]} == {"a cat"}
    assert catalog.accounted().passed_over["beside the containers"].count == 4
    adds_up(catalog)
    with pytest.raises(DataError, match="no label 'kind' in 18 files"):
        scan(tmp_path, options=DataConfig(label_column="kind"))
    assert len(list(examples_of(str(tmp_path), {"image": ImageSpec(size=(8, 8))}, Limits()))) == 6


TWO = [("a/1.png", PNG), ("b/2.png", PNG)]
LONG = [("a/1.png", PNG), ("b/2.png", 9999 * PNG)]
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "encrypted": (
        lambda t: flagged(zip_of(t / "a.zip", TWO), 1),
        "2 of 2 files are encrypted, the first 'a/1.png'; unpack it: 7z x ",
    ),
    "LZMA": (lambda t: zip_of(t / "a.zip", TWO, zipfile.ZIP_LZMA), "2 of 2 files are compressed by LZMA, the first "),
    "cut": (
        lambda t: cut(tar_of(t / "a.tar", LONG), 5000),
        "cut short: it ends in member 2, 'b/2.png'; fetch it again",
    ),
    "damaged": (lambda t: spoilt(tar_of(t / "a.tar", TWO), 1024), "damaged tar after 1 file"),
    "cut zip": (lambda t: cut(zip_of(t / "a.zip", LONG), 300), "a damaged zip after 0 files: File is not a zip file"),
    "cut gzip": (
        lambda t: cut(tar_of(t / "a.tar.gz", [("a/1.png", os.urandom(9999))], "w:gz"), 3000),
        "damaged, or cut short: Compressed file ended",
    ),
    "no data": (
        lambda t: zip_of(t / "a.zip", [("a/inner.zip", b"PK\x03\x04"), ("b/x.pkl", b"x")]),
        "no usable files: 0 of 2 files are used",
    ),
    "empty": (lambda t: tar_of(t / "a.tar", []), "nothing but zeros at its start"),
}


def flagged(path: Path, flag: int) -> Path:
    """Set a flag of each member of a zip."""
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := data.find(magic, at + 1)) >= 0:
            data[at + offset] |= flag
    path.write_bytes(data)
    return path


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def spoilt(path: Path, at: int) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + 9] = b"\xff" * 9
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_archives_that_cannot_be_read_say_why(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        scan(make(tmp_path))


def test_a_damaged_member_is_one_bad_example(tmp_path: Path) -> None:
    noise = [(f"{label}/{n}.png", PNG) for label in "ab" for n in range(3)]
    path = zip_of(tmp_path / "a.zip", noise)
    data = bytearray(path.read_bytes())
    data[data.index(b"a/1.png") + 60] ^= 0xFF
    path.write_bytes(data)
    catalog = scan(path)
    report = lint(path, workers=0)
    ((_, name, error),) = report.unreadable
    assert name == "a/1.png"
    assert "damaged" in error
    assert catalog.accounted().num_used in (5, 6)  # its first bytes may be whole


def test_limits_hold_before_a_member_is_unpacked(tmp_path: Path) -> None:
    bomb = zip_of(tmp_path / "a.zip", [("a/1.png", PNG + bytes(200 << 20)), ("b/1.png", PNG)])
    assert bomb.stat().st_size < 1 << 20
    source = scan(bomb).splits["train"][0].sources["image"]
    assert isinstance(source, Source)
    with pytest.raises(LimitError, match=r"209715[0-9]+ bytes > 100000000; pass --limit file_bytes="):
        source.open(Limits(file_bytes=100_000_000))
    assert source.head().startswith(b"\x89PNG")
    with source.open(Limits()) as file:  # too large for memory: in a temporary file
        assert file.seek(0, os.SEEK_END) == len(PNG) + (200 << 20)
    lying = bytearray(bomb.read_bytes())
    for magic, at in ((b"PK\x01\x02", 24),):
        lying[lying.index(magic) + at :][:4] = struct.pack("<I", 100)
        place = lying.index(magic) + at
        lying[place : place + 4] = struct.pack("<I", 1000)
    bomb.write_bytes(lying)
    with pytest.raises(DataError, match="damaged: its CRC is"):
        scan(bomb).splits["train"][0].sources["image"].read(Limits())  # type: ignore[union-attr]


def test_a_compressed_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perceiver_cli.data.members.BOMB_BYTES", 1 << 20)
    path = tar_of(tmp_path / "a.tar.gz", [("a/1.png", bytes(16 << 20))], "w:gz")
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        scan(path)
    monkeypatch.setattr("perceiver_cli.data.members.FREE", 0.0)
    with pytest.raises(Exception, match=r"0\.0 GB to copy to .*, half of what is free there; set TMPDIR"):
        scan(tar_of(tmp_path / "b.tar.gz", [("a/1.png", PNG)], "w:gz"))


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.tar.gz"])
def test_workers_find_members_in_place(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    path = {"a.tar": WRITERS["dot.tar"], "a.zip": WRITERS["zip"], "a.tar.gz": WRITERS["tar.gz"]}[name](folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        examples = scan(path).splits["train"]
    specs = {"image": ImageSpec(size=(12, 12), color="grey", mean=(0.5,), std=(0.25,))}
    batches = [
        [batch.segments["image"].values.numpy().tobytes() for batch in Reader(specs, Limits()).batches(tasks, workers)]
        for workers in (0, 2)
        for tasks in [list(ordered_tasks(examples, 3))]
    ]
    assert batches[0] == batches[1]
    assert len(batches[0]) == 4
    travelled = pickle.loads(pickle.dumps(examples[0].sources["image"]))  # as to a spawned worker
    assert travelled.read(Limits()) == (folder / examples[0].id).read_bytes()
    assert os.listdir(tmp_path / "tmp") == []


def test_a_copy_for_spawned_workers_has_a_name_until_it_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("perceiver_cli.data.members.start_method", lambda: "spawn")
    catalog = scan(WRITERS["tar.gz"](folder, tmp_path))
    (place,) = (tmp_path / "tmp").iterdir()
    source: Any = catalog.splits["train"][0].sources["image"]
    assert pickle.loads(pickle.dumps(source)).data.archive.place == str(place)
    del source, catalog
    assert os.listdir(tmp_path / "tmp") == []


def test_an_archive_that_changes_while_it_is_read_is_told(folder: Path, tmp_path: Path) -> None:
    path = WRITERS["dot.tar"](folder, tmp_path)
    source: Any = scan(path).splits["train"][0].sources["image"]
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.tar': has changed while it was read"):
        source.read(Limits())


def test_members_are_files_to_every_decoder(tmp_path: Path) -> None:
    """The file object of a member seeks and reads as a file does."""
    data = np.random.default_rng(0).bytes(3_000_000)
    for path in (tar_of(tmp_path / "x.tar", [("a", data)]), zip_of(tmp_path / "x.zip", [("a", data)])):
        (member,) = opened(str(path)).files.values()
        with Source("x", member).open(Limits()) as file:
            assert file.seekable()
            assert file.seek(-5, os.SEEK_END) == len(data) - 5
            assert file.read() == data[-5:]
            assert file.read(1) == b""
            file.seek(1_000_000)
            assert file.read(10) == data[1_000_000:1_000_010]
            assert zlib.crc32(data) == zlib.crc32(file.seek(0) * b"" + file.read())


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_what_is_piped_in_is_read_as_the_file(
    perceive: Perceive, bars: Path, trained: Path, tmp_path: Path, name: str
) -> None:
    data = bars / "test"
    path = {"a.tar": WRITERS["dot.tar"], "a.zip": WRITERS["zip"], "a.tar.gz": WRITERS["tar.gz"]}[name](data, tmp_path)
    stream = path.read_bytes()
    done = perceive("predict", "-", "-m", trained, stdin=stream)
    assert done.returncode == 0, done.stderr
    asked = perceive("predict", path, "-m", trained)
    answers = [[json.loads(line) for line in each.stdout.splitlines()] for each in (done, asked)]
    assert [a["prob"] for a in answers[0]] == [a["prob"] for a in answers[1]]
    assert len(answers[0]) == 30
    assert answers[1][0]["path"] == f"{path}/left/000.png"
    for command in (["evaluate", "-", "-m", trained, "--json"], ["preprocess", "-", "-o", tmp_path / "out.tar"]):
        done = perceive(*command, stdin=stream)
        assert done.returncode == 0, done.stderr
    assert labelled(scan(tmp_path / "out.tar")) == labelled(scan(data))


def test_records_of_archives_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    path = WRITERS["top.zip"](folder, tmp_path)
    for name, data in (("a", folder), ("b", path)):
        list(write_records(plan([str(data)]), str(tmp_path / f"{name}.tar"), print))
    assert labelled(scan(tmp_path / "a.tar")) == labelled(scan(tmp_path / "b.tar"))


@pytest.mark.parametrize("top", ["", "data/", "data/train/"])
def test_metadata_in_archives(tmp_path: Path, top: str) -> None:
    metadata = b"file_name,label\n" + b"".join(b"img/%d.png,%s\n" % (n, b"ab"[n % 2 : n % 2 + 1]) for n in range(4))
    members = [(f"{top}img/{n}.png", PNG) for n in range(5)] + [(f"{top}metadata.csv", metadata)]
    for path in (zip_of(tmp_path / "x.zip", members), tar_of(tmp_path / "x.tar", members)):
        catalog = scan(path)
        base = "train/" if top.endswith("train/") else ""
        assert [(e.id, e.labels) for e in catalog.splits["train"]] == [
            (f"{base}img/{n}.png", (n % 2,)) for n in range(4)
        ]
        over = {name: paths.count for name, paths in catalog.accounted().passed_over.items()}
        assert over == {"a manifest": 1, "named by no manifest": 1}
        adds_up(catalog)
    with pytest.raises(
        DataError, match=r"metadata\.csv': 1 of 4 files are not in the archive, the first '.*img/3.png'"
    ):
        scan(zip_of(tmp_path / "x.zip", [*members[:3], *members[4:]]))


def test_a_range_in_braces_by_command(perceive: Perceive, folder: Path, tmp_path: Path) -> None:
    files = files_in(folder)
    for shard in range(2):
        tar_of(tmp_path / f"x-{shard}.tar", files[shard::2])
    done = perceive("train", tmp_path / "x-{0..1}.tar", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)["splits"].values()) == 12
    done = perceive("train", tmp_path / "x-{0..2}.tar", "--dry-run", cwd=tmp_path)
    assert done.returncode == 3
    assert b"1 of 3 files do not exist; the first is" in done.stderr


def test_a_tar_beside_class_folders_is_no_data(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    for name in ("backup.tar", "old.zip"):
        (tar_of if name.endswith("tar") else zip_of)(tmp_path / "data" / name, [("z/1.png", PNG)])
    assert labelled(scan(tmp_path / "data")) == labelled(scan(folder))


def test_a_folder_of_containers_is_listed_without_a_look_at_each(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x-0.tar", "x-1.tar"):
        tar_of(tmp_path / name, files_in(folder))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    asked: list[object] = []
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: asked.append(path) or isdir(path))
    assert containers(str(tmp_path)) == ("archives", [str(tmp_path / name) for name in ("x-0.tar", "x-1.tar")])
    assert asked == [str(tmp_path)]


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file; save its arrays as"),
        ("x.bin", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file; save"),
        ("x.rar", b"Rar!\x1a\x07\x01\x00", "a RAR archive; unpack it"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive; unpack it"),
        ("x.tfrecord-00000-of-00002", bytes(99), "a TFRecord; save each item as a file"),
        ("db/data.mdb", bytes(16) + b"\xde\xc0\xef\xbe" + bytes(99), "an LMDB database; save each value as a file"),
        ("x.npz", b"PK\x03\x04" + bytes(26) + b"arr_0.npy" + bytes(99), "an .npz archive of arrays; save its arrays"),
        ("x.pt", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(99), "a PyTorch file; save its arrays"),
        (
            "x.tar.zst",
            b"\x28\xb5\x2f\xfd" + bytes(99),
            "compressed by zstd; unpack it: zstd -dc FILE | perceiver ... -",
        ),
    ],
)
def test_containers_that_are_not_read_say_what_they_are(tmp_path: Path, name: str, head: bytes, message: str) -> None:
    path = tmp_path / "of" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(head)
    for each in (path, path.parent):
        with pytest.raises(DataError, match=message):
            scan(each)
