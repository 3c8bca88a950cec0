"""The command `sweep`."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perceiver_cli.cli import completion, options
from perceiver_cli.cli.runs import show_comparison
from perceiver_cli.cli.several import folder_for, follow, is_several
from perceiver_cli.cli.terminal import emit, emit_json, say
from perceiver_cli.errors import DataError, UsageError, counted
from perceiver_cli.files import perceiver_command, show_path

if TYPE_CHECKING:
    from perceiver_cli.training.several import Request, Several


def sweep(
    data: Annotated[str | None, typer.Argument(help=options.DATA_HELP)] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            autocompletion=completion.settings,
            help="Values of an option: A,B,C or log:LOW:HIGH or lin:LOW:HIGH.",
        ),
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Number of runs [default: the whole grid, or 10].")] = None,
    max_time: Annotated[
        str | None, typer.Option(help="Time for all runs together, e.g. 1h30m; runs without a length share it.")
    ] = None,
    search: Annotated[
        Literal["auto", "grid", "random", "tpe"],
        typer.Option(help="How values are chosen; tpe learns from finished runs (optuna)."),
    ] = "auto",
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="End runs that fall behind the median.")] = True,
    output: Annotated[
        Path | None,
        options.output("Folder of the runs [default: runs/sweep-N].", completion.runs),
    ] = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    changes: options.Changes = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Length of each run in passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of each run in optimiser steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search, and of each run.")] = 0,
    device: options.Device = "auto",
    workers: options.WorkersOfRecipe = None,
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    label_column: options.LabelColumn = None,
    pair: options.Pair = None,
    group_by: options.GroupBy = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs in -o; --runs adds some.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the runs that -o already holds.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train runs with varied options. Print them, the best first; the last line on stdout trains the best.

    A run that falls behind the median of the others at the same point ends early. Ctrl-C saves; --resume goes on.
    The best is the best on the validation split: measure it on the test split before you believe its score.
    """
    seconds = options.seconds(max_time)
    if resume:
        if output is None or not is_several(output):
            raise UsageError("--resume needs the folder of a sweep", "pass -o runs/sweep-1")
        run_sweep(_resumed(output, vary, runs), output, seconds, json)
        return
    options.check_data(data)
    if data is None or data == "-":
        raise UsageError("no data given", "pass a folder of class folders: perceiver sweep DATA")
    overrides = list(changes or [])
    if epochs is not None or steps is not None:
        overrides += options.length_changes(steps)
    overrides += [] if epochs is None else [f"train.epochs={epochs:g}"]
    overrides += [f"train.seed={seed}", f"train.device={device}"]
    overrides += [] if workers is None else [f"data.workers={workers}"]
    overrides += [] if group_by is None else [f"data.group_by={group_by}"]
    overrides += options.data_changes(options.data_options(root, path_columns, label_column, pair))
    given = ["--preset", preset] if preset is not None else ["--config", os.fspath(config)] if config else []
    recipe = options.recipe_of(preset, config)
    from perceiver_cli.training.search import parse_vary, settled
    from perceiver_cli.training.several import Request

    chosen, count = settled(search, [parse_vary(text) for text in vary or []], runs)
    if seconds is not None and epochs is None and steps is None:
        overrides += options.length_changes(None, seconds, count)
        seconds = None  # each run has its own share of the time
    request = Request(
        kind="sweep", data=os.path.abspath(data), config=None if recipe is None else recipe.to_dict(),
        overrides=overrides, words=["perceiver", "train", data, *given], vary=list(vary or []), search=chosen,
        seed=seed, num_runs=count, prune=prune,
    )  # fmt: skip
    run_sweep(request, folder_for("sweep", output, replace=replace), seconds, json)


def _resumed(folder: Path, vary: list[str] | None, runs: int | None) -> "Request":
    """Return the request of a sweep to continue, with more runs if asked."""
    from perceiver_cli.training.several import load_request

    request = load_request(folder)
    if request.kind != "sweep":
        raise UsageError(f"{show_path(folder)}: holds {request.kind}", "go on with perceiver train --resume")
    if vary and vary != request.vary:
        raise UsageError("--resume cannot change --vary", f"the sweep has {' '.join(request.vary)}")
    return request.model_copy(update={"num_runs": runs or request.num_runs})


def run_sweep(request: "Request", folder: Path, seconds: float | None, as_json: bool) -> None:
    """Train the runs of a sweep; print them and the command that trains the best."""
    from perceiver_cli.training.search import parse_vary, proposer
    from perceiver_cli.training.several import Several

    propose = proposer(request.search, [parse_vary(text) for text in request.vary], request.num_runs, request.seed)
    until = None if seconds is None else time.monotonic() + seconds
    several = Several(folder, request, propose=propose, until=until, latest=True)
    how = {"grid": "the whole grid", "random": "drawn at random", "tpe": "chosen by Optuna's TPE"}[request.search]
    say(f"{counted(request.num_runs, 'run')} into {show_path(folder)}, values {how}")
    again = ["perceiver", "sweep", "--resume", "-o", os.fspath(folder)]
    follow(several, again)
    ended = sum(member.state not in ("planned", "begun") for member in several.members)
    if several.is_over and ended < request.num_runs:
        say(f"the time is over; to go on: {perceiver_command(again)}")
    show_sweep(several, as_json)


def show_sweep(several: "Several", as_json: bool) -> None:
    """Print the runs, the best first, and the command that trains the best, or one JSON object."""
    from perceiver_cli.report.compare import compare

    if not several.done:
        raise DataError("no run of the sweep ended", "; ".join(m.note for m in several.members if m.note))
    best = several.done[0]
    command = perceiver_command(command_of(several.request, best.values))
    if as_json:
        members = [member.model_dump(mode="json") for member in several.members]
        emit_json({"best": best.model_dump(mode="json"), "command": command, "runs": members})
        return
    ended = [os.fspath(several.folder / m.name) for m in several.members if m.state in ("done", "pruned")]
    if len(ended) > 1:
        show_comparison(compare(ended), False)
    counts = {state: sum(m.state == state for m in several.members) for state in ("pruned", "failed")}
    others = "".join(f", {count} {state}" for state, count in counts.items() if count)
    say(f"the best of {counted(len(several.members), 'run')}{others}:")
    emit(f"{command}\n")


def command_of(request: "Request", values: dict[str, Any]) -> list[str]:
    """Return the words of the command that trains a run with these values."""
    from perceiver_cli.config import Config, TrainConfig
    from perceiver_cli.training.several import assignment

    changes = [*request.overrides, *map(assignment, values.items())]
    recipe = TrainConfig() if request.config is None else Config.model_validate(request.config).train
    kept = [c for c in changes if c not in (f"train.device={recipe.device}", f"train.seed={recipe.seed}")]
    return [*request.words, *(word for change in kept for word in ("--set", change))]
