"""What people and pipes see: data on stdout, talk on stderr, exit codes, progress. The only user of rich."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from perceiver_cli.errors import (
    EXIT_BUG,
    EXIT_DATA,
    EXIT_RESOURCE,
    PerceiverError,
    ResourceError,
    UsageError,
    counted,
)
from perceiver_cli.files import printable, show_path

if TYPE_CHECKING:
    from perceiver_cli.compare import Comparison
    from perceiver_cli.evaluate import Report
    from perceiver_cli.events import Evaluated, Event, StepDone
    from perceiver_cli.explain import Explanation
    from perceiver_cli.lint import Copies, LintReport
    from perceiver_cli.lr_find import Curve
    from perceiver_cli.predict import Prediction
    from perceiver_cli.records import Done


class _Talk(Console):
    """Lines on stderr. A reader that leaves is no reason for a run to end."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


# In a pipe or a log a line stays a line; on a terminal words wrap.
talk = _Talk(stderr=True, highlight=False, markup=False, soft_wrap=sys.stderr is None or not sys.stderr.isatty())
PLAIN_EVERY_S = 30.0  # between lines of progress where there is no terminal
LAST_WORDS = 5  # lines of libraries that are shown when something went wrong
LIBRARY_BYTES = 1 << 16  # read at a time of what libraries wrote: all that a pipe holds
LISTED = 20  # findings of a kind that are shown to people
NAMED = 5  # of several names on a line
EXTRA_WIDTH = {"start_s": 8, "end_s": 8, "used": 12, "labels": 20}  # columns that only some predictions have
debug = False
quiet = False  # -q: errors and nothing else
verbose = False  # -v: also what libraries have to say


# ---------------------------------------------------------------- the whole program


def guarded(app: Callable[[], None]) -> None:
    """Run the command line: expected errors become one line and their exit code; a bug says so and exits with 1."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends by the signal (130); train installs its own handler
    _guard_stderr()
    try:
        app()
    except PerceiverError as error:
        if debug:
            traceback.print_exc()
        complain(f"perceiver: {error}")
        if isinstance(error, ResourceError):
            _libraries.last_words()
        sys.exit(error.exit_code)
    except MemoryError:
        complain("perceiver: out of memory; try a smaller --batch-size")
        sys.exit(EXIT_RESOURCE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        complain(f"perceiver: stdout: cannot write: {error.strerror}")
        sys.exit(EXIT_RESOURCE)
    except Exception as error:
        if debug:
            traceback.print_exc()
        complain(
            f"perceiver: this is a bug: {type(error).__name__}: {error}; run it again with --debug before the command"
        )
        _libraries.last_words()
        sys.exit(EXIT_BUG)
    finally:
        _libraries.heard()


class _Escaped(io.TextIOWrapper):
    """A stream on which control characters come out escaped: messages of others quote what people typed."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def _guard_stderr() -> None:
    """Let only `talk` write as it likes to stderr; what else Python writes there (usage, warnings) is escaped."""
    if sys.stderr is None:
        return
    own = os.dup(2)
    talk.file = open(own, "w", 1, sys.stderr.encoding, "backslashreplace")  # noqa: SIM115  # until the end
    sys.stderr = _Escaped(open(own, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)  # noqa: SIM115


class _Libraries:
    """What C libraries write to file 2 by themselves, such as libtiff's warnings of a damaged file: kept, not shown.

    With -v each line is shown, escaped; without, the last ones are if the program then fails. It goes through a pipe
    that never blocks, so that what is too much is lost and no decoder waits.
    """

    def __init__(self) -> None:
        self.pipe: int | None = None
        self.lines: deque[str] = deque(maxlen=LAST_WORDS)

    def listen(self) -> None:
        """Begin, in place of file 2."""
        self.pipe, write_end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(write_end, False)
        os.dup2(write_end, 2)
        os.close(write_end)

    def heard(self) -> None:
        """Take in what there is."""
        with suppress(OSError):  # nothing more; or in a process that was forked and reads for another
            while self.pipe is not None and (data := os.read(self.pipe, LIBRARY_BYTES)):
                for line in data.decode("utf-8", "surrogateescape").splitlines():
                    self.lines.append(line)
                    if verbose:
                        _print(f"library: {line}")

    def last_words(self) -> None:
        """Show the last lines, where they were not shown already."""
        self.heard()
        for line in () if verbose else self.lines:
            _print(f"library: {line}")


_libraries = _Libraries()


def begin(with_tracebacks: bool) -> None:
    """Settle how the command that follows speaks: with --debug, libraries write to stderr directly."""
    global debug
    debug = with_tracebacks
    if not debug and sys.stderr is not None:
        _libraries.listen()


def say(message: str) -> None:
    """Print one line of talk on stderr; nothing with -q."""
    if not quiet:
        complain(message)


def complain(message: str) -> None:
    """Print one line on stderr that -q does not silence: an error, or an input that cannot be used."""
    _libraries.heard()
    _print(message)


def _print(message: str) -> None:
    with suppress(OSError, ValueError):  # nobody may be listening
        talk.print(Text(printable(message)))


def is_live() -> bool:
    """Return whether there is somebody to show a bar to."""
    return talk.is_terminal and not quiet


def emit(text: str, *, styled: bool = False) -> None:
    """Write data to stdout and flush. Ends quietly by SIGPIPE where the reader has left.

    On a terminal control characters are escaped, unless the text is `styled`: safe, with escapes of our own.

    Raises:
        ResourceError: stdout is closed, or its disk is full.
    """
    if is_terminal() and not styled:
        text = printable(text, "\n\t")
    emit_bytes(text.encode("utf-8", "surrogateescape"))


def emit_bytes(data: bytes) -> None:
    """Write bytes to stdout and flush, as `emit` does."""
    if sys.stdout is None:
        raise ResourceError("stdout is closed")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        end_by_signal(signal.SIGPIPE)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered can no longer fail
        raise ResourceError(f"stdout: cannot write: {error.strerror}") from error


def end_by_signal(number: int) -> None:
    """End this process by a signal, so that shells and schedulers see which."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def emit_json(record: Mapping[str, Any]) -> None:
    """Write one JSON object on one line."""
    emit(json.dumps(record) + "\n")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("class", "name", "") else "right", overflow="fold")
    return table


def _emit_table(table: Table) -> None:
    stream = io.StringIO()
    # In a pipe a row is a line, however long.
    width = None if is_terminal() else 1000
    Console(file=stream, width=width, force_terminal=is_terminal(), markup=False).print(table)
    emit("".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines()), styled=True)


# ---------------------------------------------------------------- training


def follow_training(events: Iterator[Event], stop: Callable[[], None]) -> None:
    """Show a run's events as they come; the last line on stdout is the path of the best model.

    The first SIGINT or SIGTERM ends the run after its step, saved, and then ends the process by the same signal; the
    second ends it at once.
    """
    from perceiver_cli.events import Evaluated, Finished, Loaded, Note, Started, StepDone

    received: list[int] = []
    finished: Finished | None = None

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    with _TrainingDisplay() as display:
        for event in events:
            match event:
                case Started(summary, notes):
                    display.started(summary, notes)
                case Loaded(done, total, bad):
                    display.loaded(done, total, bad)
                case Note(message):
                    say(f"note: {message}")
                case StepDone():
                    display.stepped(event)
                case Evaluated():
                    display.evaluated(event)
                case Finished():
                    finished = event
                case _:
                    pass
    if finished is None:
        say("stopped before the first step")
        end_by_signal(received[0])
        return
    if "val_accuracy" in finished.metrics:
        best = f"best validation accuracy {finished.metrics['val_accuracy']:.4f} at step {finished.metrics['step']}, "
    else:
        best = ""
    ending = "stopped early and saved" if finished.stopped_early else "done"
    say(f"{ending}: {best}{counted(finished.step, 'step')} in {_clock(finished.elapsed_s)}")
    if received:
        say(f"to go on: perceiver train --resume -o {show_path(finished.model.parent)}")
        end_by_signal(received[0])
    emit(f"{finished.model}\n")


class _TrainingDisplay:
    """A live bar on a terminal; otherwise a line per evaluation and now and then one of progress."""

    def __enter__(self) -> _TrainingDisplay:
        self.live = is_live()
        self.header_shown = False
        self.last_line = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"), console=talk, transient=True, disable=not self.live,
        )  # fmt: skip
        self.task = self.progress.add_task("reading", total=None, facts="")
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def started(self, summary: Mapping[str, Any], notes: Iterable[str]) -> None:
        """Say what the run is."""
        for line in plan_lines(summary):
            say(line)
        for note in notes:
            say(f"note: {note}")

    def loaded(self, done: int, total: int, bad: int) -> None:
        """Show files decoded."""
        facts = f"{bad} unreadable" if bad else ""
        self.progress.update(self.task, description="reading", completed=done, total=total, facts=facts)
        if done == total and not self.live:
            say(f"read {counted(total, 'file')}" + (f", {bad} of them unreadable and left out" if bad else ""))

    def stepped(self, event: StepDone) -> None:
        """Show a step."""
        facts = f"loss {event.loss:.3f}  {event.samples_per_s:.0f}/s  epoch {event.epoch:.1f}"
        self.progress.update(
            self.task, description="training", completed=event.step, total=event.total_steps, facts=facts
        )
        if not self.live and time.monotonic() - self.last_line > PLAIN_EVERY_S:
            self.last_line = time.monotonic()
            say(f"step {event.step} of {event.total_steps}  {facts}")

    def evaluated(self, event: Evaluated) -> None:
        """Show a row of the table of evaluations."""
        if not self.header_shown:
            self.header_shown = True
            say(f"{'epoch':>8} {'step':>8} {'train loss':>11} {'val loss':>9} {'val acc':>8} {'time':>8}")
        mark = " *" if event.best else ""
        losses = f"{_figure(event.train_loss):>11} {_figure(event.loss):>9} {_figure(event.accuracy):>8}"
        say(f"{event.epoch:8.2f} {event.step:8d} {losses} {_clock(event.elapsed_s):>8}{mark}")
        self.last_line = time.monotonic()


def plan_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the plan of a run as lines for people."""
    splits = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
    inputs = ", ".join(
        f"{name} {' x '.join(map(str, given['shape']))} of {counted(given['channels'], 'channel')}"
        for name, given in summary["inputs"].items()
    )
    steps, limit_s = summary["steps"], summary["max_time_s"]
    length = counted(steps, "step") if steps else f"as many steps as fit in {_clock(limit_s)}"
    classes = counted(len(summary["classes"]), "class")
    return [
        f"{summary['preset']}: {classes}, {'+'.join(summary['modalities'])} ({splits}) in {show_path(summary['data'])}",
        f"inputs {inputs}; {summary['parameters']:,} parameters, {summary['flops'] / 1e9:.3g} GFLOP, "
        f"about {summary['training_bytes'] / 2**20:,.0f} MiB",
        f"{length} of {summary['batch_size']} on {summary['device']} in {summary['precision']}, into "
        f"{show_path(summary['output'])}",
    ]


def show_plan(summary: Mapping[str, Any]) -> None:
    """Print a dry run: lines on a terminal, one JSON object otherwise."""
    if not is_terminal():
        emit_json(summary)
        return
    lines = plan_lines(summary)
    for name, count in summary["classes"].items():
        lines.append(f"  {show_path(name)} {count}")
    lines.append(f"{summary['seconds_per_step']:.3f} s a step: about {_clock(summary['eta_s'])} in all")
    emit("\n".join(lines) + "\n")


def _figure(value: float) -> str:
    """Return a number for the table of evaluations; a dash where there is no validation split."""
    if isnan(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


# ---------------------------------------------------------------- predictions


def show_predictions(
    predictions: Iterable[Prediction], style: str, top_k: int, all_probs: bool, extra: Sequence[str] = ()
) -> int:
    """Write predictions as they come; return the exit code: 0, or 3 where any input was bad.

    extra: further columns of tables: start_s and end_s of windows, used of models of several modalities, labels where
    there may be several an example.
    """
    if style == "auto":
        style = "table" if is_terminal() else "jsonl"
    writer = {"table": _table_rows, "jsonl": _json_rows, "csv": _csv_rows, "tsv": _csv_rows}[style]
    failed = 0

    def watched() -> Iterator[Prediction]:
        nonlocal failed
        for prediction in predictions:
            if prediction.error is not None:
                failed += 1
                complain(f"perceiver predict: {prediction.error}")
            yield prediction

    for row in writer(watched(), "\t" if style == "tsv" else ",", top_k, all_probs, extra):
        emit(row)
    return EXIT_DATA if failed else 0


def _json_rows(
    predictions: Iterable[Prediction], _: str, top_k: int, all_probs: bool, extra: Sequence[str]
) -> Iterator[str]:
    for prediction in predictions:
        yield json.dumps(prediction.to_dict(top_k, all_probs=all_probs)) + "\n"


def _csv_rows(
    predictions: Iterable[Prediction], delimiter: str, top_k: int, all_probs: bool, extra: Sequence[str]
) -> Iterator[str]:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)  # which quotes what it ends lines with: \r and \n both

    def row(cells: list[Any]) -> str:
        stream.seek(0)
        stream.truncate()
        writer.writerow([_cell(cell) for cell in cells])
        return stream.getvalue().removesuffix("\r\n") + "\n"

    header = False
    for prediction in predictions:
        count = min(top_k, len(prediction.classes))
        if not header:
            header = True
            ranks = [
                f"{name}{rank}" for rank in ["", *(f"_{i}" for i in range(2, count + 1))] for name in ("label", "prob")
            ]
            yield row(["path", *extra, *ranks, *(f"p_{name}" for name in prediction.classes if all_probs), "error"])
        best: list[Any] = [cell for pair in prediction.top(count) for cell in pair] or [""] * (2 * count)
        best[0] = prediction.label if prediction.error is None else ""
        every = (prediction.probs or [""] * len(prediction.classes)) if all_probs else []
        yield row([prediction.path, *_extra(prediction, extra), *best, *every, prediction.error or ""])


def _extra(prediction: Prediction, names: Sequence[str]) -> list[str]:
    """Return the cells of further columns."""
    facts = {"start_s": prediction.start_s, "end_s": prediction.end_s, "used": "+".join(prediction.used)}
    if "labels" in names:
        facts["labels"] = ";".join(prediction.labels) if prediction.error is None else ""
    return ["" if facts[name] is None else str(facts[name]) for name in names]


def _cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    return (
        f"'{value}"
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and value != "-"
        else value
    )


def _table_rows(
    predictions: Iterable[Prediction], _: str, top_k: int, all_probs: bool, extra: Sequence[str]
) -> Iterator[str]:
    further = "".join(f"{name:<{EXTRA_WIDTH[name]}} " for name in extra)
    yield f"{'file':<40} {further}{'label':<16} {'prob':>6}  others\n"
    for prediction in predictions:
        shown = show_path(prediction.path)[1:-1]
        if prediction.error is not None:
            yield f"{shown:<40} (not read)\n"
            continue
        (_, prob), *others = prediction.top(len(prediction.classes) if all_probs else top_k)
        rest = ", ".join(f"{show_path(name)[1:-1]} {p:.3f}" for name, p in others)
        cells = zip(extra, _extra(prediction, extra), strict=True)
        further = "".join(f"{cell:<{EXTRA_WIDTH[name]}} " for name, cell in cells)
        yield f"{shown:<40} {further}{show_path(prediction.label)[1:-1]:<16} {prob:6.3f}  {rest}".rstrip() + "\n"


# ---------------------------------------------------------------- preparing


def follow_preparing(done: Iterator[Done]) -> int:
    """Show what becomes of inputs that are prepared; return the exit code: 0, or 3 where any input was bad."""
    last, failed, said = None, 0, time.monotonic()
    with counting("preparing") as progress:
        for last in done:
            if last.error is not None:
                failed += 1
                complain(f"perceiver preprocess: {last.error}")
            progress(last.count, last.total)
            if not talk.is_terminal and time.monotonic() - said > PLAIN_EVERY_S:
                said = time.monotonic()
                say(f"prepared {last.count} of {last.total}")
    bad = f", {failed} of them unreadable: errors in their place" if failed else ""
    say(f"prepared {counted(0 if last is None else last.total, 'input')}{bad}")
    return EXIT_DATA if failed else 0


# ---------------------------------------------------------------- evaluation and info


def show_report(report: Report, as_json: bool) -> None:
    """Print an evaluation: headline and per-class table, or one JSON object."""
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
    columns = ("count", "accuracy", "precision", "f1") if report.confusion else ("average_precision",)
    table = _table("class", *columns)
    for name, row in report.per_class.items():
        cells = ((key, row[key]) for key in columns)
        numbers = ("-" if v is None else str(v) if key == "count" else f"{v:.3f}" for key, v in cells)
        table.add_row(Text(show_path(name)[1:-1]), *numbers)
    _emit_table(table)


def show_explanation(explanation: Explanation, as_json: bool) -> None:
    """Print what an explanation says in numbers: a line for each modality, or one JSON object."""
    for note in explanation.notes:
        say(f"note: {note}")
    facts = explanation.to_dict()
    if as_json:
        emit_json(facts)
        return
    emit(f"{show_path(explanation.label)[1:-1]} {explanation.prob:.4f}\n")
    for name, part in facts["inputs"].items():
        emit(f"{name}: {part['attention_share']:.1%} of the attention, {part['share']:.1%} of the heat\n")


def show_lint(report: LintReport, as_json: bool) -> None:
    """Print what is wrong with a data set: tables and the first of each kind of finding, or one JSON object."""
    if as_json:
        emit_json(report.to_dict())
        return
    table = _table("class", *report.sizes)
    for name in next(iter(report.counts.values())):
        table.add_row(Text(show_path(name)[1:-1]), *(str(report.counts[split][name]) for split in report.sizes))
    table.add_row("examples", *(str(size) for size in report.sizes.values()), style="bold")
    _emit_table(table)
    if report.imbalance is not None and report.imbalance > 1:
        emit(f"the largest class of train is {report.imbalance:.3g} times the smallest\n")
    for split, names in report.missing.items():
        emit(f"{split} has no example of {counted(len(names), 'class')}: {_some(map(show_path, names))}\n")
    across = [group for group in report.copies if group.across]
    kinds = {
        "unreadable": [error for _, _, error in report.unreadable],
        "the same content in several splits": list(map(_group, across)),
        "the same content within a split": [_group(group) for group in report.copies if not group.across],
        "the same content with different labels": [_group(group) for group in report.copies if group.conflict],
        "silent sound": [show_path(name) for _, name, _ in report.faults["silent"]],
        "constant": [f"{show_path(name)} ({modality})" for _, name, modality in report.faults["constant"]],
        "tiny clouds": [show_path(name) for _, name, _ in report.faults["tiny"]],
    }
    for kind, found in kinds.items():
        if found:
            more = [f"... and {len(found) - LISTED} more, all with --json"] if len(found) > LISTED else []
            emit(f"{kind}: {len(found)}\n" + "".join(f"  {line}\n" for line in [*found[:LISTED], *more]))
    if not any(kinds.values()):
        emit("nothing unreadable, no duplicates, nothing silent, constant or tiny\n")


def _group(group: Copies) -> str:
    """Return a group of examples of one content as a line."""
    rows = []
    for split, name, labels in group.examples:
        said = f" ({', '.join(show_path(label)[1:-1] for label in labels)})" if group.conflict else ""
        rows.append(f"{split}: {show_path(name)}{said}")
    return _some(rows, " = ") + ("" if group.same_file else ", in files that differ")


def _some(words: Iterable[str], between: str = ", ") -> str:
    """Return the first of some words."""
    every = list(words)
    return between.join(every[:NAMED]) + (f" and {len(every) - NAMED} more" if len(every) > NAMED else "")


@contextmanager
def counting(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while something is counted, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=talk, transient=True, disable=not is_live()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print names and values: aligned lines, or one JSON object."""
    if as_json:
        emit_json(facts)
        return
    rows = list(_flat(facts, ""))
    width = max(len(name) for name, _ in rows)
    emit("".join(f"{name:<{width}}  {value}\n" for name, value in rows))


def show_curve(curve: Curve, plot: str, command: str, as_json: bool) -> None:
    """Print the learning rate that is suggested and the command to run next; or one JSON object with the curve."""
    for note in curve.notes:
        say(f"note: {note}")
    if as_json:
        emit_json({**vars(curve), "plot": plot, "command": command})
        return
    say(f"the curve of {len(curve.rates)} steps is in {show_path(plot)}; next:")
    emit(f"{command}\n")


def show_comparison(comparison: Comparison, as_json: bool) -> None:
    """Print runs side by side, a row each, and a column for each option that differs; or one JSON object."""
    for note in comparison.notes:
        say(f"note: {note}")
    if as_json:
        emit_json(comparison.to_dict())
        return
    precise = any(run.mAP is not None for run in comparison.runs)
    columns = ["accuracy", "interval", *(["mAP"] if precise else []), "loss", "examples", "seconds", "parameters"]
    table = _table("name", *columns, *(show_path(key)[1:-1] for key in comparison.differences))
    for place, run in enumerate(comparison.runs):
        interval = "-" if run.interval_95 is None else "{:.3f}-{:.3f}".format(*run.interval_95)
        measured = [_cell_of(run.accuracy, ".4f"), interval, *([_cell_of(run.mAP, ".4f")] if precise else [])]
        costs = [_cell_of(run.loss, ".4f"), _cell_of(run.num_examples, ","), _cell_of(run.seconds, ".0f")]
        settings = [values[place] for values in comparison.differences.values()]
        words = [Text("-" if value is None else show_path(str(value))[1:-1]) for value in settings]
        table.add_row(Text(show_path(run.run)[1:-1]), *measured, *costs, f"{run.parameters:,}", *words)
    _emit_table(table)


def _cell_of(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def show_rows(rows: Iterable[Mapping[str, Any]], as_json: bool) -> Iterator[Mapping[str, Any]]:
    """Print each row as it comes, names and values on one line or a JSON object, and yield it."""
    for row in rows:
        if as_json:
            emit_json(row)
        else:
            emit("  ".join(f"{name} {value}" for name, value in _flat(row, "") if value) + "\n")
        yield row


def _flat(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int):
            yield prefix + name, f"{value:,}"
        elif isinstance(value, list | tuple):
            yield prefix + name, " ".join(show_path(v)[1:-1] if isinstance(v, str) else str(v) for v in value)
        elif value is not None:
            yield prefix + name, f"{value:.6g}" if isinstance(value, float) else show_path(str(value))[1:-1]


def refuse_terminal(what: str) -> None:
    """Raise UsageError if binary data were about to fill a terminal."""
    if is_terminal():
        raise UsageError(f"{what} is binary and stdout is a terminal", "pass -o FILE, or pipe it on")
