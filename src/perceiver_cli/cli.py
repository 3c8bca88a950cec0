"""The commands. Each parses, calls one public function and hands what it gives to the console.

torch is imported only inside the bodies that need it, so that `--help` and `--version` are immediate.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from perceiver_cli import completion, console
from perceiver_cli.errors import EXIT_DATA, DataError, UsageError, counted
from perceiver_cli.files import check_plot, show_command, show_path

PIPE_BYTES = 1 << 20  # read from stdin at a time
STARTED_AT = time.monotonic()  # a time limit counts from here, the import of torch included

app = typer.Typer(
    name="perceiver",
    help="Classify images, sound, video and point clouds with the Perceiver (Jaegle et al., 2021).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
presets_app = typer.Typer(help="List the recipes that ship with the program, or show one.", rich_markup_mode=None)
app.add_typer(presets_app, name="presets", invoke_without_command=True)

# ---------------------------------------------------------------- options that several commands share

DATA_HELP = "Folder of class folders, manifest (CSV, TSV, JSONL, TXT), tar of records, - for stdin."

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        autocompletion=completion.models,
        help="Run folder or model file [default: $PERCEIVER_MODEL, then runs/latest].",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto is bf16 on a GPU, else fp32.")]
Workers = Annotated[int, typer.Option(min=0, max=256, help="Processes that read files ahead.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Inputs at once [default: what fits, 32 at most on a CPU].")]
Limit = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=VALUE", help="Raise what one input may cost, e.g. image_pixels=200M."),
]
Use = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Answer from these of the model's modalities alone, as if others were missing."),
]
Aggregate = Literal["mean", "max", "none"]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _be_quiet(wanted: bool) -> None:
    console.quiet = wanted


def _be_verbose(wanted: bool) -> None:
    console.verbose = wanted


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_be_quiet, help="Say nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=_be_verbose, help="Also what libraries say.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.emit(f"perceiver {version('perceiver-cli')}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    console.begin(debug)


# ---------------------------------------------------------------- train


@app.command()
def train(
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", autocompletion=completion.runs, help="Run folder [default: runs/PRESET-N]."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.presets,
            help="Recipe [default: --init-from's, or a tiny one for what the data holds].",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe from a TOML file, e.g. another run's.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any option.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Length in passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length in optimiser steps.")] = None,
    max_time: Annotated[
        str | None, typer.Option(help="Length in time, e.g. 300, 5m, 1h30m: the run ends with it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and augmentation.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(help="As computed.")] = None,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Make activations again instead of keeping them: slower, far less memory."),
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Through torch.compile, for GPUs.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, max=256, help="Processes that read files ahead.")] = None,
    group_by: Annotated[
        str | None, typer.Option(help="parent (folder) or a column: what is never in both train and val.")
    ] = None,
    max_bad: Annotated[float | None, typer.Option(min=0, max=1, help="Share of unreadable files to accept.")] = None,
    limit: Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in -o, or runs/latest.")] = False,
    init_from: Annotated[
        str | None,
        typer.Option(autocompletion=completion.models, help="Start from the weights of a run or model file."),
    ] = None,
    freeze: Annotated[Literal["none", "trunk"] | None, typer.Option(help="trunk: only the head learns.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Start over where -o already holds a run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, sizes and time, and stop.")] = False,
    log: Annotated[
        Literal["none", "tensorboard"], typer.Option(help="Also write the figures of each step into RUN/tensorboard.")
    ] = "none",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model on labelled files. The last line printed is the path of the best model.

    Several modalities make one model: files of one stem in a class folder (cat/017.png, cat/017.wav), a manifest with a
    column for each (image,audio,label), or videos with their sound. A missing one is missing, not an error.
    """
    from perceiver_cli.config import Flag
    from perceiver_cli.scalars import check_tensorboard, logged

    recipe = _recipe(preset, config)
    flags = {
        "--epochs": ("train.epochs", epochs),
        "--batch-size": ("train.batch_size", batch_size),
        "--lr": ("train.lr", lr),
        "--seed": ("train.seed", seed),
        "--device": ("train.device", device),
        "--precision": ("train.precision", precision),
        "--freeze": ("train.freeze", freeze),
        "--recompute": ("train.recompute", recompute or None),
        "--compile": ("train.compile", compile_ or None),
        "--workers": ("data.workers", workers),
        "--max-bad": ("data.max_bad", max_bad),
        "--group-by": ("data.group_by", group_by),
    }
    overrides: list[str] = list(changes or [])
    if epochs is not None or steps is not None or max_time is not None:
        # A length given here replaces every length of the recipe.
        lengths = {"max_steps": None, "steps": steps, "max_time_s": _seconds(max_time)}
        overrides += [f"train.{key}={value or 'none'}" for key, value in lengths.items()]
    overrides += [Flag(f"{flag} {value}", key, value) for flag, (key, value) in flags.items() if value is not None]
    overrides += [
        Flag(f"--limit {name}={value}", f"data.limits.{name}", value) for name, value in _limits(limit).items()
    ]
    if resume and output is None:
        output = Path("runs/latest").resolve()
    _check_data(data)
    if log == "tensorboard":
        check_tensorboard()
    from perceiver_cli.train import Trainer  # torch, after what can be refused without it

    trainer = Trainer(
        data,
        output,
        recipe,
        overrides=overrides,
        resume=resume,
        init_from=init_from,
        replace=replace,
        latest=True,
        started_at=STARTED_AT,
    )
    if dry_run:
        for note in trainer.notes:
            console.say(f"note: {note}")
        console.show_plan(trainer.dry_run())
        return
    events = trainer.fit()
    console.follow_training(logged(events, trainer.output) if log == "tensorboard" else events, trainer.stop)


# ---------------------------------------------------------------- evaluate and predict


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    model: Model = None,
    use: Use = None,
    split: Annotated[
        str | None, typer.Option(help="train, val, test or all [default: test, else val, else all].")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for report.html, metrics.json, predictions.jsonl, confusion.png."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="First fit a temperature on the validation split, and keep it in the model."),
    ] = False,
    json: Json = False,
    batch_size: BatchSize = None,
    workers: Workers = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    limit: Limit = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a model on labelled files: accuracy, top-5, loss, calibration (ECE), and each class."""
    _check_data(data)
    from perceiver_cli.evaluate import calibrate as calibrate_model
    from perceiver_cli.evaluate import evaluate as evaluate_model
    from perceiver_cli.evaluate import save_report

    predictor = _predictor(model, device, precision, limit, use)
    if calibrate:
        temperature = calibrate_model(predictor, data, batch_size, workers).temperature
        console.say(f"temperature {temperature:.4f}, stored in {show_path(predictor.path)}")
    with console.counting("evaluating") as progress:
        report = evaluate_model(predictor, data, split, batch_size, workers, progress)
    for note in report.notes:
        console.say(f"note: {note}")
    for _, error in report.bad[:20]:
        console.complain(f"perceiver evaluate: {error}")
    if output is not None:
        from perceiver_cli.report import REPORT_FILE, write_report

        save_report(report, output)
        words = ["perceiver", "evaluate", data, "-m", os.fspath(predictor.path), "--split", report.split]
        words += ["--use", use] if use is not None else []
        words += [word for raised in limit or [] for word in ("--limit", raised)]
        write_report(report, predictor, data, [*words, "-o", os.fspath(output)], output)
        console.say(f"wrote {show_path(output / REPORT_FILE)}, and metrics.json, predictions.jsonl beside it")
    console.show_report(report, json)
    if report.bad:
        raise typer.Exit(EXIT_DATA)


@app.command()
def predict(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Files, folders, manifests, or - for bytes on stdin.")
    ] = None,
    model: Model = None,
    use: Use = None,
    window: Annotated[float | None, typer.Option(help="Cut sound and video into windows of so many seconds.")] = None,
    hop: Annotated[float | None, typer.Option(help="Seconds between their beginnings [default: --window].")] = None,
    aggregate: Annotated[
        Aggregate | None,
        typer.Option(help="Of the windows' probabilities; none: a line for each window [default: mean]."),
    ] = None,
    style: Annotated[
        Literal["auto", "table", "jsonl", "csv", "tsv"],
        typer.Option("--format", help="auto is a table on a terminal, else JSON lines."),
    ] = "auto",
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name.")] = 5,
    all_probs: Annotated[bool, typer.Option("--all-probs", help="Give the probability of every class.")] = False,
    files_from: Annotated[str | None, typer.Option(help="Read more paths from a file, or - for stdin.")] = None,
    null: Annotated[bool, typer.Option("--null", "-0", help="Those paths end in NUL (find -print0).")] = False,
    stdin_name: Annotated[str, typer.Option(help="What to call the bytes on stdin.")] = "-",
    min_prob: Annotated[
        float, typer.Option(min=0, max=1, help='Answer "unknown" where no class is at least so probable.')
    ] = 0.0,
    embeddings: Annotated[
        Path | None, typer.Option(help="Also write the mean latent of each line to FILE.npy or FILE.safetensors.")
    ] = None,
    batch_size: BatchSize = None,
    workers: Workers = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    limit: Limit = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Classify files. One line per input, in the order given; a bad input is a line with its error, and status 3.

    For a model of several modalities a video file brings picture and sound; in a folder, files of one stem (017.png,
    017.wav) are one input; and so is a row of a manifest (CSV, TSV, JSONL), with a column for each modality. What an
    input lacks is missing, and "used" says what there was.
    """
    from perceiver_cli.embeddings import check_suffix, keeping_embeddings

    sources = _sources(inputs or [], files_from, null, stdin_name)
    windows = _windows(window, hop, aggregate, workers)
    if embeddings is not None:
        check_suffix(embeddings)
    predictor = _predictor(model, device, precision, limit, use)
    predictions = predictor.predict(
        sources, batch_size, workers, windows, min_prob=min_prob, embeddings=embeddings is not None
    )
    extra = ["start_s", "end_s"] if windows is not None and windows.aggregate == "none" else []
    extra += ["used"] if len(predictor.modalities) > 1 else []
    extra += ["labels"] if predictor.info.config.multi_label else []
    if embeddings is not None:
        predictions = keeping_embeddings(predictions, embeddings, predictor.info.config.model.latent_channels)
    raise typer.Exit(console.show_predictions(predictions, style, top_k, all_probs, extra))


@app.command()
def explain(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="A file, or one of each modality; - for bytes on stdin.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="FILE.png, or FILE.ply: the points in colours.")
    ] = None,
    model: Model = None,
    use: Use = None,
    label: Annotated[str | None, typer.Option("--class", help="To explain [default: the most probable one].")] = None,
    json: Json = False,
    device: Device = "auto",
    limit: Limit = None,
) -> None:
    """Show where a model looked: score maps as in the paper's Figure 3, attention, and what speaks for a class."""
    if output is None and not json:
        raise UsageError("nothing to write to", "pass -o FILE.png, or --json for the numbers")
    if output is not None and output.suffix.lower() not in (".png", ".ply"):
        raise UsageError(f"-o {show_path(output)}: not a kind of file that is written here", "expected .png or .ply")
    given = list(_sources(inputs, None, False, "-"))
    predictor = _predictor(model, device, "fp32", limit, use)
    from perceiver_cli.explain import explain as explained
    from perceiver_cli.explain import save

    explanation = explained(predictor, given, label)
    if output is not None:
        save(explanation, output)
        console.say(f"wrote {show_path(output)}")
    console.show_explanation(explanation, json)


def _check_data(data: str | None) -> None:
    """Refuse what is not there, before torch has been waited for."""
    if data == "-":
        _piped_stdin("perceiver preprocess DATA | perceiver train -")
    elif data is not None and not Path(data).exists() and not glob.has_magic(data):
        raise DataError(
            f"{show_path(data)}: no such folder", "expected a folder of class folders, .csv, .tsv, .jsonl, .txt or .tar"
        )


def _predictor(model: str | None, device: str, precision: str, limit: list[str] | None, use: str | None) -> Any:
    from perceiver_cli.checkpoint import find_model, read_info
    from perceiver_cli.config import Limits

    path = find_model(model)
    read_info(path)  # what is wrong with a name or a header is said before torch has been waited for
    from perceiver_cli.predict import Predictor

    predictor = Predictor(path, device, precision, use=None if use is None else re.split(r"[,\s]+", use.strip()))
    if model is None:
        console.say(f"using {show_path(predictor.path)}")
    predictor.reader.limits = Limits.model_validate({**vars(predictor.reader.limits), **_limits(limit)})
    return predictor


def _windows(window: float | None, hop: float | None, aggregate: Aggregate | None, workers: int) -> Any:
    """Return how inputs are cut into windows, None where they are not."""
    if window is None:
        if hop is not None or aggregate is not None:
            raise UsageError(f"--{'hop' if hop is not None else 'aggregate'} is of windows", "pass --window SECONDS")
        return None
    if workers:
        raise UsageError("--workers read whole files", "leave it out with --window, which reads one after another")
    from perceiver_cli.predict import Windows

    return Windows(window, window if hop is None else hop, aggregate or "mean")


def _sources(inputs: list[str], files_from: str | None, null: bool, stdin_name: str) -> Iterator[Any]:
    """Yield what to predict: paths as given, listed paths, bytes on stdin."""
    if not inputs and files_from is None:
        raise UsageError("nothing to predict", "pass files, or - with bytes on stdin, or --files-from")
    if inputs.count("-") + (files_from == "-") > 1:
        raise UsageError("stdin can be read once", "pass - once, or --files-from -")
    if "-" in inputs or files_from == "-":
        _piped_stdin()

    def found() -> Iterator[Any]:
        from perceiver_cli.predict import Pipe

        for given in inputs:
            stdin = given == "-"
            yield Pipe(stdin_name, os.fdopen(_piped_stdin(), "rb", PIPE_BYTES, closefd=False)) if stdin else given
        if files_from is not None:
            yield from _listed(files_from, b"\0" if null else b"\n")

    return found()


def _piped_stdin(example: str = "sox in.mp3 -t wav - | perceiver predict -") -> int:
    """Return the file number of stdin; a terminal there gets help instead of silence."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("stdin is a terminal", f"pipe something in: {example}")
    return sys.stdin.fileno()


def _listed(path: str, separator: bytes) -> Iterator[str]:
    """Yield the paths in a list, as they arrive."""
    try:
        stream = os.fdopen(0, "rb", closefd=False) if path == "-" else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--files-from {show_path(path)}: cannot read: {error.strerror}") from error
    rest = b""
    while chunk := stream.read1(1 << 16):
        *names, rest = (rest + chunk).split(separator)
        yield from (os.fsdecode(name) for name in names if name)
    if rest:
        yield os.fsdecode(rest)


# ---------------------------------------------------------------- preprocess, info, presets, bench


@app.command()
def preprocess(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Files, folders, manifests, or - for the bytes of one on stdin.")
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="FILE.tar, 'NAME-%06d.tar', - for stdout; of one input FILE.npy or FILE.safetensors."
        ),
    ] = "-",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", autocompletion=completion.models, help="Prepare as this run or model file does."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(autocompletion=completion.presets, help="Prepare as this recipe does.")
    ] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any option.")] = None,
    files_from: Annotated[str | None, typer.Option(help="Read more paths from a file, or - for stdin.")] = None,
    null: Annotated[bool, typer.Option("--null", "-0", help="Those paths end in NUL (find -print0).")] = False,
    label_from: Annotated[
        Literal["parent"] | None, typer.Option(help="Label each file with its folder's name.")
    ] = None,
    stdin_name: Annotated[str, typer.Option(help="What to call the bytes on stdin.")] = "-",
    augment: Annotated[int, typer.Option(min=0, help="Write so many random variants of each training example.")] = 0,
    fourier: Annotated[
        bool, typer.Option("--fourier", help="Write the byte array as rows with Fourier features, M x C.")
    ] = False,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of --fourier.")] = "float32",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of 'NAME-%06d.tar', e.g. 64M, 1G.")] = "256M",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with shards that an earlier run began.")] = False,
    workers: Workers = 0,
    limit: Limit = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Decode files once and write them as records: a tar that train, evaluate, predict and WebDataset read.

    Records hold what files decode to, from which training still draws its crops; without -m or --preset as the tiny
    preset for the data asks, "auto" settled by the data as in training. FILE.npy and FILE.safetensors are the paper's
    byte array with its Fourier features (ImageNet: 50176 x 261). A bad input is an error in its place, and status 3.
    """
    given = _given(inputs or [], files_from, null, stdin_name, limit)
    if Path(output).suffix.lower() in (".npy", ".safetensors"):
        _byte_array(given, output, model, preset, limit)
        return
    from perceiver_cli import records

    if output == "-":
        console.refuse_terminal("a stream of records")
    job = records.plan(
        given, model=model, preset=preset, changes=changes or [], raised=_limits(limit),
        label_from_parent=label_from is not None, augment=augment, fourier=dtype if fourier else None,
    )  # fmt: skip
    size = round(_number(f"--shard-size {shard_size}", shard_size))
    done = records.write_records(job, output, console.emit_bytes, workers, size, resume=resume)
    for note in job.notes:
        console.say(f"note: {note}")
    raise typer.Exit(console.follow_preparing(done))


def _given(inputs: list[str], files_from: str | None, null: bool, stdin_name: str, limit: list[str] | None) -> Any:
    """Return the paths to prepare, or the bytes on stdin as a Source."""
    from perceiver_cli.config import Limits
    from perceiver_cli.preprocess.base import Source, received

    if not inputs and files_from is None:
        raise UsageError("nothing to prepare", "pass files or folders, or - with bytes on stdin, or --files-from")
    if "-" in inputs:
        if len(inputs) > 1 or files_from is not None:
            raise UsageError("- is one input, by itself", "pass the paths of several with --files-from")
        with os.fdopen(_piped_stdin(), "rb", closefd=False) as stream:
            return Source(stdin_name, received(stream, Limits.model_validate(_limits(limit))))
    if files_from == "-":
        _piped_stdin()
    return [*inputs, *(_listed(files_from, b"\0" if null else b"\n") if files_from is not None else ())]


def _byte_array(given: Any, output: str, model: str | None, preset: str | None, limit: list[str] | None) -> None:
    from perceiver_cli.preprocess.base import Source
    from perceiver_cli.recipes import input_recipe, write_byte_array

    if not isinstance(given, Source) and len(given) != 1:
        raise UsageError(f"-o {show_path(output)}: one byte array, found {len(given)} inputs", "pass -o FILE.tar")
    source = given if isinstance(given, Source) else Source(given[0])
    spec, limits = input_recipe(source, model, preset, _limits(limit))
    shape = write_byte_array(source, spec, limits, output)
    console.say(f"{source.shown}: {shape[0]} x {shape[1]} float32")


@app.command()
def lint(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    json: Json = False,
    workers: Annotated[
        int | None, typer.Option(min=0, max=256, help="Processes that decode [default: one a core].")
    ] = None,
    limit: Limit = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Decode all files once and say what is wrong with them.

    Unreadable files; the same content twice, in one split or in several, with one label or with different ones; silent
    sound, pictures of one colour, clouds of few points; sizes of classes. Status 3 if there are unreadable files or
    the same content is in several splits.
    """
    _check_data(data)
    from perceiver_cli.lint import lint as check

    with console.counting("checking") as progress:
        report = check(data, _limits(limit), workers, progress)
    for note in report.notes:
        console.say(f"note: {note}")
    console.show_lint(report, json)
    if report.failed:
        raise typer.Exit(EXIT_DATA)


@app.command("import")
def import_weights(
    source: Annotated[str, typer.Argument(help="Folder or .safetensors of transformers, or ORG/NAME on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write.")] = Path("model.safetensors"),
    variant: Annotated[
        Literal["dm", "hf"], typer.Option(help="Compute as the official code (dm) or as transformers (hf).")
    ] = "dm",
) -> None:
    """Convert an image classifier of transformers (deepmind/vision-perceiver-*) into a model file."""
    from perceiver_cli.pretrained import import_model

    info = import_model(source, output, variant)
    console.say(f"wrote {show_path(output)}: {info.config.name}, {counted(len(info.classes), 'class')}")


@app.command()
def export(
    model: Annotated[str | None, typer.Argument(help="Run folder or model file [default: as of predict].")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.onnx or FILE.pt2.")] = Path("model.onnx"),
    json: Json = False,
) -> None:
    """Write a model for other programs, as ONNX or torch.export, with classes and preparation in its metadata.

    What is written is run beside the model on random inputs; a difference of more than 1e-4 is an error.
    """
    from perceiver_cli.checkpoint import find_model, read_info

    path = find_model(model)
    read_info(path)  # what is wrong with a name or a header is said before torch has been waited for
    if model is None:
        console.say(f"using {show_path(path)}")
    from perceiver_cli.export import export_model

    written = export_model(path, output)
    console.say(f"wrote {show_path(output)}: largest difference {written.difference:.2g} from the model")
    console.show_facts(vars(written), json)


@app.command()
def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            autocompletion=completion.presets_and_models,
            help="A preset, a configuration, a run or a model file.",
        ),
    ],
    json: Json = False,
) -> None:
    """Print parameters, FLOPs and shapes of a preset or a model file, without building it."""
    from perceiver_cli.recipes import describe

    console.show_facts(describe(name), json)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", autocompletion=completion.models, help="Run folders, two or more.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also a plot: FILE.png or FILE.svg.")] = None,
    json: Json = False,
) -> None:
    """Put runs side by side: validation accuracy with its interval, time, parameters, and what was set differently."""
    if output is not None:
        check_plot(output)
    from perceiver_cli import compare as comparing

    comparison = comparing.compare(runs)
    if output is not None:
        comparing.draw(comparison, output)
        console.say(f"wrote {show_path(output)}")
    console.show_comparison(comparison, json)


@app.command("lr-find")
def lr_find(
    data: Annotated[str, typer.Argument(help="Folder of class folders, or a manifest (CSV, TSV, JSONL).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The curve: FILE.png or FILE.svg.")] = Path(
        "lr-find.png"
    ),
    preset: Annotated[str | None, typer.Option(help="Recipe [default: a tiny one for what the data holds].")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe from a TOML file, e.g. another run's.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any option.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step.")] = None,
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Of rates from 1e-5 to 1, at most.")] = 100,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Suggest a learning rate: train a fresh model while the rate grows, and look where the loss is lowest."""
    recipe = _recipe(preset, config)
    given = {"--preset": preset, "--config": config, "--batch-size": batch_size}
    given |= {"--device": None if device == "auto" else device}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    words += [word for change in changes or [] for word in ("--set", change)]
    overrides = [*(changes or []), f"train.device={device}"]
    overrides += [] if batch_size is None else [f"train.batch_size={batch_size}"]
    from perceiver_cli import lr_find as finder
    from perceiver_cli.train import Trainer

    check_plot(output)
    with console.counting("training") as progress:
        curve = finder.find(Trainer(data, None, recipe, overrides=overrides), steps, progress)
    finder.draw(curve, output)
    command = show_command(["perceiver", "train", data, *words, "--lr", f"{curve.suggestion:g}"])
    console.show_curve(curve, os.fspath(output), command, json)


@app.command()
def doctor(
    json: Json = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also train, save, load and compare, in about 10 seconds.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Print versions, decoders, devices, kernels and threads; with --run, test that training works here."""
    from perceiver_cli.doctor import examine, self_test

    facts = examine()
    if run:
        facts["self_test"] = self_test(device)
    console.show_facts(facts, json)


@presets_app.callback()
def presets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from perceiver_cli.config import preset_names, preset_text

        for name in preset_names():
            console.emit(f"{name:<16} {preset_text(name).splitlines()[0].lstrip('# ')}\n")


@presets_app.command()
def show(
    name: Annotated[
        str, typer.Argument(autocompletion=completion.presets, help="One of those that `perceiver presets` lists.")
    ],
) -> None:
    """Print a recipe with its comments: perceiver presets show NAME > run.toml."""
    from perceiver_cli.config import preset_text

    console.emit(preset_text(name))


@app.command()
def bench(
    preset: Annotated[
        str, typer.Argument(autocompletion=completion.presets, help="Whose model and inputs to time; growth; or data.")
    ] = "tiny-image",
    against: Annotated[
        str | None,
        typer.Option(help="Side by side with: usual, perceiver-pytorch, transformers, perceiver-io, onnxruntime."),
    ] = None,
    mode: Annotated[Literal["forward", "train"], typer.Option(help="Of --against and growth.")] = "forward",
    inputs: Annotated[str | None, typer.Option(help="Sides of images for --against, e.g. 224,512,1024.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="One cross-attend alone, with --against usual.")] = False,
    plot: Annotated[str | None, typer.Option(help="Draw growth into this SVG or PNG.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per step [default: the preset's].")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="To spend on each measurement.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, help="Processes per contender, in turn.")] = 3,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = 0,
    json: Json = False,
) -> None:
    """Measure speed on made-up data: samples per second; or side by side with other implementations; or growth.

    `bench growth` is the imagenet model and one cross-attend of it, for 2^12 to 2^20 inputs. It and --against run each
    contender in a process of its own, in turn, one example at a time unless --batch-size says more. "usual" is this
    model, its byte array built and K and V projected in every cross-attend. `bench data` reads videos beside PyAV,
    images as files and as records beside WebDataset, a pipe, and a million records.
    """
    from perceiver_cli import bench as speed
    from perceiver_cli import contest
    from perceiver_cli.throughput import throughput

    if preset == "growth":
        rows = list(console.show_rows(contest.growth("imagenet", mode, rounds, seconds, device, precision), json))
        if plot is not None:
            contest.draw(rows, plot)
    elif preset == "data":
        list(console.show_rows(speed.loaders(seconds, rounds), json))
        list(console.show_rows(throughput(seconds, rounds), json))
    elif against is not None:
        sides = [_side(text) for text in inputs.split(",")] if inputs else []
        names = [name.strip() for name in against.split(",")]
        table = contest.contest(
            preset, names, mode, sides, batch_size or 1, rounds, seconds, device, precision, alone=alone
        )
        list(console.show_rows(table, json))
    else:
        console.show_facts(speed.bench(preset, batch_size, seconds, device, precision, workers), json)
        return
    console.show_facts(contest.facts(device, precision), json)


# ---------------------------------------------------------------- small parsers


def _recipe(preset: str | None, config: Path | None) -> Any:
    from perceiver_cli.config import load_config, load_preset

    if preset is not None and config is not None:
        raise UsageError("--preset and --config are two recipes", "pass one of them")
    return load_preset(preset) if preset is not None else load_config(config) if config is not None else None


def _seconds(text: str | None) -> float | None:
    """Return "300", "5m", "1h30m" in seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    total = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if total <= 0:
        raise UsageError(f"--max-time {text}: not a time", "expected 300, 90s, 5m or 1h30m")
    return total


def _side(text: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise UsageError(f"--inputs {text}: expected sides of images, such as 224,512")
    return int(text)


def _limits(assignments: list[str] | None) -> dict[str, float]:
    """Return the limits raised on the command line, suffixes k, M and G counted as powers of 1000."""
    from perceiver_cli.config import Limits

    raised: dict[str, float] = {}
    for assignment in assignments or []:
        name, _, text = assignment.partition("=")
        if name not in Limits.model_fields:
            known = ", ".join(Limits.model_fields)
            raise UsageError(f"--limit {assignment}: expected NAME=NUMBER", f"names are {known}")
        value = _number(f"--limit {assignment}", text)
        raised[name] = int(value) if value.is_integer() else value
    return raised


def _number(option: str, text: str) -> float:
    """Return a number that may end in k, M or G, which count as powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if match is None:
        raise UsageError(f"{option}: expected a number such as 500k, 64M or 1.5G")
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]
