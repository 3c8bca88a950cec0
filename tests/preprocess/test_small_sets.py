"""Inputs seen whole, and variations by the number of training files and the names of classes."""

from __future__ import annotations

import numpy as np
import pytest

from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.audio import AudioSpec, audible_samples, is_one_shot
from perceiver_cli.preprocess.base import TrainingSet
from perceiver_cli.preprocess.image import ImageSpec, may_mirror
from perceiver_cli.preprocess.pixels import padded
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.preprocess.test_audio import RATE, encoded


def test_a_picture_of_another_shape_is_padded_with_the_colour_of_its_edge() -> None:
    raw = np.full((10, 30, 3), 7, np.uint8)
    raw[0], raw[-1] = 200, 90
    whole = padded(raw, (20, 20))
    assert whole.shape == (30, 30, 3)
    assert (whole[:10] == 200).all()
    assert (whole[-10:] == 90).all()
    assert np.array_equal(whole[10:20], raw)
    assert padded(raw.swapaxes(0, 1), (20, 20)).shape == (30, 30, 3)
    assert padded(raw, (10, 30)) is raw
    assert padded(raw[:, :, :1], (200, 601)).shape[:2] == (10, 30)


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_the_whole_picture_is_an_input(rng: np.random.Generator | None) -> None:
    spec = ImageSpec(size=(8, 8), fit="pad", stem="conv", patch=(2, 2), eval_crop=1.0, crop_area=(1.0, 1.0), flip=0.0)
    raw = np.zeros((8, 32, 3), np.uint8)
    raw[2:6, :2] = 255  # at the far left: a cut from the centre loses it
    prepared = modality("image").prepare(raw, spec, rng)
    assert prepared.values.shape == (8, 8, 3)
    assert prepared.values[:, 0].max() > 60


@pytest.mark.parametrize(
    ("classes", "safe"),
    [
        (("cat", "dog"), True), (("3", "8"), False), (("b", "d"), False), (("turn-left", "turn-right"), False),
        (("zero", "one"), False), (("speed_30", "stop"), False), (("ankle-boot", "t-shirt-top"), True),
    ],
)  # fmt: skip
def test_pictures_are_mirrored_only_where_no_class_has_a_side_or_is_a_sign(
    classes: tuple[str, ...], safe: bool
) -> None:
    assert may_mirror(classes) == safe


def test_variations_follow_the_number_of_training_files() -> None:
    auto = ImageSpec(crop_area="auto", flip="auto", color_jitter="auto")
    few, many = (modality("image").adapt(auto, TrainingSet(n, ("cat", "dog"))) for n in (200, 5000))
    assert (few.crop_area, few.flip, few.color_jitter) == ((0.35, 1.0), 0.5, 0.4)
    assert (many.crop_area, many.flip, many.color_jitter) == ((0.7, 1.0), 0.5, 0.0)
    mine = ImageSpec(crop_area=(0.9, 1.0), flip="auto")
    assert modality("image").adapt(mine, TrainingSet(200, ("6", "9"))).model_dump() == {
        **mine.model_dump(), "flip": 0.0
    }  # fmt: skip
    sound = AudioSpec(speed="auto", equalizer_db="auto", noise="auto")
    few, notes, many = (
        modality("audio").adapt(sound, TrainingSet(n, classes))
        for n, classes in ((200, ("kick",)), (200, ("C#4",)), (5000, ("kick",)))
    )
    assert (few.speed, notes.speed, many.speed) == (0.2, 0.0, 0.0)
    assert (few.noise, few.equalizer_db, many.noise) == (0.02, 6.0, 0.0)


def hit(at: int, length: int = 2000) -> np.ndarray:
    sound = np.zeros(length, np.float32)
    fall = np.exp(-np.arange(length - at) / 150)
    sound[at:] = fall * np.sin(np.arange(length - at))
    return sound


def test_a_sound_that_dies_away_is_a_one_shot() -> None:
    assert is_one_shot(hit(300))
    assert not is_one_shot(np.sin(np.arange(2000)).astype(np.float32))
    assert not is_one_shot(np.zeros(10, np.float32))
    assert audible_samples(np.r_[np.zeros(50), np.ones(10), np.zeros(9)].astype(np.float32)) == 10


def test_length_and_beginning_of_a_clip_are_those_of_the_files() -> None:
    auto = AudioSpec(features="mel", patch=(2, 16), rate_hz=RATE, clip_s="auto", start="auto", max_auto_clip_s=1.0)
    hits = [Source("x.wav", encoded(hit(at, 6000))) for at in (0, 100, 200)]
    tones = [Source("x.wav", encoded(np.sin(np.arange(3 * RATE) / 3).astype(np.float32)))] * 2
    settled = modality("audio").resolve(auto, hits, Limits())
    assert (settled.start, settled.clip_s) == ("onset", 0.4)
    settled = modality("audio").resolve(auto, tones, Limits())
    assert (settled.start, settled.clip_s) == ("random", 1.0)


def test_the_attack_is_kept_and_silence_follows() -> None:
    spec = AudioSpec(rate_hz=RATE, clip_s=0.4, patch=(1,), start="onset", short="pad")
    sound = hit(1500, 2500)
    for rng in (None, np.random.default_rng(0)):
        clip = modality("audio").prepare(sound, spec, rng).values[:, 0]
        assert np.abs(clip[:800]).max() > 0.9
        assert not clip[1700:].any()
    assert modality("audio").first_s(sound, spec) == pytest.approx(1500 / RATE - 0.01, abs=1e-3)


def test_a_floor_hides_what_is_far_below_the_loudest() -> None:
    spec = AudioSpec(features="mel", rate_hz=RATE, clip_s=0.25, patch=(1, 1), num_mels=16)
    loud = np.zeros(RATE // 4, np.float32)
    loud[:1000] = np.sin(np.arange(1000))
    faint = loud + np.random.default_rng(0).normal(0, 1e-3, loud.size).astype(np.float32)
    differences = []
    for floor in (None, 40.0):
        one, other = (
            modality("audio").prepare(x, spec.model_copy(update={"floor_db": floor}), None).values
            for x in (loud, faint)
        )
        differences.append(float(np.abs(one - other).max()))
    assert differences[1] < differences[0] / 10


def test_sound_is_varied_by_its_seed_alone() -> None:
    spec = AudioSpec(
        features="mel", rate_hz=RATE, clip_s=0.25, patch=(1, 1), num_mels=16, speed=0.2, equalizer_db=6, noise=0.1
    )
    sound = hit(0, RATE)
    one, same, other = (
        modality("audio").prepare(sound, spec, np.random.default_rng(seed)).values for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("seed", range(4))
def test_speed_keeps_the_moment_that_a_picture_shares(seed: int) -> None:
    """The sound was played faster before it was cut: at 30 s of a film it was up to 6 s away from the picture."""
    spec = AudioSpec(features="raw", rate_hz=1000, clip_s=1.0, patch=(1,), speed=0.2)
    seconds = np.arange(40_000, dtype=np.float32) / 1000
    clip = modality("audio").prepare(seconds, spec, np.random.default_rng(seed), 30.0).values[:, 0]
    assert clip.shape == (1000,)
    assert clip[0] == pytest.approx(30.0)
    factor = np.random.default_rng(seed).uniform(0.8, 1.2)
    assert clip[-1] == pytest.approx(30.0 + factor, abs=0.01)
    # What fills a short sound up is played as fast as the sound.
    filled = spec.model_copy(update={"short": "pad"})
    clip = modality("audio").prepare(1 + seconds[:500], filled, np.random.default_rng(seed), 0.0).values[:, 0]
    assert np.count_nonzero(clip) == pytest.approx(500 / factor, abs=2)


def test_the_first_points_of_a_cloud_stored_line_by_line_are_a_fair_sample() -> None:
    spec = PointsSpec(num_points=400, stem="neighbours", stem_points=50)
    line = np.stack([np.linspace(0, 1, 400), np.zeros(400), np.zeros(400)], axis=1).astype(np.float32)
    centers = modality("points").prepare(line, spec, None).positions
    assert centers is not None
    assert np.abs(centers[:50, 0].mean()) < 0.3
    assert centers[:50, 0].std() > 0.4
