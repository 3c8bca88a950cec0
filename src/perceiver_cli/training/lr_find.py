"""The learning rate range test (Smith 2017): the loss while the rate grows, and the rate that it suggests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np

from perceiver_cli.errors import DivergedError
from perceiver_cli.report.charts import plotted
from perceiver_cli.training.trainer import Trainer

RATES = (1e-5, 1.0)  # first and last
SMOOTHING = 0.9  # share that the moving average of the loss keeps at each step
WORSE = 1.5  # the test ends at this multiple of the lowest loss
MIN_STEPS = 10
MARGIN = 0.3  # of the plot above the first and below the lowest loss, as a share of the fall


@dataclass(frozen=True)
class Curve:
    """The result of a range test. rates, losses, smoothed losses: by step; notes: doubts about the suggestion."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float
    notes: tuple[str, ...] = ()

    @property
    def fell(self) -> bool:
        """Whether the loss fell before it rose."""
        return int(np.argmin(self.smoothed)) >= MIN_STEPS

    @property
    def fell_to_the_end(self) -> bool:
        """Whether the loss was lowest at the highest rate."""
        return int(np.argmin(self.smoothed)) == len(self.smoothed) - 1


def range_test(trainer: Trainer, steps: int, progress: Callable[[int, int], None]) -> Curve:
    """Return the losses of up to `steps` optimiser steps while the learning rate grows by a constant factor.

    The test ends early once the smoothed loss is WORSE times its lowest. Nothing is written. Raises as `suggest` does.
    """
    run, config = trainer.new_run(), trainer.plan.config
    batches = trainer.plan.reader.batches(run.tasks(steps * config.train.accumulate), config.data.workers or 0)
    low, high = RATES
    rates, losses, smoothed, average = [], [], [], 0.0
    for step in range(steps):
        rate = low * (high / low) ** (step / max(1, steps - 1))
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        loss = float(run.update(batches))
        if not isfinite(loss):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        rates.append(rate)
        losses.append(loss)
        smoothed.append(average / (1 - SMOOTHING ** (step + 1)))
        progress(step + 1, steps)
        if step >= MIN_STEPS and smoothed[-1] > WORSE * min(smoothed):
            break
    return suggest(rates, losses, smoothed)


def suggest(rates: list[float], losses: list[float], smoothed: list[float]) -> Curve:
    """Return the curve with a suggested learning rate; raise DivergedError if fewer than MIN_STEPS losses are finite.

    The suggestion is the geometric mean of two rates: the first at which the smoothed loss has fallen by half of its
    whole fall (there it is steep), and the one at which it is lowest (beyond it training is unstable).
    """
    if len(rates) < MIN_STEPS:
        raise DivergedError(
            f"the loss is not finite after {len(rates)} steps of a learning rate up to {rates[-1] if rates else 0:.2g}",
            "look at the data and its scale",
        )
    half, best = usable(smoothed)
    suggestion = float(f"{sqrt(rates[half] * rates[best]):.2g}")
    notes = []
    if best == len(rates) - 1:
        notes.append(
            "the loss was still falling at the highest rate: the best rate may lie higher or need more --steps"
        )
    if best < MIN_STEPS:
        notes.append("the loss never fell: ignore the suggestion")
    return Curve(tuple(rates), tuple(losses), tuple(smoothed), suggestion, tuple(notes))


def usable(smoothed: Sequence[float]) -> tuple[int, int]:
    """Return the places of two rates: where the loss has first fallen by half, and where it is lowest."""
    best = int(np.argmin(smoothed))
    return int(np.argmax(np.asarray(smoothed) <= (smoothed[0] + smoothed[best]) / 2)), best


def draw_curve(curve: Curve, path: str | os.PathLike[str]) -> None:
    """Write the curve as PNG or SVG. Raises ResourceError if it cannot be written."""
    with plotted(path, 6, 3.6) as figure:
        axes = figure.subplots()
        axes.plot(curve.rates, curve.losses, color="#1b6ca8", alpha=0.3, linewidth=1)
        axes.plot(curve.rates, curve.smoothed, color="#1b6ca8", label="loss, smoothed")
        if curve.fell:
            low, high = (curve.rates[place] for place in usable(curve.smoothed))
            axes.axvspan(low, high, color="#1b6ca8", alpha=0.12, linewidth=0, label=f"usable: {low:.2g} to {high:.2g}")
        axes.axvline(curve.suggestion, color="#c8553d", linestyle="--", label=f"suggested: {curve.suggestion:g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        axes.xaxis.set_major_formatter("{x:g}")  # the usual one writes powers as mathematics, which `plotted` turns off
        lowest, first = min(curve.smoothed), curve.smoothed[0]
        margin = max(first - lowest, 0.1 * first)  # a loss that explodes would flatten the rest
        axes.set_ylim(max(0.0, lowest - MARGIN * margin), first + MARGIN * margin)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
