"""Measurements of speed on made-up data: training step, forward pass, data loaders. Nothing here is a test."""

from __future__ import annotations

import io
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from perceiver_cli.config import load_preset
from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Batch, Reader, Task, ordered_tasks, training_tasks
from perceiver_cli.errors import counted
from perceiver_cli.hardware import cores
from perceiver_cli.model.describe import DEFAULT_CLASSES
from perceiver_cli.model.device import Compute, choose
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import settled
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.training.optimizer import make_average, make_optimizer

MADE_UP_FILES = 64
WARM_UP = 2  # calls that are not counted


def bench(
    preset: str, batch_size: int | None, seconds: float, device: str, precision: str, workers: int
) -> dict[str, Any]:
    """Return samples per second of a preset's training step, forward pass and data loader, with machine and versions.

    Each is the median over as many calls as fit in `seconds`. The loader decodes, augments and batches made-up files
    (500 x 375 JPEG, 5 s of 16 kHz WAV, STL meshes of 5,120 triangles); nothing is kept in memory between visits.

    Raises:
        UsageError: no such preset, or a device that is not there.
    """
    config = load_preset(preset)
    specs = {name: settled(spec) for name, spec in config.inputs.items()}
    compute = choose(device, precision)
    size = batch_size or config.train.batch_size
    with tempfile.TemporaryDirectory() as folder:
        examples = [
            Example(
                str(i), {name: _made_up_file(Path(folder), spec.modality, i) for name, spec in specs.items()}, (i % 2,)
            )
            for i in range(MADE_UP_FILES)
        ]
        reader = Reader(specs, Limits())
        batches = reader.batches(training_tasks(examples, size, 0, 0, 1 << 40), workers)
        batch = next(batches)
        loader_s = _timed(lambda: next(batches), seconds, Compute(torch.device("cpu"), "fp32"))
        model = Perceiver(config.model, reader.layouts, DEFAULT_CLASSES).to(compute.device)
        step_s = _timed(_training_step(model, batch, config.train, compute), seconds, compute)
        forward_s = _timed(_forward(model.eval(), batch, compute), seconds, compute)
    return {
        "preset": preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_size": size,
        "training_samples_per_s": size / step_s,
        "forward_samples_per_s": size / forward_s,
        "loader_samples_per_s": size / loader_s,
        "workers": workers,
        **machine(compute),
    }


def loaders(seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield clips per second of reading videos: plain PyAV, then the loader with 1 and 2 workers, and augmenting.

    Videos are 320 x 240, H.264, 32 frames at 25 Hz, all of which the loader's clip needs: both decode the same frames,
    plain PyAV to arrays and no further; the loader also brings them to 224 x 224, cuts patches and makes batches, and
    where it augments, crops at random, mirrors and recolours. Each figure is a median of `rounds`, taken in turn.
    """
    spec = load_preset("audioset-video").inputs["video"].model_copy(update={"eval_windows": 1, "eval_crop": 1.0})
    with tempfile.TemporaryDirectory() as folder:
        sources = made_up_files(Path(folder), "video", MADE_UP_FILES)
        examples = [Example(str(i), {"video": source}, (i % 2,)) for i, source in enumerate(sources)]
        contenders: dict[str, Callable[[], float]] = {"plain PyAV": lambda: _plain_clips_per_s(sources, seconds)}
        for workers in (1, 2):
            name = f"loader, {counted(workers, 'worker')}"
            contenders[name] = partial(_clips_per_s, spec, lambda: ordered_tasks(cycle(examples), 8), workers, seconds)
            contenders[f"{name}, augmenting"] = partial(
                _clips_per_s, spec, lambda: training_tasks(examples, 8, 0, 0, 1 << 40), workers, seconds
            )
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, measure in contenders.items():
                found[name].append(measure())
    plain = found["plain PyAV"]
    for name, rates in found.items():
        ratios = [rate / base for rate, base in zip(rates, plain, strict=True)]
        yield {"name": name, "clips_per_s": median(rates), "over_plain": median(ratios)}


def _clips_per_s(spec: InputSpec, tasks: Callable[[], Iterator[Task]], workers: int, seconds: float) -> float:
    batches = Reader({"video": spec}, Limits()).batches(tasks(), workers)
    for _ in range(WARM_UP + 2 * workers):  # what was read ahead is not counted
        next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        count += len(next(batches).examples)
    rate = count / (time.perf_counter() - begin)
    batches.close()  # type: ignore[attr-defined]
    return rate


def _plain_clips_per_s(sources: Sequence[Source], seconds: float) -> float:
    import av

    begin, count = time.perf_counter(), 0
    while time.perf_counter() < begin + seconds:
        with av.open(sources[count % len(sources)].name) as container:
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
        count += 1
    return count / (time.perf_counter() - begin)


def machine(compute: Compute) -> dict[str, Any]:
    """Return what a measurement must be read with: device, cores, threads, versions."""
    name = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else platform.machine()
    return {
        "device": str(compute.device),
        "device_name": name,
        "precision": compute.precision,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _timed(call: Callable[[], object], seconds: float, compute: Compute) -> float:
    """Return the median seconds of a call, after a warm-up."""
    times: list[float] = []
    end = 0.0
    for count in range(1 << 30):
        begin = time.perf_counter()
        call()
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)
        now = time.perf_counter()
        if count == WARM_UP:
            end = now + seconds
        if count >= WARM_UP:
            times.append(now - begin)
            if now >= end:
                break
    return median(times)


def _training_step(model: Perceiver, batch: Batch, train: Any, compute: Compute) -> Callable[[], object]:
    optimizer = make_optimizer(model, train)
    average = make_average(model, train.ema_decay) if train.ema_decay else None
    segments = {name: segment.to(compute.device) for name, segment in batch.segments.items()}
    labels = batch.labels.to(compute.device)

    def step() -> None:
        with compute.autocast():
            logits = model(segments)
        torch.nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)

    return step


def _forward(model: Perceiver, batch: Batch, compute: Compute) -> Callable[[], object]:
    segments = {name: segment.to(compute.device) for name, segment in batch.segments.items()}

    def forward() -> None:
        with torch.inference_mode(), compute.autocast():
            model(segments)

    return forward


# ---------------------------------------------------------------- made-up files


def made_up_files(folder: Path, kind: str, count: int) -> list[Source]:
    """Write files of a modality into a new folder, each another one; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_made_up_file(folder, kind, number) for number in range(count)]


def _made_up_file(folder: Path, kind: str, number: int) -> Source:
    suffix, make = _MAKERS[kind]
    path = folder / f"{number}{suffix}"
    path.write_bytes(make(np.random.default_rng(number)))
    return Source(str(path))


def _jpeg(rng: np.random.Generator) -> bytes:
    from PIL import Image

    # Smooth noise: as hard to decode as a photograph, which plain noise is not.
    small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((500, 375), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _wav(rng: np.random.Generator) -> bytes:
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, rng.normal(0, 0.1, 80_000), 16_000, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def _stl(rng: np.random.Generator) -> bytes:
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=4)
    mesh.vertices *= rng.uniform(0.5, 2.0, 3)
    return bytes(mesh.export(file_type="stl"))


def _mp4(rng: np.random.Generator) -> bytes:
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        track.width, track.height, track.pix_fmt = 320, 240, "yuv420p"
        still = np.kron(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        for number in range(32):  # smooth enough to be compressed as a film is, and moving
            picture = np.roll(still, 3 * number, axis=1)
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode(None))
    return stream.getvalue()


_MAKERS: dict[str, tuple[str, Callable[[np.random.Generator], bytes]]] = {
    "image": (".jpg", _jpeg),
    "audio": (".wav", _wav),
    "points": (".stl", _stl),
    "video": (".mp4", _mp4),
}
