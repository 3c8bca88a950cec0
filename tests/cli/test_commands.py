"""Whole commands through the real entry point and real pipes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors.numpy import load_file

from perceiver_cli.cli.train import kept_line
from perceiver_cli.training.events import Evaluated
from tests.conftest import SMALL, Perceive, tone_of, write_clip, write_images

SETS = [part for change in SMALL for part in ("--set", change)]


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """A folder in which a model was trained: runs/latest points at it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(trained)
    return tmp_path


@pytest.fixture(scope="module")
def files(bars: Path) -> list[Path]:
    return sorted((bars / "test").rglob("*.png"))


def lines(output: bytes) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.splitlines()]


# ---------------------------------------------------------------- the main path


def test_train_evaluate_predict(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    done = perceive("train", bars, *SETS, "--epochs", "25", "--lr", "0.01", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"runs/tiny-image-1/model.safetensors\n"
    splits = b"splits: train 105, val 15 (held out by a hash of each name), test 30\n"
    assert splits + b"image: 12 x 12 grey, whole, single pixels" in done.stderr
    assert b"val acc" in done.stderr
    assert b"\x1b[" not in done.stderr  # no colours, no bars where there is no terminal

    done = perceive("evaluate", bars, "--json", "-o", "report", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert {"accuracy", "top5", "loss", "num_examples", "per_class", "split"} <= set(report)
    assert (report["split"], report["num_examples"]) == ("test", 30)
    assert report["accuracy"] > 0.9
    assert b"using 'runs/latest/model.safetensors'" in done.stderr
    names = {"report.html", "metrics.json", "predictions.jsonl", "confusion.png"}
    assert {p.name for p in (tmp_path / "report").iterdir()} == names

    file = next((bars / "test" / "right").iterdir())
    (line,) = lines(perceive("predict", file, cwd=tmp_path).stdout)
    assert (line["path"], line["label"]) == (str(file), "right")
    assert [set(top) for top in line["top"]] == [{"label", "prob"}] * 3  # type: ignore[attr-defined]


def test_evaluate_for_people(perceive: Perceive, here: Path, bars: Path) -> None:
    done = perceive("evaluate", bars, cwd=here)
    interval, head, alike, columns, *rows = done.stdout.decode().splitlines()
    assert interval == "test: accuracy between 0.884 and 1.000 (95 % interval)"
    assert head.startswith("test: accuracy ")
    assert alike.startswith("each class alike: balanced accuracy ")
    assert columns.split() == ["class", "count", "accuracy", "precision", "f1"]
    assert [row.split()[0] for row in rows] == ["left", "middle", "right"]


def test_the_end_of_a_training_says_which_model_is_kept() -> None:
    """The rule of one standard error keeps a later model than that of the highest accuracy, and said "best"."""
    highest = Evaluated(40, 2.0, 0.3, 0.8808, 0.4, True, 9.0)
    line = kept_line({"val_accuracy": 0.8742, "step": 80}, highest)
    assert line.startswith(
        "kept: the model of step 80, the last row with *: validation accuracy 0.8742; step 40 had 0.8808"
    )
    assert kept_line({"val_accuracy": 0.8808, "step": 40}, highest).endswith("validation accuracy 0.8808")
    assert kept_line({"val_accuracy": 0.5, "val_mAP": 0.25, "step": 1}, highest).endswith("accuracy 0.5000, mAP 0.2500")


def test_resume_from_the_shell(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    assert perceive("train", bars, "-o", "run", *SETS, "--steps", "3", cwd=tmp_path).returncode == 0
    again = perceive("train", bars, "-o", "run", *SETS, "--steps", "3", cwd=tmp_path)
    assert again.returncode == 2
    assert b"'run': already holds a run; pass --resume" in again.stderr
    done = perceive("train", "--resume", "--steps", "6", cwd=tmp_path)  # runs/latest, the data of its configuration
    assert done.returncode == 0, done.stderr
    assert b"6 steps" in done.stderr


def test_fine_tuning_says_what_was_taken(perceive: Perceive, here: Path, bars: Path) -> None:
    changes = ["--set", "model.schedule=c0 t0 c1 t0 c2 t0", "--steps", "1"]
    done = perceive("train", bars, "-o", "tuned", "--init-from", "runs/latest", *changes, cwd=here)
    assert done.returncode == 0, done.stderr
    # The third cross-attend has 18 tensors, which nothing is known for.
    assert re.search(
        rb"note: started from 'runs/latest': \d+ tensors taken, 18 fresh, it knows 3 of 3 classes", done.stderr
    )


def test_dry_run(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    plan = json.loads(perceive("train", bars, *SETS, "--dry-run", cwd=tmp_path).stdout)
    assert {"splits", "classes", "inputs", "parameters", "flops", "training_bytes", "steps", "eta_s"} <= set(plan)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- predict in pipes


def test_predict_reads_lists_and_bytes(perceive: Perceive, here: Path, files: list[Path]) -> None:
    expected = [json.loads(line) for line in perceive("predict", *files[:3], cwd=here).stdout.splitlines()]
    listed = "\n".join(map(str, files[:3])).encode()
    assert lines(perceive("predict", "--files-from", "-", cwd=here, stdin=listed).stdout) == expected
    (here / "list").write_bytes(listed.replace(b"\n", b"\0") + b"\0")
    assert lines(perceive("predict", "--files-from", "list", "-0", cwd=here).stdout) == expected
    (line,) = lines(perceive("predict", "-", "--stdin-name", "cam", cwd=here, stdin=files[0].read_bytes()).stdout)
    assert line["path"] == "cam"
    assert line["prob"] == pytest.approx(expected[0]["prob"])


def test_predict_formats(perceive: Perceive, here: Path, files: list[Path]) -> None:
    (here / "=1+1.png").write_bytes(files[0].read_bytes())
    done = perceive("predict", "=1+1.png", "none.png", "--format", "csv", "--top-k", "2", cwd=here)
    assert done.returncode == 3
    head, row, bad = csv.reader(io.StringIO(done.stdout.decode()))
    assert head == ["path", "label", "prob", "label_2", "prob_2", "error"]
    assert row[:2] == ["'=1+1.png", "left"]  # no spreadsheet takes it for a formula
    assert bad[:5] == ["none.png", "", "", "", ""]
    assert "No such file" in bad[5]
    done = perceive("predict", files[0], "--format", "tsv", "--all-probs", cwd=here)
    assert done.stdout.splitlines()[0].split(b"\t")[-4:] == [b"p_left", b"p_middle", b"p_right", b"error"]
    done = perceive("predict", files[0], "--format", "table", cwd=here)
    head, row = done.stdout.decode().splitlines()
    assert head.split() == ["file", "label", "prob", "others"]
    assert row.split()[:2] == [str(files[0]), "left"]


def test_a_bad_input_is_a_line_and_status_3(perceive: Perceive, here: Path, files: list[Path]) -> None:
    (here / "cut.png").write_bytes(files[0].read_bytes()[:50])
    done = perceive("predict", files[0], "cut.png", files[1], cwd=here)
    assert done.returncode == 3
    found = lines(done.stdout)
    assert [set(line) for line in found] == [
        {"path", "id", "label", "prob", "top"},
        {"path", "id", "error"},
        {"path", "id", "label", "prob", "top"},
    ]
    assert done.stderr.count(b"cut.png") == 1


def test_a_reader_that_leaves_ends_it_quietly(here: Path, files: list[Path], perceive: Perceive) -> None:
    program = Path(sys.executable).parent / "perceiver"
    script = (
        f"'{program}' predict --batch-size 1 -m runs/latest --files-from list 2>err | head -1; echo ${{PIPESTATUS[0]}}"
    )
    (here / "list").write_text("\n".join(map(str, files * 20)))
    done = subprocess.run(["bash", "-c", script], cwd=here, capture_output=True, check=True)
    first, status = done.stdout.splitlines()
    assert json.loads(first)["label"] == "left"
    assert status == b"141"
    assert (here / "err").read_bytes() == b""


def test_training_goes_on_when_nobody_reads_its_talk(bars: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "perceiver"
    options = " ".join(f"--set '{change}'" for change in SMALL)
    script = f"'{program}' train '{bars}' -o run {options} --epochs 2 2> >(head -n 1 >/dev/null)"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"run/model.safetensors\n")


def test_bytes_on_stdin_become_a_byte_array(perceive: Perceive, here: Path, files: list[Path]) -> None:
    done = perceive("preprocess", "-", "-m", "runs/latest", "-o", "x.npy", cwd=here, stdin=files[0].read_bytes())
    assert done.returncode == 0
    perceive("preprocess", files[0], "-m", "runs/latest", "-o", "y.npy", cwd=here)
    assert np.array_equal(np.load(here / "x.npy"), np.load(here / "y.npy"))


def test_a_full_disk_on_stdout_is_one_line(here: Path, files: list[Path]) -> None:
    program = Path(sys.executable).parent / "perceiver"
    with open("/dev/full", "wb") as full:
        command = [program, "predict", files[0], "-m", "runs/latest"]
        done = subprocess.run(command, cwd=here, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 5
    assert done.stderr == b"perceiver: stdout: cannot write: No space left on device\n"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([program, "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 5
    assert done.stderr.count(b"\n") == 1


HOSTILE = [
    b"\xff.png", b"[red]x.png", b"[bold]", b"\x1b]0;owned\x07.png", b"a\nb.png", b"a\rb.png",
    "a\u202eb.png".encode(), b"-rf.png",
]  # fmt: skip


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_hostile_names_survive_and_never_reach_the_terminal_raw(
    perceive: Perceive, here: Path, files: list[Path], locale: str
) -> None:
    for name in HOSTILE:
        Path(os.fsdecode(os.fsencode(here) + b"/" + name)).write_bytes(files[0].read_bytes()[:50])
    done = perceive("predict", "--files-from", "-", "-0", cwd=here, stdin=b"\0".join(HOSTILE), LC_ALL=locale)
    assert done.returncode == 3
    assert [os.fsencode(str(line["path"])) for line in lines(done.stdout)] == HOSTILE
    assert not [byte for byte in done.stderr if byte < 0x20 and byte != 0x0A]
    assert len(done.stderr.splitlines()) == len(HOSTILE) + 1
    table = perceive("predict", "--files-from", "-", "-0", "--format", "table", cwd=here, stdin=b"\0".join(HOSTILE))
    assert not [byte for byte in table.stdout if byte < 0x20 and byte != 0x0A]


def test_hostile_class_names(perceive: Perceive, tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"[red]a": 12, "b\x1b[31m\n": 12})
    done = perceive("train", "data", "-o", "run", *SETS, "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = perceive("evaluate", "data", "-m", "run", "--split", "all", cwd=tmp_path)
    assert b"[red]a" in done.stdout
    assert rb"b\x1b[31m\n" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr


# ---------------------------------------------------------------- several modalities, windows


def test_pairs_from_the_shell(perceive: Perceive, pairs: Path, paired: Path, tmp_path: Path) -> None:
    plan = json.loads(perceive("train", pairs, "--dry-run", cwd=tmp_path).stdout)
    assert (plan["preset"], plan["modalities"]) == ("tiny-audio-image", ["audio", "image"])
    folder = pairs / "test" / "top-low"
    found = lines(perceive("predict", folder, "-m", paired, cwd=tmp_path).stdout)
    assert [line["id"] for line in found] == [f"{i:03d}" for i in range(8)]
    assert all(line["used"] == ["audio", "image"] for line in found)
    done = perceive("predict", folder / "000.png", folder / "000.wav", "-m", paired, "--format", "csv", "--top-k", "1")
    head, *rows = csv.reader(io.StringIO(done.stdout.decode()))
    assert head == ["path", "used", "label", "prob", "error"]
    assert [row[1] for row in rows] == ["image", "audio"]
    done = perceive("predict", folder / "000.png", "-m", paired, "--format", "table")
    assert done.stdout.decode().splitlines()[0].split() == ["file", "used", "label", "prob", "others"]
    done = perceive("evaluate", pairs, "-m", paired, "--use", "image", "--json")
    assert json.loads(done.stdout)["modalities"] == ["image"]
    assert b"note: answered from image alone; the model reads audio+image" in done.stderr
    done = perceive("predict", folder, "-m", paired, "--use", "image,video")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_windows_from_the_shell(perceive: Perceive, filmed: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4", 1, 300, 3.0)
    done = perceive("predict", clip, "-m", filmed, "--window", "1", "--hop", "0.5", "--aggregate", "none")
    found = lines(done.stdout)
    assert [(line["start_s"], line["end_s"]) for line in found[:5]] == [(i / 2, i / 2 + 1) for i in range(5)]
    assert all(line["path"] == str(clip) and line["used"] == ["audio", "video"] for line in found[:5])
    options = ["--window", "1", "--aggregate", "none", "--format", "tsv", "--top-k", "1"]
    head, *rows = perceive("predict", clip, "-m", filmed, *options).stdout.decode().splitlines()
    assert head.split("\t") == ["path", "start_s", "end_s", "used", "label", "prob", "error"]
    assert [row.split("\t")[1] for row in rows[:3]] == ["0.0", "1.0", "2.0"]
    (one,) = lines(perceive("predict", clip, "-m", filmed, "--window", "1").stdout)
    assert "start_s" not in one


def test_events_from_the_shell(perceive: Perceive, filmed: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4", 1, 300, 3.0)
    run = ("predict", clip, "-m", filmed, "--merge")
    events = lines(perceive(*run).stdout)
    assert [list(event) for event in events] == [["path", "id", "start_s", "end_s", "label", "prob"]] * len(events)
    ends = [event["end_s"] for event in events]
    assert [event["start_s"] for event in events] == [0.0, *ends[:-1]]
    first, *_ = perceive(*run, "--format", "audacity").stdout.decode().splitlines()
    assert first.split("\t") == ["0.000000", f"{ends[0]:.6f}", events[0]["label"]]
    number, times, label, blank, *_ = perceive(*run, "--format", "srt").stdout.decode().split("\n")
    assert (number, times[:17], label, blank) == ("1", "00:00:00,000 --> ", events[0]["label"], "")
    head, *rows = perceive(*run, "--format", "csv").stdout.decode().splitlines()
    assert head == "path,start_s,end_s,label,prob,error"
    assert len(rows) == len(events)
    assert perceive(*run, "--min-prob", "1").stdout == b""
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    shutil.copy(clip, tmp_path / "d.mp4")
    two = perceive(*run, tmp_path / "bad.mp4")
    assert two.returncode == 3
    assert lines(two.stdout)[-1].keys() == {"path", "id", "error"}
    (tmp_path / "m.csv").write_text(f"path,speaker\n{clip},ann\n")
    (head, row, *_) = perceive(
        "predict", tmp_path / "m.csv", *run[2:], "--pass", "speaker", "--format", "csv"
    ).stdout.decode().splitlines()  # fmt: skip
    assert head == "path,speaker,start_s,end_s,label,prob,error"
    assert row.split(",")[1:3] == ["ann", "0.0"]
    for more, message in (
        ([tmp_path / "d.mp4", "--format", "srt"], b"--format srt holds the events of one input"),
        (["--aggregate", "mean"], b"--merge keeps windows apart"),
        (["--all-probs"], b"--all-probs has no effect with --merge"),
        (["--every", "1", "--hop", "1"], b"--every and --hop are both"),
    ):
        refused = perceive(*run, *more)
        assert refused.returncode == 2
        assert message in refused.stderr
    assert b"pass --merge" in perceive("predict", clip, "-m", filmed, "--max-gap", "1").stderr


def test_raw_sound_from_the_shell(perceive: Perceive, filmed: Path, tmp_path: Path) -> None:
    samples = (tone_of(300, 2.0, np.random.default_rng(0)) * 32767).astype("<i2")
    soundfile.write(tmp_path / "a.wav", samples, 8000)
    run = ("predict", "-", "-m", filmed, "--use", "audio")
    (whole,) = lines(perceive(*run, "--rate", "8k", stdin=samples.tobytes()).stdout)
    (of_file,) = lines(perceive(*run[:1], tmp_path / "a.wav", *run[2:]).stdout)
    assert (whole["path"], whole["prob"]) == ("-", pytest.approx(of_file["prob"]))
    every = ("--every", "0.25", "--stdin-name", "microphone")
    heard = lines(perceive(*run, *every, "--rate", "8000", stdin=samples.tobytes()).stdout)
    assert [line["start_s"] for line in heard] == [n / 4 for n in range(7)]
    assert heard[-1]["path"] == "microphone"
    assert heard[-1]["end_s"] == 2.0
    assert lines(perceive(*run, *every, stdin=(tmp_path / "a.wav").read_bytes()).stdout) == heard
    short = samples[:800].tobytes()
    (line,) = lines(perceive(*run, *every, "--rate", "8000", stdin=short).stdout)
    assert (line["start_s"], line["end_s"]) == (0.0, 0.1)
    for options, message in (
        (["--channels", "2"], b"--channels needs raw sound; pass --rate HZ"),
        (["--rate", "7"], b"sample rate 7 Hz, expected 1000 to 768000"),
    ):
        refused = perceive(*run, *options, stdin=short)
        assert message in refused.stderr
        assert refused.returncode in (2, 3)
    assert b"--rate needs raw sound on stdin" in perceive("predict", tmp_path / "a.wav", "--rate", "8k").stderr


# ---------------------------------------------------------------- preprocess and info


def test_preprocess_gives_the_papers_byte_array(perceive: Perceive, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "cat.jpg")
    done = perceive("preprocess", "cat.jpg", "-o", "cat.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "cat.npy", allow_pickle=False)
    assert (rows.shape, rows.dtype) == ((50_176, 261), np.float32)
    assert b"50176 x 261 float32" in done.stderr
    np.testing.assert_allclose(rows[0, 3:5], [-1, -1])  # y, x of the first pixel
    np.testing.assert_allclose(rows[-1, 3:5], [1, 1])
    perceive("preprocess", "cat.jpg", "-o", "cat.safetensors", cwd=tmp_path)
    assert np.array_equal(load_file(tmp_path / "cat.safetensors")["image"], rows)
    piped = perceive("preprocess", "cat.jpg", "--preset", "imagenet", "--fourier", cwd=tmp_path).stdout
    with tarfile.open(fileobj=io.BytesIO(piped)) as tar:
        member = tar.extractfile("00000000.image.npy")
        assert member is not None
        assert np.array_equal(np.load(io.BytesIO(member.read())), rows)


def test_preprocess_of_sound_points_and_as_a_model_does(perceive: Perceive, here: Path, files: list[Path]) -> None:
    soundfile.write(here / "a.wav", np.zeros(48_000, np.float32), 48_000)
    (here / "cube.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    for name, shape in (("a.wav", (480, 128 + 129)), ("cube.off", (2048, 387))):
        assert perceive("preprocess", name, "-o", "x.npy", cwd=here).returncode == 0
        assert np.load(here / "x.npy").shape == shape
    assert perceive("preprocess", files[0], "-m", "runs/latest", "-o", "x.npy", cwd=here).returncode == 0
    info = json.loads(perceive("info", "runs/latest", "--json", cwd=here).stdout)
    assert np.load(here / "x.npy").shape == (info["inputs"]["image"]["count"], info["inputs"]["image"]["channels"])
    refused = perceive("preprocess", "a.wav", "--preset", "imagenet", "-o", "x.npy", cwd=here)
    assert refused.returncode == 3
    assert b"'a.wav': audio by its content, but imagenet reads image" in refused.stderr
    assert perceive("preprocess", "a.wav", "-o", "x.mp3", cwd=here).returncode == 2


def test_info(perceive: Perceive, here: Path) -> None:
    facts = json.loads(perceive("info", "imagenet", "--json").stdout)
    assert (facts["parameters"], facts["classes"]) == (44_912_254, 1000)
    assert facts["flops"] == pytest.approx(706.3e9, rel=5e-3)
    assert facts["inputs"]["image"] == {"modality": "image", "grid": [224, 224], "count": 50_176, "channels": 261}
    assert facts["latents"] == {"count": 512, "channels": 1024}
    facts = json.loads(perceive("info", "runs/latest", "--json", cwd=here).stdout)
    assert (facts["classes"], facts["class_names"]) == (3, ["left", "middle", "right"])
    unknown = perceive("info", "imagnet")
    assert unknown.returncode == 2
    assert unknown.stderr.count(b"\n") == 1


def test_presets(perceive: Perceive) -> None:
    listed = perceive("presets").stdout.decode()
    for name in ("imagenet", "audioset-audio", "modelnet40", "tiny-image", "tiny-audio", "tiny-points"):
        assert name in listed
        assert perceive("presets", name).stdout.startswith(b"# ")


# ---------------------------------------------------------------- refusals


def png_claiming(side: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


PLY_CLAIM = b"""ply
format binary_little_endian 1.0
element vertex 1000000000000
property float x
property float y
property float z
end_header
"""
WAV_CLAIM = (
    struct.pack("<4sI4s", b"RIFF", 0xFFFFFFFF, b"WAVE")
    + struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16)
    + struct.pack("<4sI", b"data", 0xFFFFFFF0)
    + b"\0" * 3200
)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("big.png", png_claiming(31_623), b"pass --limit image_pixels=1000014129"),
        ("big.ply", PLY_CLAIM, b"declared at least 12000000000000 bytes of data"),
        ("big.wav", WAV_CLAIM, b"declared 4294967280 bytes of sound, found 3200"),
        ("empty.png", b"", b"the file is empty"),
        ("what.bin", b"\x01\x02\x03", b"unknown format"),
    ],
)  # fmt: skip
def test_files_that_claim_too_much_are_refused_from_the_header(
    perceive: Perceive, tmp_path: Path, name: str, data: bytes, message: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    done = perceive("preprocess", name, "-o", "x.npy", cwd=tmp_path)
    assert done.returncode == 3
    assert message in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "nowhere"], 3, b"'nowhere': no such folder; expected a folder of class folders"),
        (["train", "."], 3, b"no usable files"),
        (["train"], 2, b"no data given"),
        (["train", ".", "--preset", "imagnet"], 2, b"did you mean imagenet"),
        (["train", ".", "--max-time", "soon"], 2, b"--max-time soon: not a time"),
        (["train", ".", "--preset", "imagenet", "--set", "train.lrr=1"], 2, b"did you mean train.lr"),
        (["train", "--resume", "-o", "none"], 2, b"no training state to resume"),
        (["train", ".", "--seeds", "2", "--continue"], 2, b"--continue takes one run; continue several with --resume"),
        (["train", ".", "--folds", "2", "--devices", "2"], 2, b"--devices trains one run"),
        (["lint", ".", "--labels", "x", "--workers", "2"], 2, b"--labels does not take --workers"),
        (["predict", "x.png"], 2, b"no model: there is no runs/latest here; pass -m RUN"),
        (["predict"], 2, b"nothing to predict"),
        (["train", ".", "-o", ""], 2, b"-o: the name is empty"),
        (["evaluate", ".", "-o", ""], 2, b"-o: the name is empty"),
        (["predict", "x.png", "--format", "xml"], 2, b"--format"),
        (["evaluate", ".", "-m", "nowhere"], 2, b"'nowhere': no model file"),
        (["predict", "x.png", "--limit", "pixels=3"], 2, b"no model"),
        (["predict", "x.wav", "--hop", "1"], 2, b"--hop needs windows; pass --window SECONDS"),
        (["predict", "x.wav", "--aggregate", "max"], 2, b"--aggregate needs windows; pass --window SECONDS"),
        (["predict", "x.wav", "--window", "0"], 2, b"windows of 0 s every 0 s, expected more than 0 s"),
        (["predict", "x.wav", "--window", "1", "--workers", "2"], 2, b"--workers reads whole files"),
    ],
)
def test_refusals_are_one_line_with_their_status(
    perceive: Perceive, tmp_path: Path, arguments: list[str], status: int, message: bytes
) -> None:
    done = perceive(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


def test_unknown_keys_name_the_nearest(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    done = perceive("train", bars, "--set", "train.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    advice = b"did you mean train.lr; perceiver options explains all\n"
    assert done.stderr == b"perceiver: options: unknown key train.lrr, " + advice


def test_a_model_of_another_modality_names_both(perceive: Perceive, here: Path) -> None:
    soundfile.write(here / "a.wav", np.zeros(8_000, np.float32), 8_000)
    done = perceive("predict", "a.wav", cwd=here)
    assert done.returncode == 3
    assert b"audio by its content, expected image" in done.stderr


def test_damaged_models_exit_with_7(perceive: Perceive, trained: Path, tmp_path: Path) -> None:
    data = bytearray((trained / "model.safetensors").read_bytes())
    data[-9] ^= 4
    (tmp_path / "m.safetensors").write_bytes(data)
    done = perceive("predict", "x.png", "-m", "m.safetensors", cwd=tmp_path)
    assert done.returncode == 7
    assert b"content sha256" in done.stderr


def test_too_many_bad_files_exit_with_3_and_the_list(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    shutil.copytree(bars, tmp_path / "data")
    for i in range(5):
        (tmp_path / "data" / "train" / "left" / f"{i:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = perceive("train", "data", *SETS, "--steps", "2", cwd=tmp_path)
    assert done.returncode == 3
    assert b"5 of 120 files cannot be read, more than 1.0%; pass --max-bad 0.042" in done.stderr
    assert b"\\n" not in done.stderr  # one line
    assert done.stderr.count(b".png'") == 5


def test_binary_is_refused_on_a_terminal(bars: Path, tmp_path: Path, files: list[Path]) -> None:
    program = Path(sys.executable).parent / "perceiver"
    main, terminal = os.openpty()
    command = [program, "preprocess", files[0]]
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    os.close(terminal)
    os.close(main)
    assert done.returncode == 2
    assert b"stdout is a terminal; pass -o FILE" in done.stderr


def test_a_resume_with_nothing_left_says_so(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    words = ("preprocess", bars / "test", "-o", "x-%02d.tar")
    assert b"prepared 30 inputs" in perceive(*words, cwd=tmp_path).stderr
    again = perceive(*words, "--resume", cwd=tmp_path)
    assert again.returncode == 0
    assert b"prepared 0 inputs; an earlier run had prepared all" in again.stderr
