"""Where a model looks, on made-up data of which the answer is known: only one part of each example tells its class.

    python examples/explain.py image|audio|points|video [FOLDER] [STEPS]      default: explained-<modality> 300

Each makes files, trains a small model and explains one file, as `perceiver explain FILE -m RUN -o out.png` does.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from perceiver_cli import Predictor, Trainer
from perceiver_cli.inference.explain import explain
from perceiver_cli.report.explanation import save

Rng = np.random.Generator
RATE_HZ = 8000
TONES_HZ = (400, 1200)


def write_picture(path: Path, kind: int, rng: Rng) -> None:
    """Write a cross or a ring into the upper right quarter of a picture, and either into the others."""
    pixels = rng.uniform(0, 90, (24, 24))
    for corner in range(4):
        y, x = np.mgrid[:12, :12] - 5.5 + rng.uniform(-1, 1, (2, 1, 1))
        cross = (kind if corner == 1 else rng.integers(2)) == 0
        shape = (abs(y) < 1.2) | (abs(x) < 1.2) if cross else abs(np.hypot(y, x) - 3.5) < 1.2
        top, left = 12 * (corner // 2), 12 * (corner % 2)
        pixels[top : top + 12, left : left + 12] += 150 * shape
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path.with_suffix(".png"))


def tones(kinds: list[int], rng: Rng) -> NDArray[np.float32]:
    """Return a second of a low or a high tone for each kind, in noise."""
    time = np.arange(RATE_HZ) / RATE_HZ
    parts = [0.3 * np.sin(2 * np.pi * TONES_HZ[kind] * time) * np.hanning(RATE_HZ) for kind in kinds]
    sound = np.concatenate(parts)
    return (sound + 0.02 * rng.standard_normal(len(sound))).astype(np.float32)


def write_sound(path: Path, kind: int, rng: Rng) -> None:
    """Write four seconds of low and high tones, of which the third tells the class."""
    kinds = [kind if second == 2 else int(rng.integers(2)) for second in range(4)]
    soundfile.write(path.with_suffix(".wav"), tones(kinds, rng), RATE_HZ)


def write_cloud(path: Path, kind: int, rng: Rng) -> None:
    """Write four balls or cubes one above the other, of which the uppermost tells the class."""
    parts = []
    for place in range(4):
        points = rng.standard_normal((256, 3))
        ball = (kind if place == 3 else rng.integers(2)) == 0
        points /= np.linalg.norm(points, axis=1, keepdims=True) if ball else abs(points).max(axis=1, keepdims=True)
        parts.append(0.45 * points + [0, place, 0])
    np.savetxt(path.with_suffix(".xyz"), rng.permutation(np.concatenate(parts)), "%.5f")


def write_film(path: Path, kind: int, rng: Rng) -> None:
    """Write two seconds of a square that moves to the left or to the right, with a tone that tells nothing."""
    import av

    with av.open(str(path.with_suffix(".mp4")), "w") as file:
        picture = file.add_stream("mpeg4", rate=8)
        picture.width, picture.height, picture.pix_fmt, picture.bit_rate = 64, 64, "yuv420p", 1_000_000
        sound = file.add_stream("aac", rate=RATE_HZ, layout="mono")
        row = int(rng.integers(4, 44))
        for k in range(16):
            pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            x = 3 * (k if kind else 15 - k)
            pixels[row : row + 14, x : x + 14] = 230
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = k
            file.mux(picture.encode(frame))
        samples = tones([int(rng.integers(2)) for _ in range(2)], rng)
        block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        block.sample_rate = RATE_HZ
        file.mux([*picture.encode(), *sound.encode(block), *sound.encode()])


Writer = Callable[[Path, int, Rng], None]
SETS: dict[str, tuple[Writer, tuple[str, str], int, list[str]]] = {
    "image": (write_picture, ("cross", "ring"), 200, []),
    "audio": (write_sound, ("low", "high"), 200, ["inputs.audio.clip_s=4"]),
    "points": (write_cloud, ("ball", "cube"), 200, []),
    "video": (
        write_film,
        ("left", "right"),
        40,
        ["inputs.video.size=[32, 32]", "inputs.video.patch=[2, 4, 4]", "inputs.audio.patch=[8, 16]"],
    ),
}


def main(modality: str, folder: Path, steps: int) -> str:
    """Write data, train, explain one file of the second class; return its predicted class."""
    write, classes, count, changes = SETS[modality]
    rng = np.random.default_rng(0)
    for kind, name in enumerate(classes):
        for number in range(count + 1):
            place = folder / "data" / ("train" if number < count else "test") / name
            place.mkdir(parents=True, exist_ok=True)
            write(place / f"{number:03d}", kind, rng)
    for _ in Trainer(folder / "data", folder / "run", overrides=[*changes, f"train.steps={steps}"]).fit():
        pass
    (file,) = (folder / "data" / "test" / classes[1]).iterdir()
    found = explain(Predictor(folder / "run"), str(file))
    save(found, folder / "out.png")
    if modality == "points":
        save(found, folder / "out.ply")
    for name, shown in found.shown.items():
        print(f"{name}: {shown.attention.sum():.0%} of the attention, {shown.heat.sum():.0%} of the heat")
    print(f"{found.path}: {found.predicted} {found.predicted_prob:.3f}, in {folder / 'out.png'}")
    return found.predicted


if __name__ == "__main__":
    kind = sys.argv[1] if len(sys.argv) > 1 else "image"
    if kind not in SETS:
        sys.exit(__doc__)
    main(
        kind,
        Path(sys.argv[2] if len(sys.argv) > 2 else f"explained-{kind}"),
        int(sys.argv[3]) if len(sys.argv) > 3 else 300,
    )
