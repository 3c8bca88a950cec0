"""The commands about models and this machine: import, export, info, doctor, presets, bench."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from perceiver_cli.cli import completion, options, processes, terminal
from perceiver_cli.cli.progress import working
from perceiver_cli.cli.terminal import emit, emit_json, flat_items, say, say_advice
from perceiver_cli.errors import UsageError, counted
from perceiver_cli.files import atomic_write, check_suffix, show_path
from perceiver_cli.hardware import LAUNCHED, machine_cores


def import_weights(
    source: Annotated[str, typer.Argument(help="Folder or .safetensors of transformers, or ORG/NAME on the hub.")],
    output: Annotated[Path, options.output("Model file to write.")] = Path("model.safetensors"),
    variant: Annotated[Literal["dm", "hf"], typer.Option(help="Match official code (dm) or transformers (hf).")] = "dm",
) -> None:
    """Convert a transformers image classifier into a model file. Expects one of deepmind/vision-perceiver-*."""
    from perceiver_cli.advice.data import after_import
    from perceiver_cli.model.pretrained import import_model

    with working("importing"):
        info = import_model(source, output, variant)
    say(f"wrote {show_path(output)}: {info.config.name}, {counted(len(info.classes), 'class')}")
    say_advice(after_import(str(output)))


def export(
    model: Annotated[str | None, typer.Argument(help="Run folder or model file [default: as for predict].")] = None,
    output: Annotated[Path, options.output("FILE.onnx or FILE.pt2.")] = Path("model.onnx"),
    json: options.Json = False,
    misplaced: options.NoModelOption = None,
) -> None:
    """Write a model as ONNX or torch.export for other programs. Its metadata holds the classes and the preparation.

    The written file runs beside the model on random inputs; a difference of more than 1e-4 is an error.
    """
    path = options.model_file(model)
    from perceiver_cli.model.export import export_model

    with working("exporting, and comparing with the model"):
        written = export_model(path, output)
    say(f"wrote {show_path(output)}: largest difference {written.difference:.2g} from the model")
    terminal.show_facts(vars(written), json)


def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            autocompletion=completion.presets_and_models,
            help="A preset, a configuration, a run, a model file, or a file of data.",
        ),
    ],
    on: options.On = None,
    output: Annotated[Path | None, options.output("FILE.png to draw a file of data.")] = None,
    limit: options.Limit = None,
    json: options.Json = False,
    misplaced: options.NoModelOption = None,
) -> None:
    """Describe a preset, a model or a file of data.

    For a model it prints size and shapes without building it; --on adds what training costs on a machine. For a file of
    data it prints the modality, what the file declares, and what is decoded from it.
    """
    from perceiver_cli.model.describe import describe, is_model
    from perceiver_cli.model.machines import estimate_lines

    if not is_model(name):
        _about_file(name, output, limit, json)
        return
    if output is not None:
        raise UsageError("-o draws a file of data", f"leave it out for {show_path(name)}")
    facts = describe(name, on)
    lines = [] if json or on is None else estimate_lines(facts.pop("training"))
    terminal.show_facts(facts, json)
    emit("".join(f"{line}\n" for line in lines))


def _about_file(name: str, output: Path | None, limit: list[str] | None, as_json: bool) -> None:
    if output is not None:
        check_suffix(output, (".png",), "-o", "not a picture")
    from perceiver_cli.data.about_file import about_file
    from perceiver_cli.preprocess.spec import Limits

    facts, decoded = about_file(name, Limits().raised(options.raised_limits(limit)))
    if output is not None and not decoded:
        raise UsageError(f"{show_path(name)}: {facts['taken_for']} has no picture", "leave out -o")
    terminal.show_facts(facts, as_json)
    if output is not None:
        from perceiver_cli.report.pictures import sample

        with atomic_write(output) as file:
            sample(*decoded[0]).save(file, "PNG")
        say(f"wrote {show_path(output)}")


def doctor(
    json: options.Json = False,
    run: Annotated[bool, typer.Option("--run", help="Also train, save, load and compare, in about 10 s.")] = False,
    device: options.Device = "auto",
) -> None:
    """Print versions, decoders, devices, kernels and threads. With --run, test that training works here."""
    from perceiver_cli.machine.doctor import examine, self_test

    facts = examine()
    if run:
        with working("training, saving, loading"):
            facts["self_test"] = self_test(device)
    terminal.show_facts(facts, json)


def presets(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]", autocompletion=completion.presets, help="Print this recipe [default: list]."),
    ] = None,
) -> None:
    """List the built-in recipes, or print one with its comments. To change it: perceiver presets NAME > run.toml."""
    from perceiver_cli.presets import preset_names, preset_text

    wanted = names or []
    if wanted[:1] == ["show"]:  # as in version 0.1.0
        wanted = wanted[1:]
    if len(wanted) > 1:
        raise UsageError(f"{len(wanted)} names, expected one recipe", "perceiver presets lists all")
    if wanted:
        emit(preset_text(wanted[0]))
        return
    for name in preset_names():
        emit(f"{name:<16} {preset_text(name).splitlines()[0].lstrip('# ')}\n")


def bench(
    preset: Annotated[
        str, typer.Argument(autocompletion=completion.presets, help="Preset, growth or scale.")
    ] = "tiny-image",
    mode: Annotated[
        Literal["forward", "train"], typer.Option(help="What growth measures: a forward pass or a training step.")
    ] = "forward",
    plot: Annotated[str | None, typer.Option(help="Plot growth to FILE.svg or FILE.png.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of a batch [default: the preset's].")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Processes per measurement of growth.")] = 3,
    device: options.Device = "auto",
    devices: options.Devices = None,
    precision: options.Precision = "auto",
    workers: options.Workers = 0,
    json: options.Json = False,
) -> None:
    """Measure speed on synthetic data. Print samples per second of a training step, a forward pass and the loader.

    `bench growth` measures time and memory of the imagenet model and of one of its cross-attends, for 2^12 to 2^20
    inputs, one example at a time, each measurement in its own process. `bench scale`, or a preset with --devices N,
    trains with 1, 2, 4 processes up to N, in steps of the same examples.
    """
    if preset == "scale" or devices is not None:
        of, most = "tiny-image" if preset == "scale" else preset, devices or str(machine_cores())
        _scale((of, batch_size, seconds, device, precision), most, json)
        return
    from perceiver_cli.machine import speed
    from perceiver_cli.machine.growth import Trial, draw, growth
    from perceiver_cli.machine.measure import describe_machine
    from perceiver_cli.model.device import choose_compute

    if preset != "growth":
        terminal.show_facts(speed.bench(preset, batch_size, seconds, device, precision, workers, terminal.say), json)
        return
    rows = list(show_rows(growth(Trial("imagenet", mode, seconds, device, precision), rounds), json))
    if plot is not None:
        draw(rows, plot)
    terminal.show_facts(describe_machine(choose_compute(device, precision)), json)


def _scale(trial: tuple[str, int | None, float, str, str], devices: str, json: bool) -> None:
    """Print the speed of training with 1, 2, 4 ... processes, or measure if this is one of them."""
    most = processes.count_of(devices)
    if LAUNCHED not in os.environ:
        for exponent in range(most.bit_length()):
            processes.run(2**exponent)
        return
    ranks = processes.shared(None, None)
    from perceiver_cli.machine.scaling import scaling

    row = scaling(*trial, most, ranks)
    if ranks.first:
        list(show_rows([row], json))
    ranks.meet()


def show_rows(rows: Iterable[Mapping[str, Any]], as_json: bool) -> Iterator[Mapping[str, Any]]:
    """Print each row as it comes, as names and values or as a JSON object, and yield it."""
    for row in rows:
        if as_json:
            emit_json(row)
        else:
            emit("  ".join(f"{name} {value}" for name, value in flat_items(row, "") if value) + "\n")
        yield row
