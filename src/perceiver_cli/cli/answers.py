"""Answers of `predict` as a table, JSON lines, CSV, TSV, labels or subtitles."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from perceiver_cli.cli import terminal
from perceiver_cli.cli.tables import cut, padded, terminal_width
from perceiver_cli.cli.terminal import complain, emit, emit_json, say
from perceiver_cli.errors import EXIT_DATA, UsageError
from perceiver_cli.files import show_path, show_text

if TYPE_CHECKING:
    from perceiver_cli.inference.merging import TimedEvent
    from perceiver_cli.inference.predictor import Prediction

EXTRA_WIDTH = {"start_s": 8, "end_s": 8, "used": 12, "labels": 20}  # columns that only some predictions have
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # first characters of a formula in a spreadsheet
Format = Literal["auto", "table", "jsonl", "csv", "tsv", "audacity", "srt"]
OTHER_WIDTH = 12  # of other columns
FILE_WIDTH, LABEL_WIDTH = 40, 16
LEAST_FILE, ROOM = 16, 22  # columns of a narrow terminal for a file's name, and for further answers beside it
OF_EVENTS = ("audacity", "srt")  # formats that hold the events of one input


def show_predictions(
    predictions: Iterable["Prediction"],
    style: str,
    top_k: int,
    all_probs: bool,
    extra: Sequence[str] = (),
    reads: Sequence[str] = (),
    blank: "Prediction | None" = None,
) -> int:
    """Return the exit code, 3 if any input was bad; predictions are printed as they come.

    extra: columns of EXTRA_WIDTH. reads: the modalities whose formats are listed after files of an unknown format.
    blank: an answer without an input; CSV and TSV of no answers have its columns.
    """
    if style == "auto":
        style = "table" if terminal.is_terminal() else "jsonl"
    table = AnswerTable(extra)
    if style == "table":
        emit(table.row("file", {name: name for name in extra}, "label", "prob", ["others"]))
    header, errors = True, _Errors()
    for prediction in predictions:
        errors.tell(prediction.error)
        if style == "table":
            emit(_table_row(table, prediction, top_k, all_probs))
        elif style == "jsonl":
            emit_json(prediction.to_dict(top_k, all_probs=all_probs))
        else:
            cells = _cells(prediction, top_k, all_probs, extra)
            emit((_csv_row(cells.keys(), style) if header else "") + _csv_row(cells.values(), style))
            header = False
    if header and blank is not None and style in ("csv", "tsv"):
        emit(_csv_row(_cells(blank, top_k, all_probs, extra).keys(), style))
    return errors.end(reads)


def show_events(
    events: Iterable["TimedEvent"], style: str, reads: Sequence[str] = (), repeated: Sequence[str] = ()
) -> int:
    """Return the exit code, 3 if any input was bad; events are printed as they end. Raises UsageError, see OF_EVENTS.

    repeated: columns of a manifest that CSV and TSV have too.
    """
    if style == "auto":
        style = "table" if terminal.is_terminal() else "jsonl"
    columns = ("path", *repeated, "start_s", "end_s", "label", "prob", "error")
    if style == "table":
        emit(_event_row("file", "start", "end", "label", "prob"))
    elif style in ("csv", "tsv"):
        emit(_csv_row(columns, style))
    errors, number, only = _Errors(), 0, None
    for number, event in enumerate(events, start=1):
        errors.tell(event.error)
        only = event.path if only is None else only
        if style in OF_EVENTS and event.path != only:
            raise several_inputs(style, only, event.path)
        if style == "jsonl":
            emit_json(event.to_dict())
        elif style in ("csv", "tsv"):
            facts = event.to_dict()
            emit(_csv_row([facts.get(column, "") for column in columns], style))
        elif event.error is None:
            emit(_event_text(event, style, number))
        elif style == "table":
            emit(f"{show_text(event.path)}  (not read)\n")
    return errors.end(reads)


def several_inputs(style: str, first: str, second: str) -> UsageError:
    """Return the error of two inputs for a format of OF_EVENTS."""
    fault = f"--format {style} holds the events of one input, found {show_path(first)} and {show_path(second)}"
    return UsageError(fault, "pass one input, or --format csv")


def _event_text(event: "TimedEvent", style: str, number: int) -> str:
    """Return an event as a line of a table or of Audacity's labels, or as a subtitle of SRT."""
    label = show_text(event.label)
    if style == "audacity":
        return f"{event.start_s:.6f}\t{event.end_s:.6f}\t{label}\n"
    if style == "srt":
        begin, end = (_time(seconds, 3).replace(".", ",") for seconds in (event.start_s, event.end_s))
        return f"{number}\n{begin} --> {end}\n{label}\n\n"
    begin, end = (_time(seconds, 2).removeprefix("00:") for seconds in (event.start_s, event.end_s))
    return _event_row(show_text(event.path), begin, end, label, f"{event.prob:.3f}")


def _event_row(file: str, start: str, end: str, label: str, prob: str) -> str:
    """Return a row of a table of events, which fits 80 columns of a terminal."""
    width = FILE_WIDTH
    if terminal.is_terminal():
        width = max(LEAST_FILE, min(FILE_WIDTH, terminal_width() - LABEL_WIDTH - 31))
        file, label = cut(file, width), cut(label, LABEL_WIDTH)
    return f"{padded(file, width)} {start:>10} {end:>10}  {padded(label, LABEL_WIDTH)} {prob:>6}\n"


def _time(seconds: float, digits: int) -> str:
    """Return seconds as 01:02:03.456."""
    units = round(seconds * 10**digits)
    whole, rest = divmod(units, 10**digits)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{rest:0{digits}d}"


class _Errors:
    """Prints the errors of inputs as they come."""

    def __init__(self) -> None:
        self.exit_code, self.is_unknown = 0, False

    def tell(self, error: str | None) -> None:
        """Print the error of an input, if it has one."""
        from perceiver_cli.preprocess.detection import UNKNOWN

        if error is not None:
            self.exit_code = EXIT_DATA
            self.is_unknown |= error.endswith(UNKNOWN)
            complain(error)

    def end(self, reads: Sequence[str]) -> int:
        """Return the exit code; first print the formats of `reads` if a file is of an unknown one."""
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
    """Yield predictions of `count` named inputs; print how files make one input if each was answered alone."""
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


class AnswerTable:
    """The widths of a table of answers: names of files and further answers get what a narrow terminal leaves.

    extra: columns of EXTRA_WIDTH.
    """

    def __init__(self, extra: Sequence[str]) -> None:
        self.extra = extra
        self.width = terminal_width() if terminal.is_terminal() else None
        others = sum(EXTRA_WIDTH.get(name, OTHER_WIDTH) + 1 for name in extra) + LABEL_WIDTH + 10 + ROOM
        self.file = FILE_WIDTH if self.width is None else max(LEAST_FILE, min(FILE_WIDTH, self.width - others))

    def row(
        self, file: str, extra: Mapping[str, str], label: str, prob: str, others: Sequence[str], *, whole: bool = False
    ) -> str:
        """Return a row. others: as many as fit, or all of them in further lines if `whole`."""
        from rich.cells import cell_len

        cells = [padded(self._cut(file, self.file), self.file)]
        cells += [padded(show_text(cell), EXTRA_WIDTH.get(name, OTHER_WIDTH)) for name, cell in extra.items()]
        row = f"{' '.join([*cells, padded(self._cut(label, LABEL_WIDTH), LABEL_WIDTH)])} {prob:>6}  "
        lines, indent = [row], " " * cell_len(row)
        for number, other in enumerate(others):
            text = other if number == len(others) - 1 else f"{other}, "
            if self.width is not None and cell_len(lines[-1] + text.rstrip()) > self.width and lines[-1] != indent:
                if not whole:
                    break
                lines.append(indent)
            lines[-1] += text
        return "".join(f"{line.rstrip(', ')}\n" for line in lines)

    def _cut(self, text: str, width: int) -> str:
        return text if self.width is None else cut(text, width)


def _table_row(table: AnswerTable, prediction: "Prediction", top_k: int, all_probs: bool) -> str:
    shown = show_text(prediction.path)
    if prediction.error is not None:
        return f"{shown}  (not read)\n"
    (best, prob), *others = prediction.top(len(prediction.classes) if all_probs else top_k)
    rest = [f"{show_text(name)} {p:.3f}" for name, p in others]
    label = prediction.label if prediction.label == best else f"{prediction.label} ({best})"
    return table.row(shown, _extra(prediction, table.extra), show_text(label), f"{prob:.3f}", rest, whole=all_probs)
