"""`perceiver` and `python -m perceiver_cli`: set up the process, then run the command line.

Importing the package changes no environment, signal handler or malloc setting.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line."""
    # Ctrl-C ends by the signal (130), during the imports too; train installs its own handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Read by GNU OpenMP when torch is imported. Its threads spin 300,000 times at every barrier by default; beside one
    # busy process a step then takes 2 to 20 times as long. 2,000 costs nothing on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    _lend_matplotlib_a_folder()

    from perceiver_cli.cli.app import app
    from perceiver_cli.cli.terminal import guarded
    from perceiver_cli.malloc import keep_freed

    keep_freed()
    guarded(app)


def _lend_matplotlib_a_folder() -> None:
    """Set MPLCONFIGDIR to a temporary folder if matplotlib's own cannot be written: it would warn, even with -q."""
    if named := os.environ.get("MPLCONFIGDIR"):
        folders = [named]
    elif sys.platform.startswith(("linux", "freebsd")):
        pairs = (("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache"))
        folders = [os.environ.get(name) or os.path.expanduser(path) for name, path in pairs]
    else:
        folders = [os.path.expanduser("~/.matplotlib")]
    if all(map(_can_be_written, folders)):
        return
    import atexit
    import shutil
    import tempfile

    try:
        folder = tempfile.mkdtemp(prefix="perceiver-matplotlib-")
    except OSError:
        return
    os.environ["MPLCONFIGDIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _can_be_written(folder: str) -> bool:
    """Return whether a folder can be written, or made where it is missing."""
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK)


if __name__ == "__main__":
    main()
