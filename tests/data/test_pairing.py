"""Which files make one example: by stem, by manifest, as a video; what is missing, doubled or of another kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, strategies as st

from perceiver_cli.config import DataConfig
from perceiver_cli.data.catalog import scan
from perceiver_cli.data.examples import Example
from perceiver_cli.data.inputs import brought, examples_of
from perceiver_cli.data.loader import Reader
from perceiver_cli.data.pairing import identity
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.video import VideoSpec
from tests.conftest import RATE_HZ, write_clip, write_images, write_pairs

BOTH = {"image": ImageSpec(), "points": PointsSpec()}


def manifest_of(root: Path, columns: dict[str, str]) -> Path:
    """Write root/m.csv with a column for each modality of the files that are there; returns it."""
    lines = [",".join([*columns, "label", "split"])]
    for stem in sorted({path.with_suffix("") for suffix in columns.values() for path in root.rglob(f"*{suffix}")}):
        cells = [stem.with_suffix(suffix) for suffix in columns.values()]
        parts = [str(path.relative_to(root)) if path.exists() else "" for path in cells]
        lines.append(",".join([*parts, stem.parent.name, stem.parent.parent.name]))
    (root / "m.csv").write_text("\n".join(lines) + "\n")
    return root / "m.csv"


# ---------------------------------------------------------------- pairs


def test_files_of_one_stem_are_one_example(pairs: Path) -> None:
    catalog = scan(pairs)
    assert catalog.modalities == catalog.holds == ("audio", "image")
    assert {split: len(found) for split, found in catalog.splits.items()} == {"train": 96, "test": 32}
    example = catalog.splits["test"][0]
    assert example.id == "test/bottom-high/000"
    assert [Path(source.name).name for source in example.sources.values()] == ["000.wav", "000.png"]


def test_a_manifest_of_the_same_pairs_gives_the_same_examples(pairs: Path, tmp_path: Path) -> None:
    """Also where pictures or sounds are missing, or a file is damaged."""
    root = shutil.copytree(pairs, tmp_path / "data")
    (root / "train" / "top-low" / "003.wav").unlink()
    (root / "train" / "top-low" / "004.png").unlink()
    (root / "train" / "top-low" / "005.png").write_bytes(b"")
    by_stem = scan(root)
    by_row = scan(manifest_of(root, {"image": ".png", "audio": ".wav"}))
    assert by_stem.splits == by_row.splits
    assert by_stem.fingerprint == by_row.fingerprint
    assert by_stem.bad == {"train/top-low/005": f"'{root}/train/top-low/005.png': the file is empty"}
    assert (
        set(by_stem.notes) - {"audio + image by stem: 126 of 128 examples; --pair none turns it off in training"}
        == set(by_row.notes)
        == {
            "1 of 128 examples have no audio",
            "1 of 128 examples have no image",
        }
    )
    ids = {example.id for example in by_stem.splits["train"]}
    assert {"train/top-low/003.png", "train/top-low/004.wav", "train/top-low/005"} <= ids


def test_a_second_kind_joins_in_where_most_of_it_has_a_partner(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 6, "b": 6})
    for name in ("000", "001", "other"):
        soundfile.write(tmp_path / "a" / f"{name}.wav", np.zeros(800, np.float32), RATE_HZ)
    assert scan(tmp_path).modalities == ("audio", "image")
    for name in ("more", "still"):
        soundfile.write(tmp_path / "a" / f"{name}.wav", np.zeros(800, np.float32), RATE_HZ)
    catalog = scan(tmp_path)
    assert catalog.modalities == ("image",)
    assert len(catalog.splits["train"]) == 12
    assert catalog.account.passed_over[".wav (audio)"].count == 5
    assert scan(tmp_path, reads=["audio", "image"]).modalities == ("audio", "image")  # asked for, they are there


def test_a_recipe_of_one_modality_takes_its_part_of_pairs(pairs: Path) -> None:
    catalog = scan(pairs, reads=["audio"])
    assert (catalog.modalities, catalog.holds) == (("audio",), ("audio", "image"))
    assert catalog.splits["test"][0].id == "test/bottom-high/000.wav"
    assert catalog.account.passed_over[".png (image)"].count == 128


def test_two_files_of_a_kind_are_no_pair(pairs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pairs, tmp_path / "data")
    folder = root / "train" / "top-low"
    shutil.copy(folder / "000.png", folder / "000.gif.png")  # another stem
    shutil.copy(folder / "000.png", folder / "001.PnG")
    catalog = scan(root)
    assert list(catalog.bad) == ["train/top-low/001"]
    assert "a second image file with the same stem, expected one" in catalog.bad["train/top-low/001"]


def test_a_wrong_type_in_a_column_is_named_when_it_is_read(pairs: Path) -> None:
    example = Example("x", {"image": Source(str(pairs / "test" / "top-low" / "000.wav"))})
    with pytest.raises(DataError, match=r"000\.wav': audio by its content, expected image"):
        Reader({"image": ImageSpec()}, Limits()).decode(example)


def test_rows_that_name_nothing_are_bad_and_rows_without_what_is_read_are_left_out(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    (tmp_path / "m.csv").write_text("image,audio,label\ntop-low/000.png,,a\n,top-low/000.wav,b\n,,b\n")
    catalog = scan(tmp_path / "m.csv")
    assert catalog.bad == {"row 3": f"'{tmp_path}/m.csv': row 3 names no file"}
    assert len(catalog.splits["train"]) == 3
    catalog = scan(tmp_path / "m.csv", reads=["audio"])
    assert [example.id for example in catalog.splits["train"]] == ["row 3", "top-low/000.wav"]
    assert catalog.notes[:2] == ("ignored columns: image", "ignored 1 row without audio")
    assert catalog.notes[2:] == ("no file of the class 'a' is used: '.png' 1",)


def test_two_examples_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,audio,label\na.png,a.wav,x\na.jpg,a.wav,y\n")
    for name in ("a.png", "a.jpg", "a.wav"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match="two examples of the stem 'a'; rename the files"):
        scan(tmp_path / "m.csv")


@given(st.lists(st.sampled_from(["a.png", "a.wav", "b/a.off", "a", "c.mp4"]), min_size=1))
def test_identity(paths: list[str]) -> None:
    assert identity(paths) == identity(paths[::-1])
    assert identity([paths[0]] * 3) == paths[0]


def test_identity_of_stems() -> None:
    assert identity(["a/1.png", "a/1.wav"]) == "a/1"
    assert identity(["x/1.png", "y/1.wav"]) == "x/1.png+y/1.wav"


# ---------------------------------------------------------------- tables beside media


def write_boxes(folder: Path, rows: str = "0.1 0.2 0.3 0.4\n0.5 0.6 0.7 0.8\n", suffix: str = ".txt") -> None:
    """Write a table of numbers beside each picture and sound below a folder."""
    for path in sorted(folder.rglob("*.png")):
        path.with_suffix(suffix).write_text(rows)


@pytest.mark.parametrize("suffix", [".txt", ".xyz", ".pts", ".csv"])
def test_a_table_of_numbers_beside_a_picture_is_no_input(tmp_path: Path, suffix: str) -> None:
    """Boxes, landmarks, tracks of pitch: they look like clouds and tell the class (ultralytics#21224)."""
    write_images(tmp_path, {"a": 4, "b": 4})
    write_boxes(tmp_path, suffix=suffix)
    catalog = scan(tmp_path)
    assert catalog.modalities == ("image",)
    assert len(catalog.splits["train"]) == 8
    assert scan(tmp_path, reads=["image", "points"]).modalities == ("image",)
    (plain,) = [example for example in examples_of(str(tmp_path / "a"), BOTH, Limits()) if "000" in example.id]
    assert list(plain.sources) == ["image"]  # a prediction follows the same rule


def test_raw_floats_beside_a_picture_are_no_input(tmp_path: Path) -> None:
    """KITTI's .bin has no signature: an embedding without a negative number looks the same, and tells the class."""
    write_images(tmp_path, {"a": 4, "b": 4})
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".bin").write_bytes(np.random.default_rng(0).uniform(0, 1, 512).astype("<f4").tobytes())
    assert scan(tmp_path).modalities == ("image",)
    assert scan(tmp_path, options=DataConfig(pair="all")).modalities == ("image", "points")


def test_pictures_of_one_stem_are_told(tmp_path: Path) -> None:
    """x.png beside x.jpg may be its mask, or the same picture again."""
    write_images(tmp_path, {"a": 4, "b": 4})
    shutil.copy(tmp_path / "b" / "000.png", tmp_path / "b" / "000.jpg")
    (note,) = scan(tmp_path).notes
    assert note.startswith("1 file with the stem of another, such as 'b/000.jpg' and 'b/000.png'")


def test_the_user_may_join_tables_or_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 4, "b": 4})
    write_boxes(tmp_path, suffix=".xyz")
    every = DataConfig(pair="all")
    joined = scan(tmp_path, options=every)
    assert joined.modalities == ("image", "points")
    assert "image + points by stem: 8 of 8 examples; --pair none turns it off in training" in joined.notes
    assert scan(tmp_path, options=DataConfig(pair="none")).modalities == ("image",)
    (pair,) = [e for e in examples_of(str(tmp_path / "train" / "a"), BOTH, Limits(), options=[every]) if "000" in e.id]
    assert list(pair.sources) == ["image", "points"]
    assert scan(manifest_of(tmp_path, {"image": ".png", "points": ".xyz"})).modalities == ("image", "points")
    clouds = scan(tmp_path, reads=["points"])  # asked for alone, they are clouds
    assert (clouds.modalities, len(clouds.splits["train"])) == (("points",), 8)


def test_more_tables_than_pictures_do_not_come_first(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 4, "b": 4})
    for path in sorted(tmp_path.rglob("*.png")):
        for side in ("left", "right"):
            path.with_name(f"{path.stem}_{side}.xyz").write_text("0 0 1\n0 1 0\n")
    assert scan(tmp_path).modalities == ("image",)


def test_media_of_one_stem_are_pairs_which_is_said(pairs: Path, tmp_path: Path) -> None:
    note = "audio + image by stem: 128 of 128 examples; --pair none turns it off in training"
    assert note in scan(pairs).notes
    alone = scan(pairs, options=DataConfig(pair="none"))
    assert (alone.modalities, len(alone.splits["train"])) == (("audio",), 96)
    write_images(tmp_path, {"a": 3, "b": 3})
    for path in sorted(tmp_path.rglob("*.png")):
        path.with_suffix(".off").write_text("OFF\n3 1 0\n0 0 0\n0 0 1\n0 1 0\n3 0 1 2\n")
    catalog = scan(tmp_path)
    assert catalog.modalities == ("image", "points")  # a format that says that it is points
    assert "image + points by stem: 6 of 6 examples; --pair none turns it off in training" in catalog.notes
    found = examples_of(str(tmp_path / "a"), BOTH, Limits(), options=[DataConfig(pair="none")])
    assert [list(example.sources) for example in found] == [["points"], ["image"]] * 3


# ---------------------------------------------------------------- videos


def test_a_video_brings_its_sound(clips: Path, tmp_path: Path) -> None:
    clips = shutil.copytree(clips, tmp_path / "data")
    catalog = scan(clips)
    assert catalog.modalities == ("audio", "video")
    example = catalog.splits["test"][0]
    assert example.id == "test/bottom-high/000.mp4"
    assert example.sources["audio"] == example.sources["video"]
    columns = {"video": ".mp4"}
    assert scan(manifest_of(clips, columns)).modalities == ("video",)  # a column is what it says
    (clips / "m.csv").write_text((clips / "m.csv").read_text().replace("video,", "path,"))
    by_row = scan(clips / "m.csv")
    assert by_row.splits == catalog.splits


def test_sound_that_few_videos_have_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    for i in range(6):
        write_clip(tmp_path / ("a" if i % 2 else "b") / f"{i}.mp4", 0, 300 if i < 2 else None)
    catalog = scan(tmp_path)
    assert (catalog.modalities, catalog.holds) == (("video",), ("audio", "video"))
    assert catalog.notes == ("33% of the videos have sound, which is not read",)
    assert scan(tmp_path, reads=["audio", "video"]).modalities == ("audio", "video")
    sounds = scan(tmp_path, reads=["audio"])
    assert sounds.modalities == ("audio",)
    assert len(sounds.splits["train"]) == 6


def test_a_sound_file_comes_before_the_sound_of_the_video(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / name / "x.mp4", 0, 300)
        soundfile.write(tmp_path / name / "x.wav", np.zeros(800, np.float32), RATE_HZ)
    example = scan(tmp_path).splits["train"][0]
    assert [Path(source.name).name for source in example.sources.values()] == ["x.wav", "x.mp4"]
    assert example.id == "a/x"


# ---------------------------------------------------------------- what is to be predicted


def test_a_path_stands_for_files_pairs_or_rows(pairs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pairs / "test" / "top-low", tmp_path / "in")
    (root / "000.txt").write_text("about it\n")
    (root / "notes.txt").write_text("about them\n")
    shutil.copy(root / "001.png", root / "001.jpeg")
    one = {"image": ImageSpec()}
    both = one | {"audio": AudioSpec()}
    found = list(examples_of(str(root), both, Limits()))
    ids = [Path(example.id).name for example in found]
    assert ids == ["000", "001.jpeg", "001.png", "001.wav", *(f"{i:03d}" for i in range(2, 8))]
    assert list(found[0].sources) == ["audio", "image"]
    assert len(list(examples_of(str(root), one, Limits()))) == 9  # a model of one modality: its files
    (tmp_path / "m.csv").write_text("audio,image\nin/000.wav,in/003.png\n,\nin/001.wav,\n")
    rows = list(examples_of(str(tmp_path / "m.csv"), both, Limits()))
    assert [row.id for row in rows] == ["in/000.wav+in/003.png", "row 2", "in/001.wav"]
    assert rows[0].sources["image"].name == str(root / "003.png")
    (tmp_path / "cloud.csv").write_text("0.1,0.2,0.3\n0.4,0.5,0.6\n")
    (root / "m.csv").write_text("path,label\n000.png,a\n,b\n001.png,c\n")
    rows = list(examples_of(str(root / "m.csv"), one, Limits()))
    assert [row.id for row in rows] == ["000.png", "row 2", "001.png"]
    (cloud,) = examples_of(str(tmp_path / "cloud.csv"), {"points": PointsSpec()}, Limits())
    assert list(cloud.sources) == ["points"]
    (plain,) = examples_of(str(root / "000.png"), one, Limits())
    assert plain.sources == {"image": detected(Source(str(root / "000.png")))}


def test_what_an_example_brings(pairs: Path, tmp_path: Path) -> None:
    clip = Source(str(write_clip(tmp_path / "c.mp4", 0, 300)))
    for reads, names in (
        (["video"], ["video"]),
        (["audio"], ["audio"]),
        (["video", "audio", "image"], ["audio", "video"]),
    ):
        (example,) = examples_of(clip, dict.fromkeys(reads, VideoSpec()), Limits())
        assert list(brought(example, reads)) == names
    assert list(brought(Example("c", {"video": clip}), ["audio", "video"])) == ["video"]
    with pytest.raises(DataError, match="video by its content, expected image or points"):
        brought(*examples_of(clip, {"image": ImageSpec(), "points": PointsSpec()}, Limits()), ["image", "points"])
    with pytest.raises(DataError, match="'row 7': no audio or image"):
        brought(Example("row 7", {}), ["image", "audio"])
