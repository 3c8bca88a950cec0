"""The commands `predict`, `evaluate` and `explain`, and their output."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perceiver_cli.cli import options, processes, terminal
from perceiver_cli.cli.terminal import (
    complain,
    counting,
    emit,
    emit_json,
    emit_table,
    figure,
    say,
    say_lines,
    say_notes,
)
from perceiver_cli.errors import EXIT_DATA, UsageError, counted
from perceiver_cli.files import check_suffix, show_path, show_text, write_text

if TYPE_CHECKING:
    from perceiver_cli.inference.evaluation import Report
    from perceiver_cli.inference.predictor import Prediction

EXTRA_WIDTH = {"start_s": 8, "end_s": 8, "used": 12, "labels": 20}  # columns that only some predictions have
MANY_CLASSES, WORST = 100, 20  # classes up to which an evaluation prints all; beyond, those with the lowest figures
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # first characters of a formula in a spreadsheet
Format = Literal["auto", "table", "jsonl", "csv", "tsv"]


def evaluate(
    data: Annotated[str, typer.Argument(help=options.DATA_HELP)],
    model: options.Model = None,
    use: options.Use = None,
    split: Annotated[str | None, typer.Option(help="Split to measure [default: test, else val, else all].")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=options.named,
            metavar="PATH",
            help="Folder for report.html, metrics.json, predictions.jsonl, confusion.png.",
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Also accuracy by a manifest's column, or by folder (parent).")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First fit a temperature on the validation split and store it.")
    ] = False,
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    label_column: options.LabelColumn = None,
    json: options.Json = False,
    batch_size: options.BatchSize = None,
    workers: options.Workers = 0,
    device: options.Device = "auto",
    devices: options.Devices = None,
    timeout: options.Timeout = None,
    precision: options.Precision = "auto",
    limit: options.Limit = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a model on labelled files. Print accuracy, top-5, loss, calibration error (ECE), and each class."""
    options.check_data(data)
    ranks = processes.shared(devices, timeout, [data])
    from perceiver_cli.inference.evaluation import calibrate as calibrate_model, evaluate_shared
    from perceiver_cli.report.html import save_report

    given = options.data_options(root, path_columns, label_column, None, columns)
    given |= {} if by is None else {"group_by": by}
    predictor = options.open_predictor(model, ranks.device(device), precision, limit, use, given)
    if calibrate:
        temperature = calibrate_model(predictor, data, batch_size, workers, ranks).temperature
        say(f"temperature {temperature:.4f}, stored in {show_path(predictor.path)}")
    with counting("evaluating") as progress:
        report = evaluate_shared(predictor, data, ranks, split, batch_size, workers, progress)
    ranks.meet()
    if report is None:  # the first process has it
        return
    say_notes(report.notes)
    say_lines(report.files.brief())
    for _, error in report.bad[:20]:
        complain(f"perceiver evaluate: {error}")
    if output is not None:
        from perceiver_cli.report.html import REPORT_FILE, page

        save_report(report, output)
        words = ["perceiver", "evaluate", data, "-m", os.fspath(predictor.path), "--split", report.split]
        words += (["--use", use] if use is not None else []) + options.data_words(given)
        words = ["--by" if word == "--group-by" else word for word in words]
        words += [word for raised in limit or [] for word in ("--limit", raised)]
        write_text(output / REPORT_FILE, page(report, predictor, data, [*words, "-o", os.fspath(output)]))
        say(f"wrote {show_path(output / REPORT_FILE)}, and metrics.json, predictions.jsonl beside it")
    show_report(report, json)
    if report.bad:
        raise typer.Exit(EXIT_DATA)


def predict(
    inputs: options.Inputs = None,
    model: options.Model = None,
    use: options.Use = None,
    window: Annotated[float | None, typer.Option(help="Cut sound and video into windows of this many seconds.")] = None,
    hop: Annotated[float | None, typer.Option(help="Seconds between window starts [default: --window].")] = None,
    aggregate: Annotated[
        options.Aggregate | None, typer.Option(help="Combine windows' probabilities [default: mean]; none keeps each.")
    ] = None,
    style: Annotated[Format, typer.Option("--format", help="Format; auto: table on a terminal, else jsonl.")] = "auto",
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes to print.")] = 5,
    all_probs: Annotated[bool, typer.Option("--all-probs", help="Print the probability of every class.")] = False,
    files_from: options.FilesFrom = None,
    null: options.Null = False,
    stdin_name: options.StdinName = "-",
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    min_prob: Annotated[float, typer.Option(min=0, max=1, help='Answer "unknown" below this probability.')] = 0.0,
    embeddings: Annotated[Path | None, typer.Option(help="Write mean latents to FILE.npy or FILE.safetensors.")] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = 0,
    device: options.Device = "auto",
    devices: options.Devices = None,
    timeout: options.Timeout = None,
    precision: options.Precision = "auto",
    limit: options.Limit = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Classify files. Print one line per input, in input order.

    An unreadable input gets a line with its error, and the exit status is 3. For a model of several modalities, one
    input is a video with its sound, the files of one stem in a folder (017.png, 017.wav), or a row of a manifest (CSV,
    TSV, JSONL) with a column for each modality. An input may lack a modality; "used" names those that it has.
    """
    from perceiver_cli.data.account import Account
    from perceiver_cli.inference.embeddings import check_embeddings, keeping_embeddings
    from perceiver_cli.inference.shared import predict_shared

    ranks = processes.shared(devices, timeout, [*(inputs or []), files_from])
    sources = options.inputs_to_predict(inputs or [], files_from, null, stdin_name)
    windows = options.windows_of(window, hop, aggregate, workers)
    if embeddings is not None:
        check_embeddings(embeddings)
    given = options.data_options(root, path_columns, None, None, columns)
    predictor = options.open_predictor(model, ranks.device(device), precision, limit, use, given)
    account = Account()
    wanted: dict[str, Any] = {"min_prob": min_prob, "embeddings": embeddings is not None, "account": account}
    if ranks.size == 1:
        predictions = predictor.predict(sources, batch_size, workers, windows, **wanted)
    else:
        predictions = predict_shared(predictor, sources, ranks, batch_size, workers, windows, **wanted)
        if not ranks.first:
            predictions, embeddings = iter([*predictions]), None
    extra = ["start_s", "end_s"] if windows is not None and windows.aggregate == "none" else []
    extra += ["used"] if len(predictor.modalities) > 1 else []
    extra += ["labels"] if predictor.info.config.multi_label else []
    if embeddings is not None:
        predictions = keeping_embeddings(predictions, embeddings, predictor.info.config.model.latent_channels)
    exit_code = show_predictions(predictions, style, top_k, all_probs, extra, predictor.modalities)
    if account.folders:
        say_lines(account.brief())
    raise typer.Exit(exit_code)


def explain(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="A file, or one per modality; - for stdin.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=options.named,
            metavar="PATH",
            help="FILE.png, FILE.ply (colours) or FILE.npz (maps).",
        ),
    ] = None,
    model: options.Model = None,
    use: options.Use = None,
    label: Annotated[str | None, typer.Option("--class", help="Class to explain [default: the most probable].")] = None,
    json: options.Json = False,
    device: options.Device = "auto",
    limit: options.Limit = None,
) -> None:
    """Show where a model looked. Draw score maps as in the paper's Figure 3, attention, and evidence for a class."""
    if output is None and not json:
        raise UsageError("nothing to write to", "pass -o FILE.png, or --json for the numbers")
    if output is not None:
        check_suffix(output, (".png", ".ply", ".npz"), "-o", "not a format of explanations")
    named = list(options.inputs_to_predict(inputs, None, False, "-"))
    predictor = options.open_predictor(model, device, "fp32", limit, use)
    from perceiver_cli.inference.explain import explain as explained
    from perceiver_cli.malloc import give_back_freed
    from perceiver_cli.report.explanation import save

    give_back_freed()  # the process computes a large model's gradient once
    explanation = explained(predictor, named, label)
    if output is not None:
        save(explanation, output)
        say(f"wrote {show_path(output)}")
    say_notes(explanation.notes)
    facts = explanation.to_dict()
    if json:
        emit_json(facts)
        return
    emit(f"{show_text(explanation.label)} {explanation.prob:.4f}\n")
    for name, shares in facts["inputs"].items():
        emit(f"{name}: {shares['attention_share']:.1%} of the attention, {shares['share']:.1%} of the heat\n")


def show_predictions(
    predictions: Iterable["Prediction"],
    style: str,
    top_k: int,
    all_probs: bool,
    extra: Sequence[str] = (),
    reads: Sequence[str] = (),
) -> int:
    """Print predictions as they come; return the exit code, 3 if any input was bad.

    extra: columns of EXTRA_WIDTH. reads: the modalities whose formats are listed after files of an unknown format.
    """
    from perceiver_cli.preprocess.detection import UNKNOWN, formats

    if style == "auto":
        style = "table" if terminal.is_terminal() else "jsonl"
    if style == "table":
        emit(f"{'file':<40} {_padded({name: name for name in extra})}{'label':<16} {'prob':>6}  others\n")
    exit_code, header, is_unknown = 0, True, False
    for prediction in predictions:
        if prediction.error is not None:
            exit_code = EXIT_DATA
            is_unknown |= prediction.error.endswith(UNKNOWN)
            complain(f"perceiver predict: {prediction.error}")
        if style == "table":
            emit(_table_row(prediction, top_k, all_probs, extra))
        elif style == "jsonl":
            emit_json(prediction.to_dict(top_k, all_probs=all_probs))
        else:
            cells = _cells(prediction, top_k, all_probs, extra)
            emit((_csv_row(cells.keys(), style) if header else "") + _csv_row(cells.values(), style))
            header = False
    if is_unknown:
        say(f"formats: {formats(reads)}")
    return exit_code


def _csv_row(cells: Iterable[Any], style: str) -> str:
    """Return a row of CSV or TSV in which a spreadsheet finds no formula."""
    safe = [f"'{c}" if isinstance(c, str) and c != "-" and c.startswith(FORMULAS) else c for c in cells]
    stream = io.StringIO()
    # The writer quotes every character of its line end: \r and \n both.
    csv.writer(stream, delimiter="\t" if style == "tsv" else ",").writerow(safe)
    return stream.getvalue().removesuffix("\r\n") + "\n"


def _cells(prediction: "Prediction", top_k: int, all_probs: bool, extra: Sequence[str]) -> dict[str, Any]:
    """Return the cells of a row of CSV by column; those of a bad input are empty."""
    classes = prediction.classes
    cells: dict[str, Any] = {"path": prediction.path, **_extra(prediction, extra)}
    for rank, (name, prob) in enumerate(prediction.top(top_k) or [("", "")] * min(top_k, len(classes)), 1):
        suffix = "" if rank == 1 else f"_{rank}"
        cells |= {f"label{suffix}": name, f"prob{suffix}": prob}
    if prediction.error is None:
        cells["label"] = prediction.label  # or "unknown"
    if prediction.min_prob:
        cells["best"] = prediction.best if prediction.error is None else ""
    if all_probs:
        cells |= dict(zip((f"p_{name}" for name in classes), prediction.probs or [""] * len(classes), strict=True))
    return {**cells, "error": prediction.error or ""}


def _extra(prediction: "Prediction", names: Sequence[str]) -> dict[str, str]:
    """Return the cells of the columns in EXTRA_WIDTH by name."""
    facts = {"start_s": prediction.start_s, "end_s": prediction.end_s, "used": "+".join(prediction.used)}
    if "labels" in names:
        facts["labels"] = ";".join(prediction.labels) if prediction.error is None else ""
    return {name: "" if facts[name] is None else str(facts[name]) for name in names}


def _padded(cells: Mapping[str, str]) -> str:
    return "".join(f"{cell:<{EXTRA_WIDTH[name]}} " for name, cell in cells.items())


def _table_row(prediction: "Prediction", top_k: int, all_probs: bool, extra: Sequence[str]) -> str:
    shown = show_text(prediction.path)
    if prediction.error is not None:
        return f"{shown:<40} (not read)\n"
    (best, prob), *others = prediction.top(len(prediction.classes) if all_probs else top_k)
    rest = ", ".join(f"{show_text(name)} {p:.3f}" for name, p in others)
    further = _padded(_extra(prediction, extra))
    label = prediction.label if prediction.label == best else f"{prediction.label} ({best})"
    return f"{shown:<40} {further}{show_text(label):<16} {prob:6.3f}  {rest}".rstrip() + "\n"


def show_report(report: "Report", as_json: bool) -> None:
    """Print an evaluation: a headline and a table of classes, or one JSON object."""
    if as_json:
        emit_json(report.to_dict())
        return
    precision = "" if report.mean_average_precision is None else f"mAP {report.mean_average_precision:.4f}  "
    calibration = "" if report.ece is None else f"ECE {report.ece:.4f}  "
    if report.ece != report.ece_uncalibrated:
        calibration += f"({report.ece_uncalibrated:.4f} without temperature {report.temperature:.3f})  "
    emit(
        f"{report.split}: {precision}accuracy {report.accuracy:.4f}  top-5 {report.top5:.4f}  loss {report.loss:.4f}  "
        f"{calibration}({counted(report.num_examples, 'example')} of {'+'.join(report.modalities)})\n"
    )
    if report.balanced_accuracy is not None and report.macro_f1 is not None:
        emit(f"each class alike: balanced accuracy {report.balanced_accuracy:.4f}  macro F1 {report.macro_f1:.4f}\n")
    key = "accuracy" if report.confusion else "average_precision"
    columns = ("count", key, "precision", "f1") if report.confusion else (key,)
    each = list(report.per_class.items())
    if len(each) > MANY_CLASSES:
        worst = sorted(each, key=lambda pair: (pair[1][key] is None, pair[1][key] or 0, pair[0]))
        each = worst[:WORST]
        say(f"the {WORST} of {counted(len(worst), 'class')} with the lowest {key}; all are in --json and -o DIR")
    rows = (
        [show_text(name), *(figure(row[column], "" if column == "count" else ".3f") for column in columns)]
        for name, row in each
    )
    emit_table(["class", *columns], rows)
    if report.by is not None:
        show_by(report, report.by)


def show_by(report: "Report", by: str) -> None:
    """Print the accuracy of each value of a column, the lowest first."""
    rows = sorted(report.by_value.items(), key=lambda pair: (pair[1]["accuracy"], pair[0]))
    if len(rows) > MANY_CLASSES:
        shown = f"the {WORST} of {len(rows):,} values of {show_path(by)} with the lowest accuracy"
        say(f"{shown}; all are in --json and -o DIR")
        rows = rows[:WORST]
    cells = (
        [
            show_text(value) or "(none)", f"{row['count']:,}", f"{row['accuracy']:.3f}",
            "{:.3f}-{:.3f}".format(*row["interval_95"]),
        ]
        for value, row in rows
    )  # fmt: skip
    emit_table([show_text(by), "count", "accuracy", "interval"], cells)
