"""Following each piece of advice helps, on a made case: the command is run as it is printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.advice.base import Advice
from perceiver_cli.inference.evaluation import Report, evaluate
from perceiver_cli.inference.guidance import advice_on
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.checkpoint import load_model, save_model
from perceiver_cli.run_folder import MODEL_FILE, read_log
from perceiver_cli.training.events import Finished
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive, write_images

# A recipe whose score is the rule's business alone: no stem, no mixing, a rate that holds.
PLAIN = (*SMALL, 'inputs.image.stem="none"', "train.mixup=0", "train.ema_decay=0", "train.lr=0.004")
CONSTANT = ("train.schedule=constant", "train.clip_norm=none", "train.label_smoothing=0")


def write_noisy(root: Path, counts: dict[str, int], level: int = 180, seed: int = 0) -> Path:
    """Write PNG class folders: class k is a row that is a little brighter than the noise. Returns the folder."""
    rng = np.random.default_rng(seed)
    for k, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, level, (12, 12))
            pixels[1 + 2 * k] += 70
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


def train(data: Path, run: Path, *changes: str) -> tuple[Advice, ...]:
    """Train; return what the run advises."""
    *_, last = Trainer(data, run, overrides=[*PLAIN, *changes]).fit()
    assert isinstance(last, Finished)
    return last.advice


def score(run: Path) -> float:
    """Return the validation score of the model that a run kept."""
    kept: float = [record for record in read_log(run) if record["best"]][-1]["val_accuracy"]
    return kept


Follow = Callable[[Sequence[Advice], str], bytes]


@pytest.fixture
def follow(perceive: Perceive, tmp_path: Path) -> Follow:
    """Return a function that runs the advice with some words, and returns the command's stdout."""

    def run(advice: Sequence[Advice], words: str) -> bytes:
        (chosen,) = [each for each in advice if words in each.seen]
        done = perceive(*chosen.command[1:], cwd=tmp_path)
        assert done.returncode in (0, 3), done.stderr  # 3: lint found faults
        return done.stdout

    return run


def judged(run: Path, data: Path) -> tuple[Report, list[Advice]]:
    predictor = Predictor(run)
    report = evaluate(predictor, data)
    return report, advice_on(report, predictor, str(data), has_report=False)


def test_a_longer_run(tmp_path: Path, follow: Follow) -> None:
    data = write_noisy(tmp_path / "data", dict.fromkeys("abcd", 200), level=130)
    advice = train(data, tmp_path / "run", "train.steps=120", "train.eval_every=12 steps", "train.lr=0.006")
    before = score(tmp_path / "run")
    follow(advice, "still improving")
    assert score(tmp_path / "run") > before + 0.1


def test_more_time_than_a_little(tmp_path: Path, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEW_STEPS", "PERFECT"):  # how far a run gets depends on the machine
        monkeypatch.setattr(f"perceiver_cli.advice.training.{name}", 10**6)
    data = write_noisy(tmp_path / "data", dict.fromkeys("abcd", 200), level=60)
    advice = train(data, tmp_path / "run", "train.max_time_s=12", "train.lr=0.006")
    before, steps = score(tmp_path / "run"), read_log(tmp_path / "run")[-1]["step"]
    follow(advice[:1], "which are few")
    assert read_log(tmp_path / "run")[-1]["step"] > 1.3 * steps
    assert score(tmp_path / "run") >= before


def test_more_steps_than_a_few(tmp_path: Path, follow: Follow) -> None:
    data = write_noisy(tmp_path / "data", dict.fromkeys("abcd", 80))
    advice = train(data, tmp_path / "run", "train.steps=5", "train.eval_every=5 steps")
    follow(advice, "5 steps are few")
    assert score(tmp_path / "run") > 0.8


def test_a_rate_that_learns(tmp_path: Path, follow: Follow) -> None:
    data = write_noisy(tmp_path / "data", dict.fromkeys("abcd", 80))
    advice = train(data, tmp_path / "run", "train.steps=250", "train.lr=0.5", "train.eval_every=50 steps", *CONSTANT)
    assert score(tmp_path / "run") < 0.5
    words = follow(advice, "another learning rate").decode().split()
    assert words[:2] == ["perceiver", "train"]
    rate = float(words[words.index("--lr") + 1])
    train(data, tmp_path / "next", "train.steps=250", f"train.lr={rate}", "train.eval_every=50 steps", *CONSTANT)
    assert score(tmp_path / "next") > score(tmp_path / "run") + 0.2


def test_a_lower_rate(tmp_path: Path, follow: Follow) -> None:
    data = write_noisy(tmp_path / "data", dict.fromkeys("abcd", 400))
    advice = train(data, tmp_path / "run", "train.steps=240", "train.lr=0.05", "train.eval_every=15 steps", *CONSTANT)
    run = Path(follow(advice, "again and again").decode().strip())
    assert score(tmp_path / run.parent) > score(tmp_path / "run") + 0.1


def test_weights_for_rare_classes(tmp_path: Path, follow: Follow) -> None:
    data = write_noisy(tmp_path / "data" / "train", {"a": 400, "b": 100, "c": 30}).parent
    write_noisy(data / "test", dict.fromkeys("abc", 40), seed=1)
    advice = train(data, tmp_path / "run", "train.steps=150", "train.eval_every=25 steps")
    before, more = judged(tmp_path / "run", data)
    run = Path(follow(advice, "times the files of the smallest").decode().strip())
    after, _ = judged(tmp_path / run.parent, data)
    assert (after.balanced_accuracy or 0) > (before.balanced_accuracy or 0) + 0.1
    assert [each.command[-1] for each in more if "never answered" in each.seen] == ["data.class_weight_power=0.5"]


def test_groups_make_the_score_one_to_trust(tmp_path: Path, follow: Follow) -> None:
    """A speaker is a row or, in test, a column that shines; the class says nothing but who speaks."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for speaker in range(12):
            folder = tmp_path / "data" / split / "ab"[speaker % 2] / f"speaker{split}{speaker}"
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = rng.integers(0, 60, (12, 12), dtype=np.uint8)
                pixels[speaker] = 255
                Image.fromarray(pixels if split == "train" else pixels.T).save(folder / f"{number}.png")
    data, options = tmp_path / "data", ("train.steps=250", "train.eval_every=50 steps", "inputs.image.fit=crop")
    advice = train(data, tmp_path / "run", *options, "inputs.image.crop_area=[1, 1]", "inputs.image.crop_aspect=[1, 1]")
    report, more = judged(tmp_path / "run", data)
    assert score(tmp_path / "run") > report.accuracy + 0.2
    assert "--group-by" in next(each for each in more if "validation files" in each.seen).command
    run = Path(follow(advice, "folders are in both").decode().strip())
    honest, _ = judged(tmp_path / run.parent, data)
    assert abs(score(tmp_path / run.parent) - honest.accuracy) < score(tmp_path / "run") - report.accuracy


def test_copies_are_found_and_left_out(tmp_path: Path, follow: Follow) -> None:
    data = write_images(tmp_path / "data", {"a": 150, "b": 150, "c": 150})
    for path in sorted(data.glob("*/*.png")):
        shutil.copy(path, path.with_stem(f"copy{path.stem}"))
    advice = train(data, tmp_path / "run", "train.steps=150", "train.eval_every=50 steps")
    found = follow(advice, "no copies").decode()
    assert "the same content within a split: 450" in found
    from perceiver_cli.advice.data import after_lint
    from perceiver_cli.data.lint import lint

    follow(after_lint(lint(data, workers=0)), "groups of copies")
    clean = lint(tmp_path / "clean.csv", workers=0)
    assert (clean.copies, clean.sizes) == ((), {"train": 450})


def test_probabilities_are_calibrated(tmp_path: Path, follow: Follow) -> None:
    data = write_noisy(tmp_path / "data", dict.fromkeys("abcd", 300), level=230)
    train(data, tmp_path / "run", "train.steps=200", "train.eval_every=200 steps", "train.label_smoothing=0.5")
    path = tmp_path / "run" / MODEL_FILE
    model, info = load_model(path)  # training fits a temperature: the rule is for models of earlier versions
    save_model(path, model.state_dict(), replace(info, calibration=None))
    report, advice = judged(tmp_path / "run", data)
    follow(advice, "probabilities are off")
    after, _ = judged(tmp_path / "run", data)
    assert (after.ece or 0) < (report.ece or 0)


def test_mistakes_records_and_faults(tmp_path: Path, follow: Follow, perceive: Perceive) -> None:
    data = write_noisy(tmp_path / "data", {"a": 40, "b": 40})
    (data / "a" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    advice = train(data, tmp_path / "run", "train.steps=20", "data.max_bad=0.5")
    assert json.loads(perceive("lint", data, "--json", cwd=tmp_path).stdout)["unreadable"]
    assert b"unreadable: 1" in follow(advice, "could not be read")
    follow(judged(tmp_path / "run", data)[1], "mistake")
    assert (tmp_path / "run" / "report" / "report.html").is_file()
    for output in ("x.tar", "shards/y-%06d.tar"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        done = perceive("preprocess", data / "b", data / "a", "--label-from", "parent", "-o", output, cwd=tmp_path)
        (line,) = [line for line in done.stderr.decode().splitlines() if line.startswith("next: ")]
        words = line.replace("'", "").partition(": perceiver ")[2].split()
        changes = [word for change in (*PLAIN, "train.steps=2", "data.max_bad=0.5") for word in ("--set", change)]
        assert perceive(*words, *changes, cwd=tmp_path).returncode == 0
