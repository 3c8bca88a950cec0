"""Time and memory over the number of inputs: `perceiver bench growth` with the usual way as a second contender.

python -m benchmarks.growth --rounds 1 --plot growth.svg
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import typer

from benchmarks import contest
from benchmarks.command import report, start
from perceiver_cli.cli.options import Device, Json, Precision
from perceiver_cli.machine.growth import OURS, Spent, Trial, draw, growth
from perceiver_cli.model.device import choose_compute

CONTENDERS: dict[str, Callable[[Trial], Spent]] = {
    **OURS,
    "usual (SDPA)": partial(contest.measure, "usual (SDPA)"),
}


def main(
    mode: Annotated[Literal["forward", "train"], typer.Option(help="Call to time.")] = "forward",
    plot: Annotated[str | None, typer.Option(help="Plot to FILE.svg or FILE.png.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Processes per contender and size, in turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Measure the imagenet model and one cross-attend for 2^12 to 2^20 inputs, ours and the usual way (SDPA)."""
    rows = growth(Trial("imagenet", mode, seconds, device, precision), rounds, CONTENDERS)
    printed = report(rows, choose_compute(device, precision), json)
    if plot is not None:
        draw(printed, plot)


if __name__ == "__main__":
    start(main)
