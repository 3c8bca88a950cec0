"""Every path is accounted for: the groups of the summary add up to what `find` counts, for every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.data.account import Account
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.folders import walk
from perceiver_cli.errors import DataError
from tests.conftest import SMALL, Perceive, write_images

CHANGES = [word for change in SMALL for word in ("--set", change)]


# Names of pictures that shells, spreadsheets and other systems stumble over.
ODD_NAMES = (
    "-rf.png", "a b.png", " lead.png", "trail .png", "it's.png", 'say "x".png', "100%.png", "a;b,c.png", "$HOME.png",
    "#1.png", "=1+1.png", "back\\slash.png", "star*[1].png", "{a,b}.png", "e\u0301.png", "\u732b.png", "UPPER.PNG",
    "two.png.png", "no suffix", "x" * 200 + ".png",
)  # fmt: skip
# What programs write beside pictures.
BESIDE_PICTURES = (
    "000.xmp", "000.aae", "000.xml", "Shortcut.lnk", "page.url", "list.m3u", "tool.exe", "paper.pdf", "old.bak",
    "photo.png.crdownload", ".gitignore", "ehthumbs.db",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a command wrote."""

    stdout: str
    stderr: str


Run = Callable[..., Said]


@pytest.fixture
def run(perceive: Perceive) -> Run:
    """Run a command that ends with `status`."""

    def run(*arguments: str | Path, status: int = 0, cwd: Path | None = None) -> Said:
        done = perceive(*arguments, cwd=cwd)
        assert done.returncode == status, done.stderr.decode()
        return Said(done.stdout.decode(), done.stderr.decode())

    return run


def found(folder: Path, *options: str) -> int:
    """Return what `find FOLDER | wc -l` counts."""
    done = subprocess.run(["find", *options, folder, "-print0"], capture_output=True, check=False)
    return done.stdout.count(b"\0")


def total(files: dict[str, Any]) -> int:
    """Return the sum of the groups of an account in JSON."""
    over = sum(paths["count"] for paths in files["passed_over"].values())
    groups = sum(files["used"].values()) + over + files["unreadable"]["count"] + files["unlabelled"]["count"]
    return int(files["folders"] + groups)


def check_total(folder: Path, files: dict[str, Any]) -> None:
    assert files["paths"] == found(folder)
    assert total(files) == files["paths"] + files["linked"] + files["inside"] + files["absent"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of about a hundred paths: pictures of three classes, and whatever people have among their files."""
    top = tmp_path / "odd"
    write_images(top, {"red": 12, "blue": 12, "green": 9})
    for name in ("red", "blue", "green"):
        for number, path in enumerate(sorted((top / name).iterdir())):
            value = 40 * number if name == "red" else 10
            Image.fromarray(np.full((16, 16, 3), (value, 90, 200), np.uint8)).save(path)
    (top / "README.txt").write_text("about these files")
    (top / "red" / "notes.txt").write_text("good ones\n")
    (top / "red" / "000.txt").write_text("a red one\n")
    (top / "red" / "broken.png").write_bytes(b"")
    (top / "blue" / "html.jpg").write_text("<html>not found</html>")
    (top / "blue" / "half.png").write_bytes((top / "blue" / "000.png").read_bytes()[:60])
    (top / "blue" / "sound.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png", "Icon\r", "photo.png.part", "data.csv"):
        (top / "green" / name).write_bytes(b"\0\1\2\3")
    for folder in ("@eaDir/000.png", ".git/objects/aa", "__MACOSX/green", ".ipynb_checkpoints"):
        (top / "green" / folder).mkdir(parents=True)
        (top / "green" / folder / "SYNOPHOTO_THUMB_M.jpg").write_bytes((top / "green" / "000.png").read_bytes())
    picture = (top / "green" / "000.png").read_bytes()
    for name in ODD_NAMES:
        (top / "red" / name).write_bytes(picture + name.encode())  # bytes behind a picture are not read
    for name in BESIDE_PICTURES:
        (top / "green" / name).write_bytes(b"<x/>")
    (top / "empty").mkdir()
    (top / "texts").mkdir()
    for number in range(4):
        (top / "texts" / f"{number}.doc").write_bytes(b"\xd0\xcf\x11\xe0")
    shutil.copytree(top / "red", tmp_path / "pool", symlinks=True)
    (tmp_path / "pool" / "deep").mkdir()
    shutil.copy(top / "red" / "001.png", tmp_path / "pool" / "deep")
    (top / "linked").symlink_to(tmp_path / "pool")
    (top / "green" / "file.png").symlink_to(tmp_path / "pool" / "001.png")
    (top / "green" / "nothing.png").symlink_to(tmp_path / "nothing")
    (top / "green" / "self.png").symlink_to("self.png")
    (top / "green" / "loop").symlink_to(top)
    os.mkfifo(top / "green" / "pipe.png")
    (top / "caf\u00e9 \u732b").mkdir()
    (top / "caf\u00e9 \u732b" / "a\nb.png").write_bytes((top / "red" / "002.png").read_bytes())
    return top


def test_the_groups_add_up_to_what_find_counts(odd: Path) -> None:
    account = scan(odd).accounted()
    assert account.paths == found(odd) > 100
    assert account.total == account.paths + account.linked
    assert {"hidden", "of the system", "a link to nothing", "no regular file", ".txt"} <= account.passed_over.keys()
    assert account.passed_over["a link to a folder that contains it"].first == [os.path.join("green", "loop")]
    assert account.linked == found(odd / "linked", "-L") - 1  # the link itself is a path of its own
    lines = account.lines()
    assert sum(int(line.split()[0]) for line in lines[1:]) == account.paths + account.linked


def test_every_command_says_all_of_it(odd: Path, tmp_path: Path, run: Run) -> None:
    options = [*CHANGES, "--max-bad", "0.5", "--set", "data.max_bad=0.5"]
    plan = json.loads(run("train", odd, "-o", tmp_path / "run", "--dry-run", *options).stdout)
    check_total(odd, plan["files"])
    trained = run("train", odd, "-o", tmp_path / "run", "--steps", "1", *options)
    assert "are used; passed over" in trained.stderr
    assert "without a file: 'empty'" in trained.stderr
    assert "no file of the class 'texts' is used: '.doc' 4" in trained.stderr

    linted = run("lint", odd, "--json", status=3)
    files = json.loads(linted.stdout)["files"]
    check_total(odd, files)
    assert files["unreadable"]["count"] == len(json.loads(linted.stdout)["unreadable"]) == 4
    assert "passed over, hidden:" in run("lint", odd, status=3).stdout

    for split in ("all", "train"):
        evaluated = run("evaluate", odd, "-m", tmp_path / "run", "--split", split, "--json", status=3)
        check_total(odd, json.loads(evaluated.stdout)["files"])

    predicted = run("predict", odd, "-m", tmp_path / "run", "--format", "jsonl", status=3)
    rows = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert Counter("error" in row for row in rows) == {False: sum(files["used"].values()), True: 4}
    summary = f"{sum(files['used'].values())} of {total(files) - files['folders']} files are used; passed over"
    assert summary in predicted.stderr

    prepared = run("preprocess", odd, "-o", tmp_path / "odd.tar", status=3)
    assert summary in prepared.stderr
    records = json.loads(run("lint", tmp_path / "odd.tar", "--json", status=3).stdout)["files"]
    assert records["inside"] == total(records) - 1 == len(rows)  # and the tar itself


def test_a_manifest_accounts_for_the_files_that_it_names(tmp_path: Path, run: Run) -> None:
    write_images(tmp_path, {"a": 4, "b": 4})
    names = [f"{label}/{number:03d}.png" for label in "ab" for number in range(4)]
    rows = [*names, "a/missing.png", "a/000.png"]
    (tmp_path / "m.csv").write_text("path,label\n" + "".join(f"{name},{name[0]}\n" for name in rows))
    files = json.loads(run("lint", tmp_path / "m.csv", "--json", status=3).stdout)["files"]
    assert files["paths"] == total(files) == 10
    assert files["unreadable"] == {"count": 1, "first": ["a/missing.png"]}


@pytest.mark.parametrize(
    ("folders", "classes", "splits"),
    [
        (["train", "car", "bus"], {"train", "car", "bus"}, {"train"}),  # VOC: a train is a class
        (["test/a", "car/b", "bus/c"], {"test", "car", "bus"}, {"train"}),
        (["train/car", "train/bus", "val/car", "other"], {"bus", "car"}, {"train", "val"}),
        (["train/car", "train/bus", "test"], {"bus", "car"}, {"train"}),  # test is flat: it has no labels
        (["Train/car", "Train/bus", "VALID/car"], {"bus", "car"}, {"train", "val"}),
        (["chair/train", "chair/test", "sofa/train"], {"chair", "sofa"}, {"train", "test"}),
        (["chair/train", "chair/test", "chair/more", "sofa/train"], {"chair", "sofa"}, {"train", "test"}),
        (["Training set/a", "Training set/b", "Test set/a"], {"a", "b"}, {"train", "test"}),
        (["seg_train/seg_train/a", "seg_train/seg_train/b", "seg_test/seg_test/a"], {"a", "b"}, {"train", "test"}),
        (["train-clean-100/9", "train-clean-360/7", "dev-clean/9"], {"9", "7"}, {"train", "val"}),
        (["trainImages/a", "trainImages/b", "valImages/b"], {"a", "b"}, {"train", "val"}),
        (["bullet_train", "crash_test", "bus"], {"bullet_train", "crash_test", "bus"}, {"train"}),
        (["cat/cat", "dog/dog"], {"cat", "dog"}, {"train"}),
    ],
)
def test_a_folder_is_a_split_only_if_classes_are_in_it(
    tmp_path: Path, folders: list[str], classes: set[str], splits: set[str]
) -> None:
    for folder in folders:
        write_images(tmp_path, {folder: 2})
    catalog = scan(tmp_path)
    assert set(catalog.classes) == classes
    assert set(catalog.splits) == splits
    account = catalog.accounted()
    assert account.total == account.paths == found(tmp_path)
    assert account.unlabelled.count == (2 if folders[-1] == "test" else 0)
    assert account.num_passed_over == 2 * len({"other", "chair/more"} & {*folders})


@pytest.mark.parametrize(("first", "second"), [("test", "train"), ("train2017", "val2017"), ("test1", "train")])
def test_pictures_without_class_folders_are_no_classes(tmp_path: Path, first: str, second: str) -> None:
    write_images(tmp_path, {second: 3, first: 2})
    with pytest.raises(DataError, match=rf"0 of 5 files are used; 5 without a label: '{first}/000.png'"):
        scan(tmp_path)
    write_images(tmp_path, {"annotations": 1} if first != "test" else {})
    with pytest.raises(DataError, match="5 without a label"):
        scan(tmp_path)


def test_folders_that_may_be_no_classes_are_told(tmp_path: Path) -> None:
    write_images(tmp_path, {"colour/cat": 2, "colour/dog": 2, "segmented/cat": 2, "segmented/dog": 2})
    (note,) = (note for note in scan(tmp_path).notes if "each class folder" in note)
    assert note.endswith("'cat', 'dog': if these are the classes, pass one of 'colour', 'segmented'")


def test_what_this_program_wrote_is_no_data(bars: Path, tmp_path: Path, run: Run) -> None:
    """The second `train .` took runs/ for a class."""
    data = tmp_path / "data"
    shutil.copytree(bars / "train", data)
    run("train", ".", "--steps", "1", *CHANGES, cwd=data)
    run("evaluate", ".", "-o", "report", "--split", "val", cwd=data)
    assert (data / "report" / "confusion.png").exists()
    catalog = scan(data)
    assert set(catalog.classes) == {path.name for path in (bars / "train").iterdir()}
    account = catalog.accounted()
    assert account.passed_over["written by this program"].first == ["report", "runs"]
    assert account.total == account.paths == found(data)
    assert not any("without a file" in note for note in catalog.notes)


def test_unfinished_downloads_and_backups_are_no_data(tmp_path: Path) -> None:
    write_images(tmp_path, {"red": 3, "blue": 3})
    for name in ("000.png.part", "001.png.crdownload", "000.png~", "~$002.png", "a.PNG.Download"):
        shutil.copy(tmp_path / "red" / "000.png", tmp_path / "red" / name)
    catalog = scan(tmp_path)
    assert catalog.counts("train") == {"blue": 3, "red": 3}
    assert catalog.accounted().passed_over["unfinished or a backup"].count == 5


def test_files_beside_records_are_counted(tmp_path: Path, run: Run) -> None:
    write_images(tmp_path / "data", {"red": 6, "blue": 6})
    run("preprocess", "data", "-o", "data/all.tar", cwd=tmp_path)
    for _ in range(2):  # the first time, an index is written
        files = json.loads(run("train", "data", "--dry-run", cwd=tmp_path).stdout)["files"]
    assert sum(files["used"].values()) == files["passed_over"]["beside the containers"]["count"] == 12
    check_total(tmp_path / "data", files)
    assert (files["inside"], files["passed_over"]["an index of records"]["count"]) == (12, 1)


def test_a_folder_without_usable_files_names_the_first_cause(tmp_path: Path) -> None:
    write_images(tmp_path, {"red": 2})
    for path in (tmp_path / "red").iterdir():
        path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(DataError, match=r"no usable files: .*, the first: .*: a web page in place of the file"):
        scan(tmp_path)


def test_links_to_each_other_end(tmp_path: Path) -> None:
    """Each folder has links to every other: paths through them would never end."""
    for name in "abcdef":
        (tmp_path / "pool" / name).mkdir(parents=True)
        (tmp_path / "pool" / name / "x.txt").write_text("x")
        for other in "abcdef":
            (tmp_path / "pool" / name / f"to-{other}").symlink_to(tmp_path / "pool" / other)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "class").symlink_to(tmp_path / "pool" / "a")
    account = Account()
    paths = [path for path, _ in walk(tmp_path / "data", account)]
    assert len(paths) < 1000
    assert os.path.join("class", "to-b", "to-c", "x.txt") in paths


def test_an_empty_folder_is_said(tmp_path: Path, trained: Path, run: Run) -> None:
    (tmp_path / "none" / "sub").mkdir(parents=True)
    assert "nothing to predict" in run("predict", tmp_path / "none", "-m", trained, status=3).stderr
    (tmp_path / "none" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (tmp_path / "none" / "notes.txt").write_text("hello")
    done = run("predict", tmp_path / "none", "-m", trained, status=3)
    assert "passed over 2: 1 .txt, 1 of the system" in done.stderr
