"""Commands about models and this machine: info, presets, compare, import, export, doctor, bench."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perceiver_cli.cli import completion, options, terminal
from perceiver_cli.cli.terminal import emit, emit_json, emit_table, flat_items, say, say_notes
from perceiver_cli.errors import counted
from perceiver_cli.files import check_plot, show_path, show_text

if TYPE_CHECKING:
    from perceiver_cli.report.compare import Comparison


def import_weights(
    source: Annotated[str, typer.Argument(help="Folder or .safetensors of transformers, or ORG/NAME on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")] = Path("model.safetensors"),
    variant: Annotated[
        Literal["dm", "hf"], typer.Option(help="Compute as the official code (dm) or as transformers (hf).")
    ] = "dm",
) -> None:
    """Convert an image classifier of transformers (deepmind/vision-perceiver-*) into a model file."""
    from perceiver_cli.model.pretrained import import_model

    info = import_model(source, output, variant)
    say(f"wrote {show_path(output)}: {info.config.name}, {counted(len(info.classes), 'class')}")


def export(
    model: Annotated[str | None, typer.Argument(help="Run folder or model file [default: as of predict].")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.onnx or FILE.pt2.")] = Path("model.onnx"),
    json: options.Json = False,
) -> None:
    """Write a model for other programs, as ONNX or torch.export, with classes and preparation in its metadata.

    What is written is run beside the model on random inputs; a difference of more than 1e-4 is an error.
    """
    path = options.model_file(model)
    from perceiver_cli.model.export import export_model

    written = export_model(path, output)
    say(f"wrote {show_path(output)}: largest difference {written.difference:.2g} from the model")
    terminal.show_facts(vars(written), json)


def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            autocompletion=completion.presets_and_models,
            help="A preset, a configuration, a run or a model file.",
        ),
    ],
    json: options.Json = False,
) -> None:
    """Print parameters, FLOPs and shapes of a preset or a model file, without building it."""
    from perceiver_cli.model.describe import describe

    terminal.show_facts(describe(name), json)


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", autocompletion=completion.models, help="Run folders, two or more.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also a plot: FILE.png or FILE.svg.")] = None,
    json: options.Json = False,
) -> None:
    """Put runs side by side: validation accuracy with its interval, time, parameters, and what was set differently."""
    if output is not None:
        check_plot(output)
    from perceiver_cli.report import compare as comparing

    comparison = comparing.compare(runs)
    if output is not None:
        comparing.draw(comparison, output)
        say(f"wrote {show_path(output)}")
    show_comparison(comparison, json)


def doctor(
    json: options.Json = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also train, save, load and compare, in about 10 seconds.")
    ] = False,
    device: options.Device = "auto",
) -> None:
    """Print versions, decoders, devices, kernels and threads; with --run, test that training works here."""
    from perceiver_cli.machine.doctor import examine, self_test

    facts = examine()
    if run:
        facts["self_test"] = self_test(device)
    terminal.show_facts(facts, json)


presets_app = typer.Typer(help="List the recipes that ship with the program, or show one.", rich_markup_mode=None)


@presets_app.callback()
def presets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from perceiver_cli.presets import preset_names, preset_text

        for name in preset_names():
            emit(f"{name:<16} {preset_text(name).splitlines()[0].lstrip('# ')}\n")


@presets_app.command()
def show(
    name: Annotated[
        str, typer.Argument(autocompletion=completion.presets, help="One of those that `perceiver presets` lists.")
    ],
) -> None:
    """Print a recipe with its comments: perceiver presets show NAME > run.toml."""
    from perceiver_cli.presets import preset_text

    emit(preset_text(name))


def bench(
    preset: Annotated[
        str, typer.Argument(autocompletion=completion.presets, help="Whose model and inputs to time; or growth.")
    ] = "tiny-image",
    mode: Annotated[Literal["forward", "train"], typer.Option(help="Calls that growth times.")] = "forward",
    plot: Annotated[str | None, typer.Option(help="Draw growth into this SVG or PNG.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step [default: the preset's].")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="To spend on each measurement.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Processes per measurement of growth.")] = 3,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    workers: options.Workers = 0,
    json: options.Json = False,
) -> None:
    """Measure speed on made-up data: samples per second of training, forward pass and loader; or growth.

    `bench growth` measures time and memory of the imagenet model and of one cross-attend of it, for 2^12 to 2^20
    inputs, one example at a time, each measurement in a process of its own.
    """
    from perceiver_cli.machine import speed
    from perceiver_cli.machine.growth import Trial, draw, growth
    from perceiver_cli.machine.measure import describe_machine
    from perceiver_cli.model.device import choose_compute

    if preset != "growth":
        terminal.show_facts(speed.bench(preset, batch_size, seconds, device, precision, workers), json)
        return
    rows = list(show_rows(growth(Trial("imagenet", mode, seconds, device, precision), rounds), json))
    if plot is not None:
        draw(rows, plot)
    terminal.show_facts(describe_machine(choose_compute(device, precision)), json)


def show_comparison(comparison: "Comparison", as_json: bool) -> None:
    """Print runs side by side, a row each, and a column for each option that differs; or one JSON object."""
    say_notes(comparison.notes)
    if as_json:
        emit_json(comparison.to_dict())
        return
    precise = any(run.mAP is not None for run in comparison.runs)
    columns = ["accuracy", "interval", *(["mAP"] if precise else []), "loss", "examples", "seconds", "parameters"]
    rows = []
    for place, run in enumerate(comparison.runs):
        interval = "-" if run.interval_95 is None else "{:.3f}-{:.3f}".format(*run.interval_95)
        measured = [_cell_of(run.accuracy, ".4f"), interval, *([_cell_of(run.mAP, ".4f")] if precise else [])]
        costs = [_cell_of(run.loss, ".4f"), _cell_of(run.num_examples, ","), _cell_of(run.seconds, ".0f")]
        settings = [values[place] for values in comparison.differences.values()]
        words = ["-" if value is None else show_text(str(value)) for value in settings]
        rows.append([show_text(run.run), *measured, *costs, f"{run.parameters:,}", *words])
    emit_table(["name", *columns, *map(show_text, comparison.differences)], rows)


def _cell_of(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def show_rows(rows: Iterable[Mapping[str, Any]], as_json: bool) -> Iterator[Mapping[str, Any]]:
    """Print each row as it comes, names and values on one line or a JSON object, and yield it."""
    for row in rows:
        if as_json:
            emit_json(row)
        else:
            emit("  ".join(f"{name} {value}" for name, value in flat_items(row, "") if value) + "\n")
        yield row
