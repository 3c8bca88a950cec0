"""`perceiver info FILE`: what a file is taken for, how sure that is, and what is decoded of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import trimesh
from PIL import Image

from perceiver_cli.data.about_file import about_file
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import Perceive, write_clip


def test_each_kind_of_medium_says_what_it_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (20, 10), "red").save(tmp_path / "x.dat", "JPEG", exif=exif)
    facts, ((raw, _),) = about_file(str(tmp_path / "x.dat"), Limits())
    assert (facts["taken_for"], facts["sure"]) == ("image", "by its content")
    assert facts["image"]["format"] == "JPEG"
    assert (facts["image"]["width"], facts["image"]["height"], facts["image"]["orientation"]) == (20, 10, 6)
    assert raw.shape == (20, 10, 3)  # upright
    assert facts["image"]["decoded"] == "20 x 10 x 3 uint8"

    soundfile.write(tmp_path / "x.wav", np.sin(np.arange(6000, dtype=np.float32)), 8000)
    sound = about_file(str(tmp_path / "x.wav"), Limits())[0]["audio"]
    assert (sound["rate_hz"], sound["seconds"]) == (8000, 0.75)

    trimesh.creation.box((2, 4, 6)).export(tmp_path / "x.stl")
    facts = about_file(str(tmp_path / "x.stl"), Limits())[0]
    assert facts["taken_for"] == "points"
    ends = [float(end) for axis in facts["points"]["extents"].split(", ") for end in axis.split(" to ")]
    assert ends == pytest.approx([-1, 1, -2, 2, -3, 3], abs=0.1)

    facts, decoded = about_file(str(write_clip(tmp_path / "x.mp4", 1, 300, 2.0)), Limits())
    assert (facts["taken_for"], facts["video"]["seconds"]) == ("video", 2.0)
    assert facts["audio"]["seconds"] == pytest.approx(2, abs=0.2)  # a codec's last block
    assert len(decoded) == 2
    facts, decoded = about_file(str(write_clip(tmp_path / "still.mp4", 1, None, 2.0)), Limits())
    assert "no sound" in facts["audio"]["error"]
    assert len(decoded) == 1


def test_what_holds_or_names_files_and_what_is_of_no_kind(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/1.png", b"1")
    facts, decoded = about_file(str(tmp_path / "x.zip"), Limits())
    assert (facts["taken_for"], decoded) == ("a file of archives", [])
    assert facts["looked_at_by"] == f"perceiver lint {tmp_path}/x.zip"
    (tmp_path / "x.csv").write_text("path,label\n1.png,cat\n")
    assert about_file(str(tmp_path / "x.csv"), Limits())[0]["sure"] == "by its name"
    np.save(tmp_path / "x.npy", np.zeros((64, 40), np.float32))
    with pytest.raises(DataError, match="could be anything"):  # it was taken for a film
        about_file(str(tmp_path / "x.npy"), Limits())
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="unknown format"):
        about_file(str(tmp_path / "x.png"), Limits())


def test_the_command(perceive: Perceive, tmp_path: Path) -> None:
    Image.new("L", (12, 9)).save(tmp_path / "x.png")
    done = perceive("info", "x.png", "--json", "-o", "small.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["image"]["mode"] == "L"
    with Image.open(tmp_path / "small.png") as picture:
        assert picture.width > 100
    (tmp_path / "x.csv").write_text("path,label\n1.png,cat\n")
    for arguments, words in (
        (("x.png", "-o", "small.wav"), b"not a picture"),
        (("x.csv", "-o", "small.png"), b"a manifest has no picture"),
        (("tiny-image", "-o", "small.png"), b"-o draws a file of data"),
        (("x.png", "--limit", "image_pixels=5"), b"108 pixels > 5"),
    ):
        done = perceive("info", *arguments, cwd=tmp_path)
        assert done.returncode in (2, 3, 4), done
        assert words in done.stderr
        assert done.stderr.count(b"\n") == 1
