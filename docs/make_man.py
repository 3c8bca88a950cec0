"""Write docs/perceiver.1, the manual page, from the commands themselves: python docs/make_man.py"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from perceiver_cli.cli.app import app

PAGE = Path(__file__).parent / "perceiver.1"
OF_TYPER = ("install_completion", "show_completion")
HEAD = """.\\" Written from the commands by docs/make_man.py.
.TH PERCEIVER 1 "" "perceiver" "User Commands"
.SH NAME
perceiver \\- classify images, sound, video and point clouds
.SH SYNOPSIS
.B perceiver
.I COMMAND
[\\fIOPTIONS\\fR] [\\fIARGUMENTS\\fR]
"""
TAIL = """.SH EXIT STATUS
0 done; 1 a bug; 2 usage; 3 bad input, the good ones are answered; 5 cannot write, or out of a resource;
6 training diverged; 7 a damaged model file or stream. 130, 143 and 141 mean SIGINT, SIGTERM and SIGPIPE.
.SH ENVIRONMENT
.TP
.B PERCEIVER_MODEL
Model that is used without \\-m.
.SH FILES
.TP
.B runs/latest
Link to the last run, which is used without \\-m and PERCEIVER_MODEL.
"""


def page() -> str:
    """Return the manual page in roff: every command with its arguments and options."""
    program = get_command(app)
    head = [HEAD, f".SH DESCRIPTION\n{_text(program.help)}\n", *_parameters(program), ".SH COMMANDS\n"]
    return "".join([*head, *(text for child in program.commands.values() for text in _command("", child)), TAIL])  # type: ignore[attr-defined]


def _command(above: str, command: Any) -> Iterator[str]:
    name = f"{above}{command.name}"
    yield f".SS {_text(name)}\n{_text(command.help)}\n"
    yield from _parameters(command)
    for child in getattr(command, "commands", {}).values():
        yield from _command(f"{name} ", child)


def _parameters(command: Any) -> Iterator[str]:
    for each in command.params:
        if each.name not in OF_TYPER and not getattr(each, "hidden", False):
            names = (
                [each.metavar or each.name]
                if each.param_type_name == "argument"
                else [*each.opts, *each.secondary_opts]
            )
            yield f".TP\n.B {_text(', '.join(names))}\n{_text(each.help)}\n"


def _text(text: str | None) -> str:
    """Return a text in which roff finds no command: one line, dashes and backslashes escaped."""
    escaped = " ".join((text or "").split()).replace("\\", "\\\\").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    PAGE.write_text(page())
