"""`perceiver bench PRESET`: speed of the training step, forward pass and data loader on synthetic data."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn.functional import cross_entropy

from perceiver_cli.config import load_preset
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader, training_tasks
from perceiver_cli.machine.made_up import made_up_files
from perceiver_cli.machine.measure import describe_machine, forward_pass, time_calls, training_step
from perceiver_cli.model.describe import DEFAULT_CLASSES
from perceiver_cli.model.device import choose_compute
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import settled
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.training.optimizer import Average, make_optimizer

MADE_UP_FILES = 64


def bench(
    preset: str, batch_size: int | None, seconds: float, device: str, precision: str, workers: int
) -> dict[str, Any]:
    """Return samples per second of a preset's training step, forward pass and data loader, with machine and versions.

    Each is the median over the calls that fit in `seconds`, for a loader with workers the mean. The loader decodes,
    augments and batches synthetic files (500 x 375 JPEG, 5 s of 16 kHz WAV, STL meshes of 5,120 triangles, MP4 of
    320 x 240) and keeps nothing in memory. Raises UsageError if there is no such preset or device.
    """
    config = load_preset(preset)
    specs = {name: settled(spec) for name, spec in config.inputs.items()}
    compute = choose_compute(device, precision)
    size = batch_size or config.train.batch_size
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
        step = training_step(lambda: model(segments), loss, optimizer, compute)
        step_s = time_calls(step, seconds, compute.device).median
        model.eval()
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
