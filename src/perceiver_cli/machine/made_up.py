"""Files that are made up for measurements, as large as real ones: JPEG, WAV, STL, MP4."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from perceiver_cli.preprocess.source import Source


def made_up_files(folder: Path, modality: str, count: int) -> list[Source]:
    """Write files of a modality into a folder, no two alike, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix, make = _MAKERS[modality]
    paths = [folder / f"{number}{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(make(np.random.default_rng(number)))
    return [Source(str(path)) for path in paths]


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
