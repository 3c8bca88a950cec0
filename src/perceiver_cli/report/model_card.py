"""The model card: README.md of a run folder, for whoever finds the model. All that is data in it is escaped."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from perceiver_cli.files import show_text, write_text
from perceiver_cli.model.checkpoint import ModelInfo

MAX_LISTED = 200  # classes


def write_card(run: Path, summary: Mapping[str, Any], info: ModelInfo) -> None:
    """Write README.md beside a run's best model so far, whose header is `info`. Where the data lay stays out of it."""
    write_text(run / "README.md", card(summary, info))


def card(summary: Mapping[str, Any], info: ModelInfo) -> str:
    """Return the card as Markdown: the template `model_card.md.jinja`, in which every value is escaped by `plain`."""
    world = Environment(
        finalize=plain, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = world.from_string((resources.files("perceiver_cli.report") / "model_card.md.jinja").read_text("utf-8"))
    versions = {"perceiver": version("perceiver-cli"), "torch": torch.__version__, "python": platform.python_version()}
    facts = {"folder": Path(summary["data"]).name, "info": info, "config": info.config, "max_listed": MAX_LISTED}
    return template.render(summary, **facts, versions=versions)


def plain(value: Any) -> str:
    """Return a value that Markdown shows as it is: one line, no link, image, HTML, code or table cell of its own."""
    shown = show_text(f"{value:.4g}" if isinstance(value, float) else str(value))
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~$^@:]|(?<=www)\.)", r"\\\1", shown)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
