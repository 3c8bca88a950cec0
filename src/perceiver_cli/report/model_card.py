"""The model card: README.md of a run folder, for whoever finds the model. All that is data in it is escaped."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perceiver_cli.files import show_text, write_text
from perceiver_cli.model.checkpoint import ModelInfo
from perceiver_cli.run_folder import MODEL_FILE

MAX_LISTED = 200  # classes


def write_card(run: Path, summary: Mapping[str, Any], info: ModelInfo) -> None:
    """Write README.md beside a run's model.

    summary: of `Trainer`; info: of the best model so far. The data are named, but not where they lay.
    """
    write_text(run / "README.md", card(summary, info))


def card(summary: Mapping[str, Any], info: ModelInfo) -> str:
    """Return the card as Markdown."""
    config = info.config
    classes = list(summary["classes"].items())
    rest = len(classes) - MAX_LISTED
    several = "several labels an example" if config.multi_label else "one label an example"
    return "\n".join(
        [
            f"# {plain(config.name)}",
            "",
            f"A [Perceiver](https://arxiv.org/abs/2103.03206) that tells {len(classes)} classes of "
            f"{plain(' and '.join(summary['modalities']))} apart ({several}), trained with perceiver-cli "
            f"{version('perceiver-cli')}.",
            "",
            "```sh",
            "perceiver predict -m . FILE",
            "```",
            "",
            "## Data",
            "",
            f"{plain(Path(summary['data']).name)}, fingerprint `{plain(info.data_fingerprint)}`.",
            "",
            *table(("split", "examples"), summary["splits"].items()),
            "",
            *table(("class", "training examples"), classes[:MAX_LISTED]),
            *([f"\n... and {rest} classes more."] if rest > 0 else []),
            "",
            "## Model",
            "",
            *table(("fact", "value"), _facts(summary, info)),
            "",
            "## Metrics",
            "",
            f"Of the model in `{MODEL_FILE}`, on the validation split; `metrics.jsonl` holds every evaluation.",
            "",
            *table(("metric", "value"), info.metrics.items()),
            "",
            "## The run",
            "",
            "```sh",
            "perceiver train DATA --config config.toml -o ANOTHER",
            "```",
            "",
            f"does it again: seed {config.train.seed}, {plain(summary['precision'])} on {plain(summary['device'])}, "
            f"torch {plain(torch.__version__)}, Python {platform.python_version()}.",
            "",
        ]
    )


def _facts(summary: Mapping[str, Any], info: ModelInfo) -> list[tuple[str, Any]]:
    """Return names and values of a model's size and shape."""
    model = info.config.model
    inputs = [
        (name, f"{' x '.join(map(str, entry['shape']))} of {entry['channels']} channels, Fourier features included")
        for name, entry in summary["inputs"].items()
    ]
    return [
        *inputs,
        ("parameters", f"{summary['parameters']:,}"),
        ("FLOPs of a forward", f"{summary['flops']:,}"),
        ("latents", f"{model.num_latents} x {model.latent_channels}"),
        ("schedule", model.schedule),
        ("self-attends per block", model.self_attends_per_block),
    ]


def table(head: tuple[str, str], rows: Any) -> list[str]:
    """Return the lines of a Markdown table of names and values, or one that says that there is nothing."""
    lines = [f"| {plain(name)} | {plain(_figure(value))} |" for name, value in rows]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *lines] if lines else ["None."]


def plain(text: str) -> str:
    """Return text that Markdown shows as it is: one line, no link, image, HTML, code or table cell of its own."""
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~$^@:]|(?<=www)\.)", r"\\\1", show_text(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
