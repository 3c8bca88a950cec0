"""Configuration: what it refuses, and that it survives its own files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from perceiver_cli.config import Config, ModelConfig, duration_steps, load_config, load_preset, tiny_config
from perceiver_cli.errors import UsageError
from perceiver_cli.presets import preset_names, preset_text


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_what_they_are_and_replay(name: str) -> None:
    first = preset_text(name).splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20
    config = load_preset(name)
    assert config.name == name
    assert Config.parse(tomllib.loads(config.to_toml())) == config
    assert Config.parse(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.lrr=1", "unknown key train.lrr, did you mean train.lr"),
        ("lr=1", "unknown key lr, did you mean train.lr"),
        ("bands=1", "did you mean inputs.audio.bands or inputs.image.bands or inputs.points.bands"),
        ("inputs.image.sizee=3", "unknown key inputs.image.sizee, did you mean inputs.image.size"),
        ("modle.num_latents=3", "unknown key modle, did you mean model"),
        ("data.limits.zzz=3", "known are file_bytes"),
        ("train.lr=-1", "--set train.lr=-1: Input should be greater than 0, found -1"),
        ("train.lr=nan", "train.lr"),
        ("train.optimizer=lamp", "'adamw' or 'lamb', found 'lamp'"),
        ("train.warmup=soon", "a duration is like"),
        ("model.num_self_heads=7", "latent_channels 128 is not a multiple of num_self_heads 7"),
        ("model.num_latents=1000000000", "model.num_latents"),
        ("inputs.smell.size=3", "unknown modality 'smell', known are"),
        ("inputs.image.modality=[1]", "[inputs.image]: unknown modality [1], known are audio"),
        ("inputs.image=3", "inputs.image=3: Input should be a valid dictionary or instance of ImageSpec, found 3"),
        ("inputs.image.size=[1, -2]", "--set inputs.image.size=[1, -2]: Input should be greater than or equal to 1"),
        ("inputs.image={size = -2}", "--set inputs.image={size = -2}: inputs.image.size: Input should be greater"),
        ("inputs.image.limits.x=1", "unknown key inputs.image.limits, known are modality, bands"),
        ("inputs.left.modality=image", "[inputs.left] has modality 'image', expected [inputs.image]"),
        ("train.seed", "expected KEY=VALUE"),
        ("train.lr.x=1", "train.lr.x"),
    ],
)
def test_wrong_options_are_named(change: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("tiny-image").override([change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inputs_come_last_and_keep_their_own_options() -> None:
    """The header of a model file is these tables as JSON: their order is part of its bytes."""
    tables = load_preset("tiny-av").to_dict()
    assert list(tables) == ["name", "multi_label", "num_classes", "model", "data", "train", "inputs"]
    assert list(tables["inputs"]) == ["audio", "video"]
    assert tables["inputs"]["audio"]["num_mels"]
    assert next(iter(tables["inputs"]["video"])) == "modality"


def test_override_takes_toml_values_and_bare_words() -> None:
    config = load_preset("tiny-image").override(
        ["train.steps=7", "train.optimizer=lamb", "inputs.image.size=[8, 9]", "train.clip_norm=none"]
    )
    assert (config.train.steps, config.train.optimizer, config.train.clip_norm) == (7, "lamb", None)
    assert vars(config.inputs["image"])["size"] == (8, 9)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("c0 t0", "c0 t0"),
        ("c0 t0 (c1 t0)x3", "c0 t0 c1 t0 c1 t0 c1 t0"),
        ("c0 ((t0)x2 c1)x2", "c0 t0 t0 c1 t0 t0 c1"),
        ("(c0 t0)x0 c0", "c0"),
    ],
)
def test_schedule(schedule: str, steps: str) -> None:
    assert " ".join(f"{kind}{index}" for kind, index in ModelConfig(schedule=schedule).steps) == steps


def test_what_there_is_settles_the_tiny_recipe() -> None:
    for names, recipe in ((["points"], "tiny-points"), (["video"], "tiny-video"), (["video", "audio"], "tiny-av")):
        assert tiny_config(names) == load_preset(recipe)
    config = tiny_config(["points", "image"])
    assert (config.name, list(config.inputs)) == ("tiny-image-points", ["image", "points"])
    assert {spec.dropout for spec in config.inputs.values()} == {0.2}
    assert (config.train.epochs, config.train.batch_size) == (150, 32)
    assert Config.parse(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("schedule", ["", "t0 c0", "c1", "c0 t1", "c0 x0", "(c0 t0", "((c0)x9999)x9999", "c0 t0)x2"])
def test_impossible_schedules(schedule: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        ModelConfig(schedule=schedule)


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.integers(1, 500))
def test_durations(amount: int, total: int, per_epoch: int) -> None:
    assert duration_steps(f"{amount} steps", total, per_epoch) == amount
    assert duration_steps(f"{amount} epochs", total, per_epoch) == amount * per_epoch
    assert duration_steps("50%", total, per_epoch) == round(total / 2)


def test_unreadable_configurations_are_one_line(tmp_path: Path) -> None:
    cases = {"a.toml": b"x = [", "b.toml": b"\xff\xfe", "c.toml": b"[inputs]\n", "d.toml": b"#" * (1 << 21)}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError) as caught:
            load_config(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        load_config(tmp_path / "none.toml")


def test_nearest_preset_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean imagenet"):
        load_preset("imagnet")
