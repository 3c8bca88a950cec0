"""The commands `predict`, `evaluate` and `explain`, and their output."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perceiver_cli.cli import options, processes, sources
from perceiver_cli.cli.answers import OF_EVENTS, Format, several_inputs, show_events, show_predictions, with_hint
from perceiver_cli.cli.progress import BESIDE_AFTER_S, Counter, counting, working
from perceiver_cli.cli.tables import emit_facts, emit_table
from perceiver_cli.cli.terminal import (
    complain,
    emit,
    emit_json,
    figure,
    say,
    say_advice,
    say_lines,
    say_notes,
)
from perceiver_cli.errors import EXIT_DATA, UsageError, counted
from perceiver_cli.files import check_suffix, show_path, show_text, write_text

if TYPE_CHECKING:
    from perceiver_cli.inference.evaluation import Report
    from perceiver_cli.inference.predictor import Prediction

MANY_CLASSES, WORST = 100, 20  # an evaluation of more classes prints only the WORST with the lowest figures


def evaluate(
    data: Annotated[str, typer.Argument(help=options.DATA_HELP)],
    model: options.Model = None,
    use: options.Use = None,
    split: Annotated[str | None, typer.Option(help="Split to measure [default: test, else val, else all].")] = None,
    output: Annotated[
        Path | None,
        options.output("Folder for report.html, metrics.json, predictions.jsonl, confusion.png."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Add the accuracy for each value of a manifest's column, or each folder (parent)."
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First fit a temperature on the validation split and store it.")
    ] = False,
    worth: Annotated[
        bool, typer.Option("--worth", help="Add the share of each modality in the accuracy (Shapley).")
    ] = False,
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    label_column: options.LabelColumn = None,
    passed: options.Pass = None,
    views: options.Views = None,
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
    processes.started(devices, [data])
    given = options.data_options(root, path_columns, label_column, None, columns)
    more = options.passed_columns(passed) | ({} if by is None else {"group_by": by})
    path = options.model_file(model)
    ranks = processes.joined(timeout)
    from perceiver_cli.inference.evaluation import calibrate as calibrate_model, evaluate_shared
    from perceiver_cli.inference.guidance import advice_on
    from perceiver_cli.report.html import save_report

    predictor = options.open_predictor(path, ranks.device(device), precision, limit, use, {**given, **more}, views)
    if calibrate:
        temperature = calibrate_model(predictor, data, batch_size, workers, ranks).temperature
        say(f"temperature {temperature:.4f}, stored in {show_path(predictor.path)}")
    with counting("evaluating") as progress:
        report = evaluate_shared(predictor, data, ranks, split, batch_size, workers, progress)
    ranks.meet()
    if report is None:  # only the first process has it
        return
    if worth:
        from perceiver_cli.inference.worth import worth as shares_of

        with counting("sets of inputs") as progress:
            measured = shares_of(predictor, report, batch_size, workers, progress)
        report = replace(report, worth=measured.to_dict())
    say_notes(report.notes)
    say_lines(report.files.brief())
    for _, error in report.bad[:20]:
        complain(error)
    if output is not None:
        from perceiver_cli.config import DataConfig
        from perceiver_cli.report.html import REPORT_FILE, page

        save_report(report, output)
        words = ["perceiver", "evaluate", data, "-m", os.fspath(predictor.path), "--split", report.split]
        words += (["--use", use] if use is not None else []) + DataConfig(**given).words()
        words += ([] if by is None else ["--by", by]) + ([] if passed is None else ["--pass", passed])
        words += ["--worth"] if worth else []
        words += [word for raised in limit or [] for word in ("--limit", raised)]
        words += [] if views is None else ["--views", str(views)]
        with working("drawing the report"):
            write_text(output / REPORT_FILE, page(report, predictor, data, [*words, "-o", os.fspath(output)]))
        say(f"wrote {show_path(output / REPORT_FILE)}, and metrics.json, predictions.jsonl beside it")
    show_report(report, json)
    say_advice(advice_on(report, predictor, data, has_report=output is not None))
    if report.bad:
        raise typer.Exit(EXIT_DATA)


def predict(
    inputs: options.Inputs = None,
    row: options.Rows = None,
    model: options.Model = None,
    use: options.Use = None,
    window: Annotated[float | None, typer.Option(help="Cut sound and video into windows of this many seconds.")] = None,
    hop: Annotated[float | None, typer.Option(help="Seconds between window starts [default: --window].")] = None,
    every: Annotated[float | None, typer.Option(help="Seconds between answers, one for each window.")] = None,
    aggregate: Annotated[
        options.Aggregate | None, typer.Option(help="Make one answer of all windows [default: mean]; none keeps each.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join windows into events: one class each, with start and end.")
    ] = False,
    max_gap: Annotated[
        float | None, typer.Option(min=0, help="Longest pause within an event in seconds, for --merge [default: 0].")
    ] = None,
    min_length: Annotated[
        float | None, typer.Option(min=0, help="Shortest event in seconds, for --merge [default: 0].")
    ] = None,
    style: Annotated[Format, typer.Option("--format", help="Format; auto: table on a terminal, else jsonl.")] = "auto",
    top_k: Annotated[int, typer.Option(min=1, help="Number of classes to print.")] = 5,
    all_probs: Annotated[bool, typer.Option("--all-probs", help="Print the probability of every class.")] = False,
    files_from: options.FilesFrom = None,
    null: options.Null = False,
    stdin_name: options.StdinName = "-",
    rate: Annotated[str | None, typer.Option(metavar="HZ", help="Rate of raw sound on stdin, e.g. 16k.")] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="Channels of raw sound, interleaved [default: 1].")
    ] = None,
    encoding: Annotated[
        options.Encoding | None, typer.Option(help="Sample format of raw sound [default: s16le].")
    ] = None,
    root: options.Root = None,
    path_columns: options.PathColumns = None,
    columns: options.Columns = None,
    passed: options.Pass = None,
    min_prob: Annotated[
        float, typer.Option(min=0, max=1, help='Answer "unknown" below this probability; evaluate lists a few.')
    ] = 0.0,
    views: options.Views = None,
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

    An unreadable input gets a line with its error, and the exit status is 3. One input of several modalities is a video
    with its sound, the files of one stem in a folder (017.png, 017.wav), or a row of a manifest (CSV, TSV, JSONL) with
    a column for each modality. An input may lack a modality; "used" names those that it has.
    """
    from perceiver_cli.data.account import Account
    from perceiver_cli.inference.embeddings import check_embeddings, keeping_embeddings

    merge = merge or style in OF_EVENTS
    cut = options.Cut(window, hop, every, aggregate, merge)
    cut.check(workers)
    _check_merge(merge, all_probs, embeddings, max_gap, min_length)
    _check_one(style, inputs or [])
    processes.started(devices, [*(inputs or []), files_from])
    raw = sources.raw_of(inputs or [], rate, channels, encoding)
    named, place = sources.listed_to_predict(
        inputs or [], files_from, null, stdin_name, row, raw=raw, is_live=every is not None
    )
    if embeddings is not None:
        check_embeddings(embeddings)
    repeated = options.passed_columns(passed, style)
    given = options.data_options(root, path_columns, None, None, columns) | repeated
    path = options.model_file(model)
    ranks = processes.joined(timeout)
    predictor = options.open_predictor(path, ranks.device(device), precision, limit, use, given, views)
    windows, account = options.windows_of(cut, predictor), Account()
    if every is not None and "-" in (inputs or []):
        batch_size = batch_size or 1  # an answer must not wait for a batch
    apart = windows is not None and windows.aggregate == "none"
    follow = _Following(inputs or [], place, pairs=len(predictor.modalities) > 1, apart=apart)
    wanted: dict[str, Any] = {"min_prob": min_prob, "embeddings": embeddings is not None, "account": account}
    if ranks.size == 1:
        predictions = predictor.predict(named, batch_size, workers, windows, progress=follow.window, **wanted)
    else:
        from perceiver_cli.inference.shared import predict_shared

        predictions = predict_shared(predictor, named, ranks, batch_size, workers, windows, **wanted)
        if not ranks.first:
            predictions, embeddings = iter([*predictions]), None
    named_columns = [name for name in repeated.get("pass_columns", ()) if name != "*"]
    extra = named_columns + (["start_s", "end_s"] if apart else [])
    extra += ["used"] if len(predictor.modalities) > 1 else []
    extra += ["labels"] if predictor.info.config.multi_label else []
    if embeddings is not None:
        predictions = keeping_embeddings(predictions, embeddings, predictor.info.config.model.latent_channels)
    with counting("predicting", beside_data=True, last_words=follow.last_words) as follow.counter:
        predictions = follow.each(predictions)
        if merge:
            from perceiver_cli.inference.merging import merged

            events = merged(predictions, max_gap or 0.0, min_length or 0.0)
            exit_code = show_events(events, style, predictor.modalities, named_columns)
        else:
            predictions = with_hint(predictions, predictor.modalities, len(inputs or []))
            blank = replace(predictor.blank(min_prob), error="")
            exit_code = show_predictions(predictions, style, top_k, all_probs, extra, predictor.modalities, blank)
    if account.folders:
        say_lines(account.brief())
    raise typer.Exit(exit_code)


def explain(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...", help="A file, or one per modality; - for stdin.")
    ] = None,
    row: options.Rows = None,
    output: Annotated[
        Path | None,
        options.output("FILE.png, FILE.ply (colours) or FILE.npz (maps)."),
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
    named = list(sources.listed_to_predict(inputs or [], None, False, "-", row)[0])
    predictor = options.open_predictor(options.model_file(model), device, "fp32", limit, use)
    from perceiver_cli.inference.explain import explain as explained
    from perceiver_cli.malloc import give_back_freed
    from perceiver_cli.report.explanation import save

    give_back_freed()  # a large model's gradient is computed once
    with working("explaining"):
        explanation = explained(predictor, named, label)
        if output is not None:
            save(explanation, output)
    if output is not None:
        say(f"wrote {show_path(output)}")
    say_notes(explanation.notes)
    facts = explanation.to_dict()
    if json:
        emit_json(facts)
        return
    emit(f"{show_text(explanation.label)} {explanation.prob:.4f}\n")
    for name, shares in facts["inputs"].items():
        emit(f"{name}: {shares['attention_share']:.1%} of the attention, {shares['share']:.1%} of the heat\n")


class _Following:
    """How far `predict` is: inputs answered, and seconds of a long one."""

    def __init__(self, inputs: Sequence[str], place: sources.ListPlace, *, pairs: bool, apart: bool) -> None:
        self.inputs, self.place, self.pairs, self.apart = inputs, place, pairs, apart
        self.counter: Counter | None = None
        self.done, self.window_s, self.whole_s, self.path = 0, 0.0, 0.0, ""

    @cached_property
    def total(self) -> int | None:
        """The number of files if it is known without opening one, else None: a list or a tar holds any number."""
        if self.place.list is not None or "-" in self.inputs or self.pairs:
            return None
        folders = [sum(len(files) for _, _, files in os.walk(name)) for name in self.inputs if os.path.isdir(name)]
        return sum(folders) + len(self.inputs) - len(folders)

    def window(self, end_s: float, whole_s: float) -> None:
        """Note the window of an input that is being answered."""
        self.window_s, self.whole_s = end_s, whole_s
        self._show()

    def each(self, predictions: Iterable["Prediction"]) -> Iterator["Prediction"]:
        """Yield predictions, and note how many inputs have one."""
        for prediction in predictions:
            yield prediction
            # The caller has printed it by now.
            self.done += not self.apart or prediction.path != self.path
            self.path = prediction.path
            self.place.answered(prediction.path, is_part=self.apart)
            if not self.apart:
                self.window_s = self.whole_s = 0.0
                self._show()

    def _show(self) -> None:
        assert self.counter is not None
        if time.monotonic() - self.counter.began < BESIDE_AFTER_S:
            return
        share = self.window_s / self.whole_s if self.whole_s else 0.0
        of = "" if isinf(self.whole_s) else f" of {self.whole_s:,.0f}"
        facts = f"{self.window_s:,.0f}{of} s" if self.whole_s else None
        self.counter(self.done - (self.apart and share < 1) + share, self.total, facts)

    def last_words(self) -> Iterator[str]:
        """Yield what Ctrl-C prints: how far it came, and the command that continues."""
        if self.done:
            yield f"stopped after {counted(self.done, 'input')}"
        if self.done and not self.inputs and (command := self.place.command()) is not None:
            yield f"to continue: {command}"


def _check_one(style: str, inputs: Sequence[str]) -> None:
    """Raise UsageError for several inputs in a format that holds the events of one."""
    if style in OF_EVENTS and len(inputs) > 1:
        raise several_inputs(style, inputs[0], inputs[1])


def _check_merge(
    merge: bool, all_probs: bool, embeddings: Path | None, max_gap: float | None, min_length: float | None
) -> None:
    """Raise UsageError for options that have no effect with --merge, or without it."""
    options_of_events = {"--max-gap": max_gap, "--min-length": min_length}
    options_of_lines = {"--all-probs": all_probs or None, "--embeddings": embeddings}
    named = [name for name, value in (options_of_lines if merge else options_of_events).items() if value is not None]
    if named and merge:
        raise UsageError(f"{named[0]} has no effect with --merge", "leave one out")
    if named:
        raise UsageError(f"{named[0]} has no effect without --merge", "pass --merge")


def show_report(report: "Report", as_json: bool) -> None:
    """Print an evaluation: a headline and a table of classes, or one JSON object."""
    if as_json:
        emit_json(report.to_dict())
        return
    precision = [] if report.mean_average_precision is None else [f"mAP {report.mean_average_precision:.4f}"]
    calibration = [] if report.ece is None else [f"ECE {report.ece:.4f}"]
    if report.ece != report.ece_uncalibrated:
        calibration.append(f"({report.ece_uncalibrated:.4f} without temperature {report.temperature:.3f})")
    low, high = report.intervals_95.get("accuracy", (None, None))
    if low is not None and high is not None:
        emit(f"{report.split}: accuracy between {low:.3f} and {high:.3f} (95 % interval)\n")
    figures = [f"accuracy {report.accuracy:.4f}", f"top-5 {report.top5:.4f}", f"loss {report.loss:.4f}", *calibration]
    first, *others = [*precision, *figures]
    examples = f"({counted(report.num_examples, 'example')} of {'+'.join(report.modalities)})"
    emit_facts([f"{report.split}: {first}", *others, examples], indent="  ")
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
    if report.accuracy < 1 and report.min_probs:
        emit("\n")
        sure = ((f"{each.min_prob:.3f}", f"{each.answered:.3f}", f"{each.accuracy:.3f}") for each in report.min_probs)
        emit_table(["predict --min-prob", "answered", "accuracy"], sure)
    if report.by is not None:
        show_by(report, report.by)
    if report.worth is not None:
        show_worth(report.worth)


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


def show_worth(worth: Mapping[str, Any]) -> None:
    """Print the share of each modality in the accuracy, overall and for each class."""
    emit(f"\nworth: accuracy {worth['accuracy']:.4f} = {worth['chance']:.4f} by chance + the share of each modality\n")
    rows = []
    for name, each in worth["shares"].items():
        low, high = each["interval_95"]
        rows.append([name, f"{each['share']:.4f}", f"{low:.4f} to {high:.4f}", f"{worth['alone'][name]:.4f}"])
    emit_table(["modality", "share", "95 %", "accuracy alone"], rows)
    names, classes = list(worth["shares"]), list(worth["per_class"].items())
    if len(classes) <= MANY_CLASSES:
        by_class = ([show_text(name), *(f"{of[each]['share']:.3f}" for each in names)] for name, of in classes)
        emit_table(["class", *names], by_class)
