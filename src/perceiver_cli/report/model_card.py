"""The model card: README.md of a run folder. All data in it is escaped."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

import perceiver_cli
from perceiver_cli.files import show_text
from perceiver_cli.model.checkpoint import ModelInfo

MAX_LISTED = 200  # classes


def card(summary: Mapping[str, Any], info: ModelInfo) -> str:
    """Return the card of a run's plan and best model as Markdown: every value escaped, no full path of the data."""
    world = Environment(
        finalize=plain, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = world.from_string((resources.files("perceiver_cli.report") / "model_card.md.jinja").read_text("utf-8"))
    facts = {"folder": Path(summary["data"]).name, "info": info, "config": info.config, "versions": versions()}
    return template.render(summary, **facts, max_listed=MAX_LISTED)


def versions() -> dict[str, str]:
    """Return the versions of this package, torch and Python."""
    return {"perceiver": perceiver_cli.__version__, "torch": torch.__version__, "python": platform.python_version()}


def plain(value: Any) -> str:
    """Return a value as one line of literal Markdown text: no link, image, HTML, code or table cell."""
    shown = show_text(f"{value:.4g}" if isinstance(value, float) else str(value))
    escaped = re.sub(r"([\\`*_{}\[\]()#!|~$^@:]|(?<=www)\.)", r"\\\1", shown)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
