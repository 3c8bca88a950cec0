"""Two checkouts of this repository, measured in one run through their command lines.

    python -m benchmarks.side_by_side BASE HERE --rounds 5

BASE and HERE are folders of git worktrees. Every measurement has its own process, with the same Python, the same model
and the same files; the two checkouts take turns, and the first one alternates by round. A ratio is taken within a
round, so that a machine that slows down slows both.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import start
from perceiver_cli.cli.options import Json
from perceiver_cli.cli.tables import emit_table
from perceiver_cli.cli.terminal import emit_json, say, show_facts
from perceiver_cli.errors import DataError, ResourceError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.hardware import cores

PICTURES = 500
SIDE = 32  # pixels of a picture's side
CLASSES = ("high", "middle", "low")
STEPS = 30  # of training the model that both checkouts load
SIDES = ("base", "here")
WHICH = "import perceiver_cli; print(perceiver_cli.__file__)"
RATES = ("training", "forward", "loader")


@dataclass(frozen=True)
class Checkout:
    """One of the two checkouts: its name (base or here) and its folder."""

    name: str
    folder: Path

    def python(self, place: Path, *arguments: str) -> str:
        """Return the stdout of Python with this checkout's package, run in `place`.

        Raises:
            ResourceError: Python ended with an error.
        """
        # Without the caller's run and package.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PERCEIVER_")}
        environment["PYTHONPATH"] = str(self.folder / "src")
        done = subprocess.run(
            [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ResourceError(f"{self.name}: {' '.join(arguments)[:80]} ended with {done.returncode}: {last}")
        return done.stdout

    def perceiver(self, place: Path, *arguments: str) -> str:
        """Return the stdout of a `perceiver` command of this checkout, run in `place`."""
        return self.python(place, "-m", "perceiver_cli", *arguments)

    def commit(self) -> str:
        """Return the commit that is checked out, with a plus sign if files differ from it."""
        with suppress(OSError, subprocess.CalledProcessError):
            commit, changes = (
                subprocess.run(["git", "-C", self.folder, *query], capture_output=True, text=True, check=True).stdout
                for query in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
            )
            return commit.strip() + ("+" if changes else "")
        return "unknown"


def checkout(name: str, folder: Path) -> Checkout:
    """Return a checkout, after a check that Python imports its package.

    Raises:
        DataError: the folder holds no package, or Python imports another one.
    """
    side = Checkout(name, folder.resolve())
    package = side.folder / "src" / "perceiver_cli"
    if not (package / "__main__.py").exists():
        raise DataError(f"{show_path(folder)}: no src/perceiver_cli in it", "expected a checkout of this repository")
    imported = side.python(side.folder / "src", "-c", WHICH).strip()
    if Path(imported).parent != package:
        raise DataError(f"{show_path(folder)}: Python imports {show_path(imported)} instead")
    return side


# ---------------------------------------------------------------- measurements


def write_pictures(folder: Path) -> None:
    """Write PICTURES PNGs in class folders: a bright bar in one of three bands of noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        kind = number % len(CLASSES)
        pixels = rng.integers(0, 80, (SIDE, SIDE), dtype=np.uint8)
        pixels[10 * kind : 10 * kind + 8] += 150
        (folder / CLASSES[kind]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / CLASSES[kind] / f"{number:03d}.png")


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one run."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measurements(place: Path, seconds: float) -> dict[str, Callable[[Checkout], dict[str, float]]]:
    """Return the measurements of a checkout by name; each returns figures by the name of their row.

    Lower is better for rows in seconds or "times", higher for rows in "/s".
    """

    def help_text(side: Checkout) -> dict[str, float]:
        libraries = timed(lambda: side.python(place, "-c", "import typer, rich"))
        own = timed(lambda: side.perceiver(place, "--help"))
        return {"--help, s": own, "--help over import typer, rich, times": own / libraries}

    def predict_one(side: Checkout) -> dict[str, float]:
        arguments = ("predict", str(Path("pictures", CLASSES[0], "000.png")), "-m", "run", "--format", "jsonl")
        return {"predict 1 PNG, s": timed(lambda: side.perceiver(place, *arguments))}

    def predict_all(side: Checkout) -> dict[str, float]:
        arguments = ("predict", "pictures", "-m", "run", "--format", "jsonl")
        return {f"predict {PICTURES} PNGs, s": timed(lambda: side.perceiver(place, *arguments))}

    def bench(side: Checkout) -> dict[str, float]:
        facts = json.loads(side.perceiver(place, "bench", "tiny-image", "--seconds", str(seconds), "--json"))
        return {f"tiny-image {name}, samples/s": facts[f"{name}_samples_per_s"] for name in RATES}

    return {"help": help_text, "predict-one": predict_one, "predict-all": predict_all, "bench": bench}


MEASUREMENTS = ("help", "predict-one", "predict-all", "bench")


def compare_checkouts(
    base: Checkout, here: Checkout, names: list[str], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield one row per figure: the median of each side, and the ratios HERE/BASE of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_pictures(place / "pictures")
        base.perceiver(place, "train", "pictures", "-o", "run", "--preset", "tiny-image", "--steps", str(STEPS))
        predict = ("predict", "pictures", "-m", "run", "--format", "jsonl")
        same = base.perceiver(place, *predict) == here.perceiver(place, *predict)
        say(f"predictions of the same model: {'the same bytes' if same else 'they differ'}")
        every = measurements(place, seconds)
        for name in names:
            figures: dict[str, dict[str, list[float]]] = {}
            for number in range(-1, rounds):
                for side in (base, here) if number % 2 == 0 else (here, base):
                    measured = every[name](side)
                    if number < 0:  # a warm-up of bytecode and the disk's cache
                        continue
                    for row, value in measured.items():
                        figures.setdefault(row, {side_name: [] for side_name in SIDES})[side.name].append(value)
            for row, sides in figures.items():
                ratios = sorted(new / old for old, new in zip(sides["base"], sides["here"], strict=True))
                yield {
                    "name": row,
                    "base": median(sides["base"]),
                    "here": median(sides["here"]),
                    "here_over_base": {"min": ratios[0], "median": median(ratios), "max": ratios[-1]},
                    "better": "higher" if row.endswith("/s") else "lower",
                }


# ---------------------------------------------------------------- the command


def processor() -> str:
    """Return the processor's name, or its architecture if the system gives no name."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def facts_of(base: Checkout, here: Checkout, rounds: int) -> dict[str, Any]:
    """Return the facts to report beside the table: commits, machine, versions."""
    facts = {
        "base": base.commit(),
        "here": here.commit(),
        "rounds": rounds,
        "processor": processor(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses"),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    if hasattr(os, "getloadavg"):
        facts["load"] = round(os.getloadavg()[1], 2)  # of five minutes; above 1 + threads, other processes were busy
    return facts


def main(
    base: Annotated[Path, typer.Argument(help="Checkout to compare with.")],
    here: Annotated[Path, typer.Argument(help="Checkout to judge.")] = Path("."),
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each checkout, in turn.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each rate of perceiver bench.")] = 3.0,
    only: Annotated[str, typer.Option(help="Measurements to make, by commas.")] = ",".join(MEASUREMENTS),
    json: Json = False,
) -> None:
    """Compare two checkouts: start, predictions, training step, forward pass and loader, with ratios HERE/BASE."""
    names = only.split(",")
    for name in names:
        if name not in MEASUREMENTS:
            raise UsageError(f"--only {name}: not a measurement", f"expected some of {', '.join(MEASUREMENTS)}")
    sides = checkout("base", base), checkout("here", here)
    rows = list(compare_checkouts(*sides, names, rounds, seconds))
    facts = facts_of(*sides, rounds)
    if json:
        emit_json({"rows": rows, **facts})
        return
    cells = []
    for row in rows:
        ratio = row["here_over_base"]
        spread = f"{ratio['min']:.3f} - {ratio['max']:.3f}"
        cells.append(
            [row["name"], f"{row['base']:.4g}", f"{row['here']:.4g}", f"{ratio['median']:.3f}", spread, row["better"]]
        )
    emit_table(["name", "base", "here", "here/base", "min - max", "better"], cells)
    show_facts(facts, as_json=False)


if __name__ == "__main__":
    start(main)
