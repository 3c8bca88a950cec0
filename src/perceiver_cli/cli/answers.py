"""Answers of `predict` as a table, JSON lines, CSV, TSV, labels or subtitles."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from perceiver_cli.cli import terminal
from perceiver_cli.cli.terminal import complain, emit, emit_json, say
from perceiver_cli.errors import EXIT_DATA, UsageError
from perceiver_cli.files import show_path, show_text

if TYPE_CHECKING:
    from perceiver_cli.inference.merging import TimedEvent
    from perceiver_cli.inference.predictor import Prediction

EXTRA_WIDTH = {"start_s": 8, "end_s": 8, "used": 12, "labels": 20}  # columns that only some predictions have
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # first characters of a formula in a spreadsheet
Format = Literal["auto", "table", "jsonl", "csv", "tsv", "audacity", "srt"]
OF_EVENTS = ("audacity", "srt")  # formats that hold the events of one input


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
    if style == "auto":
        style = "table" if terminal.is_terminal() else "jsonl"
    if style == "table":
        emit(f"{'file':<40} {_padded({name: name for name in extra})}{'label':<16} {'prob':>6}  others\n")
    header, errors = True, _Errors()
    for prediction in predictions:
        errors.tell(prediction.error)
        if style == "table":
            emit(_table_row(prediction, top_k, all_probs, extra))
        elif style == "jsonl":
            emit_json(prediction.to_dict(top_k, all_probs=all_probs))
        else:
            cells = _cells(prediction, top_k, all_probs, extra)
            emit((_csv_row(cells.keys(), style) if header else "") + _csv_row(cells.values(), style))
            header = False
    return errors.end(reads)


def show_events(
    events: Iterable["TimedEvent"], style: str, reads: Sequence[str] = (), repeated: Sequence[str] = ()
) -> int:
    """Print events as they end; return the exit code, 3 if any input was bad. Raises UsageError, see OF_EVENTS.

    repeated: columns of a manifest that CSV and TSV have too.
    """
    if style == "auto":
        style = "table" if terminal.is_terminal() else "jsonl"
    columns = ("path", *repeated, "start_s", "end_s", "label", "prob", "error")
    if style == "table":
        emit(f"{'file':<40} {'start':>10} {'end':>10}  {'label':<16} {'prob':>6}\n")
    elif style in ("csv", "tsv"):
        emit(_csv_row(columns, style))
    errors, number, only = _Errors(), 0, None
    for number, event in enumerate(events, start=1):
        errors.tell(event.error)
        only = event.path if only is None else only
        if style in OF_EVENTS and event.path != only:
            fault = f"--format {style} holds the events of one input, found {show_path(only)} and"
            raise UsageError(f"{fault} {show_path(event.path)}", "pass one input, or --format csv")
        if style == "jsonl":
            emit_json(event.to_dict())
        elif style in ("csv", "tsv"):
            facts = event.to_dict()
            emit(_csv_row([facts.get(column, "") for column in columns], style))
        elif event.error is None:
            emit(_event_text(event, style, number))
        elif style == "table":
            emit(f"{show_text(event.path):<40} (not read)\n")
    return errors.end(reads)


def _event_text(event: "TimedEvent", style: str, number: int) -> str:
    """Return an event as a line of a table or of Audacity's labels, or as a subtitle of SRT."""
    label = show_text(event.label)
    if style == "audacity":
        return f"{event.start_s:.6f}\t{event.end_s:.6f}\t{label}\n"
    if style == "srt":
        begin, end = (_time(seconds, 3).replace(".", ",") for seconds in (event.start_s, event.end_s))
        return f"{number}\n{begin} --> {end}\n{label}\n\n"
    begin, end = (_time(seconds, 2).removeprefix("00:") for seconds in (event.start_s, event.end_s))
    return f"{show_text(event.path):<40} {begin:>10} {end:>10}  {label:<16} {event.prob:6.3f}\n"


def _time(seconds: float, digits: int) -> str:
    """Return seconds as 01:02:03.456."""
    units = round(seconds * 10**digits)
    whole, rest = divmod(units, 10**digits)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{rest:0{digits}d}"


class _Errors:
    """The errors of inputs, told as they come."""

    def __init__(self) -> None:
        self.exit_code, self.is_unknown = 0, False

    def tell(self, error: str | None) -> None:
        """Print the error of an input, if it has one."""
        from perceiver_cli.preprocess.detection import UNKNOWN

        if error is not None:
            self.exit_code = EXIT_DATA
            self.is_unknown |= error.endswith(UNKNOWN)
            complain(f"perceiver predict: {error}")

    def end(self, reads: Sequence[str]) -> int:
        """Print the formats of some modalities if a file is of an unknown one; return the exit code."""
        from perceiver_cli.preprocess.detection import formats

        if self.is_unknown:
            say(f"formats: {formats(reads)}")
        return self.exit_code


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


def with_hint(predictions: Iterable["Prediction"], reads: Sequence[str], count: int) -> Iterator["Prediction"]:
    """Yield predictions of `count` named inputs; say how files make one input if each of several was answered alone."""
    kinds: set[tuple[str, ...]] = set()
    for prediction in predictions:
        kinds.add(prediction.used)
        yield prediction
    kinds.discard(())
    if count > 1 and len(kinds) > 1 and all(len(used) == 1 for used in kinds):
        one = f"an input of {' and '.join(reads)} is files of one stem in a folder, or a row of a manifest"
        say(f"note: each file was answered alone: {one}")


def _extra(prediction: "Prediction", names: Sequence[str]) -> dict[str, str]:
    """Return the cells of the columns in EXTRA_WIDTH by name."""
    facts = {"start_s": prediction.start_s, "end_s": prediction.end_s, "used": "+".join(prediction.used)}
    if "labels" in names:
        facts["labels"] = ";".join(prediction.labels) if prediction.error is None else ""
    values = {name: facts[name] if name in facts else prediction.names.get(name) for name in names}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _padded(cells: Mapping[str, str]) -> str:
    return "".join(f"{show_text(cell):<{EXTRA_WIDTH.get(name, 12)}} " for name, cell in cells.items())


def _table_row(prediction: "Prediction", top_k: int, all_probs: bool, extra: Sequence[str]) -> str:
    shown = show_text(prediction.path)
    if prediction.error is not None:
        return f"{shown:<40} (not read)\n"
    (best, prob), *others = prediction.top(len(prediction.classes) if all_probs else top_k)
    rest = ", ".join(f"{show_text(name)} {p:.3f}" for name, p in others)
    further = _padded(_extra(prediction, extra))
    label = prediction.label if prediction.label == best else f"{prediction.label} ({best})"
    return f"{shown:<40} {further}{show_text(label):<16} {prob:6.3f}  {rest}".rstrip() + "\n"
