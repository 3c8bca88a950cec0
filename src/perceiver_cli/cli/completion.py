"""Completion for Tab: names of presets, run folders and model files, keys of options. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from glob import escape, glob
from pathlib import Path

from perceiver_cli.files import printable
from perceiver_cli.run_folder import MODEL_FILE, STATE_FOLDER


def presets(incomplete: str) -> list[str]:
    """Return the presets whose names begin with the text."""
    from perceiver_cli.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Return the run folders in runs/ and in the typed folder whose paths begin with the text."""
    return _beginning(incomplete, lambda path: (path / MODEL_FILE).exists() or (path / STATE_FOLDER).is_dir())


def models(incomplete: str) -> list[str]:
    """Return the run folders with a model, and the model files, whose paths begin with the text."""
    return _beginning(incomplete, lambda path: (path / MODEL_FILE).exists() or path.suffix == ".safetensors")


def presets_and_models(incomplete: str) -> list[str]:
    """Return the results of `presets` and `models`."""
    return presets(incomplete) + models(incomplete)


def settings(incomplete: str) -> list[str]:
    """Return the options of a recipe whose keys begin with the text, as KEY=."""
    from perceiver_cli.config import option_keys

    return [f"{key}=" for key in option_keys() if key.startswith(incomplete)]


def _beginning(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    paths = glob(f"{escape(incomplete)}*")
    if not os.path.dirname(incomplete):
        paths += [path for path in glob("runs/*") if path.startswith(incomplete)]
    # A name with control characters cannot be typed, and must not reach the terminal.
    return sorted(path for path in paths if path == printable(path, "") and wanted(Path(path)))
