"""What training costs on any machine: memory, time and disk, and what was assumed. No torch.

The time is rough, within a factor of about two: matrix products at a share of the machine's peak, and no step faster
than its launches. The shares are those of the imagenet model on an NVIDIA H200 and two CPU cores, as measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

import numpy as np

from perceiver_cli.config import Config
from perceiver_cli.errors import counted
from perceiver_cli.hardware import cores, memory_bytes
from perceiver_cli.model.cost import Cost
from perceiver_cli.preprocess import modality, settled, timed_modality
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.preprocess.spec import InputSpec

Name = Literal["h100x8", "h100", "a100", "rtx4090", "cpu"]
PASSES, RECOMPUTED = 3, 4  # forward passes that a training step costs, and with --recompute
SHARE = 0.2  # of a GPU's peak that matrix products reach, counted as in the paper
PER_CORE = 150e9  # FLOP a second of a CPU core in float32, counted as in the paper
LAUNCH_S = 0.0025  # of an attention block in a training step on a GPU: small batches wait for Python
SHARED = 0.9  # efficiency of several GPUs
BF16 = 0.6  # bytes of activations in bf16, as a share of those in float32
RECORD_BYTES = 3584  # names and padding around the arrays of a record
STATES = 2  # states to resume from, while a new one is written
UNKNOWN_MEMORY = 16 << 30  # of a machine whose memory is unknown


@dataclass(frozen=True)
class Machine:
    """A machine: its number of devices, and of each the memory in bytes and the peaks in FLOP a second."""

    words: str
    count: int
    memory: int
    bf16: float
    fp32: float  # TF32 on a GPU


# Peaks of dense products, from NVIDIA's data sheets.
MACHINES: dict[str, Machine] = {
    "h100x8": Machine("8 x NVIDIA H100 of 80 GB", 8, 80 * 10**9, 989e12, 495e12),
    "h100": Machine("NVIDIA H100 of 80 GB", 1, 80 * 10**9, 989e12, 495e12),
    "a100": Machine("NVIDIA A100 of 80 GB", 1, 80 * 10**9, 312e12, 156e12),
    "rtx4090": Machine("NVIDIA RTX 4090 of 24 GB", 1, 24 * 10**9, 165e12, 83e12),
}
# Training examples of the paper's data sets, for their recipes without data.
PUBLISHED = {"imagenet": 1_281_167, "audioset": 1_771_873, "modelnet40": 9_843}
DEFAULT_EXAMPLES = 10_000


def machine(name: str) -> Machine:
    """Return a machine by its name; "cpu" is this one without a GPU."""
    if name in MACHINES:
        return MACHINES[name]
    peak = PER_CORE * cores()
    return Machine(f"the {cores()} CPU cores here", 1, memory_bytes() or UNKNOWN_MEMORY, peak, peak)


def training_estimate(
    name: str, config: Config, cost: Cost, layouts: Mapping[str, Layout], examples: int | None = None
) -> dict[str, Any]:
    """Return what training a recipe costs on a machine; the memory is that of one device.

    examples: of training; None takes those of the paper's data set, for another recipe DEFAULT_EXAMPLES.
    """
    train, target, is_cpu = config.train, machine(name), name == "cpu"
    published = next((count for data, count in PUBLISHED.items() if config.name.startswith(data)), DEFAULT_EXAMPLES)
    examples, per_step = examples or published, train.examples_per_step
    in_bf16 = not is_cpu and train.precision != "fp32"
    share = (1.0 if is_cpu else SHARE) * (SHARED if target.count > 1 else 1.0)
    speed = (target.bf16 if in_bf16 else target.fp32) * target.count * share
    passes = RECOMPUTED if train.recompute else PASSES
    rounds = ceil(train.accumulate / target.count)  # batches that one device computes in a step
    launches = 0.0 if is_cpu else LAUNCH_S * _num_blocks(config) * rounds
    step_s = max(passes * cost.flops * per_step / speed, launches)
    steps = max(1, int(train.max_time_s / step_s)) if train.max_time_s else train.steps_for(examples)
    state = cost.training_bytes(0, averaged=train.ema_decay > 0)
    each = int((cost.recomputed_bytes if train.recompute else cost.activation_bytes) * (BF16 if in_bf16 else 1))
    moments = state - 4 * cost.parameters  # without gradients
    record = RECORD_BYTES + sum(_record_bytes(settled(config.inputs[name]), each) for name, each in layouts.items())
    how = "" if is_cpu else f", {share:.0%} of the peak in {'bf16' if in_bf16 else 'TF32'}"
    assumed = [
        f"{examples:,} training examples, {per_step:,} a step",
        f"{_rounded(cost.flops / 1e9)} GFLOP a forward pass, {passes} of them a step",
        f"{_rounded(speed / 1e12)} TFLOP a second{how}",
        *([] if is_cpu else [f"no step faster than {launches:.2g} s, in which the GPU waits for launches"]),
        *([f"{target.count} GPUs share each step, as with --devices {target.count}"] if target.count > 1 else []),
        "files are read as fast as the model needs them; the time may be wrong by a factor of two",
        "records of pictures and sounds of the model's own size",
    ]
    memory = state + ceil(per_step / rounds / target.count) * each
    return {
        "machine": target.words,
        "memory_bytes": memory,
        "machine_memory_bytes": target.memory,
        "fits": memory <= target.memory,
        "largest_batch": max(0, target.memory - state) // each * target.count,
        "steps": steps,
        "seconds_per_step": step_s,
        "hours": steps * step_s / 3600,
        "disk_bytes": {
            "model": 4 * cost.parameters,
            "run": 4 * cost.parameters + STATES * moments,
            "records": round(examples * record),
        },
        "assumptions": assumed,
    }


def estimate_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return an estimate as lines of text."""
    room = f"{_size(facts['memory_bytes'])} of {_size(facts['machine_memory_bytes'])}"
    little = "" if facts["fits"] else ", too little: pass a smaller --batch-size, or --recompute"
    disk = facts["disk_bytes"]
    return [
        f"on {facts['machine']}: {room} of memory{little}; the largest batch is about {facts['largest_batch']:,}",
        f"about {_time(facts['hours'])}: {counted(facts['steps'], 'step')} of {_rounded(facts['seconds_per_step'])} s",
        f"disk: model {_size(disk['model'])}, run {_size(disk['run'])}, records of the data {_size(disk['records'])}",
        *(f"  assumed: {each}" for each in facts["assumptions"]),
    ]


def _num_blocks(config: Config) -> int:
    """Return the number of attention blocks that a forward pass runs."""
    kinds = [kind for kind, _ in config.model.steps]
    return kinds.count("c") + kinds.count("t") * config.model.self_attends_per_block


def _record_bytes(spec: InputSpec, layout: Layout) -> float:
    """Return the bytes of one decoded example of the model's own size."""
    dtype, shape = modality(spec.modality).loaded(spec)
    timed = timed_modality(spec.modality)
    if timed is not None:
        count = timed.clip_s(spec) * timed.steps_hz(spec) * prod(filter(None, shape[1:]))
    else:
        count = prod(layout.prepared_shape) + prod(layout.positions_shape)
    return np.dtype(dtype).itemsize * count


def _size(num_bytes: int) -> str:
    """Return bytes in a unit that a person reads: 1.4 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.3g} TB"


def _time(hours: float) -> str:
    """Return hours in a unit that a person reads: 12 minutes, 3.4 hours, 5.1 days."""
    if hours < 1:
        return f"{60 * hours:.2g} minutes"
    return f"{_rounded(hours)} hours" if hours < 48 else f"{_rounded(hours / 24)} days"


def _rounded(value: float) -> str:
    """Return a number with three digits, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
