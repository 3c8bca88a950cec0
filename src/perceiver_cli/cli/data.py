"""The commands `preprocess` and `lint`, and their output."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perceiver_cli.cli import completion, options, processes, sources, terminal
from perceiver_cli.cli.progress import counting, this_command, working
from perceiver_cli.cli.tables import emit_table
from perceiver_cli.cli.terminal import (
    complain,
    emit,
    emit_json,
    say,
    say_advice,
    say_lines,
    say_notes,
    size,
)
from perceiver_cli.errors import EXIT_DATA, UsageError, counted
from perceiver_cli.files import check_suffix, show_path, show_text, write_text

if TYPE_CHECKING:
    from perceiver_cli.data.lint import Copies, LintReport
    from perceiver_cli.data.prepare import Done
    from perceiver_cli.inference.labels import LabelReport

LISTED = 20  # findings of a kind in the text report
NAMED = 5  # names on a line
LEAST_FOR_SIZE = 50  # inputs to estimate the size of all from


def preprocess(
    inputs: options.Inputs = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="FILE.tar, NAME-%06d.tar, FILE.npy, FILE.safetensors, - for stdout.")
    ] = "-",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", autocompletion=completion.models, help="Prepare for this run or model file."),
    ] = None,
    preset: options.Preset = None,
    changes: options.Changes = None,
    files_from: options.FilesFrom = None,
    null: options.Null = False,
    label_from: Annotated[Literal["parent"] | None, typer.Option(help="Label files with their folder's name.")] = None,
    stdin_name: options.StdinName = "-",
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    label_column: options.LabelColumn = None,
    pair: options.Pair = None,
    augment: Annotated[int, typer.Option(min=0, help="Number of random variants of each training example.")] = 0,
    fourier: Annotated[bool, typer.Option("--fourier", help="Write M x C rows with Fourier features.")] = False,
    model_input: Annotated[
        bool, typer.Option("--model-input", help="Write what an exported model takes to -o FILE.npz.")
    ] = False,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of --fourier rows.")] = "float32",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Size of NAME-%06d.tar, e.g. 64M or 1G.")] = "256M",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the shards of an earlier run.")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Prepare only the I-th of N equal parts, from 1.")
    ] = None,
    devices: options.Devices = None,
    workers: options.Workers = 0,
    limit: options.Limit = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Decode files once and write them as a tar of records. Other commands and WebDataset read it.

    Records hold the decoded files; training still takes random crops of them. Without -m or --preset the recipe
    is the tiny preset for the data, whose "auto" values are settled as in training. FILE.npy and FILE.safetensors
    hold one input as the paper's byte array with Fourier features (ImageNet: 50176 x 261). An unreadable input gets a
    record with its error, and the exit status is 3.

    --model-input writes an array for each input of an exported model to FILE.npz, and a line for each file to stdout.
    """
    named = sources.inputs_to_prepare(inputs or [], files_from, null, stdin_name, limit)
    given = options.data_options(root, path_columns, label_column, pair, columns)
    if model_input:
        raise typer.Exit(_model_input(named, output, options.model_file(model), limit, given))
    if Path(output).suffix.lower() in (".npy", ".safetensors"):
        _byte_array(named, output, model, preset, limit)
        return
    from perceiver_cli.advice.data import after_preprocess
    from perceiver_cli.data import prepare

    own, output = _part_of(part, devices, output, [*(inputs or []), files_from])
    if output == "-" and terminal.is_terminal():
        raise UsageError("records are binary and stdout is a terminal", "pass -o FILE, or pipe them to a command")
    changes = [*(changes or []), *options.data_changes(given)]
    with working("looking at the files"):
        job = prepare.plan(
            named, model=model, preset=preset, changes=changes, raised=options.raised_limits(limit),
            label_from_parent=label_from is not None, augment=augment, fourier=dtype if fourier else None, part=own,
        )  # fmt: skip
    shard_bytes = round(options.number(f"--shard-size {shard_size}", shard_size))
    done = prepare.write_records(job, output, terminal.emit_bytes, workers, shard_bytes, resume=resume)
    say_notes(job.catalog.notes)
    bad = follow_preparing(done, output, resume=resume)
    if own == (0, 1):  # the account covers all inputs
        say_lines(job.catalog.accounted(bad).brief())
        say_advice(after_preprocess(output, labelled=bool(job.catalog.classes), model=model))
    raise typer.Exit(EXIT_DATA if bad else 0)


def _part_of(
    part: str | None, devices: str | None, output: str, inputs: list[str | None]
) -> tuple[tuple[int, int], str]:
    """Return (I, N) for the I-th of N parts of the inputs, from 0, and where it goes.

    Each of several processes has its own part, and a tar with the part in its name.
    """
    here = processes.started(devices, inputs)
    if here.size == 1:
        match = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--part {part}: expected I/N with I from 1 to N, such as 3/8")
        return (int(match[1]) - 1, int(match[2])), output
    if part is not None:
        raise UsageError(f"--part with {here.size} processes, which divide the inputs themselves", "leave one out")
    if output == "-":
        raise UsageError(f"{here.size} processes cannot share stdout", "pass -o NAME.tar: each writes its own tar")
    stem, suffix = os.path.splitext(output)
    number = re.search(r"-?%0?\d*d$", stem)
    place = len(stem) if number is None else number.start()
    name = f"{stem[:place]}-{here.rank + 1}of{here.size}{stem[place:]}{suffix}"
    return (here.rank, here.size), name


def _byte_array(named: Any, output: str, model: str | None, preset: str | None, limit: list[str] | None) -> None:
    from perceiver_cli.data.prepare import input_recipe, write_byte_array
    from perceiver_cli.preprocess.source import Source

    if not isinstance(named, Source) and len(named) != 1:
        raise UsageError(f"-o {show_path(output)}: holds one input, found {len(named)}", "pass -o FILE.tar")
    source = named if isinstance(named, Source) else Source(named[0])
    spec, limits = input_recipe(source, model, preset, options.raised_limits(limit))
    shape = write_byte_array(source, spec, limits, output)
    say(f"{source.shown}: {shape[0]} x {shape[1]} float32")


def _model_input(named: Any, output: str, model: Path, limit: list[str] | None, read: Mapping[str, Any]) -> int:
    """Return the exit code; write the inputs of an exported model and print a line for each example."""
    from perceiver_cli.data.model_inputs import write_model_inputs

    exit_code = 0
    every = named if isinstance(named, list) else [named]
    for line in write_model_inputs(every, str(model), output, options.raised_limits(limit), read):
        if "error" in line:
            exit_code = EXIT_DATA
            complain(line["error"])
        emit_json(line)
    say(f"wrote {show_path(output)}")
    return exit_code


def lint(
    data: Annotated[str, typer.Argument(help=options.DATA_HELP)],
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    label_column: options.LabelColumn = None,
    pair: options.Pair = None,
    preset: options.Preset = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="MODEL",
            autocompletion=completion.models,
            help="Judge labels by a run or model file: report probably wrong ones, and near-copies.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        options.output("List of good files, FILE.csv or FILE.jsonl; with --labels a page, FILE.html."),
    ] = None,
    json: options.Json = False,
    workers: Annotated[int | None, typer.Option(min=0, max=256, help="Processes [default: one per core].")] = None,
    limit: options.Limit = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Decode all files once and report their faults.

    Report unreadable files; the same content twice, in one or several splits, with the same or different labels;
    silent sound, pictures of one colour, clouds of few points; sizes of classes. The exit status is 3 if files are
    unreadable or content is in several splits. -o lists the good files: one of each group of copies, in test rather
    than train, and none if their labels differ.
    """
    options.check_data(data)
    given = options.data_options(root, path_columns, label_column, pair, columns)
    if labels is not None:
        if workers is not None:
            raise UsageError("--labels does not take --workers: one process judges", "leave it out")
        if preset is not None:
            raise UsageError("--labels does not take --preset: it reads data as its model does", "leave it out")
        _lint_labels(data, labels, output, limit, given, json)
        return
    if output is not None:
        check_suffix(output, (".csv", ".jsonl"), "-o", "not a format of lists")
    from perceiver_cli.advice.data import after_lint
    from perceiver_cli.config import DataConfig
    from perceiver_cli.data.clean import write_clean
    from perceiver_cli.data.lint import lint as check

    read = DataConfig(**given)
    with counting("checking") as progress:
        report = check(data, options.raised_limits(limit), workers, progress, read, preset)
    say_notes(report.notes)
    show_lint(report, json)
    if output is not None:
        good, rest = write_clean(report, os.fspath(output))
        say(f"wrote {show_path(output)}: {counted(good, 'good example')}, {rest:,} left out")
    recipe = [] if preset is None else ["--preset", preset]
    say_advice(after_lint(report, read.words(), None if output is None else os.fspath(output), recipe))
    if report.failed:
        raise typer.Exit(EXIT_DATA)


def _lint_labels(
    data: str, model: str, output: Path | None, limit: list[str] | None, read: Mapping[str, Any], as_json: bool
) -> None:
    if output is not None:
        check_suffix(output, (".html",), "-o", "not a page")
    predictor = options.open_predictor(options.model_file(model), "auto", "auto", limit, None, read)
    from perceiver_cli.inference.labels import check_labels

    with counting("judging") as progress:
        report = check_labels(predictor, data, progress)
    say_notes(report.notes)
    if output is not None:
        from perceiver_cli.report.labels import labels_page

        write_text(output, labels_page(report, predictor, data))
        say(f"wrote {show_path(output)}")
    show_labels(report, as_json)


def show_labels(report: "LabelReport", as_json: bool) -> None:
    """Print suspect labels and near-copies: the first of each kind, or one JSON object."""
    if as_json:
        emit_json(report.to_dict())
        return
    suspects = [
        f"{suspect.split}: {show_path(suspect.path)}: {show_text(suspect.label)} ({suspect.prob:.2f}), "
        f"rather {show_text(suspect.suggested)} ({suspect.suggested_prob:.2f})"
        for suspect in report.suspects
    ]
    copies = [
        f"{copy.split}: {show_path(copy.path)} = {copy.other_split}: {show_path(copy.other)}"
        + ("" if copy.labels[0] == copy.labels[1] else f" ({', '.join(map(show_text, copy.labels))})")
        for copy in report.copies
    ]
    for kind, findings in (("suspect labels", suspects), ("near-copies", copies)):
        emit_findings(kind, findings)
    if not suspects and not copies:
        emit(f"no suspect label and no near-copy among {counted(report.num_examples, 'example')}\n")


def emit_findings(kind: str, findings: Sequence[str]) -> None:
    """Print the findings of a kind: their number, and the first ones; nothing without any."""
    if findings:
        more = [f"... and {len(findings) - LISTED} more, all with --json"] if len(findings) > LISTED else []
        emit(f"{kind}: {len(findings)}\n" + "".join(f"  {line}\n" for line in [*findings[:LISTED], *more]))


def follow_preparing(done: Iterator["Done"], output: str, *, resume: bool) -> set[str]:
    """Return the ids of bad inputs; progress and errors are printed while inputs are prepared."""
    last, bad, kept = None, set(), 0
    free = None if output == "-" else _free_bytes(Path(output).parent)

    def last_words() -> Iterator[str]:
        if "%" in output:
            yield f"to continue: {this_command('--resume')}"
        elif output != "-":
            yield f"nothing is kept: {show_path(output)} appears once it is complete"
            yield "shards, such as -o 'x-%06d.tar', can be continued with --resume"

    with counting("preparing", last_words=last_words) as progress:
        for last in done:
            if last.error is not None:
                bad.add(last.example)
                complain(last.error)
            kept = last.count if not last.num_bytes else kept  # by an earlier run
            in_all = last.num_bytes * (last.total - kept) / max(1, last.count - kept)
            sizes = f"{size(last.num_bytes)} of about {size(in_all)}"
            progress(last.count, last.total, f"{(last.count - kept) / progress.seconds:,.0f}/s  {sizes}")
            if free is not None and in_all > free and last.count - kept >= LEAST_FOR_SIZE:
                say(f"note: about {size(in_all)} in all, but the disk has only {size(free)} free")
                free = None
    failed = f", {len(bad)} of them unreadable: their records hold the error" if bad else ""
    written = f"; {size(last.num_bytes)}" if last is not None and last.num_bytes else ""
    before = "; an earlier run had prepared all" if resume and last is None else ""
    say(f"prepared {counted(0 if last is None else last.total, 'input')}{failed}{written}{before}")
    return bad


def _free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder that may not exist yet."""
    import shutil

    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free


def show_lint(report: "LintReport", as_json: bool) -> None:
    """Print the faults of a data set: a table and the first findings of each kind, or one JSON object."""
    if as_json:
        emit_json(report.to_dict())
        return
    counts = report.counts
    rows = ([show_text(n), *(str(counts[split][n]) for split in report.sizes)] for n in next(iter(counts.values())))
    emit_table(["class", *report.sizes], rows, ["examples", *map(str, report.sizes.values())])
    if report.imbalance is not None and report.imbalance > 1:
        emit(f"the largest class of train is {report.imbalance:.3g} times the smallest\n")
    for split, names in report.missing.items():
        emit(f"{split} has no example of {counted(len(names), 'class')}: {_some(map(show_path, names))}\n")
    kinds = {
        "unreadable": [error for _, _, error in report.unreadable],
        "the same content in several splits": [_group(group) for group in report.copies if group.across],
        "the same content within a split": [_group(group) for group in report.copies if not group.across],
        "the same content with different labels": [_group(group) for group in report.copies if group.conflict],
        "silent sound": [show_path(name) for _, name, _ in report.faults["silent"]],
        "constant": [f"{show_path(name)} ({modality})" for _, name, modality in report.faults["constant"]],
        "tiny clouds": [show_path(name) for _, name, _ in report.faults["tiny"]],
    }
    words = {
        "odd_length": ("a length far from the rest", "{} s, the median is {} s"),
        "odd_channels": ("other channels than the rest", "{} channels, most have {}"),
        "misnamed": ("another format than the name says", "{} by its content"),
    }
    for key, (kind, text) in words.items():
        odd = report.odd.get(key, ())
        kinds[kind] = [f"{show_path(each.id)}: {text.format(each.found, each.usual)}" for each in odd]
    for kind, findings in kinds.items():
        emit_findings(kind, findings)
    emit("\n".join(report.files.lines()) + "\n")
    if not any(kinds.values()):
        emit("nothing unreadable, no duplicates, nothing silent, constant or tiny\n")


def _group(group: "Copies") -> str:
    """Return the examples with one content as a line."""
    rows = []
    for split, name, labels in group.examples:
        said = f" ({', '.join(show_text(label) for label in labels)})" if group.conflict else ""
        rows.append(f"{split}: {show_path(name)}{said}")
    return _some(rows, " = ") + ("" if group.same_file else ", in files that differ")


def _some(words: Iterable[str], between: str = ", ") -> str:
    """Return the first NAMED words, and the number of others."""
    every = list(words)
    return between.join(every[:NAMED]) + (f" and {len(every) - NAMED} more" if len(every) > NAMED else "")
