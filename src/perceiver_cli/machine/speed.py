"""`perceiver bench PRESET`: speed of the training step, forward pass and data loader on synthetic data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn.functional import cross_entropy

from perceiver_cli.config import Config, load_preset
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader, training_tasks
from perceiver_cli.errors import UsageError
from perceiver_cli.hardware import memory_bytes
from perceiver_cli.machine.made_up import made_up_files
from perceiver_cli.machine.measure import describe_machine, forward_pass, time_calls, training_step
from perceiver_cli.model.cost import estimate
from perceiver_cli.model.describe import DEFAULT_CLASSES
from perceiver_cli.model.device import Compute, choose_compute
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.training.optimizer import Average, make_optimizer

MADE_UP_FILES = 64
ROOM = 0.7  # of the memory of a machine, that a batch may take which nobody has asked for


def _that_fits(config: Config, specs: Mapping[str, InputSpec], asked: int | None, compute: Compute) -> int:
    """Return the examples of a batch: as many as asked for, else those of the preset that this machine can train on."""
    size, memory = asked or config.train.batch_size, memory_bytes()
    if compute.device.type != "cpu" or memory is None:
        return size
    layouts = {name: modality(spec.modality).layout(spec) for name, spec in specs.items()}
    needed = partial(
        estimate(config.model, layouts, DEFAULT_CLASSES).training_bytes, averaged=config.train.ema_decay > 0
    )
    if asked is None:
        while size > 1 and needed(size) > ROOM * memory:
            size //= 2
    if needed(size) > memory:
        found = f"a step of {size:,} needs about {needed(size) / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}"
        raise UsageError(found, "pass a smaller --batch-size" if size > 1 else "measure it on another machine")
    return size


def bench(
    preset: str,
    batch_size: int | None,
    seconds: float,
    device: str,
    precision: str,
    workers: int,
    tell: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Return samples per second of a preset's training step, forward pass and data loader, with machine and versions.

    Each is the median over the calls that fit in `seconds`, for a loader with workers the mean. The loader decodes,
    augments and batches synthetic files (500 x 375 JPEG, 5 s of 16 kHz WAV, STL meshes of 5,120 triangles, MP4 of
    320 x 240) and keeps nothing in memory. tell: called with what is measured next. Raises UsageError if there is no
    such preset or device, or if a step on the CPU needs more memory than this machine has.
    """
    config = load_preset(preset)
    specs = {name: settled(spec) for name, spec in config.inputs.items()}
    compute = choose_compute(device, precision)
    size = _that_fits(config, specs, batch_size, compute)
    tell(f"a batch of {size:,}, files read from the disk")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: made_up_files(Path(folder, name), spec.modality, MADE_UP_FILES) for name, spec in specs.items()}
        rows = (dict(zip(files, row, strict=True)) for row in zip(*files.values(), strict=True))
        examples = [Example(str(i), sources, (i % 2,)) for i, sources in enumerate(rows)]
        reader = Reader(specs, Limits())
        batches = reader.batches(training_tasks(examples, size, 0, 0, 1 << 40), workers)
        batch = next(batches)
        loading = time_calls(lambda: next(batches), seconds)
        # Workers deliver batches in bursts; a median would count only the fast ones.
        loader_s = loading.mean if workers else loading.median
        model = Perceiver(config.model, reader.layouts, DEFAULT_CLASSES).to(compute.device)
        segments = {name: segment.to(compute.device) for name, segment in batch.segments.items()}
        optimizer = make_optimizer(model, config.train)
        if config.train.ema_decay:
            average = Average(model, config.train.ema_decay)
            optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
        loss = partial(cross_entropy, target=batch.labels.to(compute.device))
        tell("training steps")
        step = training_step(lambda: model(segments), loss, optimizer, compute)
        step_s = time_calls(step, seconds, compute.device).median
        model.eval()
        tell("forward passes")
        forward_s = time_calls(forward_pass(lambda: model(segments), compute), seconds, compute.device).median
    return {
        "preset": preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_size": size,
        "training_samples_per_s": size / step_s,
        "forward_samples_per_s": size / forward_s,
        "loader_samples_per_s": size / loader_s,
        "workers": workers,
        **describe_machine(compute),
    }
