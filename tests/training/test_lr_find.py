"""The range test: where it stops, what it suggests, and the command that it hands on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver_cli.errors import DivergedError
from perceiver_cli.training.lr_find import RATES, suggest
from tests.conftest import SMALL, Perceive, write_images

SETS = [part for change in SMALL[:-1] for part in ("--set", change)]


def test_the_suggestion_lies_where_the_loss_falls() -> None:
    rates = np.geomspace(1e-5, 1, 101)  # 20 steps a decade
    losses = np.interp(np.log10(rates), [-5, -4, -2, -1, 0], [2.0, 2.0, 1.0, 1.5, 9.0])
    curve = suggest(list(rates), list(losses), list(losses))
    assert curve.suggestion == pytest.approx((10**-3 * 10**-2) ** 0.5, rel=0.02)  # half of the fall, and all of it
    assert curve.notes == ()
    falling = suggest(list(rates), list(-rates), list(-rates))
    assert "still falling at the highest rate" in falling.notes[0]
    rising = suggest(list(rates), list(rates), list(rates))
    assert "never fell" in rising.notes[0]
    with pytest.raises(DivergedError, match="not finite after 1 steps"):
        suggest([1e-5], [2.0], [2.0])


def test_by_command(perceive: Perceive, tmp_path: Path) -> None:
    data = write_images(tmp_path / "it's a \n set" / "train", {"left": 24, "right": 24}).parent
    options = [*SETS, "--batch-size", "16", "--steps", "30"]
    done = perceive("lr-find", data, *options, "-o", "curve.svg", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    curve = json.loads(done.stdout)
    assert len(curve["rates"]) == len(curve["losses"]) == len(curve["smoothed"]) <= 30
    assert curve["rates"][0] == RATES[0]
    assert RATES[0] < curve["suggestion"] < RATES[1]
    assert min(curve["smoothed"]) < curve["smoothed"][0]
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()[:2000]
    assert not (tmp_path / "runs").exists()  # nothing else is written

    script = 'perceiver() { printf "%s\\0" "$@"; }\n' + curve["command"]
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert words[:2] == ["train", str(data)]
    assert words[-4:-1] == ["--set", SMALL[-2], "--lr"]
    assert float(words[-1]) == curve["suggestion"]

    done = perceive("lr-find", data, *options, cwd=tmp_path)
    assert done.stdout.decode().strip() == curve["command"]  # the same seed, the same curve
    with Image.open(tmp_path / "lr-find.png") as picture:
        assert picture.size[0] > 300
    assert perceive("lr-find", data, "-o", "curve.pdf").returncode == 2
