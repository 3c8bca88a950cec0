"""Whole runs: events, files, resume to the bit, time limits, divergence."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perceiver_cli.config import load_config
from perceiver_cli.errors import DataError, DivergedError, ResourceError, UsageError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.checkpoint import load_model
from perceiver_cli.run_folder import MODEL_FILE, next_run
from perceiver_cli.training.events import Evaluated, Finished, Note, Saved, Started, StepDone
from perceiver_cli.training.loop import within_one_error
from perceiver_cli.training.state import load_state
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, SMALL_CLIPS, SMALL_PAIRS, write_clip, write_images

FULL = (
    *SMALL,
    "train.accumulate=2",
    "train.ema_decay=0.9",
    "train.optimizer=lamb",
    "train.steps=24",
    "train.eval_every=7 steps",
    "train.save_every=5 steps",
    "train.mixup=0.2",
    "train.cutmix=1.0",
)


def digest(run: Path) -> str:
    """Return a hash of the best model's and the last state's tensors."""
    total = hashlib.sha256()
    for tensors in (load_file(run / MODEL_FILE), load_state(run)[0]):
        for name in sorted(tensors):
            total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def whole(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an uninterrupted run with everything on: accumulation, averaging, augmentation, LAMB."""
    run = tmp_path_factory.mktemp("whole") / "run"
    list(Trainer(bars, run, overrides=FULL).fit())
    return digest(run)


def test_events_and_files_of_a_run(trained: Path, bars: Path) -> None:
    config = load_config(trained / "config.toml")
    assert config.data.path == str(bars)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["val_accuracy"] > 0.9
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert sum(line["best"] for line in lines) >= 1
    assert (trained / "last" / "MANIFEST.json").exists()


def test_the_order_of_events(bars: Path, tmp_path: Path) -> None:
    events = list(
        Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.steps=6", "train.eval_every=3 steps"]).fit()
    )
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [3, 6]
    assert {event.path.name for event in events if isinstance(event, Saved)} >= {
        MODEL_FILE,
        "step-00000006.safetensors",
    }


@pytest.mark.parametrize(("workers", "cut"), [(0, 1), (0, 13), (2, 8), (2, 19)])
def test_resumed_is_uninterrupted_to_the_bit(bars: Path, tmp_path: Path, whole: str, workers: int, cut: int) -> None:
    """Stopped after any step, in mid-epoch, and resumed with any number of workers."""
    run = tmp_path / "run"
    trainer = Trainer(bars, run, overrides=[*FULL, f"data.workers={workers}"])
    for event in trainer.fit():
        if isinstance(event, StepDone) and event.step == cut:
            trainer.stop()
    assert load_state(run)[1]["step"] == cut
    list(Trainer(None, run, overrides=[f"data.workers={2 - workers}"], resume=True).fit())
    assert digest(run) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_and_resumed_is_uninterrupted(bars: Path, tmp_path: Path, whole: str, workers: int) -> None:
    """SIGKILL, twice, wherever it falls: in a step, a save, or before the first."""
    run = tmp_path / "run"
    script = (
        "import sys; from perceiver_cli.training.trainer import Trainer\n"
        "data, run, resume, *overrides = sys.argv[1:]\n"
        "for event in Trainer(data, run, overrides=overrides, resume=resume == 'yes').fit(): print(event, flush=True)\n"
    )
    rng = random.Random(workers)
    for _ in range(2):
        started = (run / "last" / "MANIFEST.json").exists()
        if run.exists() and not started:
            shutil.rmtree(run)
        command = [
            sys.executable,
            "-c",
            script,
            bars,
            run,
            "yes" if started else "no",
            *FULL,
            f"data.workers={workers}",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"StepDone") and rng.random() < 0.15:
                time.sleep(rng.random() * 0.02)
                break
        process.kill()
        process.wait()
        process.stdout.close()
    resume = (run / "last" / "MANIFEST.json").exists()
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    list(Trainer(bars, run, overrides=[*FULL, f"data.workers={workers}"], resume=resume).fit())
    assert digest(run) == whole


def test_the_same_seed_gives_the_same_model_and_another_does_not(bars: Path, tmp_path: Path, whole: str) -> None:
    list(Trainer(bars, tmp_path / "same", overrides=[*FULL, "data.workers=1", "data.cache_bytes=0"]).fit())
    assert digest(tmp_path / "same") == whole
    list(Trainer(bars, tmp_path / "other", overrides=[*FULL, "train.seed=1"]).fit())
    assert digest(tmp_path / "other") != whole


def test_a_written_configuration_replays_the_run(bars: Path, tmp_path: Path, whole: str) -> None:
    list(Trainer(bars, tmp_path / "a", overrides=FULL).fit())
    list(Trainer(None, tmp_path / "b", load_config(tmp_path / "a" / "config.toml")).fit())
    assert digest(tmp_path / "b") == whole


@pytest.mark.slow
def test_added_files_change_neither_resume_nor_replay_nor_evaluation(bars: Path, tmp_path: Path, whole: str) -> None:
    data, run, cut = tmp_path / "data", tmp_path / "run", tmp_path / "cut"
    shutil.copytree(bars / "train", data)
    list(Trainer(data, run, overrides=FULL).fit())
    expected = digest(run)
    assert expected != whole  # ids have no train/ in them
    trainer = Trainer(data, cut, overrides=FULL)
    for event in trainer.fit():
        if isinstance(event, StepDone) and event.step == 11:
            trainer.stop()
    lines = [json.loads(line) for line in (run / "split.jsonl").read_text().splitlines()[1:-1]]
    before = evaluate(Predictor(run), data)
    assert (before.split, before.split_from) == ("val", "run")
    assert {record["id"] for record in before.records} == {line["path"] for line in lines if line.get("split") == "val"}

    write_images(data / "left", {"more": 20}, seed=9)
    write_images(data, {"new": 10}, seed=9)
    resumed = Trainer(data, cut, resume=True)
    assert any("left out 30 examples that it does not name" in note for note in resumed.plan.notes)
    list(resumed.fit())
    assert digest(cut) == expected
    replayed = Trainer(data, tmp_path / "again", load_config(run / "config.toml"))
    assert replayed.plan.catalog.classes == ("left", "middle", "right")
    list(replayed.fit())
    assert digest(tmp_path / "again") == expected
    assert (tmp_path / "again" / "split.jsonl").read_bytes() == (run / "split.jsonl").read_bytes()
    after = evaluate(Predictor(run), data)
    assert (after.accuracy, after.records) == (before.accuracy, before.records)
    assert any("30 examples that it does not name" in note for note in after.notes)

    shutil.copy(run / MODEL_FILE, tmp_path / "alone.safetensors")
    everything = evaluate(Predictor(tmp_path / "alone.safetensors"), data)
    assert (everything.split, everything.split_from, everything.num_examples) == ("all", "data", 140)
    anew = Trainer(data, tmp_path / "n", load_config(run / "config.toml"), overrides=["data.split=none"])
    assert "new" in anew.plan.catalog.classes
    other = Trainer(bars, tmp_path / "o", load_config(run / "config.toml"))
    assert other.plan.notes[0].endswith("is the split of other data: this data is split anew")


def test_a_time_limit_is_a_plan(bars: Path, tmp_path: Path) -> None:
    """The schedule ends with the time: the last learning rate is near zero, and the limit is kept."""
    changes = ["train.max_time_s=4", "train.schedule=cosine", "train.warmup=0 steps", "inputs.image.stem=none"]
    begin = time.monotonic()
    events = list(Trainer(bars, tmp_path / "run", overrides=[*SMALL, *changes]).fit())
    took = time.monotonic() - begin
    steps = [event for event in events if isinstance(event, StepDone)]
    assert 1.0 < took < 8.0  # wide: other tests share the cores
    assert steps[-1].lr < 0.1 * max(step.lr for step in steps)
    assert steps[-1].step == events[-1].step > 10  # type: ignore[union-attr]
    assert len([event for event in events if isinstance(event, Evaluated)]) >= 3


def test_a_run_that_diverges_keeps_what_was_good(bars: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "train.lr=1e30", "train.optimizer=adamw", "train.steps=50", "train.save_every=1 steps"]
    with pytest.raises(DivergedError, match=r"training diverged: loss (nan|inf) at step \d+, learning rate 1e\+30"):
        list(Trainer(bars, tmp_path / "run", overrides=overrides).fit())
    tensors, state, _ = load_state(tmp_path / "run")
    assert state["step"] >= 1
    assert all(torch.isfinite(tensor).all() for name, tensor in tensors.items() if name.startswith("model."))


def test_a_validation_loss_that_is_not_finite_is_never_saved(bars: Path, tmp_path: Path) -> None:
    """The last step of a run can break the model after its loss was looked at."""
    overrides = [*SMALL, "train.lr=1e30", "train.optimizer=adamw", "train.steps=1"]
    with pytest.raises(DivergedError):
        list(Trainer(bars, tmp_path / "run", overrides=overrides).fit())
    assert not (tmp_path / "run" / MODEL_FILE).exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_replacing_a_run_keeps_it_until_the_new_one_can_begin(trained: Path, bars: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = digest(run)
    with pytest.raises(UsageError, match="no model file"):
        list(Trainer(bars, run, overrides=SMALL, init_from=tmp_path / "typo", replace=True).fit())
    assert digest(run) == before
    # Its own weights may be the start of what replaces it.
    list(Trainer(bars, run, overrides=[*SMALL, "train.steps=2"], init_from=run, replace=True).fit())
    assert load_state(run)[1]["step"] == 2


def test_the_same_seed_gives_the_same_bytes(bars: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        list(Trainer(bars, tmp_path / name, overrides=[*SMALL, "train.steps=3"]).fit())
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


def test_an_unreadable_validation_split_is_no_validation(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train", {"a": 8, "b": 8})
    write_images(tmp_path / "data" / "val", {"a": 1, "b": 1})
    for path in (tmp_path / "data" / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    overrides = [*SMALL, "train.steps=2", "data.max_bad=1.0"]
    events = list(Trainer(tmp_path / "data", tmp_path / "run", overrides=overrides).fit())
    assert isinstance(events[-1], Finished)
    assert "val_accuracy" not in events[-1].metrics


def test_starting_from_another_model(trained: Path, bars: Path, tmp_path: Path) -> None:
    """The trunk and the rows of known classes are taken; the rest is new."""
    write_images(tmp_path / "data", {"left": 12, "new": 12})
    # Without a recipe of its own, the run takes the sizes and the preprocessing of the model it starts from.
    trainer = Trainer(
        tmp_path / "data", tmp_path / "run", overrides=["train.steps=1", "train.lr=1e-9"], init_from=trained
    )
    assert trainer.plan.config.model == load_config(trained / "config.toml").model
    list(trainer.fit())
    assert any("it knows 1 of 2 classes" in note for note in trainer.plan.notes)
    ours, theirs = load_model(tmp_path / "run" / MODEL_FILE)[0], load_model(trained / MODEL_FILE)[0]
    torch.testing.assert_close(ours.latents, theirs.latents)
    torch.testing.assert_close(ours.head.weight[0], theirs.head.weight[0])
    assert ours.head.weight[1].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("value", "top", "count", "best"),
    [(0.80, 0.80, 30, True), (23 / 30, 24 / 30, 30, True), (21 / 30, 24 / 30, 30, False), (0.865, 0.87, 6000, False),
     (0.868, 0.87, 6000, True), (0.99, 1.0, 100, False), (0.0, 0.0, 5, True)],
)  # fmt: skip
def test_the_latest_within_one_standard_error_is_the_best(value: float, top: float, count: int, best: bool) -> None:
    assert within_one_error(value, top, count) is best


def test_a_frozen_trunk_leaves_only_the_head_to_learn(trained: Path, bars: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "train.steps=5", "train.freeze=trunk", "train.weight_decay=0.1", "train.ema_decay=0.9"]
    list(Trainer(bars, tmp_path / "run", overrides=overrides, init_from=trained).fit())
    ours, theirs = (load_file(path / MODEL_FILE) for path in (tmp_path / "run", trained))
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"head.weight", "head.bias"}


# ---------------------------------------------------------------- several modalities


def test_pairs_by_stem_and_by_manifest_give_the_same_model_to_the_bit(pairs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pairs, tmp_path / "data")
    (root / "train" / "top-low" / "003.wav").unlink()  # missing in both
    lines = ["audio,label,split,image"]
    for path in sorted(root.rglob("*.png"), reverse=True):
        sound = path.with_suffix(".wav")
        cells = [str(sound.relative_to(root)) if sound.exists() else "", path.parent.name, path.parent.parent.name]
        lines.append(",".join([*cells, str(path.relative_to(root))]))
    (root / "m.csv").write_text("\n".join(lines) + "\n")
    overrides = [*SMALL_PAIRS, "train.steps=12", "train.ema_decay=0.9"]
    for name, data in (("stems", root), ("rows", root / "m.csv")):
        trainer = Trainer(data, tmp_path / name, overrides=overrides)
        assert trainer.plan.config.name == "tiny-audio-image"
        list(trainer.fit())
    assert digest(tmp_path / "stems") == digest(tmp_path / "rows")
    assert (tmp_path / "stems" / MODEL_FILE).read_bytes() == (tmp_path / "rows" / MODEL_FILE).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_with_sound_resume_to_the_bit(clips: Path, tmp_path: Path, workers: int) -> None:
    """Whatever is kept in memory: short files whole, files of more than 8 clips never."""
    overrides = [*SMALL_CLIPS, "train.steps=9", "inputs.audio.clip_s=0.1", "inputs.audio.patch=[2, 4]"]
    trainer = Trainer(clips, tmp_path / "whole", overrides=overrides)
    assert trainer.plan.config.name == "tiny-av"
    assert trainer.plan.summary()["modalities"] == ["audio", "video"]
    list(trainer.fit())
    run = tmp_path / "cut"
    trainer = Trainer(clips, run, overrides=[*overrides, f"data.workers={workers}", "data.cache_bytes=0"])
    for event in trainer.fit():
        if isinstance(event, StepDone) and event.step == 4:
            trainer.stop()
    list(Trainer(None, run, overrides=[f"data.workers={2 - workers}"], resume=True).fit())
    assert digest(run) == digest(tmp_path / "whole")


@pytest.mark.parametrize("kinds", [("image", "points"), ("audio", "image", "points"), ("image", "video")])
def test_any_set_of_modalities_trains_as_one_model(pairs: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    root = shutil.copytree(pairs / "train", tmp_path / "data")
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        if "points" in kinds:
            side = 1 + i % 2
            path.with_suffix(".off").write_text(f"OFF\n3 1 0\n0 0 0\n{side} 0 0\n0 1 0\n3 0 1 2\n")
        if "video" in kinds:
            write_clip(path.with_suffix(".mp4"), i % 4, None, 0.5)
        if "audio" not in kinds:
            path.with_suffix(".wav").unlink()
    trainer = Trainer(root, tmp_path / "run", overrides=[*SMALL, "train.steps=2", "train.batch_size=4"])
    assert trainer.plan.config.name == f"tiny-{'-'.join(kinds)}"
    list(trainer.fit())
    (prediction,) = Predictor(tmp_path / "run").predict(
        {kinds[0]: next(root.rglob("*.png" if kinds[0] == "image" else "*.wav"))}
    )
    assert prediction.used == kinds[:1]


# ---------------------------------------------------------------- refusals


def test_too_many_bad_files_stop_the_run_with_the_list(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"a": 20, "b": 20})
    for i in range(3):
        target = tmp_path / "data" / "a" / f"{i:03d}.png"
        target.write_bytes(target.read_bytes()[:50])
    with pytest.raises(DataError) as caught:
        list(Trainer(tmp_path / "data", tmp_path / "run", overrides=[*SMALL, "train.steps=2"]).fit())
    assert "3 of 40 files cannot be read, more than 1.0%; pass --max-bad 0.075" in str(caught.value)
    assert all(f"00{i}.png" in str(caught.value) for i in range(3))
    trainer = Trainer(tmp_path / "data", tmp_path / "run2", overrides=[*SMALL, "train.steps=2", "data.max_bad=0.075"])
    list(trainer.fit())
    assert any(note.startswith("left out 3 unreadable files: ") for note in trainer.plan.notes)


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_a_bad_file_is_never_replaced_by_another_example(tmp_path: Path, cache: int) -> None:
    """Found early (kept in memory) or late (read on each visit), it only makes its batch smaller."""
    write_images(tmp_path / "data", {"a": 20, "b": 20})
    (tmp_path / "data" / "a" / "007.png").write_bytes((tmp_path / "data" / "a" / "006.png").read_bytes()[:70])
    overrides = [*SMALL, "train.epochs=2", "data.max_bad=0.5", f"data.cache_bytes={cache}", "data.val_fraction=0"]
    trainer = Trainer(tmp_path / "data", tmp_path / "run", overrides=overrides)
    list(trainer.fit())
    assert set(trainer.plan.reader.bad) == {"a/007.png"}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_without_a_readable_file_has_no_loss(tmp_path: Path, accumulate: int) -> None:
    """It counted as a loss of 0, and the logged loss was too low."""
    write_images(tmp_path / "data", {"a": 8, "b": 8})
    for number in range(6):
        (tmp_path / "data" / "a" / f"{number:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    overrides = [*SMALL, "train.batch_size=1", f"train.accumulate={accumulate}", f"train.steps={16 // accumulate}"]
    overrides += ["data.max_bad=0.9", "data.cache_bytes=0", "data.val_fraction=0", "train.lr=1e-9"]
    overrides += ["train.eval_every=99 steps"]
    events = list(Trainer(tmp_path / "data", tmp_path / "run", overrides=overrides).fit())
    (evaluated,) = (event for event in events if isinstance(event, Evaluated))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    if accumulate == 1:
        losses = [loss for loss in losses if loss]
        assert len(losses) == 10
        assert evaluated.train_loss == pytest.approx(sum(losses) / 10)
    else:
        assert 0.5 < evaluated.train_loss < 0.9  # log 2, with fresh weights; with zeros it was below 0.45


def test_a_run_folder_is_not_overwritten_or_shared(trained: Path, bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run; pass --resume"):
        list(Trainer(bars, trained, overrides=SMALL).fit())
    run = tmp_path / "run"
    holder = (
        "import fcntl, sys, time; from pathlib import Path; run = Path(sys.argv[1]); run.mkdir()\n"
        "lock = (run / '.lock').open('w'); fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder, run], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ResourceError, match="in use by another training run"):
            next(Trainer(bars, run, overrides=SMALL).fit())
        other.kill()


def test_an_unwritable_output_is_found_before_the_first_step(bars: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        next(Trainer(bars, tmp_path / "file" / "run", overrides=SMALL).fit())


def test_resume_can_go_further_and_says_so(bars: Path, tmp_path: Path) -> None:
    list(Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.steps=4"]).fit())
    trainer = Trainer(None, tmp_path / "run", overrides=["train.steps=9"], resume=True)
    events = list(trainer.fit())
    assert [event.step for event in events if isinstance(event, StepDone)] == [5, 6, 7, 8, 9]
    assert any("the plan changed from 4 to 9 steps" in note for note in trainer.plan.notes)


def test_an_ended_run_goes_on_with_more_time_and_else_says_that_it_ended(bars: Path, tmp_path: Path) -> None:
    list(Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.max_time_s=0.5"]).fit())
    ended = Trainer(None, tmp_path / "run", resume=True)
    assert not [event for event in ended.fit() if isinstance(event, StepDone)]
    assert any("this run ended at step" in note for note in ended.plan.notes)
    longer = Trainer(None, tmp_path / "run", overrides=["train.max_time_s=1.5"], resume=True)
    assert [event for event in longer.fit() if isinstance(event, StepDone)]


def test_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_run("tiny-image") == Path("runs/tiny-image-1")
    (tmp_path / "runs" / "tiny-image-1").mkdir(parents=True)
    assert next_run("tiny-image") == Path("runs/tiny-image-2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_is_passed_on(bars: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [Path(sys.executable).parent / "perceiver", "train", bars, "-o", tmp_path / "run", "--steps", "100000"]
    command += ["--set", "train.save_every=5 steps"]
    command += [part for change in SMALL for part in ("--set", change)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stderr is not None
    for _ in range(600):
        if (tmp_path / "run" / "last" / "MANIFEST.json").exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert b"perceiver train --resume -o" in err
    assert out == b""
    assert load_state(tmp_path / "run")[1]["step"] > 0


def test_recomputed_activations_train_the_same_model(bars: Path, tmp_path: Path) -> None:
    files = []
    for recompute in ("false", "true"):
        output = tmp_path / recompute
        overrides = [*SMALL, "train.steps=6", f"train.recompute={recompute}"]
        list(Trainer(bars, output, overrides=overrides).fit())
        files.append(load_model(output / MODEL_FILE)[0].state_dict())
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_compile_that_cannot_work_is_said_at_once(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> object:
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    trainer = Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.steps=2", "train.compile=true"])
    with pytest.raises(UsageError, match=r"torch.compile does not work here: no working C\+\+ compiler; leave out"):
        list(trainer.fit())


def test_patience_ends_a_run_that_no_longer_improves(bars: Path, tmp_path: Path) -> None:
    still = ["train.lr=1e-9", "train.steps=30", "train.eval_every=1 steps"]  # learns nothing
    events = list(Trainer(bars, tmp_path, overrides=[*SMALL, *still, "train.patience=2"]).fit())
    assert [event.step for event in events if isinstance(event, Evaluated)] == [1, 2, 3]
    (note,) = (event.message for event in events if isinstance(event, Note))
    assert "in 2 evaluations: the run ends at step 3 (train.patience)" in note
    assert isinstance(events[-1], Finished)
    assert not events[-1].stopped_early
    answers = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert len(answers) == 15
    assert sum(answer["correct"] for answer in answers) / 15 == events[-1].metrics["val_accuracy"]
    events = list(Trainer(None, tmp_path, overrides=["train.patience=4"], resume=True).fit())
    assert [event.step for event in events if isinstance(event, Evaluated)] == [4, 5]
    with pytest.raises(UsageError, match="needs a validation split"):
        Trainer(bars, tmp_path / "x", overrides=[*SMALL, "train.patience=2", "data.val_fraction=0"])
