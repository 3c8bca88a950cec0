"""Shared code of the benchmarks' command lines: start one, print its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from perceiver_cli.cli.models import show_rows
from perceiver_cli.cli.terminal import guarded, show_facts
from perceiver_cli.machine.measure import describe_machine
from perceiver_cli.malloc import keep_freed
from perceiver_cli.model.device import Compute

Seconds = Annotated[float | None, typer.Option(min=0.1, help="CPU time of each training.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of each training, in place of --seconds.")]
Seeds = Annotated[int, typer.Option(min=1, help="Seeds: 0, 1, 2 ...")]


def start(command: Callable[..., None]) -> None:
    """Run a function as a command line; an error is one line and an exit code, as in `perceiver`."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(command)
    keep_freed()  # as `perceiver` does
    guarded(app)


def report(rows: Iterable[Mapping[str, Any]], compute: Compute, as_json: bool) -> list[Mapping[str, Any]]:
    """Print rows as they come, then the facts about the machine; return the rows."""
    printed = list(show_rows(rows, as_json))
    show_facts(describe_machine(compute), as_json)
    return printed
