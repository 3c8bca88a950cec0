"""Reading videos with this package's loader, beside plain PyAV.

python -m benchmarks.loaders --seconds 5 --rounds 3
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.command import report, start
from perceiver_cli.cli.options import Json
from perceiver_cli.config import load_preset
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader, Task, ordered_tasks, training_tasks
from perceiver_cli.errors import counted
from perceiver_cli.machine.made_up import made_up_files
from perceiver_cli.machine.measure import time_calls
from perceiver_cli.model.device import choose_compute
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits

MADE_UP_FILES = 64
BATCH = 8


def loaders(seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield clips per second of reading videos: plain PyAV, then the loader with 1 and 2 workers, and augmenting.

    Videos are 320 x 240, H.264, 32 frames at 25 Hz, one clip of the loader, so that both decode the same frames. Plain
    PyAV stops at arrays; the loader also resizes to 224 x 224, cuts patches and makes batches; augmenting adds random
    crops, mirroring and recolouring. Each figure is a median of `rounds`, taken in turn.
    """
    spec = load_preset("audioset-video").inputs["video"].model_copy(update={"eval_windows": 1, "eval_crop": 1.0})
    with tempfile.TemporaryDirectory() as folder:
        sources = made_up_files(Path(folder), "video", MADE_UP_FILES)
        examples = [Example(str(i), {"video": source}, (i % 2,)) for i, source in enumerate(sources)]
        contenders: dict[str, Callable[[], float]] = {"plain PyAV": lambda: _plain_clips_per_s(sources, seconds)}
        ways: dict[str, Callable[[], Iterator[Task]]] = {
            "": lambda: ordered_tasks(cycle(examples), BATCH),
            ", augmenting": lambda: training_tasks(examples, BATCH, 0, 0, 1 << 40),
        }
        for workers, (way, tasks) in product((1, 2), ways.items()):
            name = f"loader, {counted(workers, 'worker')}{way}"
            contenders[name] = partial(_clips_per_s, spec, tasks, workers, seconds)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, measure in contenders.items():
                rates[name].append(measure())
    plain = rates["plain PyAV"]
    for name, own in rates.items():
        ratios = [rate / base for rate, base in zip(own, plain, strict=True)]
        yield {"name": name, "clips_per_s": median(own), "over_plain": median(ratios)}


def _clips_per_s(spec: InputSpec, tasks: Callable[[], Iterator[Task]], workers: int, seconds: float) -> float:
    batches = Reader({"video": spec}, Limits()).batches(tasks(), workers)
    for _ in range(2 * workers):  # skip the batches read ahead
        next(batches)
    rate = BATCH / time_calls(lambda: next(batches), seconds).mean
    batches.close()  # type: ignore[attr-defined]
    return rate


def _plain_clips_per_s(sources: Sequence[Source], seconds: float) -> float:
    import av

    films = cycle(sources)

    def decode() -> None:
        with av.open(next(films).name) as container:
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")

    return 1 / time_calls(decode, seconds).mean


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender, in turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
    json: Json = False,
) -> None:
    """Measure clips per second of reading videos: plain PyAV, and the loader with 1 and 2 workers."""
    report(loaders(seconds, rounds), choose_compute("cpu"), json)


if __name__ == "__main__":
    start(main)
