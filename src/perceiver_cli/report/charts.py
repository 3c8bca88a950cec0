"""Diagrams by matplotlib: curves and reliability as SVG for a page, the confusion matrix, and plots in files.

An SVG of a page takes the page's font and, by name, the light or dark colours of the style sheet in report.html.
pyplot is not used: it keeps every figure. Only functions import matplotlib, because it is slow to import.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.errors import counted
from perceiver_cli.files import atomic_write, check_plot, show_text
from perceiver_cli.inference.statistics import BINS, Bin

if TYPE_CHECKING:  # `compare` works without torch
    from perceiver_cli.inference.evaluation import Report

SIZE = 4.9, 3.1  # a diagram in a page, in inches of 72 SVG units
DOT_AREA = 90  # of the largest dot of a reliability diagram, in square points
NAMED, COUNTED = 60, 25  # classes up to which a matrix has names, and counts in its cells
LONGEST_NAME = 28  # letters of a class beside a matrix
DIAGONAL, OFF_DIAGONAL = (27, 108, 168), (200, 72, 48)  # colours of a confusion matrix
MAX_POINTS = 500  # points of a line; more cannot be seen
ONE, TWO, BAR, RULE, TEXT = "#1b6ca8", "#c84830", "#c9d3dc", "#e3e4e6", "#646b73"
IN_PAGE = {ONE: "var(--one)", TWO: "var(--two)", BAR: "var(--bar)", RULE: "var(--rule)", TEXT: "currentColor"}

Point = tuple[float, float]


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw names literally: a dollar sign starts no formula, and a letter missing in the font gives no warning.

    SVG keeps text as text and is the same on every run.
    """
    import matplotlib

    settings = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "perceiver"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


@contextmanager
def plotted(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure, in inches, and write it as PNG or SVG by the suffix.

    Raises UsageError for another suffix, ResourceError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    kind = check_plot(path)
    with plain_text():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_write(path) as file:
            figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)


def curves(name: str, lines: Mapping[str, Sequence[Point]], most: float = inf) -> str:
    """Return an SVG of up to two lines over epochs, by their names; "" if no line has two points.

    most: upper limit of the values and so of the axis.
    """
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    with plain_text():
        figure, axes = _axes("epoch")
        for color, (label, points) in zip((ONE, TWO), lines.items(), strict=False):
            x, y = zip(*points[:: ceil(len(points) / MAX_POINTS)], strict=True)
            axes.plot(x, y, "o-" if len(x) <= BINS else "-", color=color, markersize=5, clip_on=False, label=label)
        low, high = axes.get_ylim()
        axes.set(xlim=(0, None), ylim=(max(0.0, low), min(most, high)))
        return _svg(figure, name)


def reliability_diagram(bins: Sequence[Bin | None]) -> str:
    """Return an SVG of the share of right answers over the probability, and bars of counts; "" without bins."""
    full = {place: one for place, one in enumerate(bins) if one is not None}
    if not full:
        return ""
    counts = [one.count for one in full.values()]
    with plain_text():
        figure, axes = _axes("probability")
        middles = (np.array([*full]) + 0.5) / len(bins)
        bars = axes.bar(middles, np.array(counts) / max(counts), 0.9 / len(bins), color=BAR)
        for bar, one in zip(bars, full.values(), strict=True):
            share = f"mean probability {one.confidence:.3f}, {one.correct:.3f} of them right"
            bar.set_gid(f"title: {one.count:,} of {sum(counts):,}: {share}")
        dots = [(one.confidence, one.correct) for one in full.values()]
        areas = DOT_AREA * np.array(counts) / max(counts)  # a dot of few answers must not stand out
        axes.scatter(
            *zip(*dots, strict=True), areas.clip(min=4), ONE, clip_on=False, zorder=3, label="share that is right"
        )
        axes.plot((0, 1), (0, 1), "--", color=TEXT, linewidth=1, label="if calibrated")
        axes.set(xlim=(0, 1), ylim=(0, 1))
        return _svg(figure, "Reliability diagram")


def _axes(x_name: str) -> tuple[Any, Any]:
    """Return a figure and its axes, with horizontal grid lines only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=RULE)
    axes.tick_params(colors=TEXT, length=0, pad=6)
    axes.set_xlabel(x_name, color=TEXT)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """Return a figure as the SVG element of a page. name: its label for screen readers."""
    figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=TEXT)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r'<g id="title: ([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # ids must differ within the page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for color, in_page in IN_PAGE.items():
        svg = svg.replace(color, in_page)
    return svg


def tints_of(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """Return RGBA (classes, classes, 4) of a confusion matrix: right answers blue, mistakes red, by their share.

    shares: of each row. The square root keeps small shares visible.
    """
    tints = np.where(np.eye(len(shares), dtype=bool)[..., None], DIAGONAL, OFF_DIAGONAL)
    opacity = (255 * np.sqrt(shares)).round()[..., None]
    return np.concatenate([tints, opacity], axis=-1).astype(np.uint8)


def draw_confusion(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the confusion matrix as PNG or SVG: the page's colours, counts in the cells, the share of each row."""
    counts = np.array(report.confusion)
    totals = counts.sum(axis=1)
    shares = counts / totals[:, None].clip(min=1)
    names = [_short(show_text(name)) for name in report.classes]
    size = float(np.clip(0.34 * len(names), 2.4, 13.0))
    margin = 0.075 * max(map(len, names)) if len(names) <= NAMED else 0.0
    with plotted(path, max(5.2, size + margin + 1.4), size + margin + 1.1) as figure:
        axes = figure.subplots()
        axes.imshow(tints_of(shares))
        axes.spines[:].set_color(RULE)
        axes.tick_params(length=0)
        if len(names) <= NAMED:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            rows = [f"{name}  {share:.0%}" for name, share in zip(names, shares.diagonal(), strict=True)]
            axes.set_yticks(range(len(names)), rows, fontsize=8)
        if len(names) <= COUNTED:
            for (i, j), count in np.ndenumerate(counts):
                if count:
                    color = "white" if shares[i, j] > 0.4 else "black"
                    axes.text(j, i, f"{count:,}", ha="center", va="center", fontsize=7, color=color)
        examples = counted(report.num_examples, "example")
        axes.set(xlabel="answer", ylabel="truth, share that is right")
        axes.set_title(f"accuracy {report.accuracy:.4f}, {examples} ({report.split})", fontsize=10)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 10]}…{name[-9:]}"
