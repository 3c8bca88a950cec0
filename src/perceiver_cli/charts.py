"""Where the marks of a chart lie: lines, dots and bars in the pixels of an inline SVG, which the report's page draws.

The page gives them colours by their slot, 1, 2 ..., so that a chart follows light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from perceiver_cli.calibration import BINS, Bin
from perceiver_cli.draw import round_step

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 40  # margins, where names and numbers of axes stand
TICKS = 8  # at most, or so
MAX_POINTS = 500  # of a line: more cannot be seen

Point = tuple[float, float]
Ticks = tuple[tuple[float, str], ...]  # pixel and number


@dataclass(frozen=True)
class Line:
    """A line through points, as the attribute of an SVG polyline; dots: those that are marked."""

    name: str
    slot: int
    points: str
    dots: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Bar:
    """A rectangle, and what it says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Chart:
    """All marks of one chart. name: said to those who do not see it."""

    name: str
    x_name: str
    x_ticks: Ticks
    y_ticks: Ticks
    lines: tuple[Line, ...]
    bars: tuple[Bar, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


class Scale:
    """From values to pixels: those from `low` to `high` lie between two pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high if high > low else low + 1, start, end

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, to a tenth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> Ticks:
        """Return round numbers."""
        step = round_step((self.high - self.low) / TICKS)
        first, last = ceil(self.low / step - 1e-6), floor(self.high / step + 1e-6)
        return tuple((self(k * step), f"{k * step:.4g}") for k in range(first, last + 1))


def curves(name: str, x_name: str, lines: Sequence[tuple[str, int, Sequence[Point]]]) -> Chart | None:
    """Return a chart of (name, slot, points) lines over one pair of axes; None where there are no two points."""
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return None
    xs, ys = zip(*(point for _, _, points in lines for point in points), strict=True)
    across = Scale(0, max(xs), LEFT, WIDTH - RIGHT)
    room = 0.05 * (max(ys) - min(ys)) or 0.5
    up = Scale(max(0.0, min(ys) - room), max(ys) + room, HEIGHT - BOTTOM, TOP)
    drawn = []
    for line, slot, points in lines:
        places = [(across(x), up(y)) for x, y in points[:: ceil(len(points) / MAX_POINTS)]]
        drawn.append(Line(line, slot, _joined(places), tuple(places) if len(places) <= BINS else ()))
    return Chart(name, x_name, across.ticks(), up.ticks(), tuple(drawn))


def reliability(bins: Sequence[Bin | None]) -> Chart | None:
    """Return the reliability diagram: share correct over confidence, a diagonal, and bars of how many there are."""
    full = [part for part in bins if part is not None]
    if not full:
        return None
    across, up = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    total, most = sum(part.count for part in full), max(part.count for part in full)
    bars = []
    for k, part in enumerate(bins):
        if part is not None:
            left, right, top = across(k / len(bins)) + 1, across((k + 1) / len(bins)) - 1, up(part.count / most)
            text = (
                f"{part.count:,} of {total:,}: mean probability {part.confidence:.3f}, {part.correct:.3f} of them right"
            )
            bars.append(Bar(left, top, round(right - left, 1), round(up(0) - top, 1), text))
    dots = tuple((across(part.confidence), up(part.correct)) for part in full)
    diagonal = Line("if calibrated", 2, _joined([(across(0), up(0)), (across(1), up(1))]))
    lines = (diagonal, Line("share that is right", 1, _joined(dots), dots))
    return Chart("Reliability diagram", "probability", across.ticks(), up.ticks(), lines, tuple(bars))


def _joined(points: Sequence[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
