"""`perceiver` and `python -m perceiver_cli`: set up the process, then run the command line.

Importing the package changes no environment, signal handler or malloc setting.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line."""
    # Ctrl-C ends by the signal (130), during the imports too; train installs its own handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Read by GNU OpenMP when torch is imported. Its threads spin 300,000 times at every barrier by default; beside one
    # busy process a step then takes 2 to 20 times as long. 2,000 costs nothing on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

    from perceiver_cli.cli.app import app
    from perceiver_cli.cli.terminal import guarded
    from perceiver_cli.malloc import keep_freed

    keep_freed()
    guarded(app)


if __name__ == "__main__":
    main()
