"""`perceiver` and `python -m perceiver_cli`: sets up the process, then runs the command line.

Only here: who imports the package keeps their own environment, signal handlers and malloc.
"""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    # Read by GNU OpenMP when torch is first imported. Its threads spin 300,000 times at every barrier by default; with
    # one other busy process on the machine a step then takes 2 to 20 times as long. 2,000 costs nothing where it is
    # quiet.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

    from perceiver_cli.cli.app import app
    from perceiver_cli.cli.terminal import guarded
    from perceiver_cli.malloc import keep_freed

    keep_freed()
    guarded(app)


if __name__ == "__main__":
    main()
