"""Small data sets that are written to disk, and a model trained on one, shared by the tests."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from packaging.version import Version
from PIL import Image

from perceiver_cli.data.inputs import opened
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits
from perceiver_cli.training.events import Finished
from perceiver_cli.training.trainer import Trainer

# A model so small that a step takes a few milliseconds.
SMALL = (
    "model.num_latents=8",
    "model.latent_channels=16",
    "model.num_self_heads=2",
    "model.self_attends_per_block=1",
    "model.schedule=c0 t0 c1 t0",
    "train.batch_size=16",
)


def at_least(package: str, wanted: str) -> bool:
    """Return whether an installed package has this version or a later one: what a test expects may be a library's."""
    return Version(version(package)) >= Version(wanted)


SLOW = ("test_pages.py", "benchmarks", "test_export.py", "slow")  # files and folders whose tests are all slow
FIRST = ("test_pages.py", "test_contest.py", "test_export.py", "test_registry.py", "test_pipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests; run the slowest first, so that several processes end together; skip what needs a GPU."""
    for item in items:
        if not {*SLOW}.isdisjoint(item.path.relative_to(Path(__file__).parent).parts):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.name) in FIRST else len(FIRST))


def write_images(root: Path, counts: dict[str, int], side: int = 12, seed: int = 0) -> Path:
    """Write PNG class folders: class k is a bright bar in row k of noise, easy to learn. Returns the folder."""
    rng = np.random.default_rng(seed)
    for k, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (side, side), dtype=np.uint8)
            pixels[(2 + 3 * k) % side] = 255
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def lack(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make the import of a package fail, as where it is not installed."""
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)


def detect(source: Source) -> str:
    """Return the modality that a source belongs to by its content."""
    return detected(source).kinds[0]


def decode(source: Source, spec: InputSpec, limits: Limits) -> Array:
    """Return what a source decodes to."""
    return opened(source, spec, limits).array()


RATE_HZ = 8_000
TONES_HZ = {"low": 300, "high": 2_000}
ROWS = {"top": 2, "bottom": 8}


def write_pairs(root: Path, count: int, seed: int = 0) -> Path:
    """Write pairs of one stem, 017.png and 017.wav, in four classes that neither tells alone. Returns the folder.

    A picture has a bright bar in one of two rows, a sound of 0.3 s one of two tones: top-low, top-high, bottom-low ...
    """
    rng = np.random.default_rng(seed)
    for row, place in ROWS.items():
        for tone, hz in TONES_HZ.items():
            folder = root / f"{row}-{tone}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (12, 12), dtype=np.uint8)
                pixels[place] = 255
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
                soundfile.write(folder / f"{i:03d}.wav", tone_of(hz, 0.3, rng), RATE_HZ)
    return root


def tone_of(hz: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Return a sine with noise at RATE_HZ."""
    samples = np.arange(round(seconds * RATE_HZ))
    sine = np.sin(2 * np.pi * (hz * samples / RATE_HZ + rng.random()))
    return np.asarray(0.3 * sine + 0.05 * rng.standard_normal(len(samples)), dtype=np.float32)


def write_clip(path: Path, row: int | None, hz: float | None, seconds: float = 1.0, seed: int = 0) -> Path:
    """Write an MP4 of 8 frames a second, 32 x 32, with a bright bar, and a tone; None leaves out picture or sound."""
    import av

    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        picture = sound = None
        if row is not None:
            picture = file.add_stream("mpeg4", rate=8)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
        if hz is not None:
            sound = file.add_stream("aac", rate=RATE_HZ, layout="mono")
        if picture is not None:
            for i in range(round(8 * seconds)):
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[8 * (row or 0) : 8 * (row or 0) + 8] = 255
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = i
                file.mux(picture.encode(frame))
            file.mux(picture.encode())
        if sound is not None:
            samples = tone_of(hz or 0, seconds, rng)
            block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            block.sample_rate = RATE_HZ
            file.mux(sound.encode(block))
            file.mux(sound.encode())
    return path


# Inputs of pairs and clips as small as the model; sound is given as raw samples where a spectrogram adds nothing.
SMALL_PAIRS = (
    *SMALL,
    "inputs.image.stem=none",
    "inputs.audio.stem=none",
    "inputs.image.size=[12, 12]",
    "inputs.image.patch=[2, 2]",
    "inputs.image.bands=4",
    "inputs.audio.clip_s=0.25",
    "inputs.audio.num_mels=16",
    "inputs.audio.patch=[4, 4]",
    "inputs.audio.bands=4",
)
SMALL_CLIPS = (
    *SMALL,
    "inputs.audio.clip_s=0.5",
    "inputs.audio.num_mels=16",
    "inputs.audio.patch=[4, 4]",
    "inputs.audio.bands=4",
    "inputs.video.num_frames=4",
    "inputs.video.size=[16, 16]",
    "inputs.video.patch=[2, 4, 4]",
    "inputs.video.bands=4",
)


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of the test processes fills, and all others wait for and read."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    claim, whole, end = root / f"{name}.claim", root / f"{name}.whole", time.monotonic() + 300
    while not whole.exists():
        assert time.monotonic() < end, f"another test process did not make {name}"
        try:
            claim.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.05)
        else:
            (root / name).mkdir()
            make(root / name)
            whole.touch()
    return root / name


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ of pictures with sounds: four classes of 24 and 8 pairs."""

    def make(root: Path) -> None:
        write_pairs(root / "train", 24, seed=1)
        write_pairs(root / "test", 8, seed=2)

    return shared(tmp_path_factory, "pairs", make)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ of videos with sound: four classes of 12 and 4 MP4 of a second."""

    def make(root: Path) -> None:
        for split, count in (("train", 12), ("test", 4)):
            for row in (0, 2):
                for tone, hz in TONES_HZ.items():
                    for i in range(count):
                        path = root / split / f"{'top' if row == 0 else 'bottom'}-{tone}" / f"{i:03d}.mp4"
                        write_clip(path, row, hz, seed=i)

    return shared(tmp_path_factory, "clips", make)


@pytest.fixture(scope="session")
def paired(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small model that has learned `pairs`."""

    def make(root: Path) -> None:
        options = [*SMALL_PAIRS, "train.epochs=60", "train.lr=0.01"]
        assert isinstance(list(Trainer(pairs, root / "run", overrides=options).fit())[-1], Finished)

    return shared(tmp_path_factory, "paired", make) / "run"


@pytest.fixture(scope="session")
def filmed(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small model that has seen `clips` for a few steps."""

    def make(root: Path) -> None:
        list(Trainer(clips, root / "run", overrides=[*SMALL_CLIPS, "train.steps=8"]).fit())

    return shared(tmp_path_factory, "filmed", make) / "run"


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with three classes of 40 and 10 grey 12 x 12 PNG."""

    def make(root: Path) -> None:
        write_images(root / "train", {"left": 40, "middle": 40, "right": 40}, seed=1)
        write_images(root / "test", {"left": 10, "middle": 10, "right": 10}, seed=2)

    return shared(tmp_path_factory, "bars", make)


@pytest.fixture(scope="session")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small model, of the paper's byte arrays, that has learned `bars`."""

    def make(root: Path) -> None:
        options = [*SMALL, "inputs.image.stem=none", "train.epochs=25", "train.lr=0.01"]
        assert isinstance(list(Trainer(bars, root / "run", overrides=options).fit())[-1], Finished)

    return shared(tmp_path_factory, "trained", make) / "run"


Perceive = Callable[..., "subprocess.CompletedProcess[bytes]"]


@contextmanager
def warm(folder: Path, **environment: str) -> Iterator[Path]:
    """Yield a folder whose `perceiver` and `python` start at once; see tests/warm.py. The real ones without `fork`."""
    if not hasattr(os, "fork"):
        yield Path(sys.executable).parent
        return
    command = [sys.executable, Path(__file__).parent / "warm.py", folder]
    with subprocess.Popen(command, env=os.environ | environment) as server:
        while not os.access(folder / "perceiver", os.X_OK):
            assert server.poll() is None, "tests/warm.py ended"
            time.sleep(0.05)
        yield folder
        server.terminate()


@pytest.fixture(scope="session")
def warm_bin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of programs that start at once: `warm`."""
    with warm(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="session")
def perceive(warm_bin: Path) -> Perceive:
    """Run the `perceiver` command; returns the finished process with bytes of stdout and stderr."""

    def run(
        *arguments: str | Path | bytes, cwd: Path | None = None, stdin: bytes | None = None, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        command = [os.fsencode(warm_bin / "perceiver"), *map(os.fsencode, arguments)]
        environment = {k: v for k, v in os.environ.items() if k != "PERCEIVER_MODEL"} | env
        given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(command, capture_output=True, cwd=cwd, env=environment, timeout=120, **given)  # type: ignore[call-overload,no-any-return]

    return run
