"""What is settled before the first step, and what is refused there."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from perceiver_cli.config import load_preset, tiny_config
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.hardware import Place
from perceiver_cli.model.ranks import Ranks
from perceiver_cli.training.events import Started
from perceiver_cli.training.plan import settled_training
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, write_images


def test_one_class_is_refused_with_the_counts(tmp_path: Path) -> None:
    write_images(tmp_path, {"only": 7})
    with pytest.raises(DataError, match=r"one class to learn: 'only' with 7 files; expected two or more"):
        Trainer(tmp_path, tmp_path / "run")


def test_resume_refuses_other_data_and_another_model(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"a": 20, "b": 20})
    run = tmp_path / "run"
    list(Trainer(tmp_path / "data", run, overrides=[*SMALL, "train.steps=2"]).fit())
    with pytest.raises(UsageError, match=r"--resume cannot change model\.num_latents"):
        Trainer(None, run, overrides=["model.num_latents=4"], resume=True)
    with pytest.raises(UsageError, match=r"--resume cannot change inputs\.image"):
        Trainer(None, run, overrides=["inputs.image.bands=3"], resume=True)
    with pytest.raises(UsageError, match=r"--resume cannot change train\.optimizer"):
        Trainer(None, run, overrides=["train.optimizer=lamb"], resume=True)
    (tmp_path / "data" / "a" / "000.png").unlink()
    with pytest.raises(UsageError, match="the data changed"):
        Trainer(None, run, resume=True)


def test_a_step_that_cannot_fit_in_memory_is_refused(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a step needs about \d+ GiB, this machine has"):
        Trainer(bars, tmp_path / "run", overrides=["train.batch_size=1000000", "model.num_latents=4096"])


def test_groups_stay_together_in_a_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "data" / name, {f"s{i}": 3 for i in range(8)})
    trainer = Trainer(tmp_path / "data", tmp_path / "run", overrides=[*SMALL, "data.group_by=parent"])
    groups = {split: {example.group for example in examples} for split, examples in trainer.plan.catalog.splits.items()}
    assert groups["val"]
    assert not groups["train"] & groups["val"]
    os.rename(tmp_path / "data", tmp_path / "train")
    write_images(tmp_path / "test" / "a", {"s0": 3})
    with pytest.raises(DataError, match="1 group by 'parent' in both test and "):
        Trainer(tmp_path, tmp_path / "run", overrides=[*SMALL, "data.group_by=parent"])


def test_a_recipe_takes_its_part_of_what_there_is(clips: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = Trainer(clips, tmp_path / "run", load_preset("tiny-video"), overrides=SMALL)
    assert trainer.plan.catalog.modalities == ("video",)
    assert "100% of the videos have sound, which is not read" in trainer.plan.notes
    trainer = Trainer(clips, tmp_path / "run", load_preset("tiny-audio"), overrides=SMALL)
    assert trainer.plan.catalog.modalities == ("audio",)
    trainer = Trainer(pairs, tmp_path / "run", load_preset("tiny-image"), overrides=SMALL)
    assert len(trainer.plan.train_examples) + len(trainer.plan.val_examples) == 96
    with pytest.raises(DataError, match=r"holds audio\+image, but tiny-av reads audio\+video"):
        Trainer(pairs, tmp_path / "run", load_preset("tiny-av"), overrides=SMALL)
    with pytest.raises(
        UsageError, match=r"mixup and train\.cutmix need pictures or sound alone; this run reads audio\+image"
    ):
        Trainer(pairs, tmp_path / "run", overrides=["train.mixup=0.2"])


def test_dry_run_writes_nothing(bars: Path, tmp_path: Path) -> None:
    plan = Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.epochs=10"]).dry_run()
    assert not (tmp_path / "run").exists()
    assert plan["splits"] == {"test": 30, "train": 105, "val": 15}
    assert plan["steps"] == 66  # 10 x 105 / 16, rounded up
    assert plan["val_from"] == "held out by a hash of each name"
    assert plan["inputs"]["image"]["shape"] == [12, 12]
    assert (
        plan["inputs"]["image"]["words"] == "12 x 12 grey, whole, single pixels, behind a stem of convolutions; "
        "varied in training by colours, crops from 35% on"
    )
    assert plan["eta_s"] == pytest.approx(plan["seconds_per_step"] * 66)
    assert plan["training_bytes"] > plan["parameters"] * 16


def test_a_dry_run_of_several_processes_measures_the_share_of_one(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of six processes computes one of the step's batches; at two, three; none has fewer to measure."""
    trainer = Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.batch_size=2", "train.accumulate=6"])
    seconds = count()
    monkeypatch.setattr("perceiver_cli.training.trainer.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    for place, expected in ((Place(0, 1), 6), (Place(1, 2), 3), (Place(5, 6), 1), (Place(0, 12), 1)):
        request = replace(trainer.plan.request, ranks=Ranks(place))
        trainer.plan = replace(trainer.plan, request=request)
        assert trainer.dry_run()["seconds_per_step"] == expected


def test_a_plan_stays_as_it_was_made(bars: Path, tmp_path: Path) -> None:
    """A run keeps its own state; another trainer's stop, step or look at the data does not reach its plan."""
    trainer = Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.steps=2"])
    before = dict(vars(trainer.plan))
    list(trainer.fit())
    trainer.stop()
    assert {name: vars(trainer.plan)[name] for name in before} == before
    with pytest.raises(AttributeError):
        trainer.plan.output = tmp_path  # type: ignore[misc]


def test_stopped_before_the_first_step_leaves_nothing(bars: Path, tmp_path: Path) -> None:
    trainer = Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.steps=2"])
    trainer.stop()
    events = list(trainer.fit())
    assert isinstance(events[0], Started)
    assert not [event for event in events if hasattr(event, "step")]
    assert not (tmp_path / "run").exists()


def test_length_and_mixing_follow_the_number_of_examples() -> None:
    recipe = load_preset("tiny-image")
    few, many = (settled_training(recipe, count) for count in (200, 60_000))
    assert (few.epochs, few.mixup, few.cutmix) == (640, 0.2, 1.0)  # 2,000 steps of 64
    assert (many.epochs, many.mixup, many.cutmix) == (40, 0, 0)
    with warnings.catch_warnings():  # of pydantic, about an integer where the recipe has a float
        warnings.simplefilter("error")
        assert recipe.model_copy(update={"train": many}).to_dict()["train"]["epochs"] == 40
    sound = settled_training(load_preset("tiny-audio"), 200)
    assert (sound.mixup, sound.cutmix) == (0.2, 0)
    mine = settled_training(recipe.override(["train.epochs=3", "train.mixup=0"]), 200)
    assert (mine.epochs, mine.mixup) == (3, 0)
    pair = tiny_config(["image", "points"])
    assert settled_training(pair, 200).mixup == 0
