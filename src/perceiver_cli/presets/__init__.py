"""The recipes that ship with the package, one TOML file each."""

from __future__ import annotations

import difflib
from importlib import resources

from perceiver_cli.errors import UsageError


def preset_names() -> list[str]:
    """Return the names of the recipes that ship with the package, sorted."""
    folder = resources.files("perceiver_cli") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """Return a preset's TOML with its comments.

    Raises:
        UsageError: there is no such preset; names the nearest.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise UsageError(
            f"no preset named {name!r}", f"did you mean {near[0]}" if near else f"there are {', '.join(names)}"
        )
    return (resources.files("perceiver_cli") / "presets" / f"{name}.toml").read_text("utf-8")
