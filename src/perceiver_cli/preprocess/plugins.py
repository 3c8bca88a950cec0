"""A user's own files that register modalities: --plugin FILE.py.

Such a file is a program, so only a file that the user named is run: no model file, record or recipe can name one.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from perceiver_cli.errors import UsageError
from perceiver_cli.files import plugins, show_path


def load_plugin(path: str | os.PathLike[str]) -> None:
    """Run a Python file, which registers its modalities. Raises UsageError if it is missing or fails.

    The file becomes a module with its own name, so that a spawned worker can import it.
    """
    file = Path(path).resolve()
    shown = f"--plugin {show_path(path)}"
    if file.suffix != ".py" or not file.is_file():
        raise UsageError(f"{shown}: no such Python file", "expected FILE.py that calls perceiver_cli.register")
    if os.fspath(file.parent) not in sys.path:
        sys.path.append(os.fspath(file.parent))  # last: no file in that folder takes the place of a library
    try:
        found = find_spec(file.stem)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or Path(found.origin).resolve() != file:
        raise UsageError(f"{shown}: another module is called {file.stem}", "rename the file, to letters and _")
    try:
        import_module(file.stem)
    except UsageError:
        raise
    except Exception as error:  # anything can go wrong in a program
        raise UsageError(f"{shown}: {type(error).__name__}: {error}") from error
    if (name := os.fspath(path)) not in plugins:
        plugins.append(name)
