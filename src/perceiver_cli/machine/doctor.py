"""`perceiver doctor`, made for bug reports: installed packages, decoders, devices, and a short training as a test."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

import perceiver_cli
from perceiver_cli.errors import PerceiverError
from perceiver_cli.hardware import cores, memory_bytes
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.machine.measure import describe_machine
from perceiver_cli.model import kernels
from perceiver_cli.model.device import DTYPES, choose_compute
from perceiver_cli.training.events import StepDone
from perceiver_cli.training.trainer import Trainer

CORE = ("torch", "numpy", "safetensors", "pillow", "soundfile", "soxr", "trimesh", "pydantic", "typer", "matplotlib")
# Package: the ability that needs it, and the extra that installs it.
OPTIONAL = {
    "av": ("videos and their sound", "video"),
    "pillow-heif": ("HEIC pictures", "heif"),
    **dict.fromkeys(("laspy", "lazrs"), ("LAS and LAZ of lidar", "lidar")),
    "pyarrow": ("Parquet and Arrow files", "parquet"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), ("export to ONNX", "onnx")),
    "tensorboard": ("train --log tensorboard", "tensorboard"),
    "huggingface_hub": ("import ORG/NAME", "hub"),
    "optuna": ("sweep --search tpe", "sweep"),
}
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
SELF_TEST_STEPS = 40  # of training; in a time limit a slow or a cold machine would do too few
SELF_TEST_BATCH = 8  # enough to learn in these steps, and a third of the time of the default
FALLS_TO = 0.7  # largest accepted last loss, as a share of chance's
SAME = 1e-5  # largest accepted difference of the loss before saving and after loading
SIDE, FILES = 16, 60  # pixels of a picture's side; pictures in each of three classes


def examine() -> dict[str, Any]:
    """Return versions, decoders, devices, kernels and threads; "problems" holds a sentence for each problem."""
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    has_gpu = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = {name: _device(name) for name in ("cpu", *(gpu for gpu, there in has_gpu.items() if there))}
    return {
        "perceiver": perceiver_cli.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in CORE},
        "optional": {
            name: installed_version(name) or f"not installed: no {ability} (pip install 'perceiver-cli[{extra}]')"
            for name, (ability, extra) in OPTIONAL.items()
        },
        "decoders": _decoders(),
        "devices": devices,
        "threads": {"torch": torch.get_num_threads(), "cores": cores(), **variables},
        "memory_bytes": memory_bytes(),
        "free_bytes": {"here": shutil.disk_usage(".").free, "temporary": shutil.disk_usage(tempfile.gettempdir()).free},
        "problems": [
            f"{name}: no fused attention kernel passes its self-test; plain products are right, but slower"
            for name, facts in devices.items()
            if facts["kernel"] == kernels.PLAIN.name
        ],
    }


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _decoders() -> dict[str, str]:
    import soundfile
    from PIL import features

    decoders = {name: features.version(name) or "missing" for name in ("jpg", "webp", "libtiff", "zlib")}
    decoders["libsndfile"] = soundfile.__libsndfile_version__
    decoders["mp3"] = "yes" if "MP3" in soundfile.available_formats() else "missing"
    if installed_version("av") is not None:
        import av

        decoders["ffmpeg"] = str(av.ffmpeg_version_info)
    return decoders


def _device(name: str) -> dict[str, Any]:
    """Return a device's name, its precision, and the attention kernel that passes its self-test there."""
    compute = choose_compute(name)
    kernel = kernels.choose(compute.device, DTYPES.get(compute.precision, torch.float32))
    return {"name": describe_machine(compute)["device_name"], "precision": compute.precision, "kernel": kernel.name}


def self_test(device: str = "auto") -> dict[str, Any]:
    """Return the losses and the accuracy of a short training on synthetic pictures.

    Raises PerceiverError if the loss did not fall, or the saved model's loss differs from the trained model's.
    """
    report_it = f"please report it with the output of perceiver doctor ({sys.platform})"
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        _write_pictures(data)
        length = [f"train.steps={SELF_TEST_STEPS}", "train.eval_every='50%'", "train.save_every='100%'"]
        overrides = [*length, f"train.device={device}", "train.lr=0.003", f"train.batch_size={SELF_TEST_BATCH}"]
        losses = [e.loss for e in Trainer(data, run, overrides=overrides).fit() if isinstance(e, StepDone)]
        predictor = Predictor(run, device)
        before = float(predictor.info.metrics["val_loss"])
        report = evaluate(predictor, data, "val")
    # A GPU's loss is read only every few steps, so the first value may have fallen already: compare with chance.
    chance, last, difference = log(len(predictor.classes)), losses[-1], abs(report.loss - before)
    if not last <= FALLS_TO * chance:
        raise PerceiverError(f"self-test: the loss went from {chance:.4f} to {last:.4f}, expected a fall", report_it)
    if not difference <= SAME * max(1.0, before):
        message = f"self-test: validation loss {before:.6f} before saving, {report.loss:.6f} after loading"
        raise PerceiverError(message, report_it)
    facts = {"steps": SELF_TEST_STEPS, "first_loss": chance, "last_loss": last}
    return {**facts, "accuracy": report.accuracy, "difference_after_loading": difference}


def _write_pictures(folder: Path) -> None:
    """Write class folders of PNGs: noise with a bright bar, whose rows depend on the class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for place, name in enumerate(("high", "middle", "low")):
        (folder / name).mkdir(parents=True)
        for number in range(FILES):
            pixels = rng.integers(0, 80, (SIDE, SIDE), dtype=np.uint8)
            pixels[5 * place : 5 * place + 4] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
