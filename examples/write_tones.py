"""Write labelled sounds as WAV, FOLDER/{train,test}/{low,high,noise}/<n>.wav, and FOLDER/recording.wav of all three."""

import sys
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16_000
TONES_HZ = {"low": (150, 500), "high": (1500, 5000)}
NUM_SOUNDS = {"train": 24, "test": 8}  # of each class


def sound(kind: str, rng: np.random.Generator, seconds: float = 1.0) -> np.ndarray:
    """Return a sine of a random pitch, or noise: (samples,) float64 between -1 and 1."""
    times = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    noise = rng.normal(size=len(times))
    if kind == "noise":
        return noise * 0.2
    return 0.4 * np.sin(2 * np.pi * rng.uniform(*TONES_HZ[kind]) * times) + 0.02 * noise


def write_tones(folder: Path) -> None:
    """Write the sounds of every class and split, and a recording of 6 s in which they follow each other."""
    rng = np.random.default_rng(0)
    for kind in (*TONES_HZ, "noise"):
        for split, count in NUM_SOUNDS.items():
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                soundfile.write(folder / split / kind / f"{number:02d}.wav", sound(kind, rng), RATE_HZ)
    recording = np.concatenate([sound(kind, rng, 2.0) for kind in ("low", "noise", "high")])
    soundfile.write(folder / "recording.wav", recording, RATE_HZ)


if __name__ == "__main__":
    write_tones(Path(sys.argv[1] if len(sys.argv) > 1 else "tones"))
