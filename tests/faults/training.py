"""Faults in training: kills, signals, NaN, workers that die, runs at once; and figures that must be of the state."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from perceiver_cli.errors import DivergedError
from perceiver_cli.run_folder import MANIFEST, MODEL_FILE, STATE_FOLDER
from perceiver_cli.training.events import StepDone
from perceiver_cli.training.state import load_state
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, SMALL_PAIRS, write_images, write_pairs
from tests.faults.process import start
from tests.faults.table import Place, Verdict, row
from tests.runs import finite, poison, wrong_figures

RECIPE = (*SMALL, "train.steps=8", "train.save_every=2 steps", "train.eval_every=3 steps", "train.ema_decay=0.9")
SETS = [word for change in RECIPE for word in ("--set", change)]
ENDED = {signal.SIGINT: -2, signal.SIGTERM: -15, signal.SIGHUP: -1, signal.SIGKILL: -9}


def small(place: Place) -> Path:
    """Return a folder of a few small pictures in three classes."""
    return write_images(place.folder / "bars", {"left": 12, "middle": 12, "right": 12})


def slow(place: Place, rows: int = 1000) -> Path:
    """Return a manifest of pictures that take seconds to read: it names a few large ones again and again."""
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = rng.integers(0, 255, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place.folder / f"{number}.png", compress_level=1)
    table = place.folder / "slow.csv"
    table.write_text("path,label\n" + "".join(f"{i % 4}.png,{'ab'[i % 2]}\n" for i in range(rows)))
    return table


def contents(run: Path) -> list[object]:
    """Return what must be the same in two runs: the bytes of the model, the tensors of the last state."""
    tensors = load_state(run).tensors
    return [(run / MODEL_FILE).read_bytes(), *((name, t.numpy().tobytes()) for name, t in sorted(tensors.items()))]


def litter(place: Place, *runs: Path) -> Verdict:
    """Return which temporary files are left."""
    left = [path for folder in (place.folder / "tmp", *runs) for path in folder.rglob("*") if path.is_file()]
    left = [path for path in left if path.suffix == ".tmp" or "tmp" in path.parts[-2]]
    return f"left behind: {', '.join(map(str, left[:3]))}" if left else ""


def finished(place: Place, data: Path, run: Path, *more: str) -> Verdict:
    """Go on with a run that was ended in whatever moment, to its end; return what is wrong."""
    way = "--resume" if (run / STATE_FOLDER / MANIFEST).exists() else "--replace"
    words = ["train", data, "-o", run, way, *(SETS if way == "--replace" else ()), *more]
    return start(place, *words).ended(0)


@row("killed at random moments, resumed to the same bytes", 100, 4)
def killed(place: Place) -> Iterator[Verdict]:
    data, whole = small(place), place.folder / "whole"
    begun = time.monotonic()
    start(place, "train", data, "-o", whole, *SETS).ended(0)
    took = time.monotonic() - begun
    for number in range(place.count):
        run, workers = place.folder / f"run-{number}", str(number % 3 % 2)
        child = start(place, "train", data, "-o", run, *SETS, "--workers", workers)
        time.sleep(place.random.uniform(0, 1.1 * took))
        os.kill(child.pid, signal.SIGKILL)
        verdict = child.ended(-9, 0) or finished(place, data, run)
        yield verdict or ("other bytes" if contents(run) != contents(whole) else litter(place, run))
        shutil.rmtree(run, ignore_errors=True)


# ---------------------------------------------------------------- exact resume

OPTIONS: list[tuple[str, list[list[str]]]] = [
    ("optimizer", [["train.optimizer=lamb"], ["train.optimizer=adamw"]]),
    ("average", [[], ["train.ema_decay=0.9"]]),
    ("batches", [[], ["train.accumulate=2"], ["train.batch_size=5"]]),
    ("schedule", [[], ["train.schedule=constant", "train.warmup=3 steps"],
                  ["train.schedule=step", 'train.decay_at=["50%"]']]),
    ("precision", [[], ["train.precision=bf16"]]),
    ("clip", [[], ["train.clip_norm=0.1"]]),
    ("smoothing", [[], ["train.label_smoothing=0.1"], ["data.class_weight_power=0.5"]]),
    ("memory", [[], ["train.recompute=true"], ["data.cache_bytes=0"], ["train.freeze=trunk"]]),
]  # fmt: skip
MIXES: list[list[str]] = [[], ["train.mixup=0.3"], ["train.cutmix=1.0"], ["train.mixup=0.2", "train.cutmix=1.0"]]
STEPS, CUTS = 6, 6


@row("exact resume over a matrix of recipes", 270, 12)
def exact(place: Place) -> Iterator[Verdict]:
    pictures, pairs = small(place), write_pairs(place.folder / "pairs", 6)
    for number in range(-(-place.count // CUTS)):
        paired = number % 3 == 2
        recipe = [*(SMALL_PAIRS if paired else SMALL), f"train.steps={STEPS}", "train.eval_every=3 steps"]
        recipe += [change for _, options in OPTIONS for change in place.random.choice(options)]
        recipe += [] if paired else place.random.choice(MIXES)
        recipe += ["train.save_every=2 steps", f"train.seed={number}"]
        data, whole, run = pairs if paired else pictures, place.folder / "whole", place.folder / "run"
        list(Trainer(data, whole, overrides=recipe).fit())
        for _ in range(min(CUTS, place.count - number * CUTS)):
            cut, workers = place.random.randrange(1, STEPS), [f"data.workers={place.random.randrange(2)}"]
            trainer = Trainer(data, run, overrides=[*recipe, *workers])
            for event in trainer.fit():
                trainer.stopping |= isinstance(event, StepDone) and event.step == cut
            list(Trainer(None, run, resume=True).fit())
            yield "" if contents(run) == contents(whole) else f"cut after step {cut}: other bytes with {recipe}"
            shutil.rmtree(run)
        shutil.rmtree(whole)


@row("every logged figure is that of the saved state", 36, 4)
def figures(place: Place) -> Iterator[Verdict]:
    pictures, pairs = small(place), write_pairs(place.folder / "pairs", 6)
    ways = list(product(["lamb", "adamw"], [0.0, 0.5, 0.99], ["fp32", "bf16"], [pictures, pairs, pictures]))
    place.random.shuffle(ways)
    for optimizer, decay, precision, data in islice(cycle(ways), place.count):
        recipe = [*(SMALL_PAIRS if data == pairs else SMALL), "train.steps=6", "train.eval_every=2 steps"]
        recipe += [f"train.optimizer={optimizer}", f"train.ema_decay={decay}", "train.lr=0.01", "data.val_fraction=0.3"]
        yield "; ".join(wrong_figures(data, place.folder / "run", recipe, precision))
        shutil.rmtree(place.folder / "run")
        shutil.rmtree(place.folder / "run-state")


@row("NaN in a loss, gradient, weight, moment or average", 72, 8)
def not_a_number(place: Place) -> Iterator[Verdict]:
    data, run = small(place), place.folder / "run"
    saves = [["train.save_every=1 steps"], ["train.save_every=4 steps"], ["data.val_fraction=0"]]
    ways = list(product(["loss", "gradient", "weight", "moment", "average"], [1, 4, 6], saves, [False, True]))
    place.random.shuffle(ways)
    for what, step, save, stop in ways[: place.count]:
        optimizer = place.random.choice(["lamb", "adamw"])
        recipe = [*SMALL, "train.steps=6", "train.ema_decay=0.9", f"train.optimizer={optimizer}", *save]
        trainer = Trainer(data, run, overrides=recipe)
        poison(trainer, step, what, stop=stop)
        try:
            list(trainer.fit())
            yield f"{what} in step {step}: no error"
        except DivergedError as error:
            kept = (run / STATE_FOLDER / MANIFEST).exists()
            said = "the saved state is kept" in str(error)
            if kept:
                list(Trainer(None, run, resume=True).fit())
            yield (
                f"{what} in step {step}, {save}: " + ("NaN in a file" if not finite(run) else str(error))
                if not finite(run) or kept != said
                else ""
            )
        shutil.rmtree(run, ignore_errors=True)


# ---------------------------------------------------------------- workers and signals


def commands(place: Place, data: Path, run: Path, *, workers: int) -> dict[str, list[str | Path]]:
    """Return a command line of each command that reads files."""
    readers: list[str | Path] = ["--workers", str(workers)]
    model: list[str | Path] = ["-m", place.folder / "model"]
    sets = [word for change in (*RECIPE, "train.steps=2000") for word in ("--set", change)]
    return {
        "train": ["train", data, "-o", run, *sets, "--set", "data.cache_bytes=0", *readers],
        "read": ["train", data, "-o", run, *sets, *readers],
        "evaluate": ["evaluate", data, *model, *readers],
        "predict": ["predict", data, *model, *readers],
        "preprocess": ["preprocess", data, "-o", place.folder / "made.tar", *readers],
    }


def trained(place: Place, data: Path) -> None:
    """Train place.folder/model for a step."""
    few = write_images(place.folder / "few", {"a": 4, "b": 4})
    start(place, "train", few, "-o", place.folder / "model", *SETS, "--steps", "1").ended(0)


@row("workers killed or stopped", 36, 4)
def workers_killed(place: Place) -> Iterator[Verdict]:
    data, run = slow(place), place.folder / "run"
    trained(place, data)
    signals = cycle((signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL))
    names = cycle(commands(place, data, run, workers=2))
    for name, sent in islice(zip(names, signals, strict=False), place.count):
        child = start(place, *commands(place, data, run, workers=2)[name])
        if name == "train":
            child.wait_for(lambda: (run / "metrics.jsonl").exists())
        time.sleep(place.random.uniform(0, 0.3))
        verdict = "" if child.hurt_worker(sent, place.random) else f"{name}: no worker to hurt: {child.said()}"
        begun = time.monotonic()
        verdict = verdict or child.ended(5) or child.left()
        if not verdict and "killed or stopped" not in child.said():
            verdict = f"{name}: says nothing of the worker: {child.said()}"
        if not verdict and time.monotonic() - begun > 15:
            verdict = f"{name}: {time.monotonic() - begun:.0f} s until the end"
        yield verdict or litter(place, run)
        shutil.rmtree(run, ignore_errors=True)


@row("signals x commands", 80, 4)
def signals(place: Place) -> Iterator[Verdict]:
    data, run, made = slow(place, 300), place.folder / "run", place.folder / "made.tar"
    trained(place, data)
    names = ("train", "evaluate", "predict", "preprocess", "read")
    ways = list(product(names, ENDED, (False, True), (0, 2)))
    place.random.shuffle(ways)
    for name, sent, group, workers in islice(cycle(ways), place.count):
        child = start(place, *commands(place, data, run, workers=workers)[name])
        time.sleep(place.random.uniform(0.05, 1.0))
        (os.killpg if group else os.kill)(child.pid, sent)
        where = f"{name}, {sent.name} {'to the group' if group else ''}, {workers} workers: "
        verdict = child.ended(ENDED[sent], 0) or child.left() or litter(place, run)
        if "Traceback" in child.said():
            verdict = f"a traceback: {child.said()}"
        if made.exists() and not verdict:
            verdict = start(place, "lint", made).ended(0, 3)
        if name in ("train", "read") and sent != signal.SIGKILL and "to continue:" in child.said():
            verdict = verdict or start(place, "train", "--resume", "-o", run, "--steps", "3", "--dry-run").ended(0)
        yield where + verdict if verdict else ""
        made.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)


@row("a signal to a process group with workers saves, and the resume is exact", 12, 2)
def group(place: Place) -> Iterator[Verdict]:
    data, whole = small(place), place.folder / "whole"
    start(place, "train", data, "-o", whole, *SETS).ended(0)
    for number in range(place.count):
        run, sent = place.folder / f"run-{number}", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[number % 3]
        options = ["--set", "data.cache_bytes=0", "--workers", "2"]
        child = start(place, "train", data, "-o", run, *SETS, *options)
        child.wait_for(lambda run=run: (run / STATE_FOLDER / MANIFEST).exists())
        os.killpg(child.pid, sent)
        verdict = child.ended(ENDED[sent], 0) or child.left()
        if not verdict and child.status and "to continue:" not in child.said():
            verdict = f"nothing said of going on: {child.said()}"
        verdict = verdict or finished(place, data, run)
        yield verdict or ("other bytes" if contents(run) != contents(whole) else litter(place, run))


@row("concurrent runs", 12, 2)
def concurrent(place: Place) -> Iterator[Verdict]:
    data = small(place)
    for number in range(place.count):
        if number % 2:
            home = place.folder / f"home-{number}"
            home.mkdir()
            children = [start(place, "train", data, *SETS, cwd=home) for _ in range(6)]
            verdict = next(filter(None, [child.ended(0) for child in children]), "")
            runs = sorted(path.parent for path in home.glob("runs/*/model.safetensors") if path.parent.name != "latest")
            same = all(contents(run) == contents(runs[0]) for run in runs)
            yield verdict or ("" if len(runs) == 6 and same else f"{len(runs)} runs of 6, the same: {same}")
        else:
            run = place.folder / f"one-{number}"
            children = [start(place, "train", data, "-o", run, *SETS, "--replace") for _ in range(4)]
            verdict = next(filter(None, [child.ended(0, 5) for child in children]), "")
            best = [child for child in children if child.status == 0]
            refused = [child for child in children if child.status == 5]
            if not verdict and (not best or not refused or not all("in use by" in child.said() for child in refused)):
                verdict = f"{len(best)} ended well, {len(refused)} were refused"
            verdict = verdict or litter(place, run)
            yield verdict or ("" if load_file(run / MODEL_FILE) and finite(run) else "a broken run")
