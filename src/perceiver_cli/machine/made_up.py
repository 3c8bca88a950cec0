"""Synthetic files for measurements, as large as real ones: JPEG, WAV, STL, MP4, text, cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from perceiver_cli.preprocess.series import MADE_UP as CHANNELS
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.table import MADE_UP

WORDS = 200  # of a text
SAMPLES = 512  # of a series


def made_up_files(folder: Path, modality: str, count: int) -> list[Source]:
    """Write different files of a modality into a folder and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix, make = _MAKERS[modality]
    paths = [folder / f"{number}{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        with path.open("wb") as file:
            make(np.random.default_rng(number), file)
    return [Source(str(path)) for path in paths]


def _jpeg(rng: np.random.Generator, file: BinaryIO) -> None:
    from PIL import Image

    # Smooth noise is as hard to decode as a photograph; plain noise is harder.
    small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
    small.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)


def _wav(rng: np.random.Generator, file: BinaryIO) -> None:
    import soundfile

    soundfile.write(file, rng.normal(0, 0.1, 80_000), 16_000, format="WAV", subtype="PCM_16")


def _stl(rng: np.random.Generator, file: BinaryIO) -> None:
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=4)
    mesh.vertices *= rng.uniform(0.5, 2.0, 3)
    file.write(mesh.export(file_type="stl"))


def _mp4(rng: np.random.Generator, file: BinaryIO) -> None:
    import av

    with av.open(file, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        track.width, track.height, track.pix_fmt = 320, 240, "yuv420p"
        still = np.kron(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        for number in range(32):  # smooth and moving, to compress as a real video does
            picture = np.roll(still, 3 * number, axis=1)
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode(None))


def _txt(rng: np.random.Generator, file: BinaryIO) -> None:
    letters = rng.integers(97, 123, 6 * WORDS, dtype=np.uint8)
    letters[5::6] = ord(" ")
    file.write(letters.tobytes())


def _cells(rng: np.random.Generator, file: BinaryIO) -> None:
    numbers = rng.normal(size=MADE_UP)
    file.write(json.dumps([[f"column {place + 1}", "number", str(x)] for place, x in enumerate(numbers)]).encode())


def _csv(rng: np.random.Generator, file: BinaryIO) -> None:
    steps = np.arange(SAMPLES)[:, None]
    waves = np.sin(steps * rng.uniform(0.05, 0.5, CHANNELS)) + rng.normal(0, 0.1, (SAMPLES, CHANNELS))
    names = [f"channel {place + 1}" for place in range(CHANNELS)]
    np.savetxt(file, waves, "%.4f", ",", header=",".join(names), comments="")


_MAKERS: dict[str, tuple[str, Callable[[np.random.Generator, BinaryIO], None]]] = {
    "image": (".jpg", _jpeg),
    "audio": (".wav", _wav),
    "points": (".stl", _stl),
    "video": (".mp4", _mp4),
    "series": (".csv", _csv),
    "text": (".txt", _txt),
    "table": (".json", _cells),
}
