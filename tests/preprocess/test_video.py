"""Video: each instant has the frame shown then, spans and windows are parts of the whole, hostility costs nothing."""

from __future__ import annotations

import gc
import io
import math
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from perceiver_cli.errors import AbsentError, DataError, LimitError, UsageError
from perceiver_cli.preprocess import container, modality
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.video import MODALITY as VIDEO, VideoSpec
from tests.conftest import decode, detect, lack

LIMITS = Limits()
HEIGHT, WIDTH, RATE = 48, 64, 25
KEPT = {"size": (HEIGHT, WIDTH), "eval_crop": 1.0}  # frames stay as they are


def grey(level: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def levels(count: int) -> list[int]:
    return [20 + 7 * (11 * i % 30) for i in range(count)]


@lru_cache
def encoded(
    kind: str = "mp4",
    codec: str = "libx264",
    count: int = 50,
    times: tuple[int, ...] | None = None,  # in milliseconds
    size: tuple[int, int] = (HEIGHT, WIDTH),
    flags: str = "",
    **options: str,
) -> bytes:
    """Return a video of grey frames, `levels`, each far from its neighbours."""
    path = io.BytesIO()
    muxer = {"movflags": flags} if flags else {"mpegts_m2ts_mode": "1"} if kind == "m2ts" else {}
    with av.open(path, "w", format={"m2ts": "mpegts"}.get(kind, kind), options=muxer) as file:
        stream = file.add_stream(codec, rate=RATE, options={"threads": "1", "b": "4000000", **options})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index, level in enumerate(levels(count)):
            frame = av.VideoFrame.from_ndarray(grey(level, *size))
            if times:
                frame.pts, frame.time_base = times[index], stream.codec_context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path.getvalue()


def load(data: bytes, limits: Limits = LIMITS, span: tuple[float, float] | None = None, **spec: object) -> np.ndarray:
    found = VIDEO.load(Source("x.mp4", data), VideoSpec.model_validate({**KEPT, **spec}), limits, span)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    return found


def shown(frames: np.ndarray) -> list[int]:
    """Return which of `levels` each frame is."""
    known = np.array(levels(30))  # they repeat after that
    middle = frames[:, HEIGHT // 2, WIDTH // 2].mean(axis=1)
    distance = np.abs(middle[:, None] - known)
    assert distance.min(axis=1).max() < 3.4
    return [int(index) for index in distance.argmin(axis=1)]


def refused(data: bytes | Path, limits: Limits = LIMITS, **spec: object) -> DataError:
    """Return the DataError that a video meets, which is one line, quick and takes next to no memory."""
    source = Source("x.mp4", data) if isinstance(data, bytes) else Source(str(data))
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(DataError) as caught:
            decode(source, VideoSpec.model_validate({**KEPT, **spec}), limits)
        assert time.perf_counter() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- frames and times

CONTAINERS = [
    ("mp4", "libx264"),  # with B-frames
    ("mov", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx"),
    ("avi", "mpeg4"),
    ("mpeg", "mpeg1video"),
    ("mpegts", "libx264"),
    ("m2ts", "libx264"),  # AVCHD: packets of 192 bytes
    ("mpeg1video", "mpeg1video"),  # without a container
    ("asf", "wmv2"),
    ("flv", "flv"),
    ("ogg", "libvpx"),
    ("mxf", "mpeg2video"),
]
STREAMS = ("mpeg", "mpegts", "m2ts", "mpeg1video", "mxf")  # declare no size; what is there of them is read


@pytest.mark.parametrize(("kind", "codec"), CONTAINERS)
def test_every_container_decodes_to_what_was_written(kind: str, codec: str) -> None:
    data = encoded(kind, codec, 30)
    source = Source("no-name", data)
    assert detect(source) == "video"
    found = load(data)
    assert found.shape == (30, HEIGHT, WIDTH, 3)
    assert shown(found) == list(range(30))
    assert abs(VIDEO.duration_s(source, LIMITS) - 30 / RATE) < (0.15 if kind == "mpeg" else 0.05)  # it declares none


@pytest.mark.parametrize(("kind", "codec"), CONTAINERS)
def test_a_span_is_a_part_of_the_whole(kind: str, codec: str) -> None:
    options = {"g": "12"} | ({"bf": "2"} if "264" in codec else {})
    data = encoded(kind, codec, 60, **options)
    for rate in (25.0, 10.0):
        whole = load(data, frame_rate_hz=rate)
        for start in np.arange(0, 2.3, 0.17):
            first = round(start * rate)
            part = load(data, span=(start, 0.4), frame_rate_hz=rate)
            assert np.array_equal(part, whole[first : first + round(0.4 * rate)]), (rate, start)
    assert np.array_equal(load(data, span=(2.2, 9.0)), load(data)[55:])


def test_open_groups_of_pictures_are_sought_right() -> None:
    data = encoded("mp4", "libx264", 60, **{"x264-params": "keyint=12:open_gop=1:bframes=3:b-adapt=0:scenecut=0"})
    whole = load(data)
    for first in range(60):
        assert np.array_equal(load(data, span=(first / RATE, 0.12)), whole[first : first + 3]), first


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("mpegts", "libx264")])
def test_windows_are_parts_of_the_whole(kind: str, codec: str) -> None:
    data = encoded(kind, codec, 60)
    whole, source = load(data), Source("x", data)
    windows = list(VIDEO.windows(source, VideoSpec.model_validate(KEPT), LIMITS, 0.8, 0.48))
    assert [round(start, 3) for start, _ in windows] == [0.0, 0.48, 0.96, 1.44, 1.6]
    for start, window in windows:
        assert np.array_equal(window, whole[round(start * RATE) :][:20])
    ((start, window),) = VIDEO.windows(source, VideoSpec.model_validate(KEPT), LIMITS, 5.0, 1.0)
    assert start == 0
    assert np.array_equal(window, whole)


def test_windows_hold_no_more_than_one() -> None:
    data = encoded(count=300)
    spec = VideoSpec.model_validate(KEPT)
    frame = HEIGHT * WIDTH * 3
    tracemalloc.start()
    try:
        count = sum(1 for _ in VIDEO.windows(Source("x", data), spec, LIMITS, 0.8, 0.4))
        assert count == 29
        assert tracemalloc.get_traced_memory()[1] < 60 * frame + len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [5.0, 12.5, 25.0, 30.0, 60.0])
def test_each_instant_has_the_frame_shown_then(rate: float) -> None:
    found = shown(load(encoded(count=25), frame_rate_hz=rate))
    assert found == [int(k / rate * RATE + 1e-9) for k in range(math.ceil(rate))]


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_variable_frame_rates(kind: str) -> None:
    times = (0, 40, 80, 500, 520, 540, 900, 1300)
    data = encoded(kind, "libx264", 8, times)
    found = shown(load(data, frame_rate_hz=50.0))
    expected = [int(np.searchsorted(times, 20 * k, side="right")) - 1 for k in range(len(found))]
    assert found == expected
    assert len(found) > 65
    for start in (0.04, 0.3, 0.51, 1.0, 1.31):
        first = round(start * 50)
        assert shown(load(data, span=(start, 0.2), frame_rate_hz=50.0)) == found[first : first + 10]


def test_times_that_a_container_rounds_lose_no_frame() -> None:
    times = tuple(round(1000 * i / 30) for i in range(30))  # 33, 67, 100 ...
    assert shown(load(encoded("matroska", "libx264", 30, times), frame_rate_hz=30.0))[:30] == list(range(30))


def turned(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Return an MP4 with another display matrix."""
    at = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


def corner_video() -> bytes:
    """Return an MP4 with red at the top left, green at the top right, blue at the bottom left."""
    pixels = grey(255)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = io.BytesIO()
    with av.open(path, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"threads": "1", "crf": "5"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        file.mux(stream.encode(None))
    return path.getvalue()


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),  # a phone held upright
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    ],
)
def test_rotation_metadata(matrix: tuple[int, ...], upright: Callable[[np.ndarray], np.ndarray]) -> None:
    plain = corner_video()
    expected = upright(load(plain)[0])
    found = load(turned(plain, *matrix), size=expected.shape[:2])[0]
    assert np.array_equal(found, expected)


def test_frames_are_freed_as_soon_as_they_were_read() -> None:
    """PyAV's `frame.side_data` is a cycle: frames would stay until Python looks for those, 55 MB of a small film."""
    data = encoded()
    gc.collect()
    gc.disable()
    try:
        load(data)
        assert not any(type(left) is av.VideoFrame for left in gc.get_objects())
    finally:
        gc.enable()


def test_colours_are_those_that_were_written() -> None:
    frame = load(corner_video())[0].astype(int)
    corners = frame[12, 16], frame[12, 48], frame[36, 16], frame[36, 48]
    for found, expected in zip(corners, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], strict=True):
        assert np.abs(found - expected).max() < 12


def test_pixels_that_are_not_square() -> None:
    path = io.BytesIO()
    with av.open(path, "w", format="matroska") as file:
        stream = file.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(grey(99))))
        file.mux(stream.encode(None))
    assert load(path.getvalue(), size=(48, 96)).shape == (1, 48, 96, 3)


def test_frames_are_kept_at_the_size_that_the_evaluation_crop_needs() -> None:
    data = encoded(count=3, size=(96, 160))
    spec = VideoSpec(size=(28, 28), eval_crop=0.875, num_frames=2, patch=(1, 1, 1))
    raw = VIDEO.load(Source("x", data), spec, LIMITS)
    assert raw.shape == (3, 32, 53, 3)
    assert np.array_equal(VIDEO.prepare(raw, spec, None).values, raw[0:2, 2:30, 12:40])
    assert load(data, size=(224, 224)).shape == (3, 96, 160, 3)  # never enlarged


# ---------------------------------------------------------------- animations


def animation(kind: str, durations: list[int], **options: object) -> bytes:
    frames = [Image.fromarray(grey(level)) for level in levels(len(durations))]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=durations, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GIF", {"loop": 0}), ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("AVIF", {"quality": 100})],
)
def test_animations_are_videos_by_their_times(kind: str, options: dict[str, object]) -> None:
    data = animation(kind, [100, 200, 300], **options)
    source = Source("x", data)
    assert detect(source) == "video"
    assert shown(load(data, frame_rate_hz=10.0)) == [0, 1, 1, 2, 2, 2]
    assert shown(load(data, span=(0.2, 0.2), frame_rate_hz=10.0)) == [1, 2]
    assert VIDEO.duration_s(source, LIMITS) == pytest.approx(0.6)
    windows = VIDEO.windows(source, VideoSpec(frame_rate_hz=10.0, **KEPT), LIMITS, 0.4, 0.2)
    assert [shown(window) for _, window in windows] == [[0, 1, 1, 2], [1, 2, 2, 2]]
    assert modality("image").sniff(source.head(), "x")  # its first frame, when asked for


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_still_among_animated_ones_is_a_film_of_one_frame(kind: str) -> None:
    still = io.BytesIO()
    Image.fromarray(grey(50)).save(still, kind)
    source = detected(Source("x", still.getvalue()))
    assert source.kinds == ("image", "video")
    frames = decode(source, VideoSpec.model_validate(KEPT), LIMITS)
    assert frames.shape[1:] == (HEIGHT, WIDTH, 3)
    assert np.abs(frames.astype(int) - 50).max() < 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_still_images_are_no_videos(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, kind)
    for data in (file.getvalue(), animation(kind, [100])):
        assert detect(Source("x", data)) == "image"
        if kind == "PNG":
            assert "image by its content, expected video" in str(refused(data))


def test_a_large_animation_is_one_by_its_first_frame_and_a_hasty_one_is_slowed() -> None:
    noise = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype=np.uint8)) for i in range(3)
    ]
    file = io.BytesIO()
    noise[0].save(file, "GIF", save_all=True, append_images=noise[1:], duration=100)
    assert detect(Source("x", file.getvalue())) == "video"
    assert VIDEO.duration_s(Source("x", animation("GIF", [0, 0, 0], loop=0)), LIMITS) == pytest.approx(0.3)


def test_the_still_that_stands_in_for_an_animated_png_is_not_shown() -> None:
    found = load(animation("PNG", [100, 100], default_image=True), frame_rate_hz=10.0)
    assert shown(found) == [1]


# ---------------------------------------------------------------- clips


def test_the_papers_clip_is_12544_by_384() -> None:
    layout = VIDEO.layout(VideoSpec(bands=16))
    assert (layout.grid, layout.num_inputs, layout.channels) == ((16, 28, 28), 12_544, 384)
    assert layout.num_channels == 384 + 99  # and 4 of modality: Perceiver IO's 487
    assert len(layout.mean) == len(layout.std) == 384
    assert VIDEO.clip_s(VideoSpec()) == 1.28
    raw = np.random.default_rng(0).integers(0, 256, (32, 256, 256, 3), dtype=np.uint8)
    values = VIDEO.prepare(raw, VideoSpec(), None).values
    assert values.shape == layout.prepared_shape
    assert values.dtype == np.uint8
    assert np.array_equal(values[3, 4, 5], raw[6:8, 48:56, 56:64].reshape(-1))


def test_raw_pixels() -> None:
    spec = VideoSpec(num_frames=4, size=(6, 8), patch=(1, 1, 1), eval_crop=1.0)
    raw = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    assert VIDEO.layout(spec).prepared_shape == (4, 6, 8, 3)
    assert np.array_equal(VIDEO.prepare(raw, spec, None).values, raw)


@pytest.mark.parametrize(
    "spec",
    [
        {"num_frames": 1},  # fewer than a patch
        {"size": (4, 224)},
        {"max_resolution": (10.0, 10.0)},
        {"crop_area": (0.5, 0.1)},
        {"mean": (0.5, 0.5)},
    ],
)
def test_layouts_that_cannot_be(spec: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="video"):
        VIDEO.layout(VideoSpec.model_validate(spec))


SMALL = {"num_frames": 4, "frame_rate_hz": 10.0, "size": (8, 8), "patch": (1, 8, 8), "eval_crop": 1.0}


def clip(count: int, seed: int | None = None, start_s: float | None = None, **spec: object) -> list[int]:
    """Return which frames are in a clip of a video of `count`."""
    raw = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    rng = None if seed is None else np.random.default_rng(seed)
    values = VIDEO.prepare(raw, VideoSpec.model_validate({**SMALL, **spec}), rng, start_s).values
    assert values.shape == (4, 1, 1, 192)
    assert (values == values[..., :1]).all()
    return [int(level) for level in values[:, 0, 0, 0]]


def test_a_clip_is_where_it_is_asked_for_central_or_random() -> None:
    assert clip(10) == [3, 4, 5, 6]
    assert clip(10, start_s=0.2) == [2, 3, 4, 5]
    assert clip(10, 1, start_s=0.2) == [2, 3, 4, 5]
    assert clip(10, start_s=5.0) == [6, 7, 8, 9]
    starts = {clip(10, seed)[0] for seed in range(60)}
    assert starts == set(range(7))


def test_a_short_video_is_repeated_or_held() -> None:
    assert clip(3) == [0, 1, 2, 0]
    assert clip(3, short="hold") == [0, 1, 2, 2]
    assert clip(3, start_s=0.2) == [0, 1, 2, 0]
    assert clip(1, 5) == [0, 0, 0, 0]
    assert {tuple(clip(3, seed)) for seed in range(30)} == {(0, 1, 2, 0), (1, 2, 0, 1), (2, 0, 1, 2)}
    assert {tuple(clip(3, seed, short="hold")) for seed in range(30)} == {(0, 1, 2, 2), (0, 0, 1, 2)}


def test_one_crop_and_one_mirror_and_colour_for_all_frames() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    raw = np.stack([frame] * 4)
    spec = VideoSpec(num_frames=4, size=(8, 8), patch=(1, 8, 8), flip=0.5, color=0.4)
    seen = set()
    for seed in range(20):
        values = VIDEO.prepare(raw, spec, np.random.default_rng(seed)).values
        assert (values == values[:1]).all()
        assert np.array_equal(values, VIDEO.prepare(raw, spec, np.random.default_rng(seed)).values)
        seen.add(values.tobytes())
    assert len(seen) == 20
    plain = VideoSpec(num_frames=4, size=(20, 30), patch=(1, 20, 30), crop_area=(1, 1), crop_aspect=(1, 1))
    flips = [VIDEO.prepare(raw, plain, np.random.default_rng(s)).values.reshape(raw.shape) for s in range(20)]
    assert all(np.array_equal(values, raw) for values in flips)  # no mirror unless asked for
    mirrored = VIDEO.prepare(raw, plain.model_copy(update={"flip": 1.0}), np.random.default_rng(0)).values
    assert np.array_equal(mirrored.reshape(raw.shape), raw[:, :, ::-1])


def test_recolouring_keeps_grey_grey() -> None:
    raw = np.stack([grey(100, 4, 4), grey(120, 4, 4)])
    spec = VideoSpec(num_frames=2, size=(4, 4), patch=(1, 4, 4), color=0.3)
    for seed in range(20):
        found = VIDEO.prepare(raw, spec, np.random.default_rng(seed)).values.reshape(raw.shape).astype(int)
        assert np.ptp(found, axis=-1).max() <= 1
        assert 0.7 * 100 - 8 <= found[0].mean() <= 1.3 * 100 + 8
        assert found[1].mean() > found[0].mean()


# ---------------------------------------------------------------- hostile and odd files


@pytest.mark.parametrize("share", [0.95, 0.6, 0.1])
@pytest.mark.parametrize(("kind", "codec"), [c for c in CONTAINERS if c[0] not in STREAMS])
def test_truncated_files_are_refused(kind: str, codec: str, share: float) -> None:
    data = encoded(kind, codec, 30)
    assert "truncated" in str(refused(data[: int(len(data) * share)]))


@pytest.mark.parametrize("cut", [0, 77])
@pytest.mark.parametrize("kind", ["mpegts", "m2ts"])
def test_a_recording_that_begins_anywhere_is_a_film_by_its_suffix(kind: str, cut: int) -> None:
    data = encoded(kind, "libx264", 60, g="12")[cut:]
    assert detect(Source("00001.MTS", data)) == "video"
    assert len(VIDEO.load(Source("00001.MTS", data), VideoSpec.model_validate(KEPT), LIMITS)) >= 47


def test_an_mp4_without_an_index_says_so() -> None:
    data = encoded()
    at = data.index(b"moov")
    assert "no index (moov)" in str(refused(data[: at - 4]))  # a camera lost power
    assert "no index (moov)" in str(refused(data[:at] + b"free" + data[at + 4 :]))


@pytest.mark.parametrize("kind", ["matroska", "flv", "asf", "ogg"])
def test_a_film_that_declares_more_than_it_holds(kind: str) -> None:
    data = encoded(kind, {"matroska": "libx264", "flv": "flv", "asf": "wmv2", "ogg": "libvpx"}[kind], 60)
    if kind == "matroska":
        at = data.index(b"\x44\x89") + 3
        data = data[:at] + struct.pack(">d", 10_000.0) + data[at + 8 :]
    elif kind == "flv":
        at = data.index(b"\0\x08duration\0") + 11
        data = data[:at] + struct.pack(">d", 10.0) + data[at + 8 :]
    elif kind == "asf":
        at = data.index(container.ASF_FILE) + 64  # play duration
        data = data[:at] + struct.pack("<Q", 131_000_000) + data[at + 8 :]
    else:
        at = data.rindex(b"OggS")  # without its last page, but one that ends whole
        assert len(load(data[:at])) < 60
        return
    assert re.search(r"found 2\.\d+ of 1\d(\.\d)? s: truncated or damaged", str(refused(data)))


def test_fragmented_files_are_read_and_refused_when_cut() -> None:
    data = encoded("mp4", "mpeg4", 20, flags="frag_keyframe+empty_moov", g="5")
    whole = load(data)
    assert shown(whole) == list(range(20))
    assert np.array_equal(load(data, span=(0.5, 0.2)), whole[12:17])
    assert "truncated" in str(refused(data[: len(data) * 2 // 3]))
    at = data.index(b"trun")
    bomb = data[: at + 8] + struct.pack(">I", 80_000_000) + data[at + 12 :]
    assert "declared 80000000 bytes of samples" in str(refused(bomb))


def test_a_count_of_samples_that_cannot_be() -> None:
    data = encoded()
    at = data.index(b"stsz")
    bomb = data[: at + 8] + struct.pack(">2I", 1, 20_000_000) + data[at + 16 :]
    assert "declared 20000000 bytes of samples" in str(refused(bomb))


def test_boxes_within_boxes_cost_nothing() -> None:
    """Each box was handed up through all that hold it: 20 s for these 800 kB."""
    nested = struct.pack(">I4s", 8, b"free") * 100_000
    for name in (b"moov", b"trak", b"mdia", b"minf") * 200:
        nested = struct.pack(">I4s", len(nested) + 8, name) + nested
    begin = time.process_time()
    refused(struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"isom") + nested)
    assert time.process_time() - begin < 5


def test_claimed_durations_cost_nothing() -> None:
    data = encoded("matroska", "libx264")
    at = data.index(b"\x44\x89") + 3
    year = data[:at] + struct.pack(">d", 365 * 86_400_000.0) + data[at + 8 :]
    error = refused(year)
    assert isinstance(error, LimitError)
    assert "31536000 seconds > 3600; pass --limit video_seconds=31536000" in str(error)
    with pytest.raises(LimitError):
        VIDEO.duration_s(Source("x", year), LIMITS)
    data = encoded()
    at = data.index(b"stts") + 16
    refused(data[:at] + struct.pack(">I", 0x0FFFFFFF) + data[at + 4 :])  # its frames would last 145 hours
    long = encoded("matroska", "libx264", 3, (0, 1000, 4_000_000))  # true, but longer than allowed
    assert "--limit video_seconds=" in str(refused(long, frame_rate_hz=1.0))
    assert len(load(long, Limits(video_seconds=5000), frame_rate_hz=0.1)) == 401


def test_limits_are_checked_before_decoding() -> None:
    assert "3072 pixels in a frame > 3000; pass --limit video_pixels=3072" in str(
        refused(encoded(), Limits(video_pixels=3000))
    )
    assert "decoded_bytes" in str(refused(encoded(), Limits(decoded_bytes=100_000)))
    assert "file_bytes" in str(refused(encoded(), Limits(file_bytes=100)))
    assert len(load(encoded(), Limits(decoded_bytes=100_000), span=(1.0, 0.4))) == 10
    gif = animation("GIF", [100, 100], loop=0)
    assert "video_pixels" in str(refused(gif, Limits(video_pixels=3000)))
    assert "video_seconds" in str(refused(gif, Limits(video_seconds=0.05)))
    assert "decoded_bytes" in str(refused(gif, Limits(decoded_bytes=15_000), frame_rate_hz=50.0))


def jpeg_video(height: int, width: int, lie: tuple[int, int] | None = None) -> bytes:
    """Return an AVI of JPEG frames, whose own headers may say another size than that of the AVI."""
    path = io.BytesIO()
    with av.open(path, "w", format="avi") as file:
        stream = file.add_stream("mjpeg", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey(99, height, width))))
        file.mux(stream.encode(None))
    data = bytearray(path.getvalue())
    at = -1
    while lie and (at := data.find(b"\xff\xc0", at + 1)) >= 0:
        data[at + 5 : at + 9] = struct.pack(">2H", *lie)
    return bytes(data)


def test_wide_frames_are_refused_before_they_are_allocated() -> None:
    wide = encoded("mp4", "mpeg4", 1, size=(2176, 8176))
    limits = Limits(video_pixels=16_000_000)
    assert "17790976 pixels in a frame > 16000000" in str(refused(wide, limits))
    strip = jpeg_video(64, 16_384)
    assert "16384 pixels along a side of a frame > 8192; pass --limit video_side=16384" in str(refused(strip))
    assert len(load(strip, Limits(video_side=16_384))) == 3
    assert "video_side" in str(refused(animation("GIF", [100, 100], loop=0), Limits(video_side=60)))
    assert len(load(jpeg_video(HEIGHT, WIDTH))) == 3
    refused(jpeg_video(HEIGHT, WIDTH, lie=(16_384, 16_384)))  # caught by the decoder
    assert "pixels in a frame" in str(refused(jpeg_video(HEIGHT, WIDTH, lie=(64, 64)), Limits(video_pixels=3500)))


def test_frames_and_packets_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_FRAMES_PER_S", 10)
    assert "more than 10 frames a second" in str(refused(encoded()))
    monkeypatch.undo()
    monkeypatch.setattr(container, "SPARE_PACKET_BYTES", -2 * len(encoded()))
    assert "again and again" in str(refused(encoded()))


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile {0}\n"
DASH = "<?xml version='1.0'?><MPD><BaseURL>{0}</BaseURL></MPD>"


@pytest.mark.parametrize("text", [HLS, CONCAT, DASH])
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "concat:list|other", "img%03d.png"])
def test_a_playlist_opens_nothing_else(text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(encoded())
    path = tmp_path / name
    path.write_text(text.format(secret))
    monkeypatch.chdir(tmp_path)
    secret.chmod(0)
    for given in (path, Path(name)):
        assert any(words in str(refused(given)) for words in ("unknown format", "an XML document"))
        with pytest.raises(DataError, match="not a video by its content"):
            VIDEO.load(Source(str(given)), VideoSpec(), LIMITS)
        with pytest.raises(DataError):
            VIDEO.duration_s(Source(str(given)), LIMITS)


@pytest.mark.parametrize("name", ["concat:a|b", "http://h/x.mp4", "file:x.mp4", "tcp://127.0.0.1:1", "pipe:0", "-"])
def test_names_are_always_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        VIDEO.load(Source(name), VideoSpec(), LIMITS)
    if "/" not in name:
        Path(name).write_bytes(encoded())
        assert len(VIDEO.load(Source(name), VideoSpec(), LIMITS)) == 50


def test_references_inside_a_container_are_refused() -> None:
    with pytest.raises(OSError, match="external reference refused: /etc/passwd"):
        container.refuse_reference("/etc/passwd", 1, {})


def test_a_video_without_pictures_and_one_of_a_single_frame() -> None:
    path = io.BytesIO()
    with av.open(path, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    data = path.getvalue()
    assert isinstance(refused(data), AbsentError)
    assert "no picture in it" in str(refused(data))
    with pytest.raises(AbsentError):
        VIDEO.duration_s(Source("x", data), LIMITS)
    with pytest.raises(AbsentError, match="no sound in it"):
        modality("audio").load(Source("x", encoded()), AudioSpec(), LIMITS)
    one = load(encoded(count=1))
    assert shown(one) == [0]
    assert VIDEO.prepare(one, VideoSpec(), None).values.shape == (16, 28, 28, 384)
    with pytest.raises(DataError, match="no frames at 3 s"):
        load(encoded(), span=(3.0, 1.0))


def test_what_holds_sound_only_is_sound() -> None:
    head = encoded("matroska", "libx264")
    assert detect(Source("a.mkv", head)) == "video"
    assert detect(Source("a.mka", head)) == "audio"
    assert detect(Source("a", b"\0\0\0\x20ftypM4A \0\0\2\0" + bytes(20))) == "audio"
    assert detect(Source("a.heic", b"\0\0\0\x20ftypheic\0\0\2\0" + bytes(20))) == "image"


def test_a_missing_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, "av")
    with pytest.raises(UsageError, match=r"pip install 'perceiver-cli\[video\]'"):
        VIDEO.load(Source("x", encoded()), VideoSpec(), LIMITS)
    assert len(load(animation("GIF", [100, 100], loop=0), frame_rate_hz=10.0)) == 2


@pytest.mark.parametrize("seed", [*CONTAINERS, ("GIF", ""), ("WEBP", "")])
def test_mutants_give_an_array_or_a_data_error(seed: tuple[str, str], capfd: pytest.CaptureFixture) -> None:
    kind, codec = seed
    data = encoded(kind, codec, 12) if codec else animation(kind, [100] * 4, loop=0)
    rng = np.random.default_rng(2)
    good, messages = 0, []
    for trial in range(40):
        mutant = bytearray(data)
        region = min(len(mutant), 1000) if trial % 2 else len(mutant)
        for at in rng.integers(0, region, rng.integers(1, 5)):
            mutant[at] = rng.integers(256)
        if trial % 7 == 0:
            del mutant[rng.integers(1, len(mutant)) :]
        start = time.perf_counter()
        try:
            found = load(bytes(mutant))
        except DataError as error:
            messages.append(str(error))
        else:
            good += 1
            assert found.ndim == 4
            assert found.size > 0
        assert time.perf_counter() - start < 5
    assert good
    assert messages
    assert not any("\n" in message for message in messages)
    assert capfd.readouterr().err == ""


def test_a_position_that_does_not_exist_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """PyAV printed a traceback for each seek of a damaged ASF to a place before its start."""
    data = bytearray(encoded("asf", "wmv2", 12))
    data[39:47] = b"\xff" * 8  # the size of an object
    (tmp_path / "x.asf").write_bytes(data)
    with suppress(DataError):
        VIDEO.duration_s(Source(str(tmp_path / "x.asf")), LIMITS)
    assert capfd.readouterr().err == ""


def test_a_picture_that_has_no_pixels_to_show_is_a_data_error() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(file, "TIFF")
    with pytest.raises(DataError, match="not finite numbers"):
        VIDEO.load(Source("x.tif", file.getvalue()), VideoSpec.model_validate(KEPT), LIMITS)
