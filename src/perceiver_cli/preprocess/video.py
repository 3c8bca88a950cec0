"""Video as a grid, time x height x width: frames by their presentation times, one crop for all frames (paper 4.2).

`load` returns the frame shown at each instant of the spec's frame rate, upright, and no larger than crops need. PyAV
reads MP4, MKV and other containers (`container`), Pillow animated GIF, WebP and PNG.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice, repeat
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from PIL.Image import Resampling
from pydantic import Field

from perceiver_cli.errors import DataError, PerceiverError, UsageError
from perceiver_cli.preprocess import container, image, register
from perceiver_cli.preprocess.base import Array, ByteArray, Layout, Rng, Span, TimedModality, lengths_in_words, patchify
from perceiver_cli.preprocess.pixels import Change, center_box, color_statistics, opaque, random_box, recoloring, resize
from perceiver_cli.preprocess.source import Source, as_data_errors
from perceiver_cli.preprocess.spec import Fraction, InputSpec, Limits, Pair, Positive, Range, Size


class VideoSpec(InputSpec):
    """Frames of a clip as a grid, time x height x width (paper 4.2). Values stay uint8 until the model."""

    modality: Literal["video"] = "video"
    num_frames: Annotated[int, Field(ge=1, le=1 << 16)] = 32  # frames of a clip
    frame_rate_hz: Annotated[float, Field(gt=0, le=1000)] = 25.0  # each instant takes the frame shown then
    size: Pair = (224, 224)  # height and width of a frame
    patch: tuple[Size, Size, Size] = (2, 8, 8)  # space-time patches; [1, 1, 1] is raw pixels
    short: Literal["loop", "hold"] = "loop"  # how a file shorter than the clip is filled up
    eval_windows: Size = 1  # clips of each file in evaluation, spread evenly over it; their scores are averaged
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # mean of values in 0..1, per channel
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)  # divisor of the values after mean
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875  # share of the shorter side that evaluation keeps
    # Training: a random time, and one Inception crop for all frames. No mirror by default: it turns left into right,
    # which may be another class. `color` is the largest change of brightness, contrast and saturation, as a share.
    crop_area: Range = (0.3, 1.0)
    crop_aspect: Range = (3 / 4, 4 / 3)  # range of width / height of the crop
    flip: Fraction = 0.0  # probability of a mirror image
    color: Fraction = 0.0  # strength of random brightness, contrast and saturation


COLORS = 3
SKETCH_FRAMES = 8
# Containers round times to their tick: a frame counts as shown from half a tick earlier, so that no frame is skipped.
MAX_SLACK_S = 0.0005
EPSILON_S = 1e-6
SHORTEST_S, DEFAULT_S = 0.011, 0.1  # as in browsers: a frame of an animation with 10 ms or less is shown for 100 ms
MIN_PIXEL_ASPECT, MAX_PIXEL_ASPECT = 0.1, 10.0  # outside this range, pixels count as square
PLANAR = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


class TimedFrame(NamedTuple):
    """A frame with the times between which it is shown."""

    start_s: float
    end_s: float
    picture: Callable[[], Array]  # decodes the frame to (H, W, 3) uint8


class VideoModality(TimedModality[VideoSpec]):
    """Video files to (frames, height, width, colours) uint8, then to a grid of space-time patches (paper 4.2)."""

    name = "video"
    steps = "frames"
    precedence = 1  # before image, which also reads animations, and before audio, which also reads containers
    formats = "MP4, MOV, MKV, WebM, AVI, MPEG, WMV, FLV, OGV, MXF, DV, animated GIF, WebP, PNG and AVIF"
    suffixes = frozenset({
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif", ".webp", ".apng", ".mts",
        ".m2ts", ".m2t", ".ts", ".wmv", ".asf", ".flv", ".ogv", ".3gp", ".3g2", ".mxf", ".dv", ".vob", ".m1v", ".m2v",
    })  # fmt: skip
    decides = ("frame_rate_hz", "size", "eval_crop")
    contains = ("audio",)
    surveyed = 32
    paper_preset = "audioset-video"
    preparation = (
        "the middle num_frames frames at frame_rate_hz, each cropped and resized as an image is, 0..255; cut into "
        "patches of time, height, width"
    )

    def sniff(self, head: bytes, name: str) -> bool:
        if container.format_of(head, name) is not None:
            return not container.holds_sound_only(head, name)
        return _is_animated(head)

    def also_reads(self, head: bytes) -> bool:
        return image.format_of(head) in ("GIF", "WEBP")  # a still among animated ones

    def clip_s(self, spec: VideoSpec) -> float:
        return spec.num_frames / spec.frame_rate_hz

    def steps_hz(self, spec: VideoSpec) -> float:
        return spec.frame_rate_hz

    def duration_s(self, source: Source, limits: Limits, spec: VideoSpec | None = None) -> float:
        """Return the end of the last frame in seconds, as declared; in an animation, every frame is visited."""
        if container.format_of(source.head(), source.name) is not None:
            with container.open_track(source, limits, "video") as track:
                duration_s = track.duration_s
        else:
            frames = _frames(source, VideoSpec(), limits, 0, 0)
            duration_s = max((frame.end_s for frame in frames), default=0.0) + EPSILON_S
        source.check_limit(duration_s, "seconds", "video_seconds", limits)
        return duration_s

    def load(self, source: Source, spec: VideoSpec, limits: Limits, span: Span | None = None) -> Array:
        """Return (T, H, W, 3) uint8: the frame shown at each k / `frame_rate_hz` seconds of the file or of a span.

        At H x W the evaluation crop has the size of the spec; a smaller file keeps its own size.
        """
        first, stop = 0, math.inf
        if span is not None:
            first = max(0, round(span[0] * spec.frame_rate_hz))
            stop = first + max(1, round(span[1] * spec.frame_rate_hz))
        pictures: list[Array] = []
        for picture in _sampled(source, spec, limits, first, stop, stop - first):
            source.check_decoded((len(pictures) + 1) * picture.size, 1, limits)
            if pictures and picture.shape != pictures[0].shape:
                raise DataError(f"{source.shown}: frames of {pictures[0].shape[:2]} and of {picture.shape[:2]}")
            pictures.append(picture)
        if not pictures:
            raise DataError(f"{source.shown}: no frames" + (f" at {span[0]:g} s" if span else " in the file"))
        return np.stack(pictures)

    def blocks(self, source: Source, spec: VideoSpec, limits: Limits, window_s: float) -> Iterator[Array]:
        for picture in _sampled(source, spec, limits, 0, math.inf, window_s * spec.frame_rate_hz):
            yield picture[None]

    def loaded(self, spec: VideoSpec) -> tuple[str, tuple[int | None, ...]]:
        return "uint8", (None, None, None, COLORS)

    def layout(self, spec: VideoSpec) -> Layout:
        """Return a (time, height, width) grid of patches; by default 16 x 28 x 28 = 12,544 inputs of 384 values."""
        shape = (spec.num_frames, *spec.size)
        grid = tuple(side // patch for side, patch in zip(shape, spec.patch, strict=True))
        if 0 in grid:
            raise UsageError(f"inputs.video.patch {list(spec.patch)} is larger than the clip, {list(shape)}")
        volume = math.prod(spec.patch)
        return Layout.of_grid(spec, grid, COLORS * volume, **color_statistics(spec, COLORS, volume))

    def prepare(self, raw: Array, spec: VideoSpec, rng: Rng | None, start_s: float | None = None) -> ByteArray:
        """Return the clip from `start_s` on as ((T, *size) // patch, 3 x patch volume) uint8.

        Without `rng`: the centre crop of `eval_crop`; with `rng`: one Inception crop, mirror and recolouring for all.
        """
        frames = raw[_clip(len(raw), spec, rng, start_s)]
        box = center_box(frames[0], spec, spec.size) if rng is None else random_box(frames[0], spec, spec.size, rng)
        left, top, right, bottom = box
        frames = frames[:, top:bottom, left:right]
        changes: list[Change] = []
        if rng is not None and rng.random() < spec.flip:
            changes.append(ImageOps.mirror)
        if rng is not None and spec.color:
            changes.append(recoloring(frames, spec.color, rng))
        return ByteArray(patchify(_resized(frames, spec.size, None if rng is None else 3.0, changes), spec.patch))

    def in_words(self, spec: VideoSpec) -> str:
        frames = f"{self.clip_s(spec):.3g} s as {spec.num_frames} frames of {spec.size[0]} x {spec.size[1]}"
        return f"{frames}, {' x '.join(map(str, spec.patch))} patches"

    def declared(self, source: Source, limits: Limits) -> dict[str, Any]:
        return {"seconds": round(self.duration_s(source, limits), 3)}

    def survey(self, spec: VideoSpec, sources: Sequence[Source], limits: Limits) -> list[str]:
        seconds = []
        for source in sources:
            with suppress(PerceiverError):
                seconds.append(self.duration_s(source, limits))
        return lengths_in_words(seconds, self.clip_s(spec))

    def sketch(self, raw: Array, spec: VideoSpec) -> Array:
        """Return SKETCH_FRAMES pictures of 8 x 8 pixels, without their mean."""
        places = np.linspace(0, len(raw) - 1, SKETCH_FRAMES).astype(int)
        height, width = raw.shape[1:3]
        small = np.stack([resize(raw[at], (0, 0, width, height), (8, 8)) for at in places]).astype(np.float32)
        return np.asarray(small - small.mean()).reshape(-1)

    def viewed(self, spec: VideoSpec) -> VideoSpec:
        """Return `spec` with the crops of training, which are mild by default, and its mirror alone."""
        return spec.model_copy(update={"color": 0.0})

    def num_views(self, spec: VideoSpec) -> int:
        return spec.eval_windows


MODALITY = VideoModality()
register(MODALITY)


def _sampled(source: Source, spec: VideoSpec, limits: Limits, first: int, stop: float, held: float) -> Iterator[Array]:
    """Yield the picture shown at each instant k / rate, from k = `first` to `stop` - 1 or the end of the file.

    held: the number of pictures that the caller keeps at a time, whose bytes are checked against the limits.
    """
    rate_hz = spec.frame_rate_hz
    frames = _frames(source, spec, limits, first / rate_hz, held)
    k, shown = first, next(frames, None)
    while shown is not None and k < stop:
        following = next(frames, None)
        end_s = shown.end_s if following is None else following.start_s
        source.check_limit(max(shown.start_s, end_s), "seconds", "video_seconds", limits)
        after = math.ceil(end_s * rate_hz)
        if following is None and after <= k == first <= after + 1:  # the last frame may end before its declared end
            after = k + 1
        if k < (after := int(min(stop, after))):
            yield from repeat(shown.picture(), after - k)
            k = after
        shown = following


def _clip(total: int, spec: VideoSpec, rng: Rng | None, start_s: float | None) -> Array:
    """Return the indices of a clip's frames among `total` frames: from `start_s`, a random or a central frame on.

    A video shorter than the clip is repeated, or its first and last frames are held, as `spec.short` says.
    """
    spare = total - spec.num_frames
    if start_s is not None:
        start = min(round(start_s * spec.frame_rate_hz), max(0, spare))
    elif rng is None:
        start = max(0, spare // 2)
    elif spare < 0 and spec.short == "loop":
        start = int(rng.integers(total))
    else:
        start = int(rng.integers(min(0, spare), max(0, spare) + 1))
    indices = np.arange(start, start + spec.num_frames)
    return indices % total if spec.short == "loop" else indices.clip(0, total - 1)


def _frames(source: Source, spec: VideoSpec, limits: Limits, start_s: float, held: float) -> Iterator[TimedFrame]:
    """Return the frames of a file, from the frame shown at `start_s` or an earlier one on."""
    head = source.head()
    if container.format_of(head, source.name) is not None:
        return _video(source, spec, limits, start_s, held)
    if image.MODALITY.sniff(head, source.name):
        return _animation(source, spec, limits)
    raise DataError(f"{source.shown}: not a video by its content", f"expected {MODALITY.formats}")


def _video(source: Source, spec: VideoSpec, limits: Limits, start_s: float, held: float) -> Iterator[TimedFrame]:
    """Yield the frames of a container, after a check of the decoded bytes of `held` pictures."""
    with container.open_track(source, limits, "video") as track:
        canvas = _Canvas(source, track.stream.codec_context, spec, limits)
        duration_s = track.duration_s
        source.check_limit(duration_s, "seconds", "video_seconds", limits)
        pictures = max(1.0, min(held, (duration_s - start_s) * spec.frame_rate_hz))
        source.check_decoded(pictures * math.prod(canvas.size), COLORS, limits)
        slack_s = min(track.tick_s / 2, MAX_SLACK_S) + EPSILON_S
        before_s = None
        for time_s, frame in track.frames(start_s):
            length_s = (frame.duration or 0) * float(frame.time_base) or track.step_s
            if length_s == 0 and before_s is not None:
                length_s = time_s - before_s
            picture = as_data_errors(source, "file")(partial(canvas, frame))
            yield TimedFrame(time_s - slack_s, time_s + length_s - slack_s, picture)
            before_s = time_s


class _Canvas:
    """Makes upright RGB arrays (H, W, 3) uint8 of decoded frames, at the size of `_kept_size`."""

    def __init__(self, source: Source, codec: Any, spec: VideoSpec, limits: Limits) -> None:
        from av.video.reformatter import VideoReformatter

        self.source, self.limits = source, limits
        # One each: both keep their setup between frames.
        self.resize, self.convert = VideoReformatter(), VideoReformatter()
        aspect = float(codec.sample_aspect_ratio or 1)  # width of a pixel by its height
        _check_pixels(source, codec, limits)
        square = max(1, round(codec.width * (aspect if MIN_PIXEL_ASPECT < aspect < MAX_PIXEL_ASPECT else 1.0)))
        self.size = _kept_size(codec.height, square, spec)
        self.turned_size = _kept_size(square, codec.height, spec)[::-1]  # before the frame is transposed

    def __call__(self, frame: Any) -> Array:
        _check_pixels(self.source, frame, self.limits)
        turned, upside_down, mirrored = _orientation(frame)
        height, width = self.turned_size if turned else self.size
        if (height, width) != (frame.height, frame.width) and frame.format.name in PLANAR:
            # Two steps are twice as fast as one, which FFmpeg computes without vector instructions.
            frame = self.resize.reformat(frame, width, height, frame.format.name, interpolation="BILINEAR", threads=1)
        frame = self.convert.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        picture: Array = frame.to_ndarray()
        if turned:
            picture = picture.transpose(1, 0, 2)
        return np.ascontiguousarray(picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def _check_pixels(source: Source, frame: Any, limits: Limits) -> None:
    source.check_limit(frame.width * frame.height, "pixels in a frame", "video_pixels", limits)
    source.check_limit(max(frame.width, frame.height), "pixels along a side of a frame", "video_side", limits)


def _kept_size(height: int, width: int, spec: VideoSpec) -> tuple[int, int]:
    """Return the (height, width) at which the evaluation crop is `spec.size`, or the arguments if they are smaller."""
    scale = max(spec.size[0] / height, spec.size[1] / width) / spec.eval_crop
    return (round(height * scale), round(width * scale)) if scale < 1 else (height, width)


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Return the steps that make a stored frame upright: whether to transpose it, then turn it over, then mirror it."""
    from av.sidedata.sidedata import SideDataContainer

    # frame.side_data would make a reference cycle, which keeps the frame until the next garbage collection.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    if matrix is None or len(bytes(matrix)) != 36:
        return False, False, False
    # The matrix ((a, b, u), (c, d, v), (x, y, w)) shows column p and row q at (a p + c q + x, b p + d q + y).
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _is_animated(head: bytes) -> bool:
    """Return whether a GIF, WebP, AVIF or PNG declares in its first bytes that it is an animation."""
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        return len(head) > 20 and bool(head[20] & 2)
    if head[4:12] == b"ftypavis":
        return True
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        before, name, after = head.partition(b"acTL")  # the chunk that counts the frames
        return bool(name) and b"IDAT" not in before and int.from_bytes(after[:4], "big") > 1
    return head[:6] in (b"GIF87a", b"GIF89a") and _is_animated_gif(head)


def _is_animated_gif(head: bytes) -> bool:
    """Return whether a GIF has a second frame; if its first frame fills `head`, whether it has a duration."""
    at, frames, timed = 13, 0, False
    if len(head) > at and head[10] & 0x80:
        at += 3 << (head[10] & 7) + 1  # the colour table
    while at + 10 < len(head) and head[at] in b"\x21\x2c":
        if head[at] == 0x2C:
            frames += 1
            at += 11 + (3 << (head[at + 9] & 7) + 1 if head[at + 9] & 0x80 else 0)
        else:
            timed |= head[at + 1] == 0xF9 and head[at + 4 : at + 6] != b"\0\0"
            timed |= head[at + 3 : at + 14] in (b"NETSCAPE2.0", b"ANIMEXTS1.0")
            at += 2
        while at < len(head) and head[at]:  # blocks of data, each after its length
            at += 1 + head[at]
        at += 1
    return frames > 1 or (timed and head[at : at + 1] != b"\x3b")  # 0x3b ends the file


def _animation(source: Source, spec: VideoSpec, limits: Limits) -> Iterator[TimedFrame]:
    """Yield the frames of a GIF, WebP or PNG from the first on: each frame is drawn over the previous one."""
    with image.open_image(source, limits) as file:
        _check_pixels(source, file, limits)
        size = _kept_size(file.height, file.width, spec)
        time_s = 0.0
        # A PNG may begin with a still image for programs that cannot show animations.
        for frame in islice(ImageSequence.Iterator(file), int(getattr(file, "default_image", False)), None):
            frame.load()
            length_s = float(frame.info.get("duration", 0)) / 1000
            length_s = length_s if length_s >= SHORTEST_S else DEFAULT_S
            picture = as_data_errors(source, "file")(partial(_picture, frame.copy(), size))
            yield TimedFrame(time_s - EPSILON_S, time_s + length_s - EPSILON_S, picture)
            time_s += length_s


def _picture(file: Image.Image, size: tuple[int, int]) -> Array:
    values = opaque(file, "RGB")
    return resize(values, (0, 0, file.width, file.height), size)


def _resized(frames: Array, size: tuple[int, int], reducing_gap: float | None, changes: Sequence[Change]) -> Array:
    """Return (T, *size, 3) uint8, resized bilinearly as usual for videos, with the same changes to each frame."""
    if frames.shape[1:3] == size and not changes:
        return frames
    resized = np.empty((len(frames), *size, COLORS), np.uint8)
    for frame, target in zip(frames, resized, strict=True):
        shown = Image.fromarray(frame).resize((size[1], size[0]), Resampling.BILINEAR, reducing_gap=reducing_gap)
        for change in changes:
            shown = change(shown)
        target[...] = np.asarray(shown)
    return resized
