"""Folders, splits, order, bad files."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings, strategies as st

from perceiver_cli.config import DataConfig
from perceiver_cli.data.catalog import Catalog, resolve_specs, scan
from perceiver_cli.data.decoder import kept
from perceiver_cli.data.examples import Example, Examples
from perceiver_cli.data.loader import Batch, Reader, ordered_tasks, training_tasks
from perceiver_cli.data.splits import read_split, save_split
from perceiver_cli.data.workers import in_order
from perceiver_cli.errors import DataError, IntegrityError, ResourceError, UsageError
from perceiver_cli.model.encoding import Segment
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.video import VideoSpec
from perceiver_cli.training.loop import class_weights
from perceiver_cli.training.mixing import mix
from tests.conftest import RATE_HZ, write_clip, write_images

SPEC = ImageSpec(size=12, color="grey", mean=(0.5,), std=(0.5,), crop_area=(0.5, 1.0))


def examples(count: int) -> list[Example]:
    return [Example(f"class/{i:04d}.png", {}, (i % 3,)) for i in range(count)]


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["class/file", "split/class/file", "class/split/file"])
def test_layouts_give_the_same_examples(tmp_path: Path, layout: str) -> None:
    write_images(tmp_path / "flat", {"a": 4, "b": 3})
    root = tmp_path / "data"
    for name in ("a", "b"):
        for file in sorted((tmp_path / "flat" / name).iterdir()):
            parts = {"class": name, "split": "train", "file": file.name}
            target = root.joinpath(*(parts[part] for part in layout.split("/")))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    catalog = scan(root)
    assert (catalog.modalities, catalog.classes) == (("image",), ("a", "b"))
    assert catalog.counts("train") == {"a": 4, "b": 3}
    assert catalog.notes == ()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val"])
def test_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / name, {"a": 1, "b": 1})
    catalog = scan(tmp_path)
    assert set(catalog.splits) == {"train", "val"}
    assert catalog.hold_out(0.1) is catalog


def test_what_is_not_data_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 3})
    (tmp_path / "train" / "a" / "notes.txt").write_text("about these pictures\n")
    (tmp_path / "train" / "a" / ".DS_Store").write_bytes(b"\x00")
    (tmp_path / "licences").mkdir()
    catalog = scan(tmp_path)
    assert len(catalog.splits["train"]) == 6
    assert any("'licences'" in note for note in catalog.notes)
    assert catalog.account.passed_over[".txt"].count == 1


def test_a_damaged_file_of_the_right_suffix_is_bad_not_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "text.png").write_text("no picture at all\n")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    catalog = scan(tmp_path)
    assert set(catalog.bad) == {"a/empty.png", "a/text.png"}
    assert catalog.account.passed_over["no regular file"].first == ["b/pipe.png"]
    assert len(catalog.splits["train"]) == 8


def test_folders_without_data_say_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("hello\n")
    with pytest.raises(
        DataError, match=r"no usable files: 0 of 1 file is used; passed over 1 .txt; expected class/file"
    ):
        scan(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "none")
    write_images(tmp_path / "shapes", {"round": 2, "square": 2})
    with pytest.raises(DataError, match=r"passed over 2 in no class folder; .* pass the one above it, '.*/shapes'$"):
        scan(tmp_path / "shapes" / "round")
    (tmp_path / "a" / "x.doc").write_text("hello\n")
    with pytest.raises(DataError, match="neither a folder nor a manifest"):
        scan(tmp_path / "a" / "x.doc")


def test_classes_of_a_model_are_matched_by_name(tmp_path: Path) -> None:
    write_images(tmp_path / "test", {"b": 2, "c": 2, "z": 1})
    catalog = scan(tmp_path, ["a", "b", "c"])
    assert [example.labels for example in catalog.splits["test"]] == [(1,), (1,), (2,), (2,), ()]
    assert any("1 file of classes not among the model's classes: 'z' 1" in note for note in catalog.notes)


def test_order_on_disk_does_not_matter(tmp_path: Path) -> None:
    write_images(tmp_path / "one", {"a": 9, "b": 9})
    files = sorted((tmp_path / "one").rglob("*.png"))
    random.Random(0).shuffle(files)
    for file in files:
        target = tmp_path / "two" / file.relative_to(tmp_path / "one")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    one, two = (scan(tmp_path / name).hold_out(0.2) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert [e.id for e in one.splits["val"]] == [e.id for e in two.splits["val"]]


def test_the_current_folder_is_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    monkeypatch.chdir(tmp_path)
    assert scan(".").fingerprint == scan(tmp_path).fingerprint
    shutil.move("train/a/000.png", "train")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n000.png,a\nb/000.png,b\n")
    assert (scan(".").fingerprint, scan(".").notes) == (scan(tmp_path).fingerprint, scan(tmp_path).notes)


def test_links_are_not_followed_round_in_circles(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(scan(tmp_path).splits["train"]) == 4


# ---------------------------------------------------------------- splits


def shares(catalog: Catalog) -> dict[str, set[str]]:
    return {split: {example.id for example in examples} for split, examples in catalog.splits.items()}


def made_up(counts: dict[str, int], groups: int = 0) -> Catalog:
    """A catalog of so many examples of each class, in so many groups that every class has."""
    found = [
        Example(f"{name}/{i:05d}", {}, (label,), f"g{i % groups}" if groups else "")
        for label, (name, count) in enumerate(counts.items())
        for i in range(count)
    ]
    return Catalog("", (), (), tuple(counts), {"train": Examples(found)}, group_by="who" if groups else None)


def test_hold_out_is_disjoint_and_of_every_class_that_has_two() -> None:
    held = made_up({"a": 2000, "b": 40, "c": 2, "one": 1}).hold_out(0.1)
    assert 160 <= held.counts("val")["a"] <= 240
    assert 0 < held.counts("val")["b"] < 20
    assert held.counts("val")["c"] == held.counts("train")["c"] == 1
    assert held.counts("train")["one"] == 1
    ids = shares(held)
    assert not ids["train"] & ids["val"]
    assert len(ids["train"] | ids["val"]) == 2043
    assert held.hold_out(0.5) is held


def test_adding_files_never_moves_old_ones() -> None:
    before = shares(made_up({"a": 300, "b": 100}).hold_out(0.1))
    after = shares(made_up({"a": 3000, "b": 101, "new": 50}).hold_out(0.1))
    assert before["train"] < after["train"]
    assert before["val"] < after["val"]


@pytest.mark.parametrize("groups", [2, 3, 40])
def test_no_group_is_in_two_splits(groups: int) -> None:
    held = made_up({"a": 200, "b": 80, "c": 80}, groups).hold_out(0.2)
    of = {split: {example.group for example in examples} for split, examples in held.splits.items()}
    assert of["train"]
    assert of["val"]
    assert not of["train"] & of["val"]
    held.check_groups()


def test_groups_by_folder_and_by_column(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "in" / name, {f"s{i}": 3 for i in range(8)})
    files = sorted((tmp_path / "in").rglob("*.png"))
    rows = "".join(f"in/{p.relative_to(tmp_path / 'in')},{p.parts[-3]},{p.parent.name}\n" for p in files)
    (tmp_path / "m.csv").write_text("path,label,speaker\n" + rows)
    by_folder = scan(tmp_path / "in", options=DataConfig(group_by="parent")).hold_out(0.3)
    by_column = scan(tmp_path / "m.csv", options=DataConfig(group_by="speaker")).hold_out(0.3)
    assert [{f"in/{name}" for name in names} for names in shares(by_folder).values()] == [*shares(by_column).values()]
    assert 0 < len({e.group for e in by_folder.splits["val"]}) < 8
    with pytest.raises(DataError, match="'speaker'; expected 'speakr' for --group-by; perhaps --group-by 'speaker'"):
        scan(tmp_path / "m.csv", options=DataConfig(group_by="speakr"))
    with pytest.raises(DataError, match="no column 'speaker': classes are folders; group by parent") as folder:
        scan(tmp_path / "in", options=DataConfig(group_by="speaker"))
    how = f"a manifest with columns path, label and 'speaker'; to begin one: perceiver lint {tmp_path}/in -o files.csv"
    assert str(folder.value).endswith(how)
    write_images(tmp_path / "flat", {"a": 3, "b": 3})
    with pytest.raises(DataError, match="no class has two groups by 'parent', so none is held out"):
        scan(tmp_path / "flat", options=DataConfig(group_by="parent")).hold_out(0.3)
    (tmp_path / "n.csv").write_text("path,label,speaker,split\nin/a/s0/000.png,a,x,train\nin/b/s0/000.png,b,x,test\n")
    with pytest.raises(DataError, match="1 group by 'speaker' in both test and train, such as 'x'"):
        scan(tmp_path / "n.csv", options=DataConfig(group_by="speaker")).check_groups()


def test_a_saved_split_outlives_new_files(tmp_path: Path) -> None:
    old = made_up({"a": 30, "b": 30}).hold_out(0.2)
    save_split(tmp_path / "split.jsonl", old)
    saved = read_split(tmp_path / "split.jsonl")
    assert saved.classes == ("a", "b")
    again = saved.apply(made_up({"a": 40, "b": 30}))
    assert again is not None
    assert shares(again) == shares(old)
    assert again.fingerprint == old.fingerprint
    assert again.notes[-1].endswith("split.jsonl'; left out 10 examples that it does not name")
    fewer = saved.apply(made_up({"a": 20, "b": 30}))
    assert fewer is not None
    assert fewer.notes[-1].endswith("; 10 examples that it names are missing")
    assert saved.apply(made_up({"a": 9, "b": 9})) is None
    assert saved.apply(made_up({})) is None


def test_a_saved_split_keeps_an_example_that_is_in_both(tmp_path: Path) -> None:
    (one, two, three) = (Example(f"{i}.png", {}, (i % 2,)) for i in range(3))
    both = Catalog("", (), (), ("a", "b"), {"train": Examples([one, one, two]), "val": Examples([two, three])})
    save_split(tmp_path / "split.jsonl", both)
    again = read_split(tmp_path / "split.jsonl").apply(both)
    assert again is not None
    assert again.splits == both.splits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 3, "classes": []}\n', "split of format 3, expected 2"),
        (
            '{"format": 2, "classes": []}\n',
            "a damaged one: its sha256 does not match its lines",
        ),
        ('{"format": 2, "classes": []}\n5', "its sha256 does not match its lines"),
        ('{"format": 1, "classes": ["a"]}\n{"path": 5, "split": "val"}\n', "split val of 5"),
        ('{"format": 1, "classes": ["a"]}\n{"path": "\\ud800", "split": "val"}\n', "surrogates not allowed"),
        ('{"format": 1, "classes": ["a"]}\n', "a split without examples"),
        ('{"format": 1, "classes": ["a"]}\n{"path": "x", "split": "tes', "not the split of a run"),
        ('{"format": 1, "classes": ["a"]}\n{"path": "x", "split": "test"}\n', "a damaged one: split test of x"),
        ("[1]\n", "not the split of a run"),
        ("", "not the split of a run"),
    ],
)
def test_damaged_splits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split.jsonl").write_text(text)
    with pytest.raises(IntegrityError) as caught:
        read_split(tmp_path / "split.jsonl")
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="cannot read the split: No such file"):
        read_split(tmp_path / "none")


def test_a_damaged_line_of_a_split_is_found(tmp_path: Path) -> None:
    path = tmp_path / "split.jsonl"
    save_split(path, made_up({"a": 9, "b": 9}).hold_out(0.3))
    lines = path.read_bytes()
    for place in range(0, len(lines), 7):
        path.write_bytes(lines[:place] + bytes([lines[place] ^ 1]) + lines[place + 1 :])
        with pytest.raises(IntegrityError, match=r"split\.jsonl"):
            read_split(path)
    for cut in (lines[:-1].rfind(b"\n") + 1, len(lines) // 2):
        path.write_bytes(lines[:cut])
        with pytest.raises(IntegrityError, match="damaged"):
            read_split(path)


def test_hostile_ids_survive_a_saved_split(tmp_path: Path) -> None:
    names = ["\udcff.png", "a\nb.png", "\x1b[31m.png", "\u202e.png", '".png']
    catalog = Catalog("", (), (), ("a",), {"train": Examples(Example(name, {}, (0,)) for name in sorted(names))})
    save_split(tmp_path / "split.jsonl", catalog)
    lines = (tmp_path / "split.jsonl").read_bytes().splitlines()[1:-1]
    assert {os.fsencode(json.loads(line)["path"]) for line in lines} == {os.fsencode(name) for name in names}
    again = read_split(tmp_path / "split.jsonl").apply(catalog)
    assert again is not None
    assert again.splits == catalog.splits


# ---------------------------------------------------------------- order


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5), st.integers(0, 40))
def test_every_example_once_an_epoch_whatever_the_batch(count: int, batch: int, seed: int, start: int) -> None:
    data = examples(count)
    batches = -(-3 * count // batch)
    tasks = list(training_tasks(data, batch, seed, 0, batches))
    assert all(len(task.examples) == batch for task in tasks)
    stream = [e.id for task in tasks for e in task.examples]
    for epoch in range(3):
        assert Counter(stream[epoch * count : (epoch + 1) * count]) == Counter(e.id for e in data)
    start = min(start, batches)
    assert list(training_tasks(data, batch, seed, start, batches)) == tasks[start:]  # resuming is slicing


def test_order_depends_on_seed_and_epoch() -> None:
    data = examples(30)
    (first, second), (other, _) = (list(training_tasks(data, 30, seed, 0, 2)) for seed in (0, 1))
    assert len({tuple(e.id for e in task.examples) for task in (first, second, other)}) == 3


def test_evaluation_keeps_the_order() -> None:
    tasks = list(ordered_tasks(examples(10), 4))
    assert [len(task.examples) for task in tasks] == [4, 4, 2]
    assert [e.id for task in tasks for e in task.examples] == [e.id for e in examples(10)]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_or_memory(bars: Path, workers: int) -> None:
    data = scan(bars).splits["train"]
    plain, cached = Reader({"image": SPEC}, Limits()), Reader({"image": SPEC}, Limits())
    assert list(cached.preload(data, 1 << 30, workers))[-1] == len(data)
    expected = list(plain.batches(training_tasks(data, 16, 0, 0, 9)))
    found = list(cached.batches(training_tasks(data, 16, 0, 0, 9), workers))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.segments["image"].values, b.segments["image"].values)
        assert torch.equal(a.labels, b.labels)
    # Augmentation differs between visits of one example.
    assert not torch.equal(expected[0].segments["image"].values, expected[-1].segments["image"].values)


def test_a_bad_file_is_left_out_and_reported(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 4})
    (tmp_path / "a" / "001.png").write_bytes((tmp_path / "a" / "000.png").read_bytes()[:60])
    data = [Example(str(p), {"image": Source(str(p))}, (0,)) for p in sorted((tmp_path / "a").iterdir())]
    reader = Reader({"image": SPEC}, Limits())
    (batch,) = reader.batches(ordered_tasks(data, 8))
    assert [e.id for e in batch.examples] == [data[i].id for i in (0, 2, 3)]
    ((position, example, error),) = batch.bad
    assert (position, example.id) == (1, data[1].id)
    assert "001.png" in error
    assert len(batch.segments["image"].values) == 3


def test_another_modality_names_both(tmp_path: Path) -> None:
    (tmp_path / "cube.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    example = Example("cube.off", {"image": Source(str(tmp_path / "cube.off"))})
    with pytest.raises(DataError, match="points by its content, expected image"):
        Reader({"image": SPEC}, Limits()).decode(example)


def test_preload_stops_at_its_budget(bars: Path) -> None:
    data = scan(bars).splits["train"]
    reader = Reader({"image": SPEC}, Limits())
    assert list(reader.preload(data, 10 * 144, 0))[-1] == 10


def test_resolve_settles_size_and_color(bars: Path) -> None:
    specs = resolve_specs({"image": ImageSpec(size="auto", color="auto")}, scan(bars), Limits())
    assert (vars(specs["image"])["size"], vars(specs["image"])["color"]) == ((12, 12), "grey")


# ---------------------------------------------------------------- several modalities

SOUND = AudioSpec(features="raw", rate_hz=RATE_HZ, clip_s=0.25, patch=(50,))
PICTURES = VideoSpec(
    num_frames=4, frame_rate_hz=8.0, size=(16, 16), patch=(2, 4, 4), crop_area=(1, 1), crop_aspect=(1, 1)
)


def test_what_is_missing_is_zero_and_masked(pairs: Path) -> None:
    folder = pairs / "test" / "top-low"
    both = {"image": Source(str(folder / "000.png")), "audio": Source(str(folder / "000.wav"))}
    data = [Example(name, {k: both[k] for k in keys}) for name, keys in
            (("a", ["image", "audio"]), ("b", ["image"]), ("c", ["audio"]))]  # fmt: skip
    reader = Reader({"image": SPEC, "audio": SOUND}, Limits())
    (batch,) = reader.batches(ordered_tasks(data, 3))
    assert batch.used == (("audio", "image"), ("image",), ("audio",))
    image, audio = batch.segments["image"], batch.segments["audio"]
    assert image.mask is not None
    assert image.mask.tolist() == [[True], [True], [False]]
    assert audio.mask is not None
    assert audio.mask.tolist() == [[True], [False], [True]]
    assert torch.equal(image.values[0], image.values[1])
    assert not image.values[2].any()
    assert torch.equal(audio.values[0], audio.values[2])
    assert not audio.values[1].any()
    (batch,) = reader.batches(ordered_tasks(data[1:2], 3))
    assert set(batch.segments) == {"image"}  # of all of them missing: left out
    assert batch.segments["image"].mask is None
    (batch,) = reader.batches(ordered_tasks([Example("d", {})], 3))
    assert [error for _, _, error in batch.bad] == ["'d': no audio or image"]


@given(st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.0, 0.3, 1.0]), min_size=1), st.integers(0, 1 << 40))
def test_withholding_leaves_at_least_one_and_depends_on_nothing_else(dropout: dict[str, float], seed: int) -> None:
    left = kept(dropout, np.random.default_rng(seed))
    assert left
    assert left == kept(dict(reversed(dropout.items())), np.random.default_rng(seed))
    assert set(left) >= {name for name, share in dropout.items() if share == 0}
    if len(left) > 1:
        assert not any(dropout[name] == 1 for name in left)


def test_withholding_has_the_shares_asked_for(pairs: Path) -> None:
    specs = {"image": SPEC.model_copy(update={"dropout": 0.5}), "audio": SOUND.model_copy(update={"dropout": 0.25})}
    data = scan(pairs).splits["train"]
    found = Counter(
        used for batch in Reader(specs, Limits()).batches(training_tasks(data, 96, 0, 0, 30)) for used in batch.used
    )
    shares = {used: count / found.total() for used, count in found.items()}
    assert shares[("audio", "image")] == pytest.approx(0.375, abs=0.03)
    assert shares[("audio",)] == pytest.approx(0.375 + 0.0625, abs=0.03)  # of both, the higher draw stays
    assert sum(shares.values()) == 1
    plain = Reader({"image": SPEC, "audio": SOUND}, Limits())
    (with_dropout,), (without,) = (
        list(reader.batches(training_tasks(data, 96, 0, 0, 1))) for reader in (Reader(specs, Limits()), plain)
    )
    there = [i for i, used in enumerate(with_dropout.used) if used == ("audio", "image")]
    for name in ("image", "audio"):  # what is left is augmented as ever
        assert torch.equal(with_dropout.segments[name].values[there], without.segments[name].values[there])


def test_sound_and_picture_share_one_window(tmp_path: Path) -> None:
    """Brightness and loudness rise together in the file, so they do in every clip of it."""
    path = tmp_path / "ramp.mkv"
    with av.open(str(path), "w") as file:
        picture, sound = file.add_stream("ffv1", rate=8), file.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono")
        picture.width = picture.height = 16
        picture.pix_fmt = "bgr0"
        for i in range(24):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 10 * i, np.uint8), format="rgb24")
            frame.pts = i
            file.mux(picture.encode(frame))
        file.mux(picture.encode())
        ramp = (np.arange(3 * RATE_HZ) * 10 // (RATE_HZ // 8) // 10 * 1000).astype(
            np.int16
        )  # 1000 x the frame's number
        block = av.AudioFrame.from_ndarray(ramp[None], format="s16", layout="mono")
        block.sample_rate = RATE_HZ
        file.mux(sound.encode(block))
        file.mux(sound.encode())
    example = Example("ramp", {"audio": Source(str(path)), "video": Source(str(path))})
    clip = {"audio": SOUND.model_copy(update={"clip_s": 0.5}), "video": PICTURES}
    for cut in (clip, {**clip, "audio": SOUND.model_copy(update={"clip_s": 0.25})}):  # kept whole; read in spans
        reader = Reader(cut, Limits())
        assert bool(reader.decode(example).long) == (cut is not clip)
        starts = set()
        for epoch in range(20):
            (row,) = reader.views(reader.decode(example), (0, epoch, example.key))
            frame, level = row["video"].values.ravel()[0] / 10, row["audio"].values.ravel()[0] * 32768 / 1000
            assert abs(frame - level) <= 1.01
            starts.add(round(float(level)))
        assert len(starts) > 5
        (row,) = reader.views(reader.decode(example))
        assert row["video"].values.ravel()[0] == pytest.approx(100, abs=11)  # the middle of 24 frames


@pytest.mark.parametrize("seconds", [0.6, 4.0])
def test_long_files_are_read_in_spans_to_the_same_bits(tmp_path: Path, seconds: float) -> None:
    """Whatever is kept in memory, and however many workers read."""
    for i in range(6):
        write_clip(tmp_path / "a" / f"{i}.mp4", i % 4, 300, seconds, seed=i)
    data = scan(tmp_path).splits["train"]
    specs = {"audio": SOUND, "video": PICTURES}
    readers = [Reader(specs, Limits()) for _ in range(3)]
    assert list(readers[1].preload(data, 1 << 30, 0))[-1] == 6
    decoded = readers[1].decode(data[0])
    assert (decoded.nbytes == 0) == (seconds > 8 * 0.5)
    found = [list(reader.batches(training_tasks(data, 4, 0, 0, 6), workers)) for reader, workers in
             zip(readers, (0, 0, 2), strict=True)]  # fmt: skip
    for batches in found[1:]:
        for one, other in zip(found[0], batches, strict=True):
            for name in specs:
                assert torch.equal(one.segments[name].values, other.segments[name].values)
    assert not torch.equal(found[0][0].segments["audio"].values, found[0][3].segments["audio"].values)


def test_a_file_that_is_replaced_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "again.wav"
    example = Example("again", {"audio": Source(str(path))})
    reader = Reader({"audio": SOUND}, Limits())
    for seconds in (1, 2):
        soundfile.write(path, np.zeros(seconds * RATE_HZ, dtype=np.float32), RATE_HZ)
        assert reader.decode(example).seconds == reader.decode(example).seconds == {"audio": seconds}


def test_views_of_evaluation_are_spread_over_the_file(tmp_path: Path) -> None:
    ramp = np.linspace(0, 0.9, RATE_HZ, dtype=np.float32)
    soundfile.write(tmp_path / "ramp.wav", ramp, RATE_HZ, subtype="FLOAT")
    reader = Reader({"audio": SOUND.model_copy(update={"eval_windows": 4})}, Limits())
    decoded = reader.decode(Example("ramp", {"audio": Source(str(tmp_path / "ramp.wav"))}))
    starts = [row["audio"].values.ravel()[0] for row in reader.views(decoded)]
    np.testing.assert_allclose(starts, [0, 0.225, 0.45, 0.675], atol=1e-3)
    (row,) = reader.views(decoded, (0, 0, 1))  # training sees one
    assert row["audio"].values.shape == (40, 50)


def test_sound_that_begins_with_its_onset_has_one_view(tmp_path: Path) -> None:
    spec = SOUND.model_copy(update={"eval_windows": 3, "start": "onset"})
    reader = Reader({"audio": spec}, Limits())
    examples = []
    for seconds in (1, 3):  # decoded whole, and too long for that
        path = tmp_path / f"{seconds}.wav"
        soundfile.write(path, np.linspace(0.1, 0.9, seconds * RATE_HZ, dtype=np.float32), RATE_HZ, subtype="FLOAT")
        examples.append(Example(str(seconds), {"audio": Source(str(path))}))
    assert len(reader.views(reader.decode(examples[0]))) == 3
    batches = [*reader.batches(ordered_tasks(examples, 1)), *reader.batches(ordered_tasks(examples, 2))]
    assert [batch.num_views for batch in batches] == [1, 3, 3]
    assert [len(batch.segments["audio"].values) for batch in batches] == [1, 3, 6]
    assert torch.equal(batches[2].segments["audio"].values[2], batches[0].segments["audio"].values[0])
    assert batches[2].used == (("audio",), ("audio",))


def test_a_fast_clip_of_a_long_sound_is_not_filled_up(tmp_path: Path) -> None:
    """Only the clip itself was decoded: played faster, it ended early, and its beginning was heard again."""
    soundfile.write(tmp_path / "a.wav", np.linspace(0, 0.9, 4 * RATE_HZ, dtype=np.float32), RATE_HZ, subtype="FLOAT")
    reader = Reader({"audio": SOUND.model_copy(update={"speed": 0.5})}, Limits())
    decoded = reader.decode(Example("a", {"audio": Source(str(tmp_path / "a.wav"))}))
    assert decoded.long
    for seed in range(8):
        (view,) = reader.views(decoded, (0, seed))
        assert (np.diff(view["audio"].values.reshape(-1)) >= 0).all()


def test_a_film_without_sound_has_windows_spread_over_it(tmp_path: Path) -> None:
    """A spec of sound that finds its own start decided for the film too: all windows were the middle one."""
    film = Example("film", {"video": Source(str(write_clip(tmp_path / "c.mp4", 1, None, 3.0)))})
    sound = SOUND.model_copy(update={"start": "onset"})
    reader = Reader({"audio": sound, "video": PICTURES.model_copy(update={"eval_windows": 3})}, Limits())
    assert reader.starts(reader.decode(film)) == [0.0, 1.25, 2.5]


def test_windows_of_a_file_are_as_files_of_their_own(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "c.mp4", 1, 300, 3.0)
    example = Example("c", {"audio": Source(str(path)), "video": Source(str(path))})
    reader = Reader({"audio": SOUND, "video": PICTURES, "image": SPEC}, Limits())
    found = list(reader.windows(example, 1.0, 0.5))
    spans = [span for span, _ in found]
    assert spans[:4] == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0), (1.5, 2.5)]
    assert all(decoded.names == ("audio", "video") for _, decoded in found[:4])
    assert [len(decoded.arrays["video"]) for _, decoded in found[:4]] == [8] * 4
    picture = write_images(tmp_path, {"x": 1}) / "x" / "000.png"
    ((span, decoded),) = reader.windows(Example("p", {"image": Source(str(picture))}), 1.0, 0.5)
    assert (span, decoded.names) == (None, ("image",))
    still = Example("both", {"image": Source(str(picture)), "audio": Source(str(path))})
    assert [decoded.names for _, decoded in reader.windows(still, 1.0, 1.0)][:3] == [("audio", "image")] * 3


def test_a_video_without_what_is_read_is_bad(tmp_path: Path) -> None:
    silent = Example("s", {"audio": Source(str(write_clip(tmp_path / "s.mp4", 1, None)))})
    (batch,) = Reader({"audio": SOUND}, Limits()).batches(ordered_tasks([silent], 1))
    assert "s.mp4': no sound in it" in batch.bad[0][2]


# ---------------------------------------------------------------- weights


def test_class_weights() -> None:
    assert torch.equal(class_weights([5, 10], 0.0), torch.ones(2))
    counts = np.array([10, 90])
    weights = class_weights(counts.tolist(), 1.0).numpy()
    assert weights[0] / weights[1] == pytest.approx(9)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1)


# ---------------------------------------------------------------- mixing


def image_batch(count: int = 4) -> Batch:
    values = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 10, 8, 3) * 10
    return Batch({"image": Segment(values)}, torch.arange(count), tuple(examples(count)))


def test_mixup_is_the_weighted_mean_of_both() -> None:
    mixed = mix(image_batch(), 1.0, 0.0, np.random.default_rng(0))
    values = mixed.segments["image"].values
    assert 0 < mixed.share < 1
    assert mixed.other_labels.tolist() == [3, 2, 1, 0]
    expected = torch.tensor([mixed.share * 10 * i + (1 - mixed.share) * 10 * (3 - i) for i in range(4)])
    torch.testing.assert_close(values[:, 0, 0, 0], expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_cutmix_share_is_what_was_not_pasted(seed: int) -> None:
    batch = image_batch()
    mixed = mix(batch, 0.0, 1.0, np.random.default_rng(seed))
    values = mixed.segments["image"].values
    assert values.dtype == torch.uint8
    kept = (values[0] == batch.segments["image"].values[0]).float().mean()
    assert mixed.share == pytest.approx(float(kept), abs=1e-6)
    assert set(values[0].unique().tolist()) <= {0, 30}
    assert batch.segments["image"].values[0].max() == 0  # the batch itself is left alone


def test_too_few_files_for_workers_are_told_before_they_start() -> None:
    """With 14 to 20 descriptors torch hung, half begun, or ended in tracebacks."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, old[1]))
    try:
        for begin in (lambda: Reader({}, Limits()).batches([], 2), lambda: in_order(str, [1], 2)):
            with pytest.raises(ResourceError, match=r"2 data workers cannot start: Too many open files.*ulimit -n"):
                next(begin())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


def test_weights_of_several_labels_are_those_of_the_present_ones() -> None:
    weights = class_weights([10, 50, 1, 0], 1.0, 100)
    assert weights.tolist() == pytest.approx([9, 1, 99, 99])
    assert class_weights([1], 1.0, 1000).tolist() == [100]
