"""Estimates of training on machines that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perceiver_cli import Trainer
from perceiver_cli.config import Config, load_preset
from perceiver_cli.errors import UsageError
from perceiver_cli.model.cost import Cost, estimate
from perceiver_cli.model.machines import MACHINES, estimate_lines, training_estimate
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.base import Layout
from tests.conftest import SMALL, Perceive, write_images


def sized(preset: str, *changes: str) -> tuple[Config, Cost, dict[str, Layout]]:
    config = load_preset(preset).override(list(changes))
    layouts = {name: modality(name).layout(settled(spec)) for name, spec in config.inputs.items()}
    return config, estimate(config.model, layouts, config.num_classes or 10), layouts


def test_the_measured_steps_are_met_within_a_factor_of_two() -> None:
    """docs/benchmarks.md: 171 ms for 16 pictures on an H200, of an H100's peak; 4.52 s for one on two cores."""
    measured = training_estimate("h100", *sized("imagenet", "train.batch_size=16", "train.accumulate=1"))
    assert 0.171 / 2 < measured["seconds_per_step"] < 0.171 * 2
    one = training_estimate("cpu", *sized("imagenet", "train.batch_size=1", "train.accumulate=1"))
    cores = int(one["machine"].split()[1])
    assert 4.52 / 2 < one["seconds_per_step"] * cores / 2 < 4.52 * 2


def test_more_of_a_machine_is_faster_and_holds_more() -> None:
    recipe = sized("imagenet")
    found = {name: training_estimate(name, *recipe) for name in (*MACHINES, "cpu")}
    assert found["h100x8"]["hours"] < found["h100"]["hours"] < found["a100"]["hours"] < found["cpu"]["hours"]
    assert found["h100"]["largest_batch"] > found["rtx4090"]["largest_batch"]
    assert "1,281,167 training examples, 1,024 a step" in found["h100"]["assumptions"]
    assert "8 GPUs share each step, as with --devices 8" in found["h100x8"]["assumptions"]
    less = training_estimate("rtx4090", *sized("imagenet", "train.recompute=true"))
    assert less["memory_bytes"] < found["rtx4090"]["memory_bytes"]
    small = training_estimate("rtx4090", *sized("imagenet", "train.batch_size=512"))
    assert not small["fits"]
    assert "too little" in estimate_lines(small)[0]


@pytest.mark.parametrize("preset", ["audioset-av", "modelnet40", "tiny-video", "tiny-points", "tiny-audio"])
def test_every_modality_has_an_estimate(preset: str) -> None:
    facts = training_estimate("a100", *sized(preset))
    assert facts["fits"]
    assert facts["hours"] > 0
    assert facts["disk_bytes"]["records"] > facts["steps"] > 0


def test_a_dry_run_refuses_nothing_for_the_size_of_this_machine(tmp_path: Path) -> None:
    """The cost was the question, and the answer a refusal for too little memory or no GPU."""
    data = write_images(tmp_path / "data", {"a": 4, "b": 4})
    changes = ["train.device=cuda:99", "train.batch_size=100000", "train.accumulate=1", "data.val_fraction=0"]
    config = load_preset("imagenet").override(changes)
    with pytest.raises(UsageError):
        Trainer(data, tmp_path / "run", config)
    trainer = Trainer(data, tmp_path / "run", config, dry_run=True)
    facts = trainer.dry_run()
    assert (facts["estimate"]["fits"], facts["steps"]) == (False, 1)
    assert any("the plan is for the CPU" in note for note in trainer.plan.notes)
    assert any("a step needs about" in note for note in trainer.plan.notes)
    assert "estimate" not in Trainer(data, tmp_path / "run", overrides=list(SMALL), dry_run=True).dry_run()
    elsewhere = Trainer(data, tmp_path / "run", config, dry_run=True)
    assert elsewhere.dry_run("h100x8")["estimate"]["machine"] == "8 x NVIDIA H100 of 80 GB"
    assert not any("a step needs about" in note for note in elsewhere.plan.notes)
    assert not (tmp_path / "run").exists()


def test_info_tells_the_cost(perceive: Perceive) -> None:
    done = perceive("info", "tiny-image", "--on", "a100")
    assert b"on NVIDIA A100 of 80 GB: " in done.stdout
    assert b"\n  assumed: 10,000 training examples, 64 a step\n" in done.stdout
    facts = json.loads(perceive("info", "tiny-image", "--on", "a100", "--json").stdout)
    assert {"memory_bytes", "hours", "disk_bytes", "assumptions"} <= facts["training"].keys()
