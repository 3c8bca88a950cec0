"""The page of an evaluation: what it says, one file, all of it escaped, never large, and as a browser sees it."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from PIL import Image

from perceiver_cli.data.examples import Example
from perceiver_cli.inference.evaluation import Report, evaluate
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.inference.statistics import BINS, calibration_error, reliability
from perceiver_cli.preprocess.source import Source
from perceiver_cli.report import charts, html as pages
from perceiver_cli.report.html import page, shown
from perceiver_cli.training.trainer import Trainer
from tests.conftest import SMALL, Perceive, write_images

HOSTILE = "<script>alert(1)<b>&amp;\"'"
COMMAND = ("perceiver", "evaluate", "DATA")


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser takes them apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def links(self) -> list[str]:
        names = ("src", "href", "poster", "srcset", "data", "xlink:href")
        return [value for _, name, value in self.attributes if name in names]

    def diagrams(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("svg", "aria-label")]


def made(run: Path, data: Path, **changes: object) -> tuple[Report, str]:
    predictor = Predictor(run)
    report = replace(evaluate(predictor, data), **changes)  # type: ignore[arg-type]
    return report, page(report, predictor, str(data), COMMAND)


@pytest.fixture(scope="module")
def confused(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bars` with a test split in which 4 pictures of left lie among those of right."""
    root = tmp_path_factory.mktemp("confused") / "bars"
    shutil.copytree(bars, root)
    for name in ("000", "001", "002", "003"):
        (root / "test" / "left" / f"{name}.png").rename(root / "test" / "right" / f"moved-{name}.png")
    return root


def test_the_page_agrees_with_the_metrics_and_says_how_to_make_it_again(
    perceive: Perceive, trained: Path, confused: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "out" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    done = perceive("evaluate", confused, "-m", trained, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"wrote 'out/report.html'" in done.stderr
    assert kept.read_text() == "mine"
    html = (tmp_path / "out" / "report.html").read_text()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    low, high = metrics["intervals_95"]["accuracy"]
    assert low < metrics["accuracy"] < high
    found = Page(html)
    figure = f"Accuracy {pages.percent(metrics['accuracy'])} {pages.percent(low)} to {pages.percent(high)}"
    assert " ".join(figure.split()) in found.text
    assert metrics["confusion"][2][0] >= 3
    assert f"right taken for left: {metrics['confusion'][2][0]} of 14" in found.text
    assert "test/right/moved-00" in found.text
    assert all(name in found.text for name in ("Loss while training", "Accuracy while training", "probability"))
    assert f"the ECE, {metrics['ece']:.4f}" in found.text
    for each in metrics["min_probs"]:
        row = f"{each['min_prob']:.3f} {pages.percent(each['answered'])} {pages.percent(each['accuracy'])}"
        assert " ".join(row.split()) in found.text
    assert metrics["min_probs"]
    assert b"\npredict --min-prob  answered  accuracy\n" in done.stdout

    (*advice, again, train) = re.findall(r"<pre>(.*?)</pre>", html)
    assert all(command.startswith("perceiver ") for command in advice)
    words = shlex.split(again.replace("&#39;", "'"))
    assert words[:2] == ["perceiver", "evaluate"]
    assert train.startswith("perceiver train DATA --config")
    assert perceive(*words[1:], cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "report.html").read_text() == html


def test_the_page_says_what_to_do_next(trained: Path, confused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(trained)
    report = evaluate(predictor, confused)
    never = report.per_class | {"left": report.per_class["left"] | {"precision": None}}
    uneven = replace(report.facts, counts={"left": 1, "right": 9})
    monkeypatch.setattr(Report, "per_class", property(lambda _: never))
    html = page(replace(report, facts=uneven), predictor, str(confused), COMMAND)
    command = re.findall(r"<pre>(.*?)</pre>", html)[0]
    assert command.startswith("perceiver train ")
    assert command.endswith("--set data.class_weight_power=0.5")
    assert "never answered" in Page(html).text


def test_nothing_in_the_page_comes_from_elsewhere(trained: Path, confused: Path) -> None:
    html = made(trained, confused)[1]
    found = Page(html)
    assert found.links()
    assert all(link.startswith(("data:", "#")) for link in found.links())  # "#": a mark in the same diagram
    assert not re.search(r"url\((?!#)", html)
    assert not found.tags & {"script", "iframe", "object", "embed", "form", "base"}
    assert ("meta", "http-equiv", "Content-Security-Policy") in found.attributes


def test_names_of_classes_and_files_are_text(tmp_path: Path) -> None:
    data = tmp_path / HOSTILE
    for split in ("train", "test"):
        write_images(data / split, {HOSTILE: 6, "b\u202ed": 6})
    evil = '"><img src=x onerror=alert(1)>.png'
    for path in sorted((data / "test").glob("*/*.png")):
        path.rename(path.with_name(path.stem + evil))
    list(Trainer(data, tmp_path / "run", overrides=[*SMALL, "train.steps=1"]).fit())
    report, html = made(tmp_path / "run", data, notes=(HOSTILE,), bad=((HOSTILE, f"{HOSTILE}: cannot read"),))
    assert report.accuracy < 1  # after one step: there are mistakes to show
    found = Page(html)
    assert found.text.count(HOSTILE) > 5
    assert evil in found.text
    assert "b\\u202ed" in found.text
    assert "\u202e" not in html
    assert "script" not in found.tags
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert all(link.startswith(("data:", "#")) for link in found.links())


def test_names_of_classes_break_after_separators_and_are_whole(trained: Path, confused: Path) -> None:
    """On a phone they broke within a word, and the matrix cut them."""
    report = evaluate(Predictor(trained), confused)
    names = ("wall_socket", "in/out.door", "<b>_x")
    renamed = dict(zip(report.classes, names, strict=True))
    records = tuple(r | {"truth": renamed[r["truth"]], "label": renamed[r["label"]]} for r in report.records)
    html = made(trained, confused, classes=names, records=records)[1]
    for broken in ("wall_<wbr>socket", "in/<wbr>out.<wbr>door", "&lt;b&gt;_<wbr>x"):
        assert html.count(f'<span class="name">{broken}</span>') == 3  # of classes, rows and columns of the matrix
    assert "_<wbr>x taken for wall_<wbr>socket" in html
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "ellipsis" not in style
    assert "overflow: hidden" not in style


def test_shown_text_is_one_line_and_short() -> None:
    assert shown("a\nb\x1b\udcff") == "a\\nb\\x1b\\xff"
    assert shown("plain ascii\n") == "plain ascii\\n"
    assert len(shown("x" * 5000)) == 201


def test_100_000_examples_of_1000_classes_stay_below_20_mb(trained: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = tmp_path / "noise.png"  # as large in the page as a picture can be
    Image.fromarray(rng.integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(noise)
    classes = tuple(f"{k:04d}" + 300 * "<" for k in range(1000))
    true = np.arange(100_000) % 1000
    said = np.where(np.arange(100_000) < 1000, true, (true + 1) % 1000)
    confusion = np.zeros((1000, 1000), int)
    np.add.at(confusion, (true, said), 1)
    records = tuple(
        {"path": "p", "truth": classes[t], "label": classes[s], "prob": 0.5, "correct": t == s, "loss": 1.0}
        for t, s in zip(true.tolist(), said.tolist(), strict=True)
    )
    examples = (Example(300 * "&", {"image": Source(str(noise))}),) * 100_000
    bad = tuple((str(k), 300 * '"') for k in range(5000))
    report = Report(
        classes, 0.001, 0.005, 7.0, tuple(map(tuple, confusion.tolist())), 100_000, records=records, examples=examples,
        bad=bad, ece=0.5, ece_uncalibrated=0.5, modalities=("image",), split="test",
    )  # fmt: skip
    html = page(report, Predictor(trained), "DATA", COMMAND)
    assert len(html.encode()) < 20e6
    text = Page(html).text
    assert "Shown are the 200 worst of 1,000 classes" in text
    assert "a picture without numbers" in text
    assert re.search(r"Shown are 32 examples of 99,000 mistakes", text)
    assert "5,000 files could not be read" in text
    assert "and 4980 more" in text


def test_media_that_would_make_the_page_too_large_are_left_out(
    trained: Path, confused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MEDIA_BYTES", 3000)
    _, html = made(trained, confused)
    assert sum(len(link) for link in Page(html).links() if link.startswith("data:")) < 3100
    assert re.search(r"; \d+ more would have made this file too large", Page(html).text)


def test_sound_and_film_are_drawn_and_can_be_heard(filmed: Path, clips: Path) -> None:
    predictor = Predictor(filmed)
    report = evaluate(predictor, clips)
    assert report.accuracy < 1
    found = Page(page(report, predictor, str(clips), COMMAND))
    sounds = [value for tag, name, value in found.attributes if (tag, name) == ("audio", "src")]
    kinds = [value for tag, name, value in found.attributes if (tag, name) == ("img", "class")]
    framed = found.text.count("right: ")  # beside mistakes
    assert framed
    mistakes = min(len(sounds) - framed, sum(not record["correct"] for record in report.records))
    assert len(sounds) == mistakes + framed == kinds.count("audio") == kinds.count("video")
    samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(sounds[0].partition(",")[2])))
    spec = predictor.info.config.inputs["audio"]
    assert rate_hz == spec.rate_hz  # type: ignore[attr-defined]
    assert len(samples) == round(0.5 * rate_hz)  # the clip that the model heard, not the whole file
    assert 0.2 < np.abs(samples).max() < 0.6


def test_records_without_media_are_said_so(perceive: Perceive, trained: Path, confused: Path, tmp_path: Path) -> None:
    perceive("preprocess", confused, "-m", trained, "--fourier", "-o", tmp_path / "a.tar", "-q")
    done = perceive("evaluate", tmp_path / "a.tar", "-m", trained, "--split", "all", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = Page((tmp_path / "out" / "report.html").read_text())
    assert "a prepared array: there is no medium to show" in found.text
    assert "img" not in found.tags


def test_a_class_never_answered_or_absent_a_moved_model_and_no_mistake(
    trained: Path, bars: Path, confused: Path, tmp_path: Path
) -> None:
    moved = shutil.copy(trained / "model.safetensors", tmp_path / "mine.safetensors")
    report, html = made(moved, bars)
    assert report.accuracy == 1.0
    text = Page(html).text
    assert "Nothing was confused" in text
    assert "outside its run" in text
    assert "perceiver train" not in text
    shutil.copytree(bars / "test" / "right", tmp_path / "data" / "right")
    _, html = made(trained, tmp_path / "data")
    assert "Never answered: left, middle." in Page(html).text
    assert "Without examples here: left, middle." in Page(html).text


def test_a_damaged_log_is_said_so(trained: Path, bars: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for log in (
        '{"step": "<b>"}\n{"step": 2}\n',
        "[[[[}\n",
        '{"step": 1, "epoch": NaN, "val_loss": 1e999}\n' * 3,
        '{"step": 1, "epoch": 1, "val_loss": 1e29}\n{"step": 2, "epoch": -5, "val_loss": -1e29}\n',
    ):
        (run / "metrics.jsonl").write_text(log)
        found = Page(made(run, bars)[1])
        assert "Loss while training" not in found.text
        assert found.diagrams() == ["Reliability diagram"]  # calibration is drawn all the same


def test_diagrams_say_what_they_draw_in_the_colours_of_the_page(trained: Path, bars: Path) -> None:
    report, html = made(trained, bars)
    assert Page(html).diagrams() == ["Reliability diagram", "Loss while training", "Accuracy while training"]
    svg = charts.reliability_diagram(report.bins)
    ElementTree.fromstring(svg)
    full = [one for one in report.bins if one is not None]
    titles = re.findall(r"<title>(\S+) of 30: mean probability (\S+), (\S+) of them right</title>", svg)
    assert [(int(count), float(right)) for count, _, right in titles] == [(b.count, round(b.correct, 3)) for b in full]
    assert "share that is right" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg.replace("#ffffff", ""))  # light or dark, as the page is
    assert "var(--one)" in svg
    assert "<style" not in svg  # it would be the whole page's
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', html))
    assert used
    assert used <= set(re.findall(r' id="(\w+)"', html))
    assert svg == charts.reliability_diagram(report.bins)
    points = [(float(k), abs(np.sin(k))) for k in range(100_000)]
    assert len(charts.curves("many", {"a": points})) < 40_000
    assert charts.curves("none", {"a": [(0.0, 1.0)], "b": []}) == ""
    assert charts.reliability_diagram(()) == ""


def test_several_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "x", {"a": 30, "b": 30})
    lines = ["path,labels,split"]
    for k in range(30):
        split = "test" if k % 3 == 0 else "train"
        lines += [f"x/a/{k:03d}.png,top;both,{split}", f"x/b/{k:03d}.png,{'both' if k % 2 else ''},{split}"]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    list(Trainer(tmp_path / "m.csv", tmp_path / "run", overrides=[*SMALL, "train.epochs=4"]).fit())
    report, html = made(tmp_path / "run", tmp_path / "m.csv")
    text = Page(html).text
    low, high = report.intervals_95["mAP"]
    precision = report.mean_average_precision
    assert precision is not None
    assert low <= precision <= high
    assert f"mAP {precision:.3f} {low:.3f} to {high:.3f}" in text
    assert "Hardest examples" in text
    assert "there are no pairs of classes" in text
    assert "is top, both;" in text or "is both, top;" in text
    assert "Confusion matrix" not in text


def test_reliability_is_what_the_ece_sums_up() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    correct = rng.random(500) < confidence**2
    bins = reliability(confidence, correct)
    assert len(bins) == BINS
    assert sum(part.count for part in bins if part) == 500
    gaps = [part.count * abs(part.correct - part.confidence) for part in bins if part]
    assert sum(gaps) / 500 == pytest.approx(calibration_error(confidence, correct))
    assert reliability(np.array([0.5, 0.51]), np.array([1, 0])).count(None) == BINS - 1
    assert reliability(np.array([np.nan]), np.array([1])) == ()


# ---------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def complaints(html: Path, profile: Path) -> list[str]:
    """Return what Chromium's console says of a page: errors, and requests that its policy forbids."""
    assert CHROMIUM is not None
    flags = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "dump-dom")
    flags += ("enable-logging=stderr", "virtual-time-budget=3000", f"user-data-dir={profile}")
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), html.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert b"<h1>" in done.stdout
    return [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not opened in a browser")
@pytest.mark.skipif(sys.platform != "linux", reason="Chromium is run as on Linux")
def test_chromium_has_no_complaint_and_asks_for_nothing(filmed: Path, clips: Path, tmp_path: Path) -> None:
    _, html = made(filmed, clips)
    (tmp_path / "report.html").write_text(html)
    assert complaints(tmp_path / "report.html", tmp_path / "profile") == []
    # It would be noticed: the policy in the page forbids every request, and the console says so.
    spoilt = html.replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>')
    (tmp_path / "spoilt.html").write_text(spoilt)
    (complaint,) = complaints(tmp_path / "spoilt.html", tmp_path / "profile")
    assert "127.0.0.1:9" in complaint
