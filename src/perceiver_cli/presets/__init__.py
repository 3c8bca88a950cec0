"""The built-in recipes, one TOML file each."""

from __future__ import annotations

import difflib
from importlib import resources

from perceiver_cli.errors import UsageError

FOLDER = resources.files("perceiver_cli") / "presets"


def preset_names() -> list[str]:
    """Return the names of the built-in recipes, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """Return a preset's TOML with its comments. Raises a UsageError that names the nearest preset."""
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}" if near else f"there are {', '.join(names)}"
        raise UsageError(f"no preset named {name!r}", hint)
    return (FOLDER / f"{name}.toml").read_text("utf-8")
