"""The command `compare`, and its table, which fits a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perceiver_cli.cli import completion, options
from perceiver_cli.cli.tables import GAP, cut, emit_table, terminal_width
from perceiver_cli.cli.terminal import emit, emit_json, figure, is_terminal, say, say_notes
from perceiver_cli.errors import UsageError, counted
from perceiver_cli.files import check_plot, show_path, show_text

if TYPE_CHECKING:
    from perceiver_cli.report.compare import Comparison, Group, RunFacts

LONGEST_NAME, LONGEST_VALUE = 28, 16  # characters of a run's name and of an option's value on a terminal
SPARE = ("seconds", "loss", "examples", "parameters")  # columns that may be left out


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", autocompletion=completion.models, help="Run folders, or folders of several runs."
        ),
    ],
    output: Annotated[
        Path | None,
        options.output("Also plot to FILE.png or FILE.svg."),
    ] = None,
    x: Annotated[Literal["seconds", "steps"], typer.Option(help="Axis of the curves in the plot.")] = "seconds",
    data: Annotated[
        str | None, typer.Option(help="Also measure every model on the same examples of this data.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of --data [default: test, else val, else all].")] = None,
    json: options.Json = False,
) -> None:
    """Put runs side by side. Print scores with intervals and options that differ.

    The best run comes first. p is the probability that equally good runs differ as much as a run and the best one, by
    their answers to the same examples (McNemar's test): those of --data, else those of validation. Runs that differ in
    their seed or fold alone form a group, with the mean and its interval.
    """
    if output is not None:
        check_plot(output)
    if split is not None and data is None:
        raise UsageError("--split needs --data", "pass --data DATA")
    options.check_data(data)
    from perceiver_cli.report import compare as comparing

    comparison = comparing.compare(runs, data, split)
    if output is not None:
        comparing.draw_comparison(comparison, output, x)
        say(f"wrote {show_path(output)}")
    show_comparison(comparison, json)


def show_comparison(comparison: "Comparison", as_json: bool) -> None:
    """Print a row for each run and group with the options that differ, or one JSON object."""
    say_notes(comparison.notes)
    if as_json:
        emit_json(comparison.to_dict())
        return
    columns = columns_of(comparison)
    shown, rest = columns, dict[str, list[str]]()
    if is_terminal():
        shown, rest = fitted(columns, terminal_width())
    emit_table(list(shown), zip(*shown.values(), strict=True))
    for key, cells in rest.items():
        values = [f"{cell} ({name.strip()})" for cell, name in zip(cells, shown["name"], strict=True) if cell != "-"]
        emit(f"{key}: {', '.join(values)}\n")


def columns_of(comparison: "Comparison") -> dict[str, list[str]]:
    """Return the cells of each column by its name, the most important first.

    A group's row comes before the rows of its runs; the highest score comes first.
    """
    from perceiver_cli.report.compare import short_keys, short_names

    keys = short_keys(list(comparison.differences))
    names = short_names([run.run for run in comparison.runs])
    cells: dict[str, dict[str, str]] = {}
    for place, (run, name) in enumerate(zip(comparison.runs, names, strict=True)):
        settings = {keys[key]: _value(values[place]) for key, values in comparison.differences.items()}
        cells[run.run] = {"name": show_text(name), **_run_cells(run), **settings, **_costs(run)}
    blocks: list[tuple[float, list[dict[str, str]]]] = []
    for group in comparison.groups:
        own = [cells.pop(run) for run in group.runs if run in cells]
        shared = {key: own[0][key] for key in keys.values() if len({one[key] for one in own}) == 1}
        inside = [one | {"name": f"  {one['name']}"} for one in own]
        blocks.append((group.mean, [_group_cells(group) | shared, *inside]))
    blocks += [(run.score, [cells[run.run]]) for run in comparison.runs if run.run in cells]
    rows = [row for _, block in sorted(blocks, key=lambda block: -block[0]) for row in block]
    columns = {name: [row.get(name, "-") for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
    if all(len(set(columns[name]) - {"-"}) < 2 for name in ("examples", "parameters")):  # nothing to compare
        del columns["examples"], columns["parameters"]
    return {name: column for name, column in columns.items() if name == "name" or set(column) != {"-"}}


def _run_cells(run: "RunFacts") -> dict[str, str]:
    """Return the cells of a run's scores, without those that it does not have."""
    row = {"accuracy": figure(run.accuracy, ".4f"), "interval": _interval(run.interval_95)}
    row |= {} if run.mAP is None else {"mAP": figure(run.mAP, ".4f")}
    if (tested := run.tested) is not None:
        row |= {tested.split: figure(tested.accuracy, ".4f"), f"{tested.split} interval": _interval(tested.interval_95)}
    chance = run.chance if tested is None else tested.chance
    return row | {"p": _chance(chance), "seconds": figure(run.seconds, ",.0f")}


def _costs(run: "RunFacts") -> dict[str, str]:
    examples, parameters = figure(run.num_examples, ","), f"{run.parameters:,}"
    return {"loss": figure(run.loss, ".4f"), "examples": examples, "parameters": parameters}


def _group_cells(group: "Group") -> dict[str, str]:
    """Return the cells of a group: the mean of its scores and the interval of that mean."""
    name = f"mean of {counted(len(group.runs), group.repeated)}"
    row = {"name": name, "accuracy": figure(group.mean, ".4f"), "interval": _interval(group.interval_95)}
    if group.tested_mean is not None:
        split = str(group.tested_split)
        row |= {split: figure(group.tested_mean, ".4f"), f"{split} interval": _interval(group.tested_interval_95)}
    return row


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else "{:.3f}-{:.3f}".format(*(min(1.0, max(0.0, end)) for end in ends))


def _chance(p: float | None) -> str:
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}"


def _value(value: Any) -> str:
    """Return an option's value, shortened."""
    if isinstance(value, list):
        return "x".join(map(_value, value)) if all(isinstance(one, int) for one in value) else str(value)
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else show_text(str(value))


def fitted(columns: Mapping[str, list[str]], width: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the columns that fit a terminal, names cut and numbers whole, and the options that do not.

    Figures that do not fit are left out: --json has them.
    """
    from rich.cells import cell_len

    shown: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    used = -GAP
    for name in sorted(columns, key=lambda name: (name in SPARE, name.endswith(" interval"))):
        cells = columns[name]
        longest = LONGEST_NAME if name == "name" else LONGEST_VALUE
        short = [cut(cell, longest) for cell in cells]
        wide = GAP + max(map(cell_len, (name, *short)))
        if used + wide <= width and (name == "name" or short == cells):
            shown[name] = short
            used += wide
        elif not (name in SPARE or name.endswith(" interval")):
            rest[name] = cells
    return {name: shown[name] for name in columns if name in shown}, rest
