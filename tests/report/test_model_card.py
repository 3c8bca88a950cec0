"""The model card of a run, and what strangers' names can do to it: nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.report.model_card import MAX_LISTED, card, plain


def test_a_run_has_a_card(trained: Path, bars: Path) -> None:
    text = (trained / "README.md").read_text()
    info = read_info(trained / "model.safetensors")
    assert text.startswith("# tiny-image\n")
    sizes = {name: int(count) for name, count in re.findall(r"^\| (\w+) \| (\d+) \|$", text, re.MULTILINE)}
    assert sizes["train"] + sizes["val"] == 120
    assert sizes["val"] > 0
    assert sizes["left"] + sizes["middle"] + sizes["right"] == sizes["train"]
    assert f"| val\\_accuracy | {info.metrics['val_accuracy']:.4g} |" in text
    assert f"| step | {info.step} |" in text
    assert f"`{info.data_fingerprint}`" in text
    assert "perceiver train DATA --config config.toml" in text
    assert str(bars) not in text  # the model travels; where the data lay does not


def test_the_card_says_which_positions_the_inputs_have(trained: Path) -> None:
    info = read_info(trained / "model.safetensors")
    spec = info.config.inputs["image"]
    shape = {"image": {"shape": [6, 6], "channels": 22, "words": ""}}
    summary = {
        "classes": {"a": 1}, "modalities": ["image"], "splits": {}, "inputs": shape, "parameters": 1, "flops": 1,
        "device": "cpu", "precision": "fp32", "data": "d",
    }  # fmt: skip
    for positions, words in (("fourier", "Fourier features"), ("learned", "learned positions")):
        inputs = {"image": spec.model_copy(update={"positions": positions})}
        changed = replace(info, config=info.config.model_copy(update={"inputs": inputs}))
        assert f"22 channels, {words} included" in card(summary, changed)


def test_names_are_text(trained: Path) -> None:
    evil = [
        "<script>x</script>",
        "a | b",
        "[x](http://y)",
        "# h",
        "`code`\n\n# new",
        "\x1b[31m",
        "www.x.y",
        "*b*",
        "x@y.z",
    ]
    info = read_info(trained / "model.safetensors")
    summary = {
        "classes": dict.fromkeys([*evil, *map(str, range(MAX_LISTED))], 1),
        "modalities": ["image"], "splits": {}, "inputs": {}, "parameters": 1, "flops": 1, "device": "cpu",
        "precision": "fp32", "data": "/secret/<b>",
    }  # fmt: skip
    text = card(summary, info)
    for wrong in (
        "<script",
        "a | b",
        "[x](",
        "\n# h",
        "\n# new",
        "\x1b",
        "www.x",
        "*b*",
        "x@y",
        "/secret",
        "<b>",
        "http://y",
    ):
        assert wrong not in text, wrong
    assert f"... and {len(evil)} more classes." in text
    assert "None." in text  # no splits


@pytest.mark.parametrize(("given", "shown"), [("a-b c.d", "a-b c.d"), ("a_b", "a\\_b"), ("a\nb", "a\\\\nb")])
def test_plain(given: str, shown: str) -> None:
    assert plain(given) == shown
