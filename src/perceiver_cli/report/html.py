"""The page of an evaluation: report.html, one file that opens from disk, loads nothing and can be sent to anybody.

Figures with their intervals, classes, confusions with the media themselves, calibration, the curves of the run, facts,
and the command that makes it again. Its size is bounded whatever was evaluated: media, classes and pairs are shown up
to a number, and the page says so. All text in it is data from strangers: escaped by the template, C-escaped where it
cannot be shown.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import numpy as np
import soundfile
import torch
from PIL import Image

from perceiver_cli.data.examples import Example
from perceiver_cli.data.loader import Reader
from perceiver_cli.errors import DataError, IntegrityError, counted
from perceiver_cli.files import MAX_SHOWN, printable, show_command, write_text
from perceiver_cli.inference.evaluation import Report
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.inference.statistics import share_interval
from perceiver_cli.model.describe import describe
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.video import VideoSpec
from perceiver_cli.report import charts, pictures
from perceiver_cli.run_folder import MODEL_FILE, read_log

REPORT_FILE = "report.html"
PAIRS, EACH = 8, 4  # pairs of classes that are shown with media, and examples of each
HARDEST = 16  # examples shown where there are several labels each, and so no pairs
MEDIA_BYTES = 12 << 20  # of all pictures and sounds, as text
CELLS = 30  # classes up to which the confusion matrix is a table with numbers; beyond it is a picture
MAX_MATRIX = 1000  # classes up to which it is shown at all
MAX_ROWS = 200  # classes in the table
LISTED = 20  # names or files in a sentence
SIDES = {"image": 200, "points": 240, "audio": 208, "video": 208}  # pixels of a picture, as `draw.sample` takes them
JPEG_QUALITY = 85
MOST_DRAWN = 1e9  # of a figure in a log: pixels can still be told apart
DIAGONAL, OFF_DIAGONAL = (27, 108, 168), (200, 72, 48)  # colours of a matrix that is a picture


@dataclass(frozen=True)
class Medium:
    """One example to look at. pictures: data URI, modality and size of each; sound: a data URI; words: what is missing.

    caption, detail: what the model said of it.
    """

    name: str
    detail: str
    pictures: tuple[tuple[str, str, tuple[int, int]], ...] = ()
    sound: str = ""
    words: str = ""

    @property
    def size(self) -> int:
        """Characters that it takes in the page."""
        return len(self.sound) + sum(len(uri) for uri, _, _ in self.pictures)


@dataclass(frozen=True)
class Pair:
    """Examples of one class that were taken for another: how many, of how many, and some of them."""

    true: str
    predicted: str
    count: int
    total: int
    media: tuple[Medium, ...]


def write_report(report: Report, predictor: Predictor, data: str, command: Sequence[str], folder: Path) -> None:
    """Write report.html into `folder`. data, command: as `page` takes them. Raises ResourceError."""
    write_text(folder / REPORT_FILE, page(report, predictor, data, command))


def page(report: Report, predictor: Predictor, data: str, command: Sequence[str]) -> str:
    """Return the page as HTML. data: what was evaluated, as it was named; command: the words that make it again."""
    gallery = _Gallery(predictor.reader)
    run = predictor.path.parent
    log, why_no_log = _log(predictor)
    config = run / "config.toml"
    return _template().render(
        title=f"{predictor.info.config.name} on {os.path.basename(os.path.normpath(data))}",
        report=report,
        headline=list(_headline(report)),
        majority=_majority(report),
        pairs=_pairs(report, gallery),
        hardest=_hardest(report, gallery),
        gallery=gallery,
        rows=_rows(report),
        never=[]
        if report.confusion is None
        else [n for n, row in report.per_class.items() if row["precision"] is None],
        absent=[] if report.confusion is None else [n for n, row in report.per_class.items() if not row["count"]],
        matrix=_matrix(report),
        reliability=charts.reliability(report.bins),
        curves=_curves(log, several=report.confusion is None),
        why_no_curves=why_no_log,
        facts=_facts(report, predictor, data),
        command=show_command(command),
        training=show_command(["perceiver", "train", "DATA", "--config", str(config), "-o", "ANOTHER"])
        if config.is_file()
        else "",
        listed=LISTED,
        cells=CELLS,
    )


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    world = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    world.filters |= {"shown": shown, "counted": counted, "percent": percent}
    return world.from_string((resources.files("perceiver_cli.report") / "report.html").read_text("utf-8"))


def shown(text: str) -> str:
    """Return text from a stranger on one line, what cannot be shown C-escaped, cut in the middle if it is long."""
    text = printable(text, keep="").replace("\n", "\\n")
    half = MAX_SHOWN // 2
    return text if len(text) <= MAX_SHOWN else f"{text[:half]}…{text[-half:]}"


def percent(share: float) -> str:
    """Return a share as a percentage: 8.9 %, 100 %."""
    return f"{100 * share:.1f} %".replace("100.0", "100")


# ---------------------------------------------------------------- figures


def _headline(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, figure, interval and a word of explanation of each headline figure, the most important first."""

    def interval(name: str, style: Any) -> str:
        ends = report.intervals_95.get(name)
        return "" if ends is None else f"{style(ends[0])} to {style(ends[1])}"

    def plain(value: float) -> str:
        return f"{value:.3f}"

    precision = report.mean_average_precision
    if precision is not None:
        yield "mAP", plain(precision), interval("mAP", plain), "mean over classes of the average precision"
    said = "the first answer is one of the labels" if report.confusion is None else "the first answer is right"
    yield "Accuracy", percent(report.accuracy), interval("accuracy", percent), said
    if len(report.classes) > 5:
        yield "Top-5", percent(report.top5), interval("top5", percent), "right among the first five"
    yield "Loss", plain(report.loss), interval("loss", plain), "cross-entropy in nats"
    if report.ece is not None:
        yield "ECE", plain(report.ece), interval("ece", plain), "how far probabilities are from shares that are right"


def _majority(report: Report) -> tuple[str, float] | None:
    """Return the most frequent class, and the accuracy of whoever always answers it."""
    if report.confusion is None:
        return None
    counts = np.array(report.confusion).sum(axis=1)
    return report.classes[int(counts.argmax())], float(counts.max() / counts.sum())


def _rows(report: Report) -> list[dict[str, Any]]:
    """Return a row for each class with its interval, in their order; of more than MAX_ROWS the worst, worst first."""
    key = "average_precision" if report.confusion is None else "accuracy"
    rows: list[dict[str, Any]] = [{"name": name, "figure": row[key], **row} for name, row in report.per_class.items()]
    if len(rows) > MAX_ROWS:
        rows.sort(key=lambda row: (row["figure"] is None, row["figure"]))
    rows = rows[:MAX_ROWS]
    return [{**row, "ends": share_interval(row["correct"], row["count"]) if row.get("count") else None} for row in rows]


def _matrix(report: Report) -> dict[str, Any] | None:
    """Return the confusion matrix: rows of (count, share of the row), or a picture of shares; None if too large."""
    if report.confusion is None or len(report.classes) > MAX_MATRIX:
        return None
    counts = np.array(report.confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    if len(counts) <= CELLS:
        cells = [list(zip(*row, strict=True)) for row in zip(counts.tolist(), shares.tolist(), strict=True)]
        return {"rows": list(zip(report.classes, cells, strict=True)), "picture": ""}
    tints = np.where(np.eye(len(counts), dtype=bool)[..., None], DIAGONAL, OFF_DIAGONAL)
    opacity = (255 * np.sqrt(shares)).round()[..., None]  # that little is seen at all
    picture = Image.fromarray(np.concatenate([tints, opacity], axis=-1).astype(np.uint8), "RGBA")
    return {"rows": [], "picture": _data_uri(_png(picture), "image/png")}


# ---------------------------------------------------------------- media


class _Gallery:
    """Draws examples until all the room for media is taken; counts those shown and those for which there was none."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.room = MEDIA_BYTES
        self.num_shown = self.num_left_out = 0
        self.points = {name: layout.grid[0] for name, layout in reader.layouts.items()}

    def show(self, example: Example, detail: str) -> Medium | None:
        """Return an example to look at, None where there is no room."""
        medium = self._medium(example, detail)
        if medium.size > self.room:
            self.num_left_out += 1
            return None
        self.room -= medium.size
        self.num_shown += 1
        return medium

    def _medium(self, example: Example, detail: str) -> Medium:
        reader = self.reader
        try:
            decoded = reader.decode(example)
            starts = reader.starts(decoded)
            shown, sound = [], ""
            for name in sorted(decoded.arrays.keys() | decoded.long.keys(), key=lambda name: name == "audio"):
                spec, start_s = reader.specs[name], 0.0
                if not isinstance(spec, ImageSpec | AudioSpec | VideoSpec | PointsSpec):
                    continue
                if name in reader.timed:
                    raw, start_s = reader.clip(name, decoded, starts[len(starts) // 2])
                else:
                    raw = decoded.arrays[name]
                    raw = raw[: self.points[name]] if isinstance(spec, PointsSpec) else raw
                picture = pictures.sample(raw, spec, side=SIDES[spec.modality], start_s=start_s)
                shown.append((_picture(picture), spec.modality, picture.size))
                if isinstance(spec, AudioSpec):
                    sound = _sound(raw, spec)
        except DataError as error:  # the file changed since it was evaluated
            return Medium(example.id, detail, words=str(error))
        words = "" if shown else "a prepared array: there is no medium to show"
        return Medium(example.id, detail, tuple(shown), sound, words)


def _picture(picture: pictures.Picture) -> str:
    """Return a data URI, of the smaller of PNG and JPEG: drawings are the one, photographs the other."""
    png, jpeg = _png(picture), io.BytesIO()
    picture.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    if len(png) <= len(jpeg.getvalue()):
        return _data_uri(png, "image/png")
    return _data_uri(jpeg.getvalue(), "image/jpeg")


def _png(picture: pictures.Picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _sound(samples: Array, spec: AudioSpec) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), spec.rate_hz, format="FLAC", subtype="PCM_16")
    return _data_uri(buffer.getvalue(), "audio/flac")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _pairs(report: Report, gallery: _Gallery) -> list[Pair]:
    """Return the pairs of classes that are most often confused, with the surest of their mistakes first."""
    if report.confusion is None:
        return []
    mistakes: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for k, record in enumerate(report.records):
        if not record["correct"]:
            mistakes[record["label"], record["prediction"]].append((-record["prob"], k))
    most = sorted(mistakes.items(), key=lambda item: -len(item[1]))[:PAIRS]
    totals = {name: int(row["count"] or 0) for name, row in report.per_class.items()}
    pairs = []
    for (true, predicted), some in most:
        media = (gallery.show(report.examples[k], f"{percent(-prob)} sure") for prob, k in sorted(some)[:EACH])
        pairs.append(Pair(true, predicted, len(some), totals[true], tuple(one for one in media if one is not None)))
    return pairs


def _hardest(report: Report, gallery: _Gallery) -> list[Medium]:
    """Return, with several labels an example, those of the highest loss."""
    if report.confusion is not None:
        return []
    order = sorted(range(len(report.records)), key=lambda k: -report.records[k]["loss"])[:HARDEST]
    media = []
    for k in order:
        record = report.records[k]
        labels = ", ".join(map(shown, record["labels"])) or "nothing"
        medium = gallery.show(
            report.examples[k], f"is {labels}; first answer {shown(record['prediction'])}, {percent(record['prob'])}"
        )
        media += [] if medium is None else [medium]
    return media


# ---------------------------------------------------------------- the run and its facts


def _log(predictor: Predictor) -> tuple[list[dict[str, Any]], str]:
    """Return the evaluations of the run whose model it is; or none, and why."""
    if predictor.path.name != MODEL_FILE:
        return [], "The model file lies outside its run, which keeps the log of its training."
    try:
        log = read_log(predictor.path.parent)
    except IntegrityError as error:
        return [], str(error)
    return log, "" if len(log) > 1 else "There is no log of several evaluations beside the model."


def _curves(log: Sequence[Mapping[str, Any]], *, several: bool) -> dict[str, str]:
    """Return, by name, the SVG of loss and of accuracy (and mAP) over the epochs of a run, those that can be drawn.

    With several labels an example the training loss is a sum over classes, and is not drawn beside a mean.
    """

    def points(key: str) -> list[charts.Point]:
        rows = [(record.get("epoch"), record.get(key)) for record in log]
        return [(float(x), float(y)) for x, y in rows if _is_number(x) and _is_number(y)]

    losses = {"validation": points("val_loss"), "training": [] if several else points("train_loss")}
    shares = {"accuracy, validation": points("val_accuracy"), "mAP, validation": points("val_mAP")}
    drawn = {
        "Loss while training": charts.curves("Loss while training", losses),
        "Accuracy while training": charts.curves("Accuracy while training", shares, most=1.0),
    }
    return {name: svg for name, svg in drawn.items() if svg}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < MOST_DRAWN  # nor NaN


def _facts(report: Report, predictor: Predictor, data: str) -> dict[str, list[tuple[str, str]]]:
    """Return what there is to know of data, model and measurement: by heading, names and values."""
    model, info = describe(str(predictor.path)), predictor.info
    config = info.config
    inputs = ", ".join(
        f"{name}: {' x '.join(map(str, entry['grid']))}, {entry['channels']} channels with positions"
        for name, entry in model["inputs"].items()
    )
    names = {"val_accuracy": "accuracy", "val_loss": "loss", "val_mAP": "mAP", "epoch": "epoch"}
    kept = (f"{names[key]} {value:.4g}" for key, value in info.metrics.items() if key in names and _is_number(value))
    length = f"{config.train.max_time_s:g} s" if config.train.max_time_s else ""
    return {
        "Data": [
            ("data", data),
            ("split", report.split + (", as the run held it out" if report.split_from == "run" else "")),
            ("examples", f"{report.num_examples:,} of {', '.join(report.modalities)}"),
            (
                "classes",
                f"{len(report.classes):,}, {'several labels' if report.confusion is None else 'one label'} each",
            ),
            ("unreadable", f"{len(report.bad):,}"),
            ("of unknown classes", f"{report.strangers:,}"),
        ],
        "Model": [
            ("name", config.name),
            ("file", str(predictor.path)),
            ("parameters", f"{model['parameters']:,}"),
            ("FLOPs a forward", f"{model['flops']:,}"),
            ("inputs", inputs),
            ("latents", f"{config.model.num_latents} x {config.model.latent_channels}"),
            ("schedule", config.model.schedule),
            ("temperature", f"{report.temperature:.4g}" + ("" if info.calibration else " (not calibrated)")),
        ],
        "Training": [
            ("steps", f"{info.step:,}"),
            *([("planned for", length)] if length else []),
            ("batch size", str(config.train.batch_size * config.train.accumulate)),
            ("optimiser", f"{config.train.optimizer}, peak learning rate {config.train.lr:g}"),
            ("seed", str(config.train.seed)),
            ("when it was kept", ", ".join(kept) or "not evaluated"),
            ("fingerprint of its data", info.data_fingerprint or "none"),
        ],
        "Measured with": [
            ("perceiver-cli", version("perceiver-cli")),
            ("torch", torch.__version__),
            ("Python", platform.python_version()),
            ("device", f"{predictor.compute.device}, {predictor.compute.precision}"),
        ],
    }


def save_report(report: Report, folder: Path) -> None:
    """Write metrics.json, predictions.jsonl and, where each example has one label, confusion.png into `folder`."""
    write_text(folder / "metrics.json", json.dumps(report.to_dict(), indent=1) + "\n")
    write_text(folder / "predictions.jsonl", "".join(json.dumps(record) + "\n" for record in report.records))
    if report.confusion is not None:
        with charts.plain_text():
            charts.save_figure(charts.confusion(report), folder / "confusion.png")
