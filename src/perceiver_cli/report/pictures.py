"""Media as the model reads them, with or without heat: `draw` on a matplotlib figure, `sample` as a picture.

Heat is one number >= 0 for each input of the model, in the shape of its grid; darker colours are hotter. Sizes are in
pixels. Only functions import matplotlib, because it is slow to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perceiver_cli.files import show_text
from perceiver_cli.preprocess import audio, modality
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.mel import mel_of
from perceiver_cli.preprocess.pixels import Box, center_box, padded
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.series import SeriesSpec
from perceiver_cli.preprocess.spec import InputSpec
from perceiver_cli.preprocess.video import VideoSpec
from perceiver_cli.report.charts import plain_text

Floats = NDArray[np.float64]
Picture = Image.Image
Extent = tuple[float, float, float, float]  # left, right, bottom, top

DPI = 128  # a power of two, so that pixels stay whole through inches
INK, FAINT, GROUND, COLD = "#464646", "#7a8086", "#fafafa", 0.81
HEAT, SCORE = "OrRd", "viridis"  # matplotlib's colour maps of heat and of scores
SIDE = 320  # default side of a medium
TOP_PERCENTILE = 99.5  # heat drawn in the darkest colour, so that one very hot input does not bleach the others
PALED = -139  # start of the grey scale under heat, so that black is drawn as 90 of 255
STRIP_FRAMES, STRIP_TEXT = 6, 18
LEAST_CELLS = 8  # smallest side of a grid whose cells are blended into each other
SPECTROGRAM_BINS, SPECTROGRAM_COLUMNS = 64, 400
LANES, LANE = 240, (14, 60)  # height of all channels of a series together, least and most of one
SOUND_LEFT, SOUND_MARGIN, SOUND_TEXT = 60, 12, 26  # for frequencies; for the label of the last second; below it
PITCHES_HZ = (250, 1000, 4000, 16000)  # that have a mark
LETTER, LETTER_SIZE, LINE = 10, 9, 24  # width of a letter of a word, its size in points, height of a line
MOST_NAMES, LONGEST_NAME = 200, 48  # words that are drawn, and letters of one
TURN, TILT = np.radians(35), np.radians(22)  # the view of a cloud, y axis up
FAR = 0.55  # share of white in the farthest points


def sample(
    raw: Array, spec: InputSpec, heat: Array | None = None, *, side: int = SIDE, start_s: float = 0.0
) -> Picture:
    """Return a picture of a decoded array in the size of `size_of`. Arguments as in `draw`."""
    with plain_text():
        figure = new_figure(*size_of(raw, spec, side))
        draw(figure, raw, spec, heat, start_s)
        return rendered(figure)


def size_of(raw: Array, spec: InputSpec, side: int) -> tuple[int, int]:
    """Return width and height of a medium within side x side; sound and video are 2 side wide."""
    match spec:
        case ImageSpec():
            tall, wide = _seen(raw, spec).shape[:2]
            return max(1, round(side * wide / max(tall, wide))), max(1, round(side * tall / max(tall, wide)))
        case AudioSpec():
            return 2 * side, 5 * side // 6 + SOUND_TEXT
        case VideoSpec():
            tall, wide = raw.shape[1:3]
            return 2 * side, min(2 * side, round(2 * side * tall / wide / min(STRIP_FRAMES, len(raw)))) + STRIP_TEXT
        case SeriesSpec():
            return 2 * side, raw.shape[1] * _lane(raw.shape[1]) + SOUND_TEXT
        case _:
            parts = modality(spec.modality).parts(raw, spec)
            return (2 * side, _laid(parts.names, 2 * side)[1]) if parts is not None else (side, side)


def _seen(raw: Array, spec: ImageSpec) -> Array:
    """Return a picture with the margins that the model reads around it."""
    return padded(raw, spec.size) if spec.fit == "pad" and isinstance(spec.size, tuple) else raw


def new_figure(width: int, height: int) -> Any:
    """Return an empty matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def rendered(figure: Any) -> Picture:
    """Return a figure as a picture."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def draw(
    figure: Any, raw: Array, spec: InputSpec, heat: Array | None = None, start_s: float = 0.0, *, framed: bool = False
) -> None:
    """Draw a decoded array from `Modality.load` with the heat of the model's inputs on it.

    framed: a frame shows the crop that the model reads, and what lies outside is pale.

    figure: a Figure or a SubFigure. raw: for sound and video the clip that the model read, which starts at `start_s`
    seconds. A modality from outside the package has no picture, so only its heat is drawn.
    """
    heat = None if heat is None else scaled(heat)
    match spec:
        case ImageSpec() if isinstance(spec.size, tuple):
            raw = _seen(raw, spec)
            axes, box = bare_axes(figure), center_box(raw, spec, spec.size)
            _still(axes, raw, heat, box)
            if framed and is_cropped(raw, spec):
                _frame(axes, box)
        case AudioSpec():
            _sound(figure, raw, spec, heat, start_s)
        case VideoSpec():
            _strip(figure, raw, spec, heat, start_s, framed=framed)
        case SeriesSpec():
            _lanes(figure, raw, spec, heat, start_s)
        case PointsSpec():
            tints = None
            if heat is not None:  # points without heat are grey, which is visible on white
                share = np.sqrt(heat)[:, None]
                tints = COLD * (1 - share) + colours(heat, HEAT) * share
            cloud(bare_axes(figure), raw[:, :3], tints)
        case _ if (parts := modality(spec.modality).parts(raw, spec)) is not None:
            _named(bare_axes(figure), parts.names, None if heat is None else scaled(parts.shares(heat)))
        case _:
            grid(bare_axes(figure), np.zeros((1, 1)) if heat is None else heat, HEAT)


def bare_axes(figure: Any) -> Any:
    """Return axes that fill a figure, without lines."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_anchor("NW")
    return axes


def colours(values: Array, name: str) -> Floats:
    """Return (..., 3) in 0..1, the colours of values in 0..1 in a colour map of matplotlib."""
    from matplotlib import colormaps

    return np.asarray(colormaps[name](np.asarray(values, np.float64))[..., :3])


def scaled(heat: Array) -> Floats:
    """Return heat in 0..1, where 1 is its TOP_PERCENTILE; zeros stay zeros."""
    top = float(np.percentile(heat, TOP_PERCENTILE)) or float(heat.max())
    return np.clip(heat / top, 0, 1) if top > 0 else np.zeros(heat.shape)


def spanned(scores: Array) -> Floats:
    """Return scores in 0..1, from the lowest to the highest."""
    return np.asarray((scores - scores.min()) / (np.ptp(scores) or 1.0), np.float64)


def _lay(axes: Any, heat: Array, extent: Extent) -> None:
    """Lay heat (h, w) in 0..1 over the drawing on axes."""
    layer = np.dstack([colours(heat, HEAT), 0.85 * np.sqrt(heat)])  # the square root keeps little heat visible
    axes.autoscale(False)
    axes.imshow(layer, extent=extent, aspect=axes.get_aspect(), interpolation=_blend(heat))


def _blend(values: Array) -> str:
    """Return matplotlib's interpolation of cells: none for a coarse grid, else Catmull-Rom."""
    return "nearest" if min(values.shape[:2]) < LEAST_CELLS else "catrom"


def _still(axes: Any, values: Array, heat: Array | None, box: Box) -> None:
    """Draw (H, W, c) uint8, with heat (h, w) over its box."""
    if heat is None:
        axes.imshow(values[..., 0] if values.shape[-1] == 1 else values, cmap="gray", vmin=0, vmax=255)
        return
    axes.imshow(values[..., :3].mean(axis=-1), cmap="gray", vmin=PALED, vmax=255)
    left, top, right, bottom = (edge - 0.5 for edge in box)  # a pixel's middle is a whole number
    _lay(axes, heat, (left, right, bottom, top))


def is_cropped(raw: Array, spec: InputSpec) -> bool:
    """Return whether parts of a picture or video lie outside the crop that the model reads."""
    if not isinstance(spec, ImageSpec | VideoSpec) or not isinstance(spec.size, tuple):
        return False
    still = raw[0] if isinstance(spec, VideoSpec) else _seen(raw, spec)
    return center_box(still, spec, spec.size) != (0, 0, still.shape[1], still.shape[0])


def _frame(axes: Any, box: Box) -> None:
    """Draw a frame around a box of a picture, and a veil over the rest."""
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path

    axes.autoscale(False)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    left, top, right, bottom = (edge - 0.5 for edge in box)
    whole = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    hole = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]  # the other way round
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * 2
    axes.add_patch(PathPatch(Path(whole + hole, codes), facecolor="white", alpha=0.6, linewidth=0))
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=INK, linewidth=1, linestyle="--")
    )


def _sound(figure: Any, samples: Array, spec: AudioSpec, heat: Array | None, start_s: float) -> None:
    """Draw the waveform above the mel spectrogram of (samples,); heat is (time,) or (time, mel bins)."""
    assert spec.rate_hz != "auto"
    end_s = start_s + len(samples) / spec.rate_hz
    left, right = SOUND_LEFT / figure.bbox.width, 1 - SOUND_MARGIN / figure.bbox.width
    places = {"left": left, "right": right, "bottom": SOUND_TEXT / figure.bbox.height, "top": 1, "hspace": 0.02}
    wave, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3), gridspec_kw=places)
    peak = 1.05 * float(np.abs(samples).max()) or 1.0
    wave.set(xlim=(start_s, end_s), ylim=(-peak, peak), facecolor=GROUND)
    wave.plot(np.linspace(start_s, end_s, len(samples)), samples, color=INK, linewidth=0.5)
    extent = (start_s, end_s, 0.0, 1.0)
    below.imshow(_spectrogram(samples, spec), cmap="Greys", extent=extent, aspect="auto", interpolation="bilinear")
    if heat is not None:
        _lay(wave, scaled(heat.reshape(len(heat), -1).sum(axis=1))[None], (start_s, end_s, -peak, peak))
        _lay(below, heat.reshape(len(heat), -1).T[::-1], extent)
    for axes in (wave, below):
        axes.spines[:].set_visible(False)
        axes.set_yticks([])
    pitches = {hz: height for hz in PITCHES_HZ if 0.04 < (height := _height(hz, spec)) < 0.96}
    below.set_yticks([*pitches.values()], [f"{hz} Hz" if hz < 1000 else f"{hz // 1000} kHz" for hz in pitches])
    wave.tick_params(bottom=False)
    below.tick_params(labelsize=7, colors=FAINT)
    below.xaxis.set_major_formatter("{x:g} s")


def _height(hz: float, spec: AudioSpec) -> float:
    """Return the height of a frequency in the spectrogram, in 0..1."""
    assert spec.rate_hz != "auto"
    low, high, mel = (mel_of(each) for each in (_lowest_hz(spec), spec.rate_hz / 2, hz))
    return (mel - low) / (high - low)


def _lowest_hz(spec: AudioSpec) -> float:
    assert spec.rate_hz != "auto"
    return min(spec.min_hz, spec.rate_hz / 4)


def _spectrogram(samples: Array, spec: AudioSpec) -> Array:
    """Return a spectrogram (mel bins, frames) for people, the lowest bin last, the same for every model."""
    assert spec.rate_hz != "auto"
    seconds = len(samples) / spec.rate_hz
    shown = spec.model_copy(
        update={
            "features": "mel", "patch": (1, 1), "max_resolution": None, "clip_s": seconds, "num_mels": SPECTROGRAM_BINS,
            "window_s": min(0.032, seconds), "hop_s": max(seconds / SPECTROGRAM_COLUMNS, 1 / spec.rate_hz),
            "min_hz": _lowest_hz(spec), "stem": "none", "start": "random", "floor_db": None,
        }
    )  # fmt: skip
    bins = audio.MODALITY.prepare(samples, shown, None).values[..., 0].T[::-1]
    return np.asarray(np.clip(bins, *np.percentile(bins, (5, 99.8))))


def _lane(count: int) -> int:
    """Return the height of one channel in a picture of `count` channels."""
    return int(np.clip(LANES // count, *LANE))


def _lanes(figure: Any, raw: Array, spec: SeriesSpec, heat: Array | None, start_s: float) -> None:
    """Draw the channels of (T, channels, 2) below each other; heat is (inputs,) or (inputs, channels)."""
    assert spec.rate_hz != "auto"
    assert spec.patch != "auto"
    count, rate_hz = raw.shape[1], spec.rate_hz
    axes = figure.add_axes((SOUND_MARGIN / figure.bbox.width, SOUND_TEXT / figure.bbox.height,
                            1 - 2 * SOUND_MARGIN / figure.bbox.width, 1 - SOUND_TEXT / figure.bbox.height))  # fmt: skip
    seconds = start_s + np.arange(len(raw)) / rate_hz
    end_s = start_s + max(1, len(raw)) / rate_hz
    axes.set(xlim=(start_s, end_s), ylim=(count, 0), facecolor=GROUND)
    for place, name in enumerate(spec.channels):
        values = np.where(raw[:, place, 1] != 0, raw[:, place, 0], np.nan)
        low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if np.isfinite(values).any() else (0.0, 0.0)
        middle, reach = (low + high) / 2, (high - low) or 1.0
        axes.plot(seconds, place + 0.5 - 0.8 * (values - middle) / reach, color=INK, linewidth=0.6)
        axes.text(start_s, place + 0.05, f" {show_text(name)}", size=5.5, color=FAINT, va="top")
    if heat is not None:
        layer = np.broadcast_to(heat.reshape(len(heat), -1).T, (count, len(heat)))
        _lay(axes, layer, (start_s, start_s + len(heat) * spec.patch[0] / rate_hz, count, 0.0))
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.tick_params(labelsize=7, colors=FAINT)
    axes.xaxis.set_major_formatter("{x:g} s" if rate_hz != 1 else "{x:g}")


def _strip(figure: Any, frames: Array, spec: VideoSpec, heat: Array | None, start_s: float, *, framed: bool) -> None:
    """Draw frames of (T, H, W, 3) as a strip, evenly in time, each with its part of the heat (time, h, w)."""
    places = _middles(STRIP_FRAMES, len(frames))
    room = {"left": 0, "right": 1, "bottom": 0, "top": 1 - STRIP_TEXT / figure.bbox.height, "wspace": 0.03}
    strip = figure.subplots(1, len(places), squeeze=False, gridspec_kw=room)
    box = center_box(frames[0], spec, spec.size)
    for axes, place in zip(strip[0], places, strict=True):
        _still(axes, frames[place], None if heat is None else heat[place * len(heat) // len(frames)], box)
        if framed and is_cropped(frames, spec):
            _frame(axes, box)
        axes.set_axis_off()
        axes.set_anchor("NW")
        axes.set_title(f"{start_s + place / spec.frame_rate_hz:.2f} s", loc="left", fontsize=6.5, color=FAINT, pad=3)


def _laid(names: Sequence[str], width: int) -> tuple[list[tuple[str, int, int]], int]:
    """Return text, left and top of each of the first names, set in lines of a width, and the height of all lines."""
    places, left, top = [], 0, 0
    for number, name in enumerate(names):
        text = show_text(name) if number < MOST_NAMES else "…"
        text = text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
        wide = LETTER * len(text)
        if left and left + wide > width:
            left, top = 0, top + LINE
        places.append((text, left, top))
        left += wide + LETTER
        if number == MOST_NAMES:
            break
    return places, top + LINE


def _named(axes: Any, names: Sequence[str], heat: Array | None) -> None:
    """Draw names, such as words, in lines, each on the colour of its heat (names,)."""
    width, height = axes.bbox.width, axes.bbox.height
    axes.set(xlim=(0, width), ylim=(height, 0))
    from matplotlib.patches import Rectangle

    tints = None if heat is None else colours(heat, HEAT)
    for number, (text, left, top) in enumerate(_laid(names, int(width))[0]):
        if tints is not None and heat is not None and heat[number] > 0:
            box = (left - LETTER / 2, top + 1), LETTER * (len(text) + 1), LINE - 2
            axes.add_patch(Rectangle(*box, color=tints[number], alpha=0.85 * float(np.sqrt(heat[number])), linewidth=0))
        axes.text(left, top + LINE / 2, text, family="monospace", size=LETTER_SIZE, va="center", color="black")


def _middles(most: int, count: int) -> list[int]:
    """Return up to `most` of `count` places, evenly spaced."""
    shown = min(most, count)
    return [int((k + 0.5) * count / shown) for k in range(shown)]


def cloud(axes: Any, points: Array, tints: Array | None) -> None:
    """Draw points (P, 3), y axis up, from the front, a little above and right; tints are (P, 3) in 0..1.

    Near points cover far ones, which fade.
    """
    turned = (points - (points.min(axis=0) + points.max(axis=0)) / 2) @ _view()
    depth = spanned(turned[:, 2])  # 1 is nearest
    order = np.argsort(depth, kind="stable")
    fade = ((FAR if tints is None else FAR / 3) * (1 - depth))[:, None]  # colours must stay distinct
    shades = (np.full((len(points), 3), 0.27) if tints is None else tints) * (1 - fade) + fade
    side = min(axes.bbox.width, axes.bbox.height)
    radius = float(np.clip(side / np.sqrt(len(points)) / 3, 1.0, side / 60))
    area = (2 * radius * 72 / DPI) ** 2  # in points, matplotlib's unit
    axes.scatter(*turned[order, :2].T, c=shades[order], s=area, linewidths=0)
    reach = (float(np.abs(turned[:, :2]).max()) or 1.0) * side / (side - 4 * radius)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def _view() -> Floats:
    """Return (3, 3), whose columns are right, up and towards the viewer."""
    turn = np.array([[np.cos(TURN), 0, np.sin(TURN)], [0, 1, 0], [-np.sin(TURN), 0, np.cos(TURN)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(TILT), np.sin(TILT)], [0, -np.sin(TILT), np.cos(TILT)]])
    return np.asarray(turn @ tilt)


def grid(axes: Any, values: Array, name: str, left: float = 0.0, right: float = 1.0) -> None:
    """Draw a grid of values in 0..1 in a colour map; with three axes or more, slices along the first."""
    if values.ndim > 2:
        places = _middles(4, len(values))
        step = (right - left) * 1.02 / len(places)
        for k, place in enumerate(places):
            grid(axes, values[place], name, left + k * step, left + (k + 1) * step - 0.02 * (right - left))
        return
    shown = {"cmap": name, "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": _blend(np.atleast_2d(values))}
    axes.imshow(np.atleast_2d(values), extent=(left, right, 0, 1), **shown)
    axes.set(xlim=(0, 1), ylim=(0, 1))
