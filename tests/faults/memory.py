"""Low memory: commands in an address space that has little room left, from a quarter of a MiB to what they need."""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import trimesh
from PIL import Image

from tests.conftest import SMALL, SMALL_CLIPS, SMALL_PAIRS, write_clip, write_images, write_pairs
from tests.faults.process import start
from tests.faults.table import Place, Verdict, row

ROOM_MIB = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LIMIT_S = 60.0


def commands(place: Place) -> dict[str, list[str]]:
    """Return what is run, by name, after writing its files and its models."""
    folder = place.folder
    write_images(folder / "images", {"a": 12, "b": 12})
    Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(folder / "large.png")  # 48 MB decoded
    soundfile.write(folder / "long.wav", np.zeros((1_500_000, 2), np.int16), 48_000)  # 12 MB as float32
    write_pairs(folder / "pairs", 4)
    for name, sound in (("c/a.mp4", 300.0), ("c/b.mp4", 900.0), ("d/a.mp4", 2000.0), ("d/b.mp4", 3000.0)):
        write_clip(folder / "clips" / name, 8, sound)
    for name in ("e", "f"):
        (folder / "points" / name).mkdir(parents=True)
        for i in range(4):
            trimesh.creation.icosphere(subdivisions=3 + i % 2).export(folder / "points" / name / f"{i}.ply")
    short = ["--steps", "2", "--batch-size", "4", "--set", "data.val_fraction=0", *sets(SMALL)]
    of = {
        "image": ["images", *short],
        "audio": ["pairs", "--preset", "tiny-audio", *short, *sets(SMALL_PAIRS, "audio")],
        "video": ["clips", "--preset", "tiny-video", *short, *sets(SMALL_CLIPS, "video")],
        "points": ["points", *short, "--set", "inputs.points.num_points=200"],
    }
    for name, words in of.items():
        assert not (fault := start(place, *["train", *words, "-o", f"of-{name}"]).ended(0)), fault
    # Alone: beside a small file that is read, the forward pass would end the command before the blame is seen.
    tests = {
        "image": ["large.png"],
        "audio": ["long.wav"],
        "video": ["clips/c/a.mp4"],
        "points": ["points/e/1.ply"],
    }
    return {
        **{f"train {name}": ["train", *words, "-o", "run", "--replace"] for name, words in of.items()},
        "train with workers": ["train", *of["image"], "-o", "run", "--replace", "--workers", "2"],
        **{f"predict {name}": ["predict", *files, "-m", f"of-{name}"] for name, files in tests.items()},
        "evaluate": ["evaluate", "images", "-m", "of-image", "--json"],
        "preprocess": ["preprocess", "images", "large.png", "-m", "of-image", "-o", "images.tar"],
        "preprocess with workers": ["preprocess", "points", "-m", "of-points", "-o", "points.tar", "--workers", "2"],
    }


def sets(options: tuple[str, ...], modality: str = "") -> list[str]:
    """Return options of a configuration as words of a command: all, or those of one modality's input."""
    mine = [option for option in options if not modality or option.startswith(f"inputs.{modality}.")]
    return [word for option in mine for word in ("--set", option)]


def same(text: str, other: str) -> bool:
    """Return whether two outputs are the same text with the same numbers, up to the rounding of another kernel."""
    number = re.compile(r"\d+\.\d+(?:e-?\d+)?")
    close = all(
        math.isclose(float(a), float(b), rel_tol=1e-4, abs_tol=1e-6)
        for a, b in zip(number.findall(text), number.findall(other), strict=False)
    )
    return close and number.sub("", text) == number.sub("", other)


@row("low memory", tried=216, sample=12)
def low_memory(place: Place) -> Iterator[Verdict]:
    """Each command with 18 sizes of room: it ends with 5 and one line, or with what it says with much memory."""
    todo = commands(place)
    right = {}
    for name, words in todo.items():
        child = start(place, *words)
        assert not (fault := child.ended(0)), fault
        right[name] = child.out.read_text()
    trials = [(name, room) for room in ROOM_MIB for name in todo]
    place.random.shuffle(trials)
    for name, room in trials[: place.count]:
        child = start(place, *todo[name], room_mib=room)
        fault, answer = child.ended(0, 5), child.out.read_text()
        if child.status == 0 and "train" not in name and not same(answer, right[name]):
            fault = f"another answer: {answer[-200:]}"
        elif child.status == 5 and "memory" not in child.said():
            fault = f"status 5: {child.said()}"
        yield f"{name} with {room:g} MiB: {fault}" if fault else ""


STEADY_MIB = 12.0  # that a process may grow by between the first part of its work and the end


def resident_mib() -> float:
    """Return this process's resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@row("growth: 3,000 predictions, 600 steps, 3,000 records", tried=3, sample=1)
def growth(place: Place) -> Iterator[Verdict]:
    """Resident memory after all of the work is what it was after a tenth."""
    from perceiver_cli.inference.predictor import Predictor
    from perceiver_cli.training.events import StepDone
    from perceiver_cli.training.trainer import Trainer

    images = write_images(place.folder / "images", {"a": 12, "b": 12})
    paths = sorted(images.rglob("*.png"))
    overrides = [*SMALL, "train.steps=600", "data.val_fraction=0"]
    list(Trainer(images, place.folder / "short", overrides=[*SMALL, "train.steps=2", "data.val_fraction=0"]).fit())

    def predictions() -> Iterator[object]:
        predictor = Predictor(place.folder / "short")
        return predictor.predict(paths[i % len(paths)] for i in range(3000))

    def steps() -> Iterator[object]:
        events = Trainer(images, place.folder / "long", overrides=overrides).fit()
        return (event for event in events if isinstance(event, StepDone))

    for work in (predictions, steps)[: place.count]:
        sizes = [resident_mib() for _ in work()]
        grown = sizes[-1] - sizes[len(sizes) // 10]
        yield "" if grown < STEADY_MIB else f"{work.__name__}: grew by {grown:.1f} MiB over {len(sizes)}"
    if place.count > 2:
        peaks = []
        for count in (300, 3000):
            write_images(place.folder / f"{count}", {"a": count})
            start(place, "preprocess", f"{count}", "-o", f"{count}.tar").ended(0)
            peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10)
        grown = peaks[1] - peaks[0]
        yield "" if grown < STEADY_MIB else f"records: grew by {grown:.1f} MiB from 300 to 3,000"
