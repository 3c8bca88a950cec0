"""The process that fuzzes one target: it imports the program after atheris, which counts its branches.

python -m tests.fuzz.run TARGET [LIBFUZZER_OPTION ...] [FOLDER ...]
"""

from __future__ import annotations

import sys


def fuzz(arguments: list[str], target: str) -> None:
    """Fuzz one target in this process, whose modules of the program are not imported yet. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["perceiver_cli"]):
        from tests.fuzz import targets
    # The first word is a command: to merge, libFuzzer starts it again.
    atheris.Setup([f"{sys.executable} -m tests.fuzz.run {target}", *arguments], targets.TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[2:], sys.argv[1])
