"""Parts of `benchmarks.gpu` that train: precisions, resuming, lack of memory, compilation, and the loader's pace."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_common import Record, Setting, attempted, first_line, row
from perceiver_cli.config import load_preset
from perceiver_cli.data.loader import Batch
from perceiver_cli.machine.made_up import made_up_files
from perceiver_cli.model.checkpoint import load_model
from perceiver_cli.model.device import choose_compute
from perceiver_cli.run_folder import MODEL_FILE
from perceiver_cli.training.events import Evaluated, StepDone
from perceiver_cli.training.loop import Run
from perceiver_cli.training.trainer import Trainer

STEPS = {"cuda": 64, "cpu": 24}  # of a training; half is a multiple of the steps between looks at a GPU's loss
FALLS_TO = 0.9  # the last training loss, as a share of the first, at most
FILES = 24  # in each of two classes
RATE_HZ = 8_000
SMALL = (
    "model.num_latents=8", "model.latent_channels=16", "model.num_self_heads=2", "model.self_attends_per_block=1",
    "model.schedule=c0 t0 c1 t0", "train.lr=0.01",
)  # fmt: skip
# One tensor of the latents takes 0.8 GiB and a step 9; with the GPU's batch 8 and 90.
HUGE = (
    "model.num_latents=8192", "model.latent_channels=512", "model.num_self_heads=8", "model.self_attends_per_block=1",
    "model.schedule=c0 t0",
)  # fmt: skip
HUGE_BATCH = {"cuda": 512, "cpu": 48}
GPU_LEFT_BYTES = 6 << 30  # that the command is left: its context takes some of it
CPU_LEFT_BYTES = 1 << 30  # of addresses, above what this process has
FED = 0.9  # share of the pace with a batch in memory from which on a loader keeps up
COMPILING_S = 40.0  # with less left, nothing is compiled
TIMED_S = {"cuda": 3.0, "cpu": 0.3}  # of steps


# ---------------------------------------------------------------- precisions


def precisions(setting: Setting) -> Iterator[Record]:
    """Yield whether each modality learns in each precision, resumes to the bit, and how a lack of memory ends."""
    kinds = ("bf16", "fp16") if setting.on_gpu else ("bf16",)
    modalities = ("image", "audio", "points", "video") if setting.on_gpu else ("image",)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        yield from attempted("image: write files", _write, place / "image", "image")
        for precision in kinds:
            yield from attempted(f"image, {precision}: resume", _resumed, setting, place, precision)
        yield from attempted("out of memory", _out_of_memory, setting, place)
        for modality in modalities:
            if modality != "image":
                yield from attempted(f"{modality}: write files", _write, place / modality, modality)
            if not (place / modality).exists():
                continue
            for precision in kinds:
                what = f"tiny-{modality}, {precision}"
                yield from attempted(what, _learns, setting, place, modality, precision)


def _write(folder: Path, modality: str) -> Iterator[Record]:
    """Write files of two classes that differ in one thing; yield a row if a package is missing."""
    if modality == "video":
        try:
            import av  # noqa: F401
        except ImportError:
            yield row("tiny-video", verdict="not installed: av")
            return
    for label in (0, 1):
        (folder / "ab"[label]).mkdir(parents=True)
        for number in range(FILES):
            rng = np.random.default_rng([label, number])
            _WRITERS[modality](folder / "ab"[label] / str(number), label, rng)


def _write_image(path: Path, label: int, rng: np.random.Generator) -> None:
    from PIL import Image

    pixels = rng.integers(0, 60, (16, 16), dtype=np.uint8)
    pixels[3 + 8 * label] = 255
    Image.fromarray(pixels).save(path.with_suffix(".png"))


def _write_audio(path: Path, label: int, rng: np.random.Generator) -> None:
    import soundfile

    phase = 2 * np.pi * (300, 2000)[label] * np.arange(RATE_HZ // 2) / RATE_HZ
    soundfile.write(path.with_suffix(".wav"), 0.3 * np.sin(phase) + 0.02 * rng.standard_normal(len(phase)), RATE_HZ)


def _write_points(path: Path, label: int, rng: np.random.Generator) -> None:
    import trimesh

    size = rng.uniform(0.9, 1.1)
    sphere, box = trimesh.creation.icosphere(radius=size), trimesh.creation.box((size, size, 0.2 * size))
    path.with_suffix(".stl").write_bytes((box if label else sphere).export(file_type="stl"))


def _write_video(path: Path, label: int, rng: np.random.Generator) -> None:
    import av

    with av.open(str(path.with_suffix(".mp4")), "w", format="mp4") as file:
        track = file.add_stream("libx264", rate=8)
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        for _ in range(16):
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[16 * label : 16 * label + 8] = 255
            file.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(track.encode(None))


_WRITERS: dict[str, Callable[[Path, int, np.random.Generator], None]] = {
    "image": _write_image, "audio": _write_audio, "points": _write_points, "video": _write_video,
}  # fmt: skip


def _trainer(setting: Setting, data: Path, output: Path, modality: str, precision: str) -> Trainer:
    small = () if setting.on_gpu else SMALL
    overrides = [
        f"train.steps={STEPS[torch.device(setting.device).type]}", "train.batch_size=16", "train.eval_every=12.5%",
        f"train.device={setting.device}", f"train.precision={precision}", "data.workers=2", *small,
    ]  # fmt: skip
    return Trainer(data, output, load_preset(f"tiny-{modality}"), overrides=overrides)


def _learns(setting: Setting, place: Path, modality: str, precision: str) -> Iterator[Record]:
    """Yield the training loss at the end of a short run, as a share of that at its beginning."""
    output = place / f"{modality}-{precision}"
    events = list(_trainer(setting, place / modality, output, modality, precision).fit())
    losses = [event.train_loss for event in events if isinstance(event, Evaluated)]
    model, _ = load_model(output / MODEL_FILE)
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    share = losses[-1] / losses[0]
    verdict = "passed" if finite and share <= FALLS_TO else f"failed: expected {FALLS_TO} at most, and finite weights"
    yield row(f"tiny-{modality}, {precision}: last loss over first", share, "", verdict, losses=losses)


def _resumed(setting: Setting, place: Path, precision: str) -> Iterator[Record]:
    """Yield whether a run that was cut and resumed, and an equal run, give the model of an uninterrupted one."""
    data, outputs = place / "image", {name: place / f"{name}-{precision}" for name in ("whole", "again", "cut")}
    for name in ("whole", "again"):
        list(_trainer(setting, data, outputs[name], "image", precision).fit())
    trainer = _trainer(setting, data, outputs["cut"], "image", precision)
    half = trainer.plan.planned_steps // 2
    for event in trainer.fit():
        if isinstance(event, StepDone) and event.step >= half:
            trainer.stop()
    list(Trainer(None, outputs["cut"], resume=True).fit())
    hashes = {name: hashlib.sha256((run / MODEL_FILE).read_bytes()).hexdigest() for name, run in outputs.items()}
    for name, what in (("again", "an equal run"), ("cut", f"a run resumed at step {half}")):
        same = hashes[name] == hashes["whole"]
        verdict = "passed" if same else "failed: another model"
        yield row(f"image, {precision}: {what}: sha256 of the model", hashes[name][:12], "", verdict)


def _out_of_memory(setting: Setting, place: Path) -> Iterator[Record]:
    """Yield how `perceiver train` ends with a batch that cannot fit: one line, status 5, and advice."""
    batch_size = str(HUGE_BATCH[torch.device(setting.device).type])
    arguments = ["train", "image", "-o", "huge", "--device", setting.device, "--steps", "1", "--quiet"]
    arguments += ["--batch-size", batch_size, "--workers", "0"]
    arguments += [word for change in HUGE for word in ("--set", change)]
    command = [sys.executable, "-m", "perceiver_cli", *arguments]
    ballast = None
    if setting.on_gpu:
        free, _ = torch.cuda.mem_get_info(setting.device)
        ballast = torch.empty(max(0, free - GPU_LEFT_BYTES), dtype=torch.uint8, device=setting.device)
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        kib = (pages * os.sysconf("SC_PAGE_SIZE") + CPU_LEFT_BYTES) >> 10
        command = ["bash", "-c", f'ulimit -v {kib} && exec "$@"', "bash", *command]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    del ballast
    torch.cuda.empty_cache()
    lines = done.stderr.strip().splitlines()
    right = done.returncode == 5 and len(lines) == 1 and "--batch-size" in lines[0]
    shown = lines[-1][:160] if lines else "nothing"
    verdict = "passed" if right else f"failed: {len(lines)} lines, the last is: {shown}"
    yield row("a batch that cannot fit: exit status", done.returncode, "", verdict, said=lines[-3:])


# ---------------------------------------------------------------- compilation and loader


def compile_(setting: Setting) -> Iterator[Record]:
    """Yield the time to the first step and the time of a step, plain and with `--compile`."""
    presets = (("tiny-image", 64), ("imagenet", 16)) if setting.on_gpu else (("tiny-image", 8),)
    with tempfile.TemporaryDirectory() as folder:
        data = _jpegs(Path(folder) / "data", 16)
        for preset, batch_size in presets:
            steps: dict[bool, float] = {}
            for compiled in (False, True):
                what = f"{preset} x {batch_size}, {'--compile' if compiled else 'plain'}"
                if setting.left_s < (COMPILING_S if compiled else COMPILING_S / 2):
                    yield row(what, verdict="not begun")
                    continue
                changes = (f"train.compile={str(compiled).lower()}", f"train.batch_size={batch_size}")
                begun = time.perf_counter()
                try:
                    run, batch = _run_with_batch(setting, data, preset, *changes)
                    _finish(run.update(repeat(batch)))
                    first_s = time.perf_counter() - begun
                    steps[compiled] = _step_s(run, repeat(batch), setting)
                except Exception as error:
                    yield row(what, verdict=f"failed: {first_line(error)}")
                    continue
                yield row(f"{what}: to the first step", first_s, "s")
                yield row(f"{what}: a step", steps[compiled] * 1e3, "ms")
            if len(steps) == 2:
                yield row(f"{preset}: plain over compiled step", steps[False] / steps[True], "times")


def loader(setting: Setting) -> Iterator[Record]:
    """Yield steps per second from JPEG files, beside those with one batch that is kept."""
    presets = (("tiny-image", 64), ("imagenet", 64)) if setting.on_gpu else (("tiny-image", 8),)
    with tempfile.TemporaryDirectory() as folder:
        data = _jpegs(Path(folder) / "data", 96 if setting.on_gpu else 16)
        for preset, batch_size in presets:
            yield from attempted(preset, _paces, setting, data, preset, batch_size)


def _paces(setting: Setting, data: Path, preset: str, batch_size: int) -> Iterator[Record]:
    compute = choose_compute(setting.device)
    workers = compute.default_workers or 1
    trainer = _timed_trainer(setting, data, preset, f"train.batch_size={batch_size}")
    run = trainer.new_run()
    batches = trainer.plan.reader.batches(run.tasks(1 << 20), workers, pin=setting.on_gpu)
    kept = next(batches)
    for _ in range(3):
        _finish(run.update(batches))
    from_files, from_memory = _step_s(run, batches, setting), _step_s(run, repeat(kept), setting)
    share = from_memory / from_files
    yield row(f"{preset} x {batch_size}, files, {workers} workers", 1 / from_files, "steps/s")
    yield row(f"{preset} x {batch_size}, one batch", 1 / from_memory, "steps/s")
    yield row(
        f"{preset}: share of that pace", share, "", "the loader feeds it" if share > 0.9 else "the loader is slower"
    )


def _jpegs(folder: Path, count: int) -> Path:
    """Return a folder of two classes with `count` JPEGs of 500 x 375 each."""
    for name in ("a", "b"):
        made_up_files(folder / name, "image", count)
    return folder


def _timed_trainer(setting: Setting, data: Path, preset: str, *changes: str) -> Trainer:
    small = () if setting.on_gpu else (*SMALL, "inputs.image.size=[32, 32]")
    overrides = [f"train.device={setting.device}", "train.accumulate=1", "train.steps=1000", *small, *changes]
    return Trainer(data, data.parent / "run", load_preset(preset), overrides=overrides)


def _run_with_batch(setting: Setting, data: Path, preset: str, *changes: str) -> tuple[Run, Batch]:
    trainer = _timed_trainer(setting, data, preset, *changes)
    run = trainer.new_run()
    return run, next(trainer.plan.reader.batches(run.tasks(1)))


def _step_s(run: Run, batches: Iterator[Batch], setting: Setting) -> float:
    """Return the mean time of a training step, the GPU's work included."""
    begun, steps = time.perf_counter(), 0
    until = begun + TIMED_S[run.compute.device.type]
    while time.perf_counter() < until:
        for _ in range(5 if setting.on_gpu else 1):
            loss = run.update(batches)
            steps += 1
        _finish(loss)
    return (time.perf_counter() - begun) / steps


def _finish(loss: torch.Tensor) -> None:
    """Wait for the device."""
    float(loss)
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
