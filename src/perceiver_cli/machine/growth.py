"""Time and memory of one cross-attend and of the whole model over the number of inputs.

Axes: B batch, N latents, W width of Q, K and V. Each measurement has its own process. Times are medians inside a
process; memory is the process's peak above its size with torch imported and nothing built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.config import Config, ModelConfig, load_preset
from perceiver_cli.errors import UsageError
from perceiver_cli.machine.measure import forward_pass, in_new_process, peak_above, time_calls, training_step
from perceiver_cli.malloc import keep_freed, peak_bytes
from perceiver_cli.model.attention import CrossAttend, Memory
from perceiver_cli.model.device import Compute, choose_compute
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.report.charts import plotted

GROWTH_INPUTS = tuple(2**power for power in range(12, 21, 2))  # squares: 64 x 64 to 1024 x 1024
SLOPE_FROM = 2**14  # inputs
NUM_CLASSES = 1000
COLOURS = ("#1b6ca8", "#c8553d")  # a plot's contenders, in order


@dataclass(frozen=True)
class Trial:
    """One measurement in one process.

    mode: "forward", or "train": forward, cross-entropy (a sum if alone), backward and a plain SGD step. seconds: time
    to spend. side: pixels of square images; None for the preset's inputs. alone: only the first cross-attend's read.
    """

    preset: str
    mode: str = "forward"
    seconds: float = 5.0
    device: str = "auto"
    precision: str = "auto"
    batch: int = 1
    side: int | None = None
    alone: bool = False


@dataclass(frozen=True)
class Spent:
    """Seconds of a call, and peak memory in bytes."""

    seconds: float
    peak_bytes: int


def layouts_of(config: Config, side: int | None) -> dict[str, Layout]:
    """Return a preset's layouts; with a side, for side x side pixels. Raises UsageError if it reads no images."""
    specs = {name: settled(spec) for name, spec in config.inputs.items()}
    if side is not None:
        if set(specs) != {"image"}:
            raise UsageError(f"{side} x {side} inputs need images, but {config.name} reads {'+'.join(specs)}")
        specs = {"image": specs["image"].model_copy(update={"size": (side, side)})}
    return {name: modality(spec.modality).layout(spec) for name, spec in specs.items()}


def made_up_segments(layouts: Mapping[str, Layout], batch: int, device: torch.device) -> dict[str, Segment]:
    """Return a batch of random inputs from a fixed seed."""
    segments = {}
    for name, layout in layouts.items():
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(batch, *layout.prepared_shape, generator=generator)
        positions = None
        if not layout.is_grid:
            positions = torch.rand(batch, layout.prepared_shape[0], layout.dims, generator=generator).mul_(2).sub_(1)
        segments[name] = Segment(values, positions).to(device)
    return segments


def new_model(config: ModelConfig, layouts: Mapping[str, Layout], device: torch.device) -> Perceiver:
    """Return a model with random weights, in its head too."""
    model = Perceiver(config, layouts, NUM_CLASSES).to(device)
    # With a head of zeros the gradient of every other parameter is zero.
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def read_alone(model: Perceiver, segments: Mapping[str, Segment]) -> Tensor:
    """Return the read of the first cross-attend (B, N, W), without the linear layers on latents after it."""
    block = model.cross_attends[0]
    assert isinstance(block, CrossAttend)
    return block.read(model.latents.unsqueeze(0), Memory(model.encoding.inputs(segments).values()))


def timed_call(
    trial: Trial, compute: Compute, call: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
) -> Callable[[], None]:
    """Return a function that runs `call` once in the trial's mode; a training step changes `parameters`."""
    if trial.mode == "forward":
        return forward_pass(call, compute)
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=1e-6)
    labels = torch.zeros(trial.batch, dtype=torch.long, device=compute.device)
    loss = Tensor.sum if trial.alone else partial(F.cross_entropy, target=labels)
    return training_step(lambda: call().float(), loss, optimizer, compute)


def measure_model(trial: Trial) -> Spent:
    """Return the time and memory of this package's model, measured in this process."""
    base = peak_bytes()
    keep_freed()  # as the command line does
    compute = choose_compute(trial.device, trial.precision)
    config = load_preset(trial.preset)
    layouts = layouts_of(config, trial.side)
    segments = made_up_segments(layouts, trial.batch, compute.device)
    model = new_model(config.model, layouts, compute.device)
    read = (lambda: read_alone(model, segments)) if trial.alone else (lambda: model(segments))
    parameters = list((model.cross_attends[0] if trial.alone else model).parameters())
    call = timed_call(trial, compute, read, parameters)
    return Spent(time_calls(call, trial.seconds, compute.device).median, peak_above(base, compute))


Measure = Callable[[Trial], Spent]
OURS: Mapping[str, Measure] = {"ours": measure_model}


def growth(trial: Trial, rounds: int, contenders: Mapping[str, Measure] = OURS) -> Iterator[dict[str, Any]]:
    """Yield rows of one cross-attend, then of the whole model, for GROWTH_INPUTS inputs.

    The last rows of each, one per contender, hold `slope`: of log time over log inputs, from SLOPE_FROM inputs on.
    The trial's `side` and `alone` are ignored. rounds: processes per contender and size, in turn; contenders: functions
    by name that measure a trial, each called in its own process.
    """
    for alone in (True, False):
        about = {"what": "cross-attend" if alone else "model"}
        times: dict[str, list[tuple[int, float]]] = {name: [] for name in contenders}
        for inputs in GROWTH_INPUTS:
            sized = replace(trial, side=int(inputs**0.5), alone=alone)
            results: dict[str, list[Spent]] = {name: [] for name in contenders}
            for _ in range(rounds):
                for name, measure in contenders.items():
                    results[name].append(in_new_process(name, measure, sized))
            for name, runs in results.items():
                seconds = median(run.seconds for run in runs)
                times[name].append((inputs, seconds))
                peak = median(run.peak_bytes for run in runs) / 2**20
                yield about | {"name": name, "inputs": inputs, "seconds": seconds, "peak_mib": peak}
        for name, points in times.items():
            yield about | {"name": name, "slope": slope(points)}


def slope(points: Sequence[tuple[int, float]]) -> float:
    """Return the least-squares slope of log time over log inputs, from SLOPE_FROM inputs on."""
    inputs, seconds = np.log([point for point in points if point[0] >= SLOPE_FROM]).T
    return float(np.polyfit(inputs, seconds, 1)[0])


def draw(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Write a plot of `growth` rows (SVG or PNG by suffix): time and memory over inputs."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    with plotted(path, 9, 3.6) as figure:
        axes = figure.subplots(1, 2)
        labels = {"seconds": "seconds", "peak_mib": "peak MiB beyond torch"}
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for kind, line in (("cross-attend", "--"), ("model", "-")):
                for name, colour in zip(names, COLOURS, strict=False):
                    points = [
                        (r["inputs"], r[key]) for r in rows if (r["what"], r["name"]) == (kind, name) and key in r
                    ]
                    axis.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=colour,
                              label=kind if len(names) == 1 else f"{kind}, {name}")  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="inputs M", ylabel=label)
            axis.set_xticks(GROWTH_INPUTS, [f"{count:,}" for count in GROWTH_INPUTS], fontsize=8)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8, frameon=False)
