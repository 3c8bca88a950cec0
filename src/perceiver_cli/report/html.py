"""The page of an evaluation: report.html, one file that opens from disk, loads nothing and can be sent to anybody.

Its size is bounded for any evaluation: media, classes and pairs are shown up to a limit, which the page states. All
text comes from strangers: the template escapes it, and unprintable characters are C-escaped.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import numpy as np
import soundfile
from PIL import Image

from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader
from perceiver_cli.data.survey import in_words
from perceiver_cli.errors import DataError, IntegrityError, counted
from perceiver_cli.files import MAX_SHOWN, perceiver_command, printable, write_text
from perceiver_cli.inference.evaluation import Report
from perceiver_cli.inference.guidance import advice_on
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.inference.statistics import share_interval
from perceiver_cli.model.describe import describe
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.report import charts, pictures
from perceiver_cli.report.model_card import versions
from perceiver_cli.run_folder import CONFIG_FILE, PREDICTIONS_FILE, SUMMARY_FILE, read_log, run_of

REPORT_FILE = "report.html"
PAIRS, EACH = 8, 4  # pairs of classes shown with media, and examples of each
HARDEST = 16  # examples shown with several labels an example, where there are no pairs
MEDIA_BYTES = 12 << 20  # all pictures and sounds, as text
CELLS = 30  # classes up to which the confusion matrix is a table of numbers; a larger one is a picture
MAX_MATRIX = 1000  # classes up to which the confusion matrix is shown
MAX_ROWS = 200  # classes in the table
LISTED = 20  # names or files in a sentence
# `side` of `pictures.sample`, in pixels
SIDES = {"image": 200, "points": 240, "audio": 208, "video": 208, "series": 208}
JPEG_QUALITY = 85
MOST_DRAWN = 1e9  # the largest number of a log in a diagram, where pixels still differ


@dataclass(frozen=True)
class Medium:
    """One example to look at."""

    name: str
    detail: str  # the model's answer
    pictures: tuple[tuple[str, str, tuple[int, int]], ...] = ()  # data URI, modality and size of each
    sound: str = ""  # data URI
    words: str = ""  # a text, cells, or the reason if there is no picture

    @property
    def size(self) -> int:
        """Characters of its media in the page."""
        return len(self.words) + len(self.sound) + sum(len(uri) for uri, _, _ in self.pictures)


def page(report: Report, predictor: Predictor, data: str, command: Sequence[str]) -> str:
    """Return the page as HTML. data: the evaluated path, as the user named it; command: makes the page again."""
    gallery = Gallery(predictor.reader)
    config = predictor.path.parent / CONFIG_FILE
    again = ["perceiver", "train", "DATA", "--config", str(config), "-o", "ANOTHER"]
    log, why_no_log = _log(predictor)
    return template("report.html").render(
        title=f"{predictor.info.config.name} on {os.path.basename(os.path.normpath(data))}",
        report=report,
        pairs=_pairs(report, gallery),
        hardest=_hardest(report, gallery),
        gallery=gallery,
        reads=in_words(predictor.reader.specs, report.examples, predictor.reader.limits),
        rows=_rows(report),
        by=sorted(report.by_value.items(), key=lambda pair: (pair[1]["accuracy"], pair[0]))[:MAX_ROWS]
        if report.by is not None
        else [],
        matrix=_matrix(report),
        reliability=charts.reliability_diagram(report.bins),
        curves=_curves(log, several=report.confusion is None),
        why_higher=_why_higher(log, several=report.confusion is None),
        fitted=_fitted(report, predictor),
        why_no_curves=why_no_log,
        data=data,
        path=str(predictor.path),
        info=predictor.info,
        config=predictor.info.config,
        model=describe(str(predictor.path)),
        compute=predictor.compute,
        versions=versions(),
        advice=advice_on(report, predictor, data, has_report=True),
        command=perceiver_command(command),
        training=perceiver_command(again) if config.is_file() else "",
        listed=LISTED,
        cells=CELLS,
    )


@lru_cache(maxsize=2)
def template(name: str) -> jinja2.Template:
    """Return a page of this folder, which escapes the text that it is given."""
    loader = jinja2.FunctionLoader(lambda file: (resources.files("perceiver_cli.report") / file).read_text("utf-8"))
    world = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader
    )
    world.globals |= {"percent": percent, "plain": "{:.3f}".format}
    world.filters |= {"shown": shown, "counted": counted, "percent": percent}
    world.tests["drawable"] = _is_drawable
    return world.get_template(name)


def shown(text: str) -> str:
    """Return text on one line, unprintable characters C-escaped, cut in the middle if it is long."""
    text = printable(text, keep="").replace("\n", "\\n")
    half = MAX_SHOWN // 2
    return text if len(text) <= MAX_SHOWN else f"{text[:half]}…{text[-half:]}"


def percent(share: float) -> str:
    """Return a share as a percentage: 8.9 %, 100 %. No line breaks before its sign."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%".replace("100.0", "100")


def _rows(report: Report) -> list[dict[str, Any]]:
    """Return a row for each class with its interval, or the worst MAX_ROWS classes, worst first."""
    key = "average_precision" if report.confusion is None else "accuracy"
    rows: list[dict[str, Any]] = [{"name": name, "figure": row[key], **row} for name, row in report.per_class.items()]
    if len(rows) > MAX_ROWS:
        rows.sort(key=lambda row: (row["figure"] is None, row["figure"]))
    rows = rows[:MAX_ROWS]
    return [{**row, "ends": share_interval(row["correct"], row["count"]) if row.get("count") else None} for row in rows]


def _matrix(report: Report) -> dict[str, Any] | None:
    """Return the confusion matrix as rows of (count, share of the row) or as a picture of shares; None if too large."""
    if report.confusion is None or len(report.classes) > MAX_MATRIX:
        return None
    counts = np.array(report.confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    if len(counts) <= CELLS:
        cells = [list(zip(*row, strict=True)) for row in zip(counts.tolist(), shares.tolist(), strict=True)]
        return {"rows": list(zip(report.classes, cells, strict=True)), "picture": ""}
    picture = Image.fromarray(charts.tints_of(shares), "RGBA")
    return {"rows": [], "picture": _data_uri(_encoded(picture, "PNG", optimize=True), "image/png")}


class Gallery:
    """Draws examples until their media fill MEDIA_BYTES; counts the examples shown and left out."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.room = MEDIA_BYTES
        self.num_shown = self.num_left_out = 0
        self.points = {name: layout.prepared_shape[0] for name, layout in reader.layouts.items()}

    def show(self, example: Example, detail: str) -> Medium | None:
        """Return an example to look at, or None if its media do not fit."""
        medium = self.beside(example, detail)
        self.num_shown += medium is not None
        self.num_left_out += medium is None
        return medium

    def beside(self, example: Example, detail: str) -> Medium | None:
        """Return an example as `show` does, but do not count it."""
        medium = self._medium(example, detail)
        if medium.size > self.room:
            return None
        self.room -= medium.size
        return medium

    def _medium(self, example: Example, detail: str) -> Medium:
        reader = self.reader
        try:
            decoded = reader.decode(example)
            starts = reader.starts(decoded)
            drawn, sound, words = [], "", list[str]()
            for name in sorted(decoded.arrays.keys() | decoded.long.keys(), key=lambda name: name == "audio"):
                spec, start_s = reader.specs[name], 0.0
                raw = decoded.arrays.get(name)
                if raw is not None and (parts := modality(name).parts(raw, spec)) is not None:
                    words.append(" ".join(parts.names))
                if spec.modality not in SIDES:
                    continue
                if name in reader.timed:
                    raw, start_s = reader.clip(name, decoded, starts[len(starts) // 2])
                else:
                    raw = decoded.arrays[name]
                    raw = raw[: self.points[name]] if isinstance(spec, PointsSpec) else raw
                picture = pictures.sample(raw, spec, side=SIDES[spec.modality], start_s=start_s)
                drawn.append((_picture(picture), spec.modality, picture.size))
                if isinstance(spec, AudioSpec):
                    sound = _sound(raw, spec)
        except DataError as error:  # the file changed since it was evaluated
            return Medium(example.id, detail, words=str(error))
        said = "; ".join(words) if words or drawn else "a prepared array: there is no medium to show"
        return Medium(example.id, detail, tuple(drawn), sound, said)


def _picture(picture: pictures.Picture) -> str:
    """Return a data URI in the smaller format: PNG for drawings, JPEG for photographs."""
    png, jpeg = _encoded(picture, "PNG", optimize=True), _encoded(picture, "JPEG", quality=JPEG_QUALITY)
    return _data_uri(png, "image/png") if len(png) <= len(jpeg) else _data_uri(jpeg, "image/jpeg")


def _encoded(picture: pictures.Picture, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _sound(samples: Array, spec: AudioSpec) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), spec.rate_hz, format="FLAC", subtype="PCM_16")
    return _data_uri(buffer.getvalue(), "audio/flac")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _pairs(report: Report, gallery: Gallery) -> list[dict[str, Any]]:
    """Return the pairs of classes that are most often confused, each with its most probable mistakes."""
    if report.confusion is None:
        return []
    mistakes: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for k, record in enumerate(report.records):
        if not record["correct"]:
            mistakes[record["truth"], record["label"]].append((-record["prob"], k))
    pairs, per_class, right = [], report.per_class, _surest(report)
    for (true, predicted), ranked in sorted(mistakes.items(), key=lambda item: -len(item[1]))[:PAIRS]:
        media = [gallery.show(report.examples[k], f"{percent(-prob)} sure") for prob, k in sorted(ranked)[:EACH]]
        known = [
            gallery.beside(report.examples[place], f"right: {shown(name)}, {percent(prob)} sure")
            for name in (true, predicted)
            if name in right
            for prob, place in [right[name]]
        ]
        pairs.append(
            {
                "true": true, "predicted": predicted, "count": len(ranked), "total": per_class[true]["count"],
                "media": media, "right": [medium for medium in known if medium is not None],
            }
        )  # fmt: skip
    return pairs


def _surest(report: Report) -> dict[str, tuple[float, int]]:
    """Return by class the probability and place of its most probable right answer."""
    best: dict[str, tuple[float, int]] = {}
    for place, record in enumerate(report.records):
        if record["correct"] and record["prob"] > best.get(record["truth"], (0.0, 0))[0]:
            best[record["truth"]] = record["prob"], place
    return best


def _hardest(report: Report, gallery: Gallery) -> list[Medium | None]:
    """Return the examples of the highest loss if examples have several labels."""
    if report.confusion is not None:
        return []
    media = []
    for k in sorted(range(len(report.records)), key=lambda k: -report.records[k]["loss"])[:HARDEST]:
        record = report.records[k]
        labels = ", ".join(map(shown, record["truths"])) or "nothing"
        answer = f"first answer {shown(record['label'])}, {percent(record['prob'])}"
        media.append(gallery.show(report.examples[k], f"is {labels}; {answer}"))
    return media


def _log(predictor: Predictor) -> tuple[list[dict[str, Any]], str]:
    """Return the evaluations of the model's run, and the reason if there are none or too few."""
    if run_of(predictor.path) is None:
        return [], "The model file lies outside its run, which holds the training log."
    try:
        log = read_log(predictor.path.parent)
    except IntegrityError as error:
        return [], str(error)
    return log, "" if len(log) > 1 else "The run has no log of several evaluations."


def _fitted(report: Report, predictor: Predictor) -> str:
    """Return a sentence if the temperature was certainly fitted on other examples; a note covers the same ones."""
    by_training = predictor.info.metrics.get("temperature") == report.temperature
    return (
        "It was fitted on the validation examples of the run, not on these."
        if by_training and report.split == "test"
        else ""
    )


def _why_higher(log: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """Return a sentence if the last training loss lies above the validation loss and both are drawn."""
    last = log[-1] if log else {}
    train, val = last.get("train_loss"), last.get("val_loss")
    if several or not (_is_drawable(train) and _is_drawable(val) and train > val):
        return ""
    return (
        "The training loss lies above the validation loss. This is no fault: it is the mean since the previous "
        "evaluation, and the recipe may make training examples harder (crops, noise, dropout, MixUp)."
    )


def _curves(log: Sequence[Mapping[str, Any]], *, several: bool) -> dict[str, str]:
    """Return by name the SVGs of loss and of accuracy (and mAP) over the epochs of a run."""

    def points(key: str) -> list[charts.Point]:
        rows = [(record.get("epoch"), record.get(key)) for record in log]
        return [(float(x), float(y)) for x, y in rows if _is_drawable(x) and _is_drawable(y)]

    # With several labels the training loss is not drawn: it is a sum over classes, the validation loss a mean.
    losses = {"validation": points("val_loss"), "training": [] if several else points("train_loss")}
    shares = {"accuracy, validation": points("val_accuracy"), "mAP, validation": points("val_mAP")}
    drawn = {
        "Loss while training": charts.curves("Loss while training", losses),
        "Accuracy while training": charts.curves("Accuracy while training", shares, most=1.0),
    }
    return {name: svg for name, svg in drawn.items() if svg}


def _is_drawable(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < MOST_DRAWN  # false for NaN


def save_report(report: Report, folder: Path) -> None:
    """Write metrics.json, predictions.jsonl and, with one label an example, confusion.png into `folder`."""
    write_text(folder / SUMMARY_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    write_text(folder / PREDICTIONS_FILE, "".join(json.dumps(record) + "\n" for record in report.records))
    if report.confusion is not None:
        charts.draw_confusion(report, folder / "confusion.png")
