"""Pictures of what was decoded, as it is or with heat on it: `sample` for one modality, `column` and `row` for a page.

Pillow and NumPy only. Everything is drawn on white. Heat is one number for each input of the model, not negative, in
the shape of its grid: it is laid on the medium in a colour that is the darker the hotter. Sizes are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

from perceiver_cli.preprocess import audio
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.pixels import Box, center_box
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.spec import InputSpec
from perceiver_cli.preprocess.video import VideoSpec

Floats = NDArray[np.float64]
Picture = Image.Image

WHITE, INK, FAINT = (255, 255, 255), (32, 33, 36), (154, 160, 166)
# Heat on a light ground: ColorBrewer's OrRd, of falling lightness. Scores: viridis. Both are interpolated.
HEAT = ((236, 236, 240), (253, 212, 158), (253, 187, 132), (252, 141, 89), (239, 101, 72), (215, 48, 31), (170, 0, 0))
SCORE = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip
SIDE = 320  # of a medium, unless another is asked for
GAP = 12
TEXT = 13  # height of letters
TOP_PERCENTILE = 99.5  # of heat that is drawn in the darkest colour: one input alone does not bleach the others
FILM_FRAMES = 6
BLUR_CELLS = 8  # sides of a grid from which on its cells are blended; those of a coarser one are shown as they are
SPECTROGRAM_BINS, SPECTROGRAM_COLUMNS = 64, 400
TURN, TILT = np.radians(35), np.radians(22)  # from where a cloud is looked at, its y axis up
FAR = 0.55  # how much of the white shines through the farthest points


def sample(
    raw: Array, spec: InputSpec, heat: Array | None = None, *, side: int = SIDE, start_s: float = 0.0
) -> Picture:
    """Return a picture of a decoded array, as its `Modality.load` gives it, with the heat of the model's inputs on it.

    Images, clouds: within side x side. Sound (waveform above spectrogram), film strips: twice as wide. `raw` of sound
    and video is the clip that the model saw, which began at `start_s` seconds. A modality from outside the package has
    no picture of its own: its heat alone is drawn, or nothing.
    """
    match spec:
        case ImageSpec() if isinstance(spec.size, tuple):
            return _still(raw, heat, center_box(raw, spec, spec.size), side, side)
        case AudioSpec():
            return _sound(raw, spec, heat, 2 * side, start_s)
        case VideoSpec():
            return _film(raw, spec, heat, 2 * side, start_s)
        case PointsSpec():
            # Grey enough for a point without heat to be seen on white.
            return cloud(raw, None if heat is None else colours(scaled(heat), ((205, 205, 212), *HEAT[2:])), side)
        case _:
            return grid(np.zeros((1, 1)) if heat is None else scaled(heat), HEAT, side)


# ---------------------------------------------------------------- colours


def colours(values: Array, table: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Return (..., 3) of values in 0..1, interpolated in a table of colours."""
    places = np.linspace(0, 1, len(table))
    channels = [np.interp(values, places, [colour[k] for colour in table]) for k in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def scaled(heat: Array) -> Floats:
    """Return heat in 0..1, where 1 is its `TOP_PERCENTILE`; zeros stay zeros."""
    top = float(np.percentile(heat, TOP_PERCENTILE)) or float(heat.max())
    return np.clip(heat / top, 0, 1) if top > 0 else np.zeros(heat.shape)


def spanned(scores: Array) -> Floats:
    """Return scores in 0..1, from the least to the greatest."""
    low, high = float(scores.min()), float(scores.max())
    return np.asarray((scores - low) / (high - low), np.float64) if high > low else np.zeros(scores.shape)


# ---------------------------------------------------------------- media


def _still(values: Array, heat: Array | None, box: Box, width: int, height: int) -> Picture:
    """Return (H, W, c) uint8 fitted into width x height; heat (h, w) lies over its box."""
    tall, wide = values.shape[:2]
    scale = min(width / wide, height / tall)
    size = max(1, round(wide * scale)), max(1, round(tall * scale))
    how = Resampling.LANCZOS if scale < 1 else Resampling.NEAREST
    picture = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).convert("RGB").resize(size, how)
    if heat is None:
        return picture
    grey = np.asarray(picture.convert("L"), np.float64)[..., None]
    left, top, right, bottom = (round(edge * scale) for edge in box)
    laid = np.zeros(grey.shape[:2])
    laid[top:bottom, left:right] = _enlarged(scaled(heat), (right - left, bottom - top))
    return Image.fromarray(_under_heat(grey, laid))


def _under_heat(grey: Array, heat: Array) -> NDArray[np.uint8]:
    """Return (H, W, 3): grey (H, W, 1), paled, with heat (H, W) in 0..1 in its colour."""
    paled = 90 + grey * (165 / 255)
    opacity = 0.85 * np.sqrt(heat)[..., None]  # that little heat is seen at all
    blended = paled * (1 - opacity) + colours(heat, HEAT) * opacity
    return np.asarray(blended.round(), np.uint8)


def _enlarged(values: Array, size: tuple[int, int]) -> Floats:
    """Return (h, w) values at size (width, height): cells as they are where they are few, else blended."""
    how = Resampling.NEAREST if min(values.shape) < BLUR_CELLS else Resampling.BICUBIC
    size = max(1, size[0]), max(1, size[1])
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, how), np.float64).clip(0, 1)


def _sound(samples: Array, spec: AudioSpec, heat: Array | None, width: int, start_s: float) -> Picture:
    """Return the waveform above the mel spectrogram of (samples,); heat is (time,) or (time, mel bins)."""
    assert spec.rate_hz != "auto"
    seconds = len(samples) / spec.rate_hz
    high, low_high = width // 6, width // 4
    over_time = None if heat is None else _enlarged(scaled(_per_time(heat))[None], (width, 1))[0]
    # The envelope: the least and greatest sample of each column.
    edges = np.linspace(0, len(samples), width + 1).astype(int)
    peak = float(np.abs(samples).max()) or 1.0
    spans = [samples[a : max(b, a + 1)] for a, b in pairwise(edges)]
    low = np.array([part.min() if len(part) else 0.0 for part in spans]) / peak
    top = np.array([part.max() if len(part) else 0.0 for part in spans]) / peak
    y = np.linspace(1, -1, high)[:, None]
    inside = (y >= low - 1.5 / high) & (y <= top + 1.5 / high)
    ink, ground = np.full((1, width, 3), 70.0), np.full((1, width, 3), 250.0)
    if over_time is not None:  # the darker the hotter, and the ground a little
        share = over_time[None, :, None]
        tint = colours(over_time, HEAT)[None].astype(np.float64)
        ink, ground = ink + (tint * 0.9 - ink) * np.sqrt(share), ground + (tint - ground) * 0.35 * share
    wave = np.where(inside[..., None], ink, ground).round().astype(np.uint8)
    grey = 255 * (1 - spanned(_spectrogram(samples, spec)))
    laid = Image.fromarray(grey.astype(np.float32)).resize((width, low_high), Resampling.BILINEAR)
    tones = np.asarray(laid, np.float64)[..., None]
    if heat is None:
        below = np.repeat(tones, 3, axis=-1).round().astype(np.uint8)
    else:
        plane = scaled(heat)[:, None] if heat.ndim == 1 else scaled(heat)
        below = _under_heat(tones, _enlarged(plane.T[::-1], (width, low_high)))
    return column([Image.fromarray(wave), Image.fromarray(below), _seconds_axis(width, start_s, seconds)], 2)


def _per_time(heat: Array) -> Array:
    return np.asarray(heat.sum(axis=tuple(range(1, heat.ndim))))


def _spectrogram(samples: Array, spec: AudioSpec) -> Array:
    """Return (mel bins, frames), the lowest last, for the eye: the same whatever the model is given."""
    assert spec.rate_hz != "auto"
    window_s = min(0.032, len(samples) / spec.rate_hz)
    seconds = len(samples) / spec.rate_hz
    shown = spec.model_copy(
        update={
            "features": "mel", "patch": (1, 1), "max_resolution": None, "clip_s": seconds, "num_mels": SPECTROGRAM_BINS,
            "window_s": window_s, "hop_s": max(seconds / SPECTROGRAM_COLUMNS, 1 / spec.rate_hz),
            "min_hz": min(spec.min_hz, spec.rate_hz / 4),
        }
    )  # fmt: skip
    bins = audio.MODALITY.prepare(samples, shown, None).values[..., 0].T[::-1]
    return np.asarray(np.clip(bins, *np.percentile(bins, (5, 99.8))))


def _film(frames: Array, spec: VideoSpec, heat: Array | None, width: int, start_s: float) -> Picture:
    """Return a strip of frames of (T, H, W, 3), evenly in time; heat is (time, h, w), on each that of its time."""
    count = min(FILM_FRAMES, len(frames))
    places = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
    wide = (width - 4 * (count - 1)) // count
    box = center_box(frames[0], spec, spec.size)
    top = None if heat is None else scaled(heat)
    strip = []
    for place in places:
        now = None if top is None else top[min(len(top) - 1, place * len(top) // len(frames))]
        # Already scaled, over all times: an empty frame must not be as hot as a full one.
        still = _still(frames[place], None, box, wide, 2 * wide)
        if now is not None:
            scale = still.width / frames.shape[2]
            left, up, right, down = (round(edge * scale) for edge in box)
            laid = np.zeros((still.height, still.width))
            laid[up:down, left:right] = _enlarged(now, (right - left, down - up))
            still = Image.fromarray(_under_heat(np.asarray(still.convert("L"), np.float64)[..., None], laid))
        strip.append(captioned(still, f"{start_s + place / spec.frame_rate_hz:.2f} s", small=True))
    return row(strip, 4)


def cloud(points: Array, tints: Array | None, side: int = SIDE) -> Picture:
    """Return points (P, 3) seen from the front, a little from above and the right; tints are (P, 3) uint8.

    The y axis is up. Near points lie over far ones, which fade.
    """
    centred = points - (points.min(axis=0) + points.max(axis=0)) / 2
    turned = centred @ _view()
    reach = float(np.abs(turned[:, :2]).max()) or 1.0
    depth = spanned(turned[:, 2])  # 1 is nearest
    large = 2 * side  # drawn large, then reduced: smooth edges
    radius = float(np.clip(large / np.sqrt(len(points)) / 3, 2.0, large / 60))
    spots = large / 2 + turned[:, :2] * [1, -1] * ((large / 2 - 2 * radius) / reach)
    base = np.full((len(points), 3), 70.0) if tints is None else tints.astype(np.float64)
    fade = ((FAR if tints is None else FAR / 3) * (1 - depth))[:, None]  # colours are to be told apart
    shades = (base * (1 - fade) + 255 * fade).round().astype(int)
    canvas = Image.new("RGB", (large, large), WHITE)
    pen = ImageDraw.Draw(canvas)
    for k in np.argsort(depth, kind="stable").tolist():
        x, y = spots[k].tolist()
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(shades[k].tolist()))
    return canvas.resize((side, side), Resampling.LANCZOS)


def _view() -> Floats:
    """Return (3, 3): columns are right, up and towards the eye."""
    turn = np.array([[np.cos(TURN), 0, np.sin(TURN)], [0, 1, 0], [-np.sin(TURN), 0, np.cos(TURN)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(TILT), np.sin(TILT)], [0, -np.sin(TILT), np.cos(TILT)]])
    return np.asarray(turn @ tilt)


def grid(values: Array, table: Sequence[tuple[int, int, int]], side: int) -> Picture:
    """Return values in 0..1 of a grid as colours: (h, w); (n,) as a curve; of three axes, the middles of the first."""
    if values.ndim == 1:
        high = max(16, side // 3)
        curve = _enlarged(values[None], (side, 1))[0]
        filled = np.linspace(1, 0, high)[:, None] <= curve
        return Image.fromarray(np.where(filled[..., None], colours(curve, table)[None], 248).astype(np.uint8))
    if values.ndim == 2:
        scale, least = side / max(values.shape), side // 3  # a grid of 200 x 4 is no line
        size = max(least, round(values.shape[1] * scale)), max(least, round(values.shape[0] * scale))
        return Image.fromarray(colours(_enlarged(values, size), table))
    count = min(4, len(values))
    places = ((np.arange(count) + 0.5) * len(values) / count).astype(int)
    return row([grid(values[place], table, max(8, side // count - 2)) for place in places], 2)


# ---------------------------------------------------------------- the page


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    """Return matplotlib's DejaVu Sans, which has letters for most alphabets; without it Pillow's own, which has few."""
    found = find_spec("matplotlib")
    folders = found.submodule_search_locations if found is not None else None
    path = Path((folders or [""])[0]) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size) if path.is_file() else ImageFont.load_default(size)


def column(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Return pictures one below the other, on white."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (max(picture.width for picture in pictures), height), WHITE)
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def row(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Return pictures beside each other, on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (width, max(picture.height for picture in pictures)), WHITE)
    x = 0
    for picture in pictures:
        page.paste(picture, (x, 0))
        x += picture.width + gap
    return page


def captioned(picture: Picture, text: str, *, small: bool = False) -> Picture:
    """Return a picture with a line of text above it."""
    return column([line(text, picture.width, small=small), picture], 2)


def line(text: str, width: int, *, small: bool = False, large: bool = False) -> Picture:
    """Return a line of text, cut to fit a width."""
    size = TEXT - 3 if small else TEXT + 5 if large else TEXT
    font = _font(size)
    if font.getlength(text) > width:
        while text and font.getlength(f"{text}…") > width:
            text = text[:-1]
        text += "…"
    strip = Image.new("RGB", (width, size + 6), WHITE)
    ImageDraw.Draw(strip).text((0, 2), text, fill=FAINT if small else INK, font=font)
    return strip


def margin(picture: Picture, gap: int = GAP) -> Picture:
    """Return a picture with a white border."""
    page = Image.new("RGB", (picture.width + 2 * gap, picture.height + 2 * gap), WHITE)
    page.paste(picture, (gap, gap))
    return page


def key(width: int, table: Sequence[tuple[int, int, int]], low: str, high: str) -> Picture:
    """Return what the colours stand for: a bar between two words."""
    font = _font(TEXT - 3)
    ends = [int(font.getlength(word)) + 6 for word in (low, high)]
    bar = Image.fromarray(np.repeat(colours(np.linspace(0, 1, width)[None], table), TEXT - 3, axis=0))
    return row([line(low, ends[0], small=True), bar, line(high, ends[1], small=True)], 4)


def _seconds_axis(width: int, start_s: float, seconds: float) -> Picture:
    """Return about six marks of time."""
    step = round_step(seconds / 6)
    digits = max(0, int(np.ceil(-np.log10(step))))
    strip = Image.new("RGB", (width, TEXT + 6), WHITE)
    pen, font = ImageDraw.Draw(strip), _font(TEXT - 3)
    for k in range(int(np.ceil(start_s / step)), int((start_s + seconds) / step + 1e-6) + 1):
        x = (k * step - start_s) / seconds * (width - 1)
        pen.line((x, 0, x, 3), fill=INK)
        text = f"{k * step:.{digits}f} s"
        length = font.getlength(text)
        pen.text((min(max(0, x - length / 2), width - length), 4), text, fill=FAINT, font=font)
    return strip


def round_step(least: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least `least`."""
    unit = 10.0 ** np.floor(np.log10(max(least, 1e-6)))
    return float(next(unit * k for k in (1, 2, 5, 10) if unit * k >= least))
