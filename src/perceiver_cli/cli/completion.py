"""Completion for Tab: names of presets, run folders and model files. Imports nothing slow."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from perceiver_cli.files import printable
from perceiver_cli.run_folder import MODEL_FILE, STATE_FOLDER

PRESETS = Path(__file__).parent.parent / "presets"


def presets(incomplete: str) -> list[str]:
    """Return the presets whose names begin with the text."""
    return sorted(path.stem for path in PRESETS.glob("*.toml") if path.stem.startswith(incomplete))


def runs(incomplete: str) -> list[str]:
    """Return the run folders in runs/ and in the typed folder whose paths begin with the text."""
    return _beginning(incomplete, lambda path: (path / MODEL_FILE).exists() or (path / STATE_FOLDER).is_dir())


def models(incomplete: str) -> list[str]:
    """Return the run folders with a model, and the model files, whose paths begin with the text."""
    return _beginning(incomplete, lambda path: (path / MODEL_FILE).exists() or path.suffix == ".safetensors")


def presets_and_models(incomplete: str) -> list[str]:
    """Return the results of `presets` and `models`."""
    return presets(incomplete) + models(incomplete)


def _beginning(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    folder = os.path.dirname(incomplete)
    names = [os.path.join(folder, name) for name in _names(folder or ".")]
    names += [os.path.join("runs", name) for name in _names("runs")] if not folder else []
    # A name with control characters could not be typed anyway, and must not reach the terminal.
    return sorted(p for p in names if p.startswith(incomplete) and p == printable(p, "") and wanted(Path(p)))


def _names(folder: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []
