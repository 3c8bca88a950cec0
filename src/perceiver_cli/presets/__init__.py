"""The built-in recipes, one TOML file each."""

from __future__ import annotations

import difflib
from pathlib import Path

from perceiver_cli.errors import UsageError

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Return the names of the built-in recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def preset_text(name: str) -> str:
    """Return a preset's TOML with its comments. Raises a UsageError that names the nearest preset."""
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}" if near else f"there are {', '.join(names)}"
        raise UsageError(f"no preset named {name!r}", hint)
    return (FOLDER / f"{name}.toml").read_text("utf-8")
