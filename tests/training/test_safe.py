"""What a run never saves, and how it comes back: NaN, a damaged manifest, a save that failed, runs begun at once."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from perceiver_cli.config import tiny_config
from perceiver_cli.data.loader import ordered_tasks
from perceiver_cli.errors import DataError, DivergedError, IntegrityError, ResourceError, UsageError
from perceiver_cli.inference.evaluation import calibrate, evaluate
from perceiver_cli.inference.explain import explain
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.checkpoint import load_model, save_model
from perceiver_cli.run_folder import MANIFEST, MODEL_FILE, STATE_FOLDER, make_next_run
from perceiver_cli.training import loop
from perceiver_cli.training.events import Saved
from perceiver_cli.training.optimizer import Lamb
from perceiver_cli.training.state import load_state
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, write_images
from tests.runs import finite, poison, wrong_figures

SHORT = (*SMALL, "train.steps=6", "train.save_every=1 steps", "train.eval_every=3 steps")


@pytest.mark.parametrize(("what", "stop"), [("loss", True), ("gradient", False), ("weight", True), ("average", False)])
def test_a_number_that_is_not_finite_is_never_saved(bars: Path, tmp_path: Path, what: str, stop: bool) -> None:
    """Wherever it comes from, and if a signal ends the run in that very step."""
    trainer = Trainer(bars, tmp_path, overrides=[*SHORT, "train.ema_decay=0.9"])
    poison(trainer, 4, what, stop=stop)
    with pytest.raises(DivergedError, match=r"training diverged: .* at step 4, learning rate .*saved state is kept"):
        list(trainer.fit())
    assert load_state(tmp_path).fields["step"] == 3
    assert finite(tmp_path)
    list(Trainer(None, tmp_path, resume=True).fit())  # nothing poisons it
    assert load_state(tmp_path).fields["step"] == 6


def test_the_last_step_of_a_run_without_validation_may_be_the_bad_one(bars: Path, tmp_path: Path) -> None:
    """The loss was looked at before the step, which makes the weights infinite."""
    changes = ["train.steps=1", "train.lr=1e38", "train.schedule=constant", "data.val_fraction=0"]
    with pytest.raises(DivergedError, match=r"62 tensors not finite, such as latents, at step 1, .*; nothing is saved"):
        list(Trainer(bars / "train", tmp_path / "run", overrides=[*SMALL, *changes]).fit())
    assert not (tmp_path / "run" / MODEL_FILE).exists()
    list(Trainer(bars, tmp_path / "run", overrides=[*SMALL, "train.steps=1"]).fit())  # it holds no run


def test_answers_that_are_not_finite_are_refused(trained: Path, bars: Path, tmp_path: Path) -> None:
    model, info = load_model(trained / MODEL_FILE)
    weights = model.state_dict()
    weights["head.weight"] = weights["head.weight"] * 0 + 3e38  # finite, and answers overflow
    save_model(tmp_path / "big.safetensors", weights, info)
    predictor = Predictor(tmp_path / "big.safetensors")
    (line,) = predictor.predict([bars / "test" / "left" / "000.png"])
    assert line.error is not None
    assert "000.png' is not finite" in line.error
    assert "NaN" not in json.dumps(line.to_dict(), allow_nan=False)
    for refused in (lambda: evaluate(predictor, bars), lambda: calibrate(predictor, bars)):
        with pytest.raises(IntegrityError, match="an answer is not finite"):
            refused()
    with pytest.raises(IntegrityError, match="is not finite"):
        explain(predictor, bars / "test" / "left" / "000.png")
    weights["head.bias"][0] = torch.nan
    save_model(tmp_path / "nan.safetensors", weights, info)
    with pytest.raises(IntegrityError, match=r"1 tensor not finite, such as head\.bias"):
        Predictor(tmp_path / "nan.safetensors")


# ---------------------------------------------------------------- figures are of the weights that are saved


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 0.0), ("adamw", 0.9), ("lamb", 0.0), ("lamb", 0.9)])
def test_each_logged_figure_is_that_of_the_state_saved_with_it(
    bars: Path, tmp_path: Path, optimizer: str, decay: float
) -> None:
    """With every optimiser and averaging; the precisions are in tests/faults."""
    changes = ["train.lr=0.01", "data.val_fraction=0.3", "train.steps=4", "train.eval_every=2 steps"]
    changes += [f"train.optimizer={optimizer}", f"train.ema_decay={decay}"]
    assert list(wrong_figures(bars, tmp_path / "run", [*SMALL, *changes])) == []


@pytest.mark.parametrize("make", [
    lambda p: SGD(p, 1e-3), lambda p: SGD(p, 1e-3, fused=True), lambda p: AdamW(p, 0.1, foreach=True),
    lambda p: AdamW(p, 0.1, fused=True), lambda p: Lamb(p, 0.1),
])  # fmt: skip
def test_a_model_answers_with_its_weights_after_any_step(trained: Path, bars: Path, make: Any) -> None:
    """In evaluation mode too, and with an answer between the gradient and the step."""
    predictor = Predictor(trained)
    model, optimizer = predictor.model, make(predictor.model.parameters())
    (batch,) = predictor.reader.batches(ordered_tasks(predictor.examples(bars / "test" / "left"), 16))

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return model(batch.segments)

    answer()
    for _ in range(2):
        model(batch.segments).square().sum().backward()
        answer()
        optimizer.step()
        other = copy.deepcopy(model).eval()
        with torch.no_grad():
            torch.testing.assert_close(answer(), other(batch.segments), rtol=0, atol=0)
    moved = model.eval().double().float()
    torch.testing.assert_close(answer(), moved(batch.segments).detach(), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- states and folders


def test_a_flip_in_the_manifest_loses_no_state(bars: Path, tmp_path: Path) -> None:
    list(Trainer(bars, tmp_path / "run", overrides=SHORT).fit())
    manifest = tmp_path / "run" / STATE_FOLDER / MANIFEST
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 9):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        assert load_state(tmp_path / "run").fields["step"] in (5, 6)
    manifest.write_bytes(b"")
    assert load_state(tmp_path / "run").fields["step"] == 6
    list(Trainer(None, tmp_path / "run", resume=True, overrides=["train.steps=7"]).fit())
    assert json.loads(manifest.read_bytes())["states"][0] == {"file": "step-00000007.safetensors", "step": 7}


def test_no_state_is_written_twice(bars: Path, tmp_path: Path) -> None:
    saved = [event.path.name for event in Trainer(bars, tmp_path, overrides=SHORT, replace=True).fit()
             if isinstance(event, Saved)]  # fmt: skip
    states = [name for name in saved if name != MODEL_FILE]
    assert states == sorted(set(states))
    again = [event for event in Trainer(None, tmp_path, resume=True).fit() if isinstance(event, Saved)]
    assert again == []


def test_a_first_save_that_failed_is_no_dead_end(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise ResourceError("disk full")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", full)
        with pytest.raises(ResourceError):
            list(Trainer(bars, run, overrides=[*SMALL, "train.steps=1"]).fit())
    assert (run / MODEL_FILE).exists()
    with pytest.raises(UsageError, match="no training state to resume; pass --replace to start over"):
        Trainer(bars, run, resume=True)
    with pytest.raises(UsageError, match="already holds a run; pass --replace to start over"):
        list(Trainer(bars, run, overrides=SHORT).fit())
    (run / MODEL_FILE).unlink()
    (run / STATE_FOLDER).mkdir(exist_ok=True)
    list(Trainer(bars, run, overrides=SHORT).fit())


def test_runs_begun_at_once_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(make_next_run, ["tiny-image"] * 8))
    assert sorted(folder.name for folder in folders) == [f"tiny-image-{n}" for n in range(1, 9)]


def test_the_number_of_workers_is_not_in_the_model(bars: Path, tmp_path: Path) -> None:
    for name, changes in (("a", []), ("b", ["data.workers=1", "data.cache_bytes=0"])):
        list(Trainer(bars, tmp_path / name, overrides=[*SMALL, "train.steps=2", *changes]).fit())
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


@pytest.mark.parametrize("change", ["train.betas=[1,1]", "train.betas=[0.9,1.0]"])
def test_decays_of_one_are_refused(bars: Path, change: str) -> None:
    with pytest.raises(UsageError, match=r"betas.*less than 1"):
        Trainer(bars, overrides=[change])


def test_an_empty_name_is_no_data_and_no_model(bars: Path) -> None:
    """A script's variable is not set: not the working folder, and not the latest model."""
    with pytest.raises(UsageError, match="no data given"):
        Trainer("")
    with pytest.raises(UsageError, match="no model given"):
        Trainer(bars, init_from="")
    with pytest.raises(UsageError, match="no model given"):
        Predictor("")


@pytest.mark.parametrize(("cache", "steps"), [(1 << 30, 8), (0, 8), (0, 1)])
def test_unreadable_files_alone_train_no_model(tmp_path: Path, cache: int, steps: int) -> None:
    write_images(tmp_path / "data", {"a": 20, "b": 20})
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    changes = ["data.max_bad=1", f"data.cache_bytes={cache}", f"train.steps={steps}", "inputs.image.size=[12, 12]"]
    changes += ["inputs.image.mean=[0.5]", "inputs.image.std=[0.5]", "inputs.image.color=grey", "data.val_fraction=0"]
    with pytest.raises(DataError, match=r"no training file can be read|none of the files read in training"):
        list(Trainer(tmp_path / "data", tmp_path / "run", tiny_config(["image"]), overrides=[*SMALL, *changes]).fit())
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_bad_first_file_is_not_all_of_them(tmp_path: Path) -> None:
    """Nothing is kept in memory, so that only some files are read before the first step."""
    write_images(tmp_path / "data", {"a": 20, "b": 20})
    bad = tmp_path / "data" / "a" / "000.png"
    bad.write_bytes(bad.read_bytes()[:60])
    changes = ["data.cache_bytes=0", "train.steps=3", "data.val_fraction=0", "data.workers=0"]
    for allowed, fine in ((0.3, True), (0.01, False)):
        run = Trainer(tmp_path / "data", tmp_path / str(fine), overrides=[*SMALL, *changes, f"data.max_bad={allowed}"])
        with nullcontext() if fine else pytest.raises(DataError, match="1 of 40 files cannot be read"):
            list(run.fit())
