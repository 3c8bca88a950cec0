"""A golden record: hashes and values of what every command writes, to compare before and after a refactoring.

    python tests/golden/record.py OUT.json [--keep DIR] [--only image,audio,...] [--jobs 2]
    python tests/golden/record.py --compare OLD.json NEW.json

It knows the program by its command line alone, so any module may move. Media are made here, from seeds. Hashes depend
on the processor and on versions of libraries: both records must come from one machine. pytest does not collect this.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

SOURCE = Path(__file__).resolve().parents[2] / "src"
CLASSES = ("a", "b", "c")
COUNTS = {"train": 4, "test": 2}  # files of a class
RATE_HZ = 8_000
MTIME_NS = 1_700_000_000_000_000_000  # of tars, since their index holds it
LIBRARIES = ("torch", "numpy", "pillow", "soundfile", "soxr", "trimesh", "av", "onnxruntime", "safetensors", "pydantic")
COMMANDS = (
    "train", "evaluate", "predict", "explain", "preprocess", "lint", "import", "export", "info", "compare", "lr-find",
    "doctor", "bench", "presets",
)  # fmt: skip
MODEL = (
    "model.num_latents=8",
    "model.latent_channels=16",
    "model.num_self_heads=2",
    "model.schedule=c0 t0 c1 t0",
    "train.eval_every=10 steps",
    "train.save_every=20 steps",
)
AUDIO = ("inputs.audio.clip_s=0.5", "inputs.audio.num_mels=16", "inputs.audio.patch=[4, 4]", "inputs.audio.bands=4")
VIDEO = (
    "inputs.video.num_frames=4",
    "inputs.video.size=[16, 16]",
    "inputs.video.patch=[2, 4, 4]",
    "inputs.video.bands=4",
)


# ---------------------------------------------------------------- media


def write_image(stem: Path, k: int, i: int, rng: np.random.Generator) -> None:
    """Write a colour picture with a bright bar in a row of its class: PNG where i is even, else JPEG."""
    pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
    pixels[2 + 4 * k : 4 + 4 * k] = 255
    Image.fromarray(pixels).save(stem.with_suffix(".jpg" if i % 2 else ".png"))


def sound(k: int, seconds: float, rng: np.random.Generator, rate_hz: int = RATE_HZ) -> NDArray[np.float32]:
    """Return a tone of its class with noise."""
    at = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = 0.3 * np.sin(2 * np.pi * (300 * 2**k * at + rng.random())) + 0.05 * rng.standard_normal(len(at))
    return np.asarray(wave, dtype=np.float32)


def write_audio(stem: Path, k: int, i: int, rng: np.random.Generator) -> None:
    """Write 1.2 s of a tone: WAV where i is even, else FLAC; of i = 3 in stereo and at twice the rate."""
    rate_hz = 2 * RATE_HZ if i == 3 else RATE_HZ
    wave = sound(k, 1.2, rng, rate_hz)
    soundfile.write(stem.with_suffix(".flac" if i % 2 else ".wav"), np.stack([wave, wave[::-1]], 1) if i == 3 else wave,
                    rate_hz)  # fmt: skip


def write_points(stem: Path, k: int, i: int, rng: np.random.Generator) -> None:
    """Write a box stretched along the axis of its class: an OBJ mesh where i is even, else a PLY cloud."""
    scale = np.where(np.arange(3) == k, 2.0, 0.5) * rng.uniform(0.8, 1.2, 3)
    if i % 2:
        points = scale * rng.uniform(-1, 1, (150, 3))
        head = "ply\nformat ascii 1.0\nelement vertex 150\n" + "".join(f"property float {axis}\n" for axis in "xyz")
        rows = "".join("{:.5f} {:.5f} {:.5f}\n".format(*row) for row in points)
        stem.with_suffix(".ply").write_text(f"{head}end_header\n{rows}", encoding="ascii")
        return
    corners = scale * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    faces = ((1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4))
    text = "".join("v {:.5f} {:.5f} {:.5f}\n".format(*row) for row in corners)
    text += "".join("f {} {} {} {}\n".format(*face) for face in faces)
    stem.with_suffix(".obj").write_text(text, encoding="ascii")


def write_film(stem: Path, k: int, i: int, rng: np.random.Generator, with_sound: bool = True) -> None:
    """Write an MP4 of a second, 32 x 32 at 8 Hz, with a bar that moves in the row of its class, and a tone."""
    import av

    with av.open(str(stem.with_suffix(".mp4")), "w") as file:
        picture = file.add_stream("mpeg4", rate=8)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        voice = file.add_stream("aac", rate=RATE_HZ, layout="mono") if with_sound else None
        for t in range(8):
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[10 * k : 10 * k + 8, 2 * t + i :] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = t
            file.mux(picture.encode(frame))
        file.mux(picture.encode())
        if voice is not None:
            block = av.AudioFrame.from_ndarray(sound(k, 1.0, rng)[None], format="fltp", layout="mono")
            block.sample_rate = RATE_HZ
            file.mux(voice.encode(block))
            file.mux(voice.encode())


def write_silent(stem: Path, k: int, i: int, rng: np.random.Generator) -> None:
    """Write such an MP4 without sound."""
    write_film(stem, k, i, rng, with_sound=False)


WriteFile = Callable[[Path, int, int, np.random.Generator], None]


def write_data(root: Path, write: WriteFile, seed: int) -> list[tuple[Path, str, str]]:
    """Write train/ and test/ of three classes. Returns (path, split, class) of each file, sorted."""
    rng = np.random.default_rng(seed)
    for split, count in COUNTS.items():
        for k, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                write(folder / f"{i:03d}", k, i, rng)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [(path, path.parts[-3], path.parts[-2]) for path in files]


# ---------------------------------------------------------------- recording


@dataclass(frozen=True)
class Kind:
    """A kind of data, with the options that keep its model small."""

    write: WriteFile
    preset: str
    options: tuple[str, ...]
    windows: bool = False  # predict in windows as well
    export: bool = False
    whole: bool = False  # also what hardly differs between kinds: pipes, calibration, .safetensors


KINDS = {
    "image": Kind(
        write_image, "tiny-image", ("inputs.image.patch=[2, 2]", "inputs.image.bands=4"), export=True, whole=True
    ),
    "audio": Kind(write_audio, "tiny-audio", AUDIO, windows=True),
    "points": Kind(write_points, "tiny-points", ("inputs.points.num_points=64", "inputs.points.bands=4"), export=True),
    "video": Kind(write_silent, "tiny-video", VIDEO, windows=True),
    "av": Kind(write_film, "tiny-av", (*AUDIO, *VIDEO), export=True, whole=True),
}


@dataclass
class Record:
    """What was found, by key: hashes and texts are compared, values say how far apart what differs is."""

    cwd: Path
    hashes: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command in the folder of this record, with one thread, and nothing of the caller's own settings."""
        settings = {key: value for key, value in os.environ.items() if not key.startswith("PERCEIVER_")}
        settings |= {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH")))),
            "XDG_CACHE_HOME": str(self.cwd / ".cache"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }
        command = [sys.executable, "-m", "perceiver_cli", *arguments]
        return subprocess.run(command, capture_output=True, cwd=self.cwd, env=settings, input=stdin, check=False)

    def good(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """Return what a command that must succeed prints."""
        done = self.run(*arguments, stdin=stdin)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}: status {done.returncode}\n{done.stderr.decode()}")
        return done.stdout

    def plain(self, data: bytes) -> bytes:
        """Return text with the folder's own path taken out."""
        return data.replace(os.fsencode(self.cwd), b"CWD")

    def hash(self, key: str, data: bytes) -> None:
        """Note the hash of an output."""
        self.hashes[key] = hashlib.sha256(data).hexdigest()

    def file(self, key: str, name: str) -> None:
        """Note the hash of a file."""
        self.hash(key, self.plain((self.cwd / name).read_bytes()) if name.endswith(".toml") else
                  (self.cwd / name).read_bytes())  # fmt: skip

    def json(self, key: str, data: bytes) -> None:
        """Note hash and values of JSON, or of JSON lines."""
        self.hash(key, self.plain(data))
        self.values[key] = [json.loads(line) for line in self.plain(data).splitlines()]

    def failed(self, key: str, *arguments: str, stdin: bytes = b"") -> None:
        """Note status and text of a command that finds something wrong."""
        done = self.run(*arguments, stdin=stdin)
        self.errors[key] = {
            "status": done.returncode,
            "stdout": self.plain(done.stdout).decode(),
            "stderr": self.plain(done.stderr).decode(),
        }

    def train(self, key: str, data: str, run: str, *options: str, steps: int = 20) -> None:
        """Train a small model, and note what the run folder holds."""
        sets = [part for option in options for part in ("--set", option)]
        self.good("train", data, "-o", run, "--steps", str(steps), "--batch-size", "6", "--seed", "0",
                  "--device", "cpu", "--workers", "0", "-q", *sets)  # fmt: skip
        self.run_folder(key, run)

    def run_folder(self, key: str, run: str) -> None:
        """Note what a run folder holds; its log without the time."""
        for name in ("model.safetensors", "split.jsonl", "config.toml", "README.md"):
            self.file(f"{key}/{name}", f"{run}/{name}")
        lines = [json.loads(line) for line in (self.cwd / run / "metrics.jsonl").read_bytes().splitlines()]
        kept = [{name: value for name, value in line.items() if name not in ("elapsed_s", "crc32")} for line in lines]
        self.json(f"{key}/metrics.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in kept))
        for state in sorted((self.cwd / run / "last").glob("*.safetensors")):
            self.hash(f"{key}/last/{state.name}", _tensor_bytes(state))


def _tensor_bytes(path: Path) -> bytes:
    """Return the tensors of a safetensors file, without its header: a state's holds the time that its run took."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def record_kind(record: Record, name: str) -> None:
    """Take one kind of data through every command."""
    kind = KINDS[name]
    files = write_data(record.cwd / "data", kind.write, seed=list(KINDS).index(name))
    record.hash("media", b"".join(path.read_bytes() for path, _, _ in files))
    one = str(next(path for path, split, _ in files if split == "test").relative_to(record.cwd))

    record.train("run", "data", "run", *MODEL, *kind.options)
    record.json("info", record.good("info", "run", "--json"))
    record.json("lint", record.good("lint", "data", "--json", "--workers", "0"))

    record.good("preprocess", "data", "-m", "run", "-o", "x.tar", "-q")
    record.file("preprocess/x.tar", "x.tar")
    os.utime(record.cwd / "x.tar", ns=(MTIME_NS, MTIME_NS))
    record.json("lint/tar", record.good("lint", "x.tar", "--json", "--workers", "0"))
    record.file("preprocess/x.tar.index", "x.tar.index")
    record.good("preprocess", one, "--preset", kind.preset, "-o", "x.npy", "-q")
    record.file("preprocess/x.npy", "x.npy")
    if kind.whole:
        record.good("preprocess", one, "--preset", kind.preset, "-o", "x.safetensors", "-q")
        record.file("preprocess/x.safetensors", "x.safetensors")
    sets = [part for option in kind.options for part in ("--set", option)]
    record.good("preprocess", "data", "--preset", kind.preset, *sets, "--augment", "2", "-o", "a.tar", "-q")
    record.file("preprocess/augment", "a.tar")
    record.good("preprocess", "data/test", "-m", "run", "--fourier", "-o", "f.tar", "-q")
    record.file("preprocess/fourier", "f.tar")

    cpu = ("-m", "run", "--device", "cpu", "-q")
    record.json("predict/files", record.good("predict", "data/test", *cpu, "--all-probs", "--embeddings", "e.npy"))
    record.file("predict/embeddings", "e.npy")
    record.json("predict/tar", record.good("predict", "x.tar", *cpu, "--all-probs"))
    if kind.whole:
        stream = (record.cwd / "x.tar").read_bytes()
        record.hash("predict/pipe", record.good("predict", "-", *cpu, "--format", "csv", "--all-probs", stdin=stream))
    if kind.windows:
        cut = ("--window", "0.5", "--hop", "0.25", "--aggregate", "none", "--all-probs")
        record.json("predict/windows", record.good("predict", "data/test", *cpu, *cut))

    record.json("evaluate/json", record.good("evaluate", "data", *cpu, "-o", "report", "--json"))
    record.file("evaluate/metrics.json", "report/metrics.json")
    record.file("evaluate/predictions.jsonl", "report/predictions.jsonl")
    record.sizes["evaluate/report.html"] = (record.cwd / "report" / "report.html").stat().st_size
    record.json("explain", record.good("explain", one, "-m", "run", "--device", "cpu", "--json"))
    if kind.export:
        record_export(record)
    if kind.whole:
        record.json("calibrate/json", record.good("evaluate", "data", *cpu, "--calibrate", "--json"))
        record.file("calibrate/model.safetensors", "run/model.safetensors")


def record_export(record: Record) -> None:
    """Export the model as ONNX, and note what it answers to fixed inputs; the file's own bytes hold source paths."""
    import onnxruntime

    record.good("export", "run", "-o", "x.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(record.cwd / "x.onnx", options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for wanted in session.get_inputs():
        shape = [size if isinstance(size, int) else 2 for size in wanted.shape]
        if wanted.type == "tensor(float)":
            inputs[wanted.name] = rng.standard_normal(shape).astype(np.float32)
        elif wanted.type == "tensor(bool)":
            inputs[wanted.name] = np.ones(shape, bool)
        else:
            inputs[wanted.name] = rng.integers(0, 256, shape).astype(wanted.type[7:-1])
    signature = [[one.name, one.type, one.shape] for one in (*session.get_inputs(), *session.get_outputs())]
    record.json("export/signature", json.dumps(signature).encode())
    record.hash("export/metadata", json.dumps(session.get_modelmeta().custom_metadata_map, sort_keys=True).encode())
    outputs = session.run(None, inputs)
    record.hash("export/outputs", b"".join(np.ascontiguousarray(output).tobytes() for output in outputs))
    record.values["export/outputs"] = [output.tolist() for output in outputs]


def record_more(record: Record) -> None:
    """Manifests of pairs and of several labels, a resumed run, the learning rate test, and other parts of a model."""
    image, audio = KINDS["image"], KINDS["audio"]
    pictures = write_data(record.cwd / "pictures", image.write, seed=10)
    sounds = write_data(record.cwd / "sounds", audio.write, seed=11)
    with (record.cwd / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "audio", "label", "split"])
        for row, ((picture, split, label), (noise, _, _)) in enumerate(zip(pictures, sounds, strict=True)):
            heard = "" if row == 1 else str(noise.relative_to(record.cwd))
            rows.writerow([str(picture.relative_to(record.cwd)), heard, label, split])
    with (record.cwd / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "labels", "split"])
        for row, (picture, split, label) in enumerate(pictures):
            labels = f"{label};odd" if row % 2 else label
            rows.writerow([str(picture.relative_to(record.cwd)), labels, split])
    cpu = ("--device", "cpu", "-q")

    record.train("pairs/run", "pairs.csv", "pairs", *MODEL, *image.options, *audio.options)
    record.json("pairs/evaluate", record.good("evaluate", "pairs.csv", "-m", "pairs", *cpu, "--json"))
    record.json("pairs/predict", record.good("predict", "pairs.csv", "-m", "pairs", *cpu, "--use", "image"))
    record.good("preprocess", "pairs.csv", "-o", "pairs.tar", "-q")
    record.file("pairs/tar", "pairs.tar")

    record.train("labels/run", "labels.csv", "labels", *MODEL, *image.options)
    record.json("labels/evaluate", record.good("evaluate", "labels.csv", "-m", "labels", *cpu, "--calibrate", "--json"))
    record.file("labels/calibrated", "labels/model.safetensors")

    record.good("train", "--resume", "-o", "labels", "--steps", "24", "-q")
    record.run_folder("resumed/run", "labels")
    record.train("other/run", "pictures", "other", *MODEL, "model.head=query", "inputs.image.positions=learned",
                 "inputs.image.learned_channels=8", "inputs.image.flip=0.5", "inputs.image.randaugment_layers=1",
                 "train.optimizer=lamb", "train.mixup=0.2", "train.cutmix=0.5", steps=6)  # fmt: skip
    record.train("raw/run", "sounds", "raw", *MODEL, "inputs.audio.features=raw", "inputs.audio.patch=[64]",
                 "inputs.audio.clip_s=0.5", steps=6)  # fmt: skip
    sets = [part for option in (*MODEL, *image.options) for part in ("--set", option)]
    found = record.good("lr-find", "pictures", *sets, "--batch-size", "6", "--steps", "10", "--device", "cpu", "--json")
    record.json("lr-find", found)


def record_errors(record: Record) -> None:
    """What is said of bad input, and every help text."""
    files = write_data(record.cwd / "data", KINDS["image"].write, seed=20)
    sets = [part for option in (*MODEL, *KINDS["image"].options) for part in ("--set", option)]
    record.good("train", "data", "-o", "run", "--steps", "2", "--batch-size", "6", "--device", "cpu", "-q", *sets)
    whole = next(path for path, _, _ in files if path.suffix == ".png").read_bytes()
    (record.cwd / "broken.png").write_bytes(whole[: len(whole) // 2])
    (record.cwd / "empty.png").write_bytes(b"")
    (record.cwd / "text.txt").write_text("not a picture\n", encoding="ascii")
    (record.cwd / "nothing").mkdir()
    one = str(files[0][0].relative_to(record.cwd))
    record.failed("predict-bad", "predict", "broken.png", "empty.png", "text.txt", "absent.png", one, "-m", "run")
    record.failed("predict-no-model", "predict", one, "-m", "absent")
    record.failed("predict-stdin-empty", "predict", "-", "-m", "run")
    record.failed("predict-other-kind", "predict", "-", "-m", "run", stdin=b"RIFF\x24\0\0\0WAVEfmt ")
    record.failed("preprocess-bad", "preprocess", "broken.png", one, "-m", "run", "-o", "x.tar")
    record.failed("preprocess-bad-auto", "preprocess", "broken.png", one, "-o", "y.tar")
    record.failed("train-nothing", "train", "nothing", "-o", "none")
    record.failed("train-set-nonsense", "train", "data", "-o", "none", "--set", "nonsense")
    record.failed("train-set-unknown", "train", "data", "-o", "none", "--set", "train.learning=1")
    record.failed("train-set-value", "train", "data", "-o", "none", "--set", "model.num_latents=-1")
    record.failed("train-again", "train", "data", "-o", "run")
    record.failed("evaluate-nothing", "evaluate", "nothing", "-m", "run")
    record.failed("info-unknown", "info", "imagnet")
    record.failed("option-unknown", "predict", "--wrong")
    (record.cwd / "damaged.safetensors").write_bytes((record.cwd / "run" / "model.safetensors").read_bytes()[:-5])
    record.failed("model-damaged", "predict", one, "-m", "damaged.safetensors")
    for command in COMMANDS:
        record.texts[f"help/{command}"] = record.good(command, "--help").decode()
    record.texts["help"] = record.good("--help").decode()
    record.texts["presets"] = record.good("presets").decode()
    record.json("info", record.good("info", "imagenet", "--json"))


def make_record(root: Path, only: list[str], jobs: int) -> dict[str, Any]:
    """Return the whole record; root: an empty folder to work in."""
    parts: dict[str, Callable[[Record], None]] = {
        name: lambda record, name=name: record_kind(record, name)  # type: ignore[misc]
        for name in KINDS
    }
    parts |= {"more": record_more, "errors": record_errors}
    unknown = set(only) - parts.keys()
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: known are {', '.join(parts)}")
    chosen = [name for name in parts if not only or name in only]

    def work(name: str) -> tuple[Record, float]:
        """Make one part in a folder of its own."""
        begun = time.monotonic()
        (root / name).mkdir()
        record = Record(root / name)
        parts[name](record)
        return record, round(time.monotonic() - begun, 1)

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(chosen, pool.map(work, chosen), strict=True))
    whole: dict[str, Any] = {"parts": chosen, "machine": _machine()}
    whole["seconds"] = {name: seconds for name, (_, seconds) in found.items()}
    for column in ("hashes", "values", "errors", "texts", "sizes"):
        whole[column] = {
            f"{name}/{key}": value for name, (record, _) in found.items() for key, value in vars(record)[column].items()
        }
    return whole


def _machine() -> dict[str, str]:
    """Return what hashes depend on, beside the program."""
    from importlib.metadata import version

    facts = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "processor": platform.machine(), **facts}


# ---------------------------------------------------------------- comparing


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key that differs; of parts that only one record has, nothing. Sizes are not compared."""
    shared = set(old["parts"]) & set(new["parts"])
    for column in ("hashes", "errors", "texts"):
        keys = dict.fromkeys([*old[column], *new[column]])
        for key in keys:
            if key.partition("/")[0] not in shared:
                continue
            if key not in new[column] or key not in old[column]:
                yield f"{column} {key}: only in the {'old' if key in old[column] else 'new'} record"
            elif old[column][key] != new[column][key]:
                yield f"{column} {key}: {_apart(old, new, column, key)}"


def _apart(old: Mapping[str, Any], new: Mapping[str, Any], column: str, key: str) -> str:
    """Return how far apart two records are at a key where they differ."""
    if column != "hashes":
        return f"\n  old: {old[column][key]!r}\n  new: {new[column][key]!r}"
    if key not in old["values"] or key not in new["values"]:
        return "differs"
    pairs = list(_leaves(old["values"][key], new["values"][key], ""))
    others = [f"{where}: {a!r:.60} is now {b!r:.60}" for where, a, b in pairs if a != b and not _numbers(a, b)]
    worst = max(
        ((abs(a - b) / max(abs(a), abs(b)), where) for where, a, b in pairs if a != b and _numbers(a, b)), default=None
    )
    said = [] if worst is None else [f"largest relative difference {worst[0]:.2g} at {worst[1]}"]
    return "; ".join(said + others[:3]) or "the same values, written otherwise"


def _numbers(a: Any, b: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in (a, b))


def _leaves(a: Any, b: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield pairs of plain values in two nested structures, with the place of each."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _leaves(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _leaves(x, y, f"{where}[{i}]")
    else:
        yield where, a, b


# ---------------------------------------------------------------- command line


def main() -> int:
    """Make a record, or compare two."""
    parser = argparse.ArgumentParser(description="Record what every command writes, or compare two such records.")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder, and keep it")
    parser.add_argument("--only", default="", metavar="A,B", help=f"of {', '.join(KINDS)}, more, errors")
    parser.add_argument("--jobs", type=int, default=1, help="parts at once, of one thread each")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"))
    given = parser.parse_args()
    if given.compare:
        old, new = (json.loads(path.read_bytes()) for path in given.compare)
        if old["machine"] != new["machine"]:
            print(f"note: of different machines, {old['machine']} and {new['machine']}", file=sys.stderr)
        lines = list(differences(old, new))
        print("\n".join(lines) or f"no difference in {', '.join(n for n in old['parts'] if n in new['parts'])}")
        return 1 if lines else 0
    if given.out is None:
        parser.error("OUT.json is missing")
    root = Path(given.keep or tempfile.mkdtemp(prefix="perceiver-golden-")).resolve()
    try:
        root.mkdir(parents=True, exist_ok=given.keep is None)
        found = make_record(root, [name for name in given.only.split(",") if name], given.jobs)
    finally:
        if given.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(found['hashes'])} hashes, {len(found['errors'])} errors, {len(found['texts'])} texts, "
          f"{sum(found['seconds'].values()):.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
