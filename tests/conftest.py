"""Small data sets that are written to disk, and a model trained on one, shared by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.events import Finished
from perceiver_cli.train import Trainer

# A model so small that a step takes a few milliseconds.
SMALL = (
    "model.num_latents=8",
    "model.latent_channels=16",
    "model.num_self_heads=2",
    "model.self_attends_per_block=1",
    "model.schedule=c0 t0 c1 t0",
    "train.batch_size=16",
)


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


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with three classes of 40 and 10 grey 12 x 12 PNG."""
    root = tmp_path_factory.mktemp("bars")
    write_images(root / "train", {"left": 40, "middle": 40, "right": 40}, seed=1)
    write_images(root / "test", {"left": 10, "middle": 10, "right": 10}, seed=2)
    return root


@pytest.fixture(scope="session")
def trained(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small model that has learned `bars`."""
    output = tmp_path_factory.mktemp("trained") / "run"
    events = list(Trainer(bars, output, overrides=[*SMALL, "train.epochs=25", "train.lr=0.01"]).fit())
    assert isinstance(events[-1], Finished)
    return output


Perceive = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="session")
def perceive() -> Perceive:
    """Run the installed `perceiver` command; returns the finished process with bytes of stdout and stderr."""

    def run(
        *arguments: str | Path | bytes, cwd: Path | None = None, stdin: bytes | None = None, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        command = [os.fsencode(Path(sys.executable).parent / "perceiver"), *map(os.fsencode, arguments)]
        environment = {k: v for k, v in os.environ.items() if k != "PERCEIVER_MODEL"} | env
        given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(command, capture_output=True, cwd=cwd, env=environment, timeout=120, **given)  # type: ignore[call-overload,no-any-return]

    return run
