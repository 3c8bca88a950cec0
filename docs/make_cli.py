"""Write docs/cli.md from the commands themselves: python docs/make_cli.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from perceiver_cli.cli.app import app

PAGE = Path(__file__).parent / "cli.md"
OF_TYPER = ("help", "install_completion", "show_completion")


def page() -> str:
    """Return the page: each command with its help, arguments and options."""
    head = "# Commands\n\nWritten from the commands by `python docs/make_cli.py`.\n"
    return "\n".join([head, *_section("perceiver", get_command(app))])


def _section(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}\n"
    if command.help:
        yield f"{command.help}\n"
    shown = [each for each in command.params if each.name not in OF_TYPER and not getattr(each, "hidden", False)]
    rows = [(_names(each), each.help or "", _default(each)) for each in shown]
    if rows:
        yield "| argument or option | meaning | default |\n|---|---|---|"
        yield "\n".join(f"| {names} | {_cell(meaning)} | {default} |" for names, meaning, default in rows) + "\n"
    for child in getattr(command, "commands", {}).values():
        yield from _section(f"{name} {child.name}", child)


def _names(each: Any) -> str:
    if each.param_type_name == "argument":
        return f"`{each.metavar or each.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))


def _default(each: Any) -> str:
    plain = each.default not in (None, False, ()) and not callable(each.default)
    return f"`{each.default}`" if plain else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
