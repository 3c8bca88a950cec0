"""What `perceiver lint` finds, of every kind, and that it finds nothing where there is nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from perceiver_cli.advice.data import after_lint
from perceiver_cli.cli.data import show_lint
from perceiver_cli.data.clean import left_out, write_clean
from perceiver_cli.data.lint import LintReport, lint
from perceiver_cli.data.unlike import Collected, Traits, misnamed
from perceiver_cli.errors import UsageError
from perceiver_cli.preprocess import modality as modality_named
from tests.conftest import Perceive, write_clip, write_images


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one fault of each kind that pictures can have."""
    root = tmp_path_factory.mktemp("faulty")
    write_images(root / "train", {"a": 6, "b": 4}, seed=1)
    write_images(root / "train", {"only": 1}, seed=2)
    write_images(root / "test", {"a": 3, "b": 3}, seed=3)
    shutil.copy(root / "train" / "a" / "000.png", root / "test" / "a" / "leak.png")
    Image.open(root / "train" / "a" / "001.png").save(root / "train" / "b" / "other.bmp")
    (root / "train" / "a" / "cut.png").write_bytes((root / "train" / "a" / "002.png").read_bytes()[:80])
    (root / "train" / "a" / "empty.png").write_bytes(b"")
    Image.new("RGB", (9, 9), "teal").save(root / "train" / "b" / "flat.png")
    return root


def check(report: LintReport) -> None:
    """Assert that everything in the faulty folder was found, and nothing else."""
    assert report.failed
    assert {(split, name) for split, name, _ in report.unreadable} == {
        ("train", "train/a/cut.png"),
        ("train", "train/a/empty.png"),
    }
    leak, other = report.copies
    assert [name for _, name, _ in leak.examples] == ["test/a/leak.png", "train/a/000.png"]
    assert (leak.across, leak.conflict, leak.same_file) == (True, False, True)
    assert [(name, labels) for _, name, labels in other.examples] == [
        ("train/a/001.png", ("a",)),
        ("train/b/other.bmp", ("b",)),
    ]
    assert (other.across, other.conflict, other.same_file) == (False, True, False)
    assert report.faults == {"silent": [], "constant": [("train", "train/b/flat.png", "image")], "tiny": []}
    assert report.counts["train"] == {"a": 8, "b": 6, "only": 1}
    assert report.imbalance == 8
    assert report.missing == {"test": ["only"]}


@pytest.mark.parametrize("name", ["clean.csv", "lists/clean.jsonl"])
def test_the_list_of_good_files_has_no_fault(faulty: Path, tmp_path: Path, name: str) -> None:
    report = lint(faulty, workers=0)
    (tmp_path / "lists").mkdir()
    assert after_lint(report)[0].command == ("perceiver", "lint", str(faulty), "-o", "clean.csv")
    assert write_clean(report, str(tmp_path / name)) == (16, 6)
    clean = lint(tmp_path / name, workers=0)
    assert (clean.failed, clean.copies, clean.unreadable, clean.faults["constant"]) == (False, (), (), [])
    assert clean.sizes == {"test": 7, "train": 9}  # the copy in test stays
    assert clean.counts["train"] == {"a": 4, "b": 4, "only": 1}
    assert [each.command[1] for each in after_lint(clean)] == ["train"]


def test_a_label_with_a_separator_is_listed_as_json_alone(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2})
    rows = [{"path": f"a/{number:03d}.png", "labels": [["red, dark", "old"], ["new"]][number]} for number in (0, 1)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = lint(tmp_path / "data.jsonl", workers=0)
    with pytest.raises(UsageError, match=r"'red, dark'.*pass -o FILE\.jsonl"):
        write_clean(report, str(tmp_path / "clean.csv"))
    write_clean(report, str(tmp_path / "clean.jsonl"))
    assert lint(tmp_path / "clean.jsonl", workers=0).catalog.classes == ("new", "old", "red, dark")


def test_a_preset_says_how_files_are_read(tmp_path: Path, perceive: Perceive) -> None:
    """Text files are read if they are asked for, and nothing could ask."""
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / label / f"{number}.txt").write_text(f"some words of {label} {number}")
    (tmp_path / "in" / "a" / "bad.txt").write_bytes(b"\0\1\2")
    done = perceive("lint", tmp_path / "in", "--preset", "tiny-text", "--json", "-o", tmp_path / "c.csv")
    found = json.loads(done.stdout)
    assert (done.returncode, found["modalities"]) == (3, ["text"])
    assert [each["path"] for each in found["unreadable"]] == ["a/bad.txt"]
    assert f"perceiver train {tmp_path / 'c.csv'} --preset tiny-text".encode() in done.stderr
    refused = perceive("lint", tmp_path / "in", "--labels", "run", "--preset", "tiny-text")
    assert (refused.returncode, b"--labels does not take --preset" in refused.stderr) == (2, True)


def test_a_class_of_silence_stays(tmp_path: Path) -> None:
    for k, label in enumerate(("hum", "silence")):
        (tmp_path / label).mkdir()
        for number in range(3):
            rng = np.random.default_rng([k, number])
            loud = 0.0 if label == "silence" else 0.5
            samples = loud * rng.standard_normal(800) + 1e-5 * number
            soundfile.write(tmp_path / label / f"{number}.wav", samples, 8000, subtype="FLOAT")
    report = lint(tmp_path, workers=0)
    assert len(report.faults["silent"]) == 3
    assert set(left_out(report).values()) <= {"copy"}


def sounds(root: Path, count: int = 24) -> Path:
    """Write mono WAV of 0.2 to 0.6 s in two classes. Returns the folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        samples = 0.5 * rng.standard_normal(1600 + 3200 * number // count)
        soundfile.write(root / "ab"[number % 2] / f"{number:02d}.wav", samples, 8000)
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_unlike_the_rest_or_its_name_is_told(tmp_path: Path, workers: int) -> None:
    """A sound of minutes among short ones, stereo among mono and an MP3 named .wav went without a word."""
    rng = np.random.default_rng(1)
    data = sounds(tmp_path / "data")
    assert not any(lint(data, workers=workers).odd.values())
    soundfile.write(data / "a" / "long.wav", 0.5 * rng.standard_normal(60 * 8000), 8000)
    soundfile.write(data / "a" / "stereo.wav", 0.5 * rng.standard_normal((3200, 2)), 8000)
    soundfile.write(data / "b" / "other.wav", 0.5 * rng.standard_normal(3200), 8000, format="MP3")
    report = lint(data, workers=workers)
    (long,), (stereo,), (misnamed,) = (report.odd[kind] for kind in ("odd_length", "odd_channels", "misnamed"))
    assert long[:3] == ("train", "a/long.wav", 60.0)
    assert 0.2 < long.usual < 0.6
    assert stereo == ("train", "a/stereo.wav", 2, 1)
    assert misnamed == ("train", "b/other.wav", "MP3", "")
    assert not report.failed
    assert report.to_dict()["odd_channels"] == [{"path": "a/stereo.wav", "split": "train", "found": 2, "usual": 1}]
    assert left_out(report) == {}  # they can be read: a list of good files keeps them


def test_files_unlike_the_rest_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sounds(tmp_path / "data")
    for name in ("stereo", "again"):
        soundfile.write(data / "a" / f"{name}.wav", np.random.default_rng(2).uniform(-1, 1, (3200, 2)), 8000)
    write_images(tmp_path / "pictures", {"a": 6})
    (tmp_path / "pictures" / "a" / "000.png").rename(tmp_path / "pictures" / "a" / "photo.JPG")
    show_lint(lint(data, workers=0), False)
    show_lint(lint(tmp_path / "pictures", workers=0), False)
    printed = capsys.readouterr().out
    assert "other channels than the rest: 2\n  'a/again.wav': 2 channels, most have 1\n" in printed
    assert "another format than the name says: 1\n  'a/photo.JPG': PNG by its content\n" in printed


@pytest.mark.parametrize(
    ("head", "name", "found"),
    [
        (b"ID3\x04" + bytes(40), "a.wav", "MP3"),
        (b"ID3\x04" + bytes(40), "a.flac", ""),  # a tag before the sound
        (b"NIST_1A\n", "a.wav", ""),  # corpora of speech
        (b"RIFF\0\0\0\0WAVEfmt ", "a.mp3", "WAV"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a.webp", ""),
        (b"\xff\xd8\xff\xe0", "a.png", "JPEG"),
        (b"\0\0\0\x20ftypisom", "a.MP4", ""),
        (b"\x1a\x45\xdf\xa3", "a.mp4", "Matroska"),
        (b"\0\0\0\x20ftypheic", "a.heic", ""),
        (b"v 0 0 0\n", "a.obj", ""),
        (b"\xff\xd8\xff\xe0", "picture", ""),  # a name that says nothing
    ],
)
def test_a_name_that_says_another_format(head: bytes, name: str, found: str) -> None:
    assert misnamed(head, name) == found


def test_a_length_is_far_only_from_nearly_all_others() -> None:
    def far(seconds: list[float]) -> list[int]:
        collected = Collected()
        for each in seconds:
            collected.add(Traits(each))
        return [*collected.unlike()["odd_length"]]

    spread = [0.5 * 1.3**k for k in range(20)]  # 0.5 to 73 s
    assert far(spread) == []
    assert far([*spread[:10], 600.0, 0.01, float("nan")]) == [10, 11]
    assert far([1.0] * 8 + [600.0]) == []  # too few to say


def test_records_have_no_list(tmp_path: Path, perceive: Perceive, faulty: Path) -> None:
    assert perceive("preprocess", faulty, "-o", "x.tar", cwd=tmp_path).returncode == 3
    report = lint(tmp_path / "x.tar", workers=0)
    assert [each.command[1] for each in after_lint(report)] == ["train"]
    with pytest.raises(UsageError, match="not records"):
        write_clean(report, str(tmp_path / "clean.csv"))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_found_once(faulty: Path, workers: int) -> None:
    steps: list[tuple[int, int]] = []
    check(lint(faulty, workers=workers, progress=lambda done, total: steps.append((done, total))))
    assert steps == [(k, 22) for k in range(1, 23)]


def test_the_command(perceive: Perceive, faulty: Path, bars: Path, tmp_path: Path) -> None:
    done = perceive("lint", faulty, "--json", cwd=tmp_path)
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert found["splits"]["train"] == {"num_examples": 15, "classes": {"a": 8, "b": 6, "only": 1}}
    assert {row["path"] for row in found["unreadable"]} == {"train/a/cut.png", "train/a/empty.png"}
    assert [group["across"] for group in found["duplicates"]] == [True, False]
    assert found["constant"] == [{"path": "train/b/flat.png", "split": "train", "modality": "image"}]
    assert (found["failed"], found["imbalance"], found["missing_classes"]) == (True, 8.0, {"test": ["only"]})
    table = perceive("lint", faulty, cwd=tmp_path)
    assert table.returncode == 3
    for line in (
        "test has no example of 1 class: 'only'",
        "the same content in several splits: 1",
        "  test: 'test/a/leak.png' = train: 'train/a/000.png'",
        "  train: 'train/a/001.png' (a) = train: 'train/b/other.bmp' (b), in files that differ",
    ):
        assert line in table.stdout.decode().splitlines()
    clean = perceive("lint", bars, cwd=tmp_path)
    assert clean.returncode == 0
    assert clean.stdout.endswith(b"nothing unreadable, no duplicates, nothing silent, constant or tiny\n")
    assert b"torch" not in perceive("lint", bars, PYTHONPROFILEIMPORTTIME="1", cwd=tmp_path).stderr


def test_duplicates_within_a_split_are_no_failure(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    for name in ("x", "y"):
        shutil.copy(tmp_path / "a" / "000.png", tmp_path / "a" / f"{name}.png")
    report = lint(tmp_path, workers=0)
    assert [len(group.examples) for group in report.copies] == [3]
    assert not report.failed


def test_a_file_that_a_manifest_lists_in_two_splits(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2})
    (tmp_path / "m.csv").write_text("path,label,split\na/000.png,x,train\na/001.png,y,train\na/000.png,x,test\n")
    (group,) = lint(tmp_path / "m.csv", workers=0).copies
    assert group.across


def test_records_have_the_faults_of_their_files(perceive: Perceive, faulty: Path, tmp_path: Path) -> None:
    perceive("preprocess", faulty, "-o", "x.tar", cwd=tmp_path)
    files, records = lint(faulty, workers=0), lint(tmp_path / "x.tar", workers=2)
    assert [group.examples for group in records.copies] == [group.examples for group in files.copies]
    assert records.faults == files.faults
    assert records.unreadable == files.unreadable
    perceive("preprocess", faulty, "--fourier", "-o", "y.tar", cwd=tmp_path)
    ready = lint(tmp_path / "y.tar", workers=0)
    assert [group.examples for group in ready.copies] == [group.examples for group in files.copies]


def test_silent_sound_and_films(tmp_path: Path) -> None:
    for name, seconds in (("a", 0.2), ("b", 0.3)):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for i in range(2):
            tone = np.sin(np.arange(int(8_000 * seconds)) * (i + 1) / 9).astype(np.float32)
            soundfile.write(tmp_path / "sounds" / name / f"{i}.wav", tone, 8_000)
    soundfile.write(tmp_path / "sounds" / "b" / "quiet.wav", np.full(2_000, 0.25, np.float32), 8_000)
    report = lint(tmp_path / "sounds", workers=0)
    assert report.faults["silent"] == [("train", "b/quiet.wav", "audio")]
    for i, row in enumerate((0, 1, 2, 2)):
        write_clip(tmp_path / "films" / "ab"[i % 2] / f"{i}.mp4", row, 300 + 50 * i, seed=min(i, 2))
    shutil.copy(tmp_path / "films" / "a" / "0.mp4", tmp_path / "films" / "b" / "9.mp4")
    (group,) = lint(tmp_path / "films", workers=0).copies  # 2 and 3 are one picture with two sounds
    assert [name for _, name, _ in group.examples] == ["a/0.mp4", "b/9.mp4"]
    assert group.conflict


@pytest.mark.parametrize(
    ("modality", "array", "expected"),
    [
        ("audio", np.zeros(100, np.float32), "silent"),
        ("audio", 0.0005 * np.sin(np.arange(100)), "silent"),
        ("audio", 0.01 * np.sin(np.arange(100)), None),
        ("image", np.full((4, 4, 3), (1, 2, 3), np.uint8), "constant"),
        ("image", np.eye(4, dtype=np.uint8)[..., None], None),
        ("video", np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2), None),
        ("points", np.zeros((63, 3), np.float32), "tiny"),
        ("points", np.ones((64, 3), np.float32), "constant"),
        ("points", np.eye(64, 3, dtype=np.float32), None),
        ("image", np.arange(5), None),
    ],
)
def test_faults_of_arrays(modality: str, array: np.ndarray, expected: str | None) -> None:
    assert modality_named(modality).fault(array) == expected


def test_hostile_names(perceive: Perceive, tmp_path: Path) -> None:
    names = [b"\xff.png", b"[red]x.png", b"\x1b]0;owned\x07.png", b"a\nb.png", "a\u202eb.png".encode()]
    write_images(tmp_path / "d", {"a": 2, "b\x1b[31m": 2})
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path / "d" / "a") + b"/" + name)).write_bytes(b"\x89PNG\r\n\x1a\n")
        Path(os.fsdecode(os.fsencode(tmp_path / "d" / "a") + b"/2" + name)).write_bytes(
            (tmp_path / "d" / "a" / "000.png").read_bytes()
        )
    done = perceive("lint", "d", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert {os.fsencode(row["path"]) for row in found["unreadable"]} == {b"a/" + name for name in names}
    (group,) = found["duplicates"]
    assert {os.fsencode(row["path"]) for row in group["examples"]} == {b"a/000.png", *(b"a/2" + n for n in names)}
    done = perceive("lint", "d", cwd=tmp_path)
    assert not [byte for byte in done.stdout + done.stderr if byte < 0x20 and byte != 0x0A]
