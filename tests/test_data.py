"""Folders, splits, order, bad files."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_cli.catalog import Example, resolve_specs, scan
from perceiver_cli.config import ImageSpec, Limits
from perceiver_cli.data import (
    Batch,
    Reader,
    class_weights,
    mix,
    ordered_tasks,
    training_tasks,
)
from perceiver_cli.encoding import Segment
from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.base import Source
from tests.conftest import write_images

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
    assert (catalog.modality, catalog.classes) == ("image", ("a", "b"))
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
    assert any("1 files that are not image: '.txt' 1" in note for note in catalog.notes)


def test_a_damaged_file_of_the_right_suffix_is_bad_not_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "text.png").write_text("no picture at all\n")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    catalog = scan(tmp_path)
    assert set(catalog.bad) == {"a/empty.png", "a/text.png", "b/pipe.png"}
    assert len(catalog.splits["train"]) == 9


def test_folders_without_data_say_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("hello\n")
    with pytest.raises(
        DataError, match=r"no usable files: found 1 folders and 1 files \('.txt' 1\); expected class/file"
    ):
        scan(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "none")
    with pytest.raises(DataError, match="neither a folder nor a manifest"):
        scan(tmp_path / "a" / "x.txt")


def test_classes_of_a_model_are_matched_by_name(tmp_path: Path) -> None:
    write_images(tmp_path / "test", {"b": 2, "c": 2, "z": 1})
    catalog = scan(tmp_path, ["a", "b", "c"])
    assert [example.labels for example in catalog.splits["test"]] == [(1,), (1,), (2,), (2,), ()]
    assert any("1 files of classes not among the model's classes: 'z' 1" in note for note in catalog.notes)


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


def test_links_are_not_followed_round_in_circles(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(scan(tmp_path).splits["train"]) == 4


# ---------------------------------------------------------------- manifests


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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "file,class\nx.png,a\n", "columns are 'file', 'class'; expected path, label or labels"),
        ("m.csv", "path,label,split\nx.png,a,later\n", "row 1 has split 'later', expected train, val or test"),
        ("m.csv", "path,label\n,a\n", "row 1 has no path or no label"),
        ("m.jsonl", '{"path": "x.png", "label": "a"}\n[1]\n', "a line that is not an object"),
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


# ---------------------------------------------------------------- splits


def test_hold_out_is_stratified_stable_and_disjoint(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 40, "b": 20, "one": 1})
    catalog = scan(tmp_path).hold_out(0.1)
    assert catalog.counts("val") == {"a": 4, "b": 2, "one": 0}
    ids = {split: {e.id for e in catalog.splits[split]} for split in ("train", "val")}
    assert not ids["train"] & ids["val"]
    assert len(ids["train"] | ids["val"]) == 61
    write_images(tmp_path, {"a": 44})  # four more files move at most one of those held out
    after = {e.id for e in scan(tmp_path).hold_out(0.1).splits["val"]}
    assert len(ids["val"] - after) <= 1


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
    specs = resolve_specs({"image": ImageSpec(size="auto", color="auto")}, scan(bars).splits["train"], Limits())
    assert (vars(specs["image"])["size"], vars(specs["image"])["color"]) == ((12, 12), "grey")


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
