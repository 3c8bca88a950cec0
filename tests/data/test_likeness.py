"""Near-copies, planted and found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.config import load_preset
from perceiver_cli.data.likeness import leak_note, near_pairs, sketch_of, stacked
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.training.events import Note
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL

RNG = np.random.default_rng(0)
SPECS = {"image": settled(load_preset("tiny-image").inputs["image"])}


def picture() -> np.ndarray:
    """A smooth random picture (40, 40, 3)."""
    coarse = Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((40, 40), Image.Resampling.BICUBIC))


def changed(values: np.ndarray, how: int) -> np.ndarray:
    image = Image.fromarray(values)
    if how == 0:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=60)
        image = Image.open(file)
    return np.asarray([image, image.resize((64, 64)), image.point(lambda v: int(0.8 * v + 20))][how])


def test_planted_near_copies_are_found_and_nothing_else() -> None:
    raw = [picture() for _ in range(60)]
    assert near_pairs(np.stack([sketch_of({"image": x}, SPECS) for x in raw])) == []
    copies = [changed(raw[i], i % 3) for i in range(9)]
    pairs = near_pairs(np.stack([sketch_of({"image": x}, SPECS) for x in raw + copies]))
    assert {(p.first, p.second) for p in pairs} == {(i, 60 + i) for i in range(9)}
    two = near_pairs(*(np.stack([sketch_of({"image": x}, SPECS) for x in each]) for each in (copies, raw)))
    assert {(p.first, p.second) for p in two} >= {(i, i) for i in range(9)}


def test_a_louder_or_shifted_sound_is_a_near_copy() -> None:
    spec = AudioSpec(rate_hz=8000)
    envelopes = [np.interp(np.arange(6000), np.arange(0, 6001, 500), RNG.random(13)) for _ in range(20)]
    raw = [(e * RNG.normal(0, 0.1, 6000)).astype(np.float32) for e in envelopes]
    raw += [raw[0] * 3, np.pad(raw[1], (500, 900))]
    rows = np.stack([sketch_of({"audio": x}, {"audio": spec}) for x in raw])
    assert {(p.first, p.second) for p in near_pairs(rows)} == {(0, 20), (1, 21)}


def test_what_has_no_sketch_is_left_out() -> None:
    points = modality("points")
    assert points.sketch(np.zeros((5, 3), np.float32), settled(load_preset("tiny-points").inputs["points"])) is None
    assert sketch_of({"image": np.full((9, 9, 3), 7, np.uint8)}, SPECS) is None
    assert stacked([None, np.ones(2, np.float32)])[0] == [1]
    assert near_pairs(np.zeros((0, 3), np.float32)) == []


@pytest.mark.parametrize("by_name", [True, False])
def test_training_tells_of_validation_examples_that_it_holds(tmp_path: Path, by_name: bool) -> None:
    for split, count in (("train", 12), ("val", 3)):
        for name in "ab":
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(picture()).save(tmp_path / "d" / split / name / f"{split}{k}.png")
    leaked = tmp_path / "d" / "train" / "a" / "train0.png"
    if by_name:
        Image.fromarray(picture()).save(tmp_path / "d" / "val" / "a" / "train0_rot90.png")
    else:
        Image.fromarray(changed(np.asarray(Image.open(leaked)), 1)).save(tmp_path / "d" / "val" / "a" / "x.png")
    trainer = Trainer(tmp_path / "d", tmp_path / "run", overrides=[*SMALL, "train.steps=1"])
    notes = [event.message for event in trainer.fit() if isinstance(event, Note)]
    (line,) = (note for note in notes if "training nearly holds" in note)
    assert ("train0_rot90.png" in line) == by_name
    assert "train/a/train0.png" in line
    assert "--group-by" in line
    (tmp_path / "d" / "val" / "a" / ("train0_rot90.png" if by_name else "x.png")).unlink()
    clean = Trainer(tmp_path / "d", None, overrides=SMALL)
    assert leak_note(clean.plan.reader, clean.plan.train_examples, clean.plan.val_examples) is None


def test_an_example_that_lacks_a_modality_has_no_sketch() -> None:
    """Its sketch would be shorter than the others': training stopped with an error of NumPy."""
    both = {**SPECS, "audio": AudioSpec(rate_hz=8000)}
    assert sketch_of({"image": np.arange(243, dtype=np.uint8).reshape(9, 9, 3)}, both) is None
