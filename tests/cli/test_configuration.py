"""`perceiver options`: every option has a meaning, and a run says who chose each value."""

from __future__ import annotations

import json
from pathlib import Path

from perceiver_cli.cli.configuration import all_options
from tests.conftest import Perceive


def test_every_option_has_a_meaning_and_a_type() -> None:
    options = all_options()
    assert len(options) > 100
    assert [option.key for option in options if not option.meaning] == []
    by_key = {option.key: option for option in options}
    assert by_key["train.lr"].kind == "number > 0"
    assert by_key["data.val_fraction"].kind == "number >= 0, < 1"
    assert by_key["data.workers"].kind == "integer >= 0, <= 256"
    assert by_key["inputs.image.size"].kind.endswith("or auto")


def test_a_word_finds_options_by_name_or_meaning(perceive: Perceive) -> None:
    done = perceive("options", "momentum")
    assert done.returncode == 2
    assert b"no option has the word momentum" in done.stderr
    lines = perceive("options", "RATE_HZ").stdout.decode().splitlines()
    assert lines[0].startswith("inputs.audio.rate_hz = 48000  (default; integer >= 1000, <= 768000 or auto)")
    assert lines[1].startswith('    "auto": ')
    assert b"did you mean batch_size" in perceive("options", "batchsize").stderr


def test_a_run_says_who_chose_each_value(perceive: Perceive, bars: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = perceive("train", bars, "-o", run, "--steps", "1", "--lr", "0.01", "--set", "model.num_latents=8")
    assert done.returncode == 0, done.stderr
    facts = json.loads(perceive("options", "--run", run, "--json").stdout)["options"]
    chosen = {row["key"]: (row["value"], row["from"]) for row in facts}
    assert chosen["train.lr"] == (0.01, "user")
    assert chosen["model.num_latents"] == (8, "user")
    assert chosen["inputs.image.size"][1] == "data"
    assert chosen["train.optimizer"] == ("adamw", "preset tiny-image")
    assert chosen["train.accumulate"] == (1, "default")
    assert not any(key.startswith("inputs.audio") for key in chosen)
