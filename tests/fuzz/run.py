"""The process that fuzzes one target: it imports the program after atheris, which counts its branches."""

from __future__ import annotations


def fuzz(arguments: list[str], target: str) -> None:
    """Fuzz one target in this process, whose modules of the program are not imported yet. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["perceiver_cli"]):
        from tests.fuzz import targets
    atheris.Setup(["fuzz", *arguments], targets.TARGETS[target])
    atheris.Fuzz()
