"""Images: every mode to the right pixels, nothing but an array or a DataError, and the geometry of the paper."""

from __future__ import annotations

import io
import pickle
import random
import resource
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.preprocess import pixels
from perceiver_cli.preprocess.image import MODALITY, ImageSpec
from perceiver_cli.preprocess.pixels import to_image
from perceiver_cli.preprocess.randaugment import RANDAUGMENT
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import at_least, decode, detect

LIMITS = Limits()
COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 0], [200, 100, 50]]], np.uint8)
GREYS = np.array([[0, 17, 34], [128, 200, 255]], np.uint8)
PLAIN: dict[str, Any] = {"crop_area": (1, 1), "crop_aspect": (1, 1), "flip": 0.0}  # augments nothing


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def source(image: Image.Image, kind: str = "PNG", **options: Any) -> Source:
    return Source(f"test.{kind.lower()}", encoded(image, kind, **options))


def load(given: Source, limits: Limits = LIMITS, **spec: Any) -> np.ndarray:
    values = MODALITY.load(given, ImageSpec(**spec), limits)
    assert values.dtype == np.uint8
    assert values.ndim == 3
    assert values.flags.writeable
    return values


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture, which JPEG keeps well."""
    small = Image.fromarray(noise(4, 4, seed=seed))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# ---------------------------------------------------------------- modes


def _rgb_case(mode: str) -> Image.Image:
    return Image.fromarray(COLORS).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "PPM", 0),
        ("RGB", "WEBP", 0),
        ("RGBA", "PNG", 0),
        ("RGBA", "TIFF", 0),
        ("CMYK", "TIFF", 1),
        # Earlier versions of Pillow write fewer bytes than such a file needs.
        pytest.param(
            "YCbCr", "TIFF", 3, marks=pytest.mark.skipif(not at_least("pillow", "13"), reason="Pillow below 13")
        ),
        ("RGBX", "TIFF", 0),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
    ],
)
def test_colour_files(mode: str, kind: str, tolerance: int) -> None:
    image = Image.fromarray(COLORS)
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    values = load(source(image, kind, **options))
    assert np.abs(values.astype(int) - COLORS).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_modes(mode: str) -> None:
    image = photo(32, 48)
    expected = np.asarray(image.convert("L").convert("RGB") if mode == "L" else image).astype(int)
    values = load(source(image.convert(mode), "JPEG", quality=100, subsampling=0))
    assert np.abs(values - expected).mean() < 3


@pytest.mark.parametrize("mode", ["HSV", "LAB", "YCbCr", "CMYK", "RGBX", "RGBa", "PA"])
def test_modes_in_memory(mode: str) -> None:
    # Modes that no format here writes, yet a plugin may give.
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.buildTransform(srgb, lab, "RGB", "LAB").apply(Image.fromarray(COLORS))
    elif mode in ("RGBa", "PA"):
        image = Image.fromarray(COLORS).convert("RGBA").convert(mode)
    else:
        image = _rgb_case(mode)
    assert image.mode == mode
    flat = pixels.flatten(image)
    assert flat.mode == "RGB"
    assert np.abs(np.asarray(flat).astype(int) - COLORS).max() <= (
        25 if mode == "LAB" else 6
    )  # 8-bit LAB has no pure blue


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "L"), ("PNG", "LA"), ("PPM", "L"), ("TIFF", "L"), ("BMP", "L")])
@pytest.mark.parametrize("color", ["grey", "rgb", "auto"])
def test_grey_files(kind: str, mode: str, color: str) -> None:
    values = load(source(Image.fromarray(GREYS).convert(mode), kind), color=color)
    channels = 1 if color == "grey" else 3
    assert values.shape == (2, 3, channels)
    assert (values == GREYS[..., None]).all()


def test_colour_to_grey_is_luma() -> None:
    values = load(source(Image.fromarray(COLORS)), color="grey")
    expected = COLORS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(values[..., 0] - expected).max() <= 1


def test_one_bit() -> None:
    bits = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        values = load(source(Image.fromarray(bits).convert("1"), kind), color="grey")
        assert (values[..., 0] == bits).all(), kind


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
    ],
)
def test_alpha_on_white(mode: str, pixel: Any, expected: Any) -> None:
    values = load(source(Image.new(mode, (3, 2), pixel)))
    assert (values == np.array(expected, np.uint8)).all()


def test_alpha_of_premultiplied_and_palette_modes() -> None:
    for mode, start in (("RGBa", "RGBA"), ("La", "LA")):
        color = (200, 100, 0, 51) if start == "RGBA" else (0, 51)
        flat = pixels.flatten(Image.new(start, (1, 1), color).convert(mode))
        expected = (244, 224, 204) if start == "RGBA" else (204,)
        assert np.abs(np.asarray(flat).ravel().astype(int) - expected).max() <= 3
    palette = Image.fromarray(COLORS).quantize(16)
    for clear in (palette.getpixel((0, 0)), bytes([0] * 256)):
        values = load(source(palette, transparency=clear))
        assert (values[0, 0] == 255).all()
    assert (values == 255).all()  # the last had every entry clear
    for kind in ("L", "RGB", "1"):
        solid = Image.new(kind, (2, 2), 0)
        data = source(solid, transparency=(0, 0, 0) if kind == "RGB" else 0)
        assert (load(data) == 255).all(), kind
        assert (load(source(solid)) == 0).all(), kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind: str) -> None:
    wide = np.array([[0, 257, 255], [257 * 128, 65535, 257 * 200 + 10]], np.uint16)
    image = Image.frombytes("I;16", (3, 2), wide.tobytes())
    values = load(source(image, kind), color="grey")[..., 0]
    assert values.tolist() == [[0, 1, 1], [128, 255, 200]]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 0, 1], [0, 255, 0, 255]),
        ([0, 10, 200, 255], [0, 10, 200, 255]),
        ([0, 257, 65535, 514], [0, 1, 255, 2]),
        ([-100, -50, 100, 50], [0, 64, 255, 191]),
        ([0, 0, 1_000_000, 200_000], [0, 0, 255, 51]),
        ([-5, -5, -5, -5], [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits(numbers: list[int], expected: list[int], dtype: Any) -> None:
    image = Image.fromarray(np.array(numbers, dtype).reshape(2, 2))
    assert image.mode in "IF"
    assert load(source(image, "TIFF"), color="grey").ravel().tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_must_be_finite(bad: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        load(source(Image.fromarray(np.array([[0, bad]], np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 80, 160, 240
    turns = [None, 0, 3, 1, 5, 2, 6, 4]  # what a camera did: the inverse of what is to be done
    stored = Image.fromarray(upright).convert("RGB")
    turn = turns[orientation - 1]
    if turn is not None:
        stored = stored.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    given = source(stored, kind, exif=exif)
    values = load(given)
    assert values.shape == (16, 32, 3)
    assert np.abs(values[..., 0].astype(int) - upright).max() < 12
    spec = MODALITY.resolve(ImageSpec(size="auto"), [given], LIMITS)
    assert spec.size == (16, 32)


def test_damaged_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert load(source(photo(16, 16), "JPEG", exif=exif)).shape == (16, 16, 3)


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        values = load(source(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert (values == [255, 0, 0]).all(), kind


# ---------------------------------------------------------------- limits and damage


def test_claim_of_a_billion_pixels_is_refused_from_the_header() -> None:
    data = png_claiming(50_000, 20_000)
    assert len(data) == 57
    load(source(photo(8, 8)))  # Pillow loads its plugins on first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(LimitError) as caught:
        load(Source("bomb.png", data))
    took = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 0.2
    assert peak < 1 << 20
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 20 << 20
    message = str(caught.value)
    assert "1000000000 pixels > 89478485" in message
    assert "--limit image_pixels=1000000000" in message
    assert "bomb.png" in message
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), DataError)


def test_gif_that_would_allocate_while_its_header_is_read() -> None:
    # Disposal method 2 makes Pillow fill a frame of 65535 x 65535 at once.
    screen = struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    control = b"\x21\xf9\x04\x08\0\0\0\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\0;"
    for start in (screen, struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(LimitError, match=r"4294836225 pixels.*--limit image_pixels="):
            load(Source("bomb.gif", b"GIF89a" + start + control + frame))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_limits_decide_and_pillow_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # above twice this, Pillow refuses by itself
    given = source(photo(30, 40))
    with pytest.raises(LimitError, match="1200 pixels > 1199"):
        load(given, Limits(image_pixels=1199))
    assert load(given, Limits(image_pixels=1200)).shape == (30, 40, 3)
    assert load(given).shape == (30, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(LimitError, match="decoded_bytes=4800"):
        load(given, Limits(decoded_bytes=4799))
    with pytest.raises(LimitError, match="file_bytes="):
        load(given, Limits(file_bytes=20))


def test_pillow_limit_is_restored_under_threads() -> None:
    before = Image.MAX_IMAGE_PIXELS
    given = source(photo(8, 8))
    threads = [threading.Thread(target=lambda: [load(given) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_files(kind: str) -> None:
    data = encoded(Image.fromarray(noise(24, 24)), kind)
    for share in (0.02, 0.1, 0.3, 0.5, 0.75, 0.9):
        with pytest.raises(DataError, match="cut") as caught:
            load(Source("cut", data[: int(len(data) * share)]))
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)  # an object's address is no cause


def test_mutants_give_an_array_or_a_data_error(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    seeds = [encoded(photo(20, 24), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    seeds.append(encoded(photo(20, 24), "TIFF", compression="tiff_lzw"))
    limits = Limits(image_pixels=1 << 22)
    messages: list[str] = []
    for number in range(350):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.randint(1, 12)):
            # Most damage goes to the header, where it does most harm.
            end = len(data) if rng.random() < 0.4 else min(len(data), 128)
            data[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        try:
            values = load(Source("mutant", bytes(data)), limits)
        except DataError as error:
            messages.append(str(error))
        else:
            assert values.size > 0
    assert 50 < len(messages) < 330
    assert all(message.isprintable() for message in messages)
    out, err = capfd.readouterr()
    assert out == ""
    assert "mutant" not in err  # Pillow's log stays quiet; libtiff, in C, cannot be kept from its own lines
    assert "samples per pixel" not in err


@pytest.mark.parametrize(
    "error",
    [
        *(SyntaxError, ValueError, EOFError, OSError, struct.error, KeyError, IndexError),
        *(AttributeError, Image.DecompressionBombError, RecursionError, NotImplementedError),
    ],
)
def test_every_exception_of_pillow_is_a_data_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error("two\nlines \x1b[31m")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DataError, match=r"test\.png.*two.*lines") as caught:
        load(source(photo(8, 8)))
    assert str(caught.value).isprintable()


def test_pillow_warnings_do_not_escape() -> None:
    palette = Image.fromarray(COLORS).quantize(16)
    load(source(palette, transparency=bytes(range(16))), color="grey")  # Pillow warns of this to-L conversion
    tiff = bytearray(encoded(photo(8, 8), "TIFF"))
    tiff[-2:] = b""  # a tag cut short only warns
    with pytest.raises(DataError):
        load(Source("t.tiff", bytes(tiff[:60])))


def test_unreadable_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for name in ("empty.png", "missing.png", "."):
        with pytest.raises(DataError):
            load(Source(str(tmp_path / name)))
    # An allowed signature only: Pillow reads this format, we do not.
    with pytest.raises(DataError, match="cannot be identified"):
        load(source(photo(8, 8), "PCX"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_sniff(kind: str) -> None:
    assert detect(source(photo(8, 8), kind)) == "image"


@pytest.mark.parametrize(
    "head",
    [
        *(b"Hello, this is text\n" * 5, b"BMW and other cars, a long text", b"P3 engine", b"solid cube\n"),
        *(b"RIFF\0\0\0\0WAVEfmt ", b"P", b"\x89PNG", b"GIF88a", b"II", b"PCX"),
    ],
)
def test_sniff_refuses_other_content_whatever_the_name(head: bytes) -> None:
    assert not MODALITY.sniff(head, "text.png")


# ---------------------------------------------------------------- drafts


@pytest.mark.parametrize(
    ("stored", "size", "decoded"),
    [
        ((640, 960), 32, (80, 120)),  # 8x less: 80 >= 2 x 32
        ((640, 960), 64, (160, 240)),  # 4x
        ((640, 960), 161, (640, 960)),  # half would be 320 < 322
        ((640, 960), (16, 160), (320, 480)),  # the longer target side counts
        ((100, 100), 64, (100, 100)),
    ],
)
def test_large_jpegs_decode_small(stored: tuple[int, int], size: Any, decoded: tuple[int, int]) -> None:
    image = photo(*stored)
    values = load(source(image, "JPEG"), size=size)
    assert values.shape[:2] == decoded
    expected = np.asarray(image.resize(decoded[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(values - expected).mean() < 4
    assert load(source(image, "JPEG"), size="auto").shape[:2] == stored


# ---------------------------------------------------------------- layout


def test_layout_of_the_paper() -> None:
    layout = MODALITY.layout(ImageSpec())
    assert layout.grid == (224, 224)
    assert layout.num_inputs == 50176
    assert layout.num_channels == 261
    assert layout.max_resolution == (224, 224)
    assert layout.is_grid
    assert layout.dims == 2
    assert layout.mean == pytest.approx((0.485 * 255, 0.456 * 255, 0.406 * 255))
    assert layout.std == pytest.approx((0.229 * 255, 0.224 * 255, 0.225 * 255))


def test_layout_with_patches() -> None:
    layout = MODALITY.layout(ImageSpec(size=(32, 48), patch=(4, 2), bands=6, max_resolution=(10, 20)))
    assert layout.grid == (8, 24)
    assert layout.channels == 3 * 8 == len(layout.mean) == len(layout.std)
    assert layout.mean[:3] == layout.mean[3:6]
    assert layout.mean[0] != layout.mean[1]
    assert layout.max_resolution == (10, 20)
    assert layout.num_channels == 24 + 2 * 13
    odd = MODALITY.layout(ImageSpec(size=(33, 33), patch=4))
    assert odd.grid == (8, 8)
    assert odd.max_resolution == (8, 8)


def test_layout_of_grey() -> None:
    grey = MODALITY.layout(ImageSpec(color="grey", size=28, patch=2))
    assert grey.channels == len(grey.mean) == 4
    assert grey.mean[0] == pytest.approx(255 * (0.485 + 0.456 + 0.406) / 3)
    one = MODALITY.layout(ImageSpec(size=8, mean=(0.5,), std=(0.25,)))
    assert one.mean == (127.5,) * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"size": "auto"}, "auto"),
        ({"size": 8, "patch": (4, 9)}, "patch"),
        ({"max_resolution": (224.0,)}, "max_resolution"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": (0.5,) * 4}, "std"),
        ({"color": "grey", "mean": (0.5, 0.5)}, "mean"),
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_area": (0.5, 1.5)}, "crop_area"),
        ({"crop_aspect": (2.0, 1.0)}, "crop_aspect"),
    ],
)
def test_layout_refuses_contradictions(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MODALITY.layout(ImageSpec(**spec))


# ---------------------------------------------------------------- resolve


def test_resolve_digits() -> None:
    given = [source(Image.fromarray(noise(8, 8, 1, seed)[..., 0])) for seed in range(30)]
    given.insert(3, Source("bad.png", b"\x89PNG\r\n\x1a\nrubbish"))
    spec = MODALITY.resolve(ImageSpec(size="auto", color="auto"), given, LIMITS)
    assert (spec.size, spec.color) == ((8, 8), "grey")
    assert spec.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert len(spec.std) == 1
    assert MODALITY.layout(spec).channels == 1
    # Grey by its pixels, not by its mode.
    same = [source(Image.fromarray(noise(8, 8, 1)[..., 0]).convert(mode)) for mode in ("RGB", "P", "RGBA")]
    assert MODALITY.resolve(ImageSpec(color="auto"), same, LIMITS).color == "grey"
    assert MODALITY.resolve(ImageSpec(color="auto"), [*same, source(photo(8, 8))], LIMITS).color == "rgb"


def test_resolve_photos() -> None:
    sides = [(300, 400), (300, 400), (200, 400), (310, 420), (50, 50)]
    given = [source(photo(*side, seed=k), "JPEG") for k, side in enumerate(sides)]
    spec = MODALITY.resolve(ImageSpec(size="auto", color="auto"), given, LIMITS)
    assert (spec.size, spec.color, len(spec.mean)) == ((48, 64), "rgb", 3)
    patched = ImageSpec(size="auto", patch=(7, 7))
    assert MODALITY.resolve(patched, given, LIMITS).size == (49, 63)
    assert MODALITY.resolve(ImageSpec(size="auto", patch=(100, 4)), given, LIMITS).size == (100, 64)
    assert MODALITY.resolve(ImageSpec(size="auto", max_auto_size=1000), given, LIMITS).size == (300, 400)


def test_resolve_leaves_what_is_settled() -> None:
    spec = ImageSpec(size=32)
    assert MODALITY.resolve(spec, [], LIMITS) == spec


@pytest.mark.parametrize("auto", ["size", "color"])
def test_resolve_needs_one_readable_source(auto: str) -> None:
    bad = [Source(f"bad{k}.png", b"\x89PNG\r\n\x1a\nrubbish") for k in range(3)]
    spec = ImageSpec(**{auto: "auto"})
    with pytest.raises(DataError, match=r"no file can be read.*bad0"):
        MODALITY.resolve(spec, bad, LIMITS)


def test_resolve_without_sources_gives_the_largest_automatic_square() -> None:
    spec = MODALITY.resolve(ImageSpec(size="auto", color="auto", patch="auto", max_auto_size=64), [], LIMITS)
    assert (spec.size, spec.color, spec.patch) == ((64, 64), "rgb", (4, 4))


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (16, 1), (28, 2), (32, 2), (64, 4), (224, 14)])
def test_automatic_patch_leaves_at_most_256_inputs(side: int, patch: int) -> None:
    spec = MODALITY.resolve(ImageSpec(size=side, patch="auto"), [], LIMITS)
    assert spec.patch == (patch, patch)
    assert MODALITY.layout(spec).num_inputs <= 256


# ---------------------------------------------------------------- prepare


def prepare(raw: np.ndarray, seed: int | None = None, **spec: Any) -> np.ndarray:
    rng = None if seed is None else np.random.default_rng(seed)
    result = MODALITY.prepare(raw, ImageSpec(**spec), rng)
    assert result.positions is None
    assert result.values.dtype == np.uint8
    layout = MODALITY.layout(ImageSpec(color="grey" if raw.shape[-1] == 1 else "rgb", **spec))
    assert result.values.shape == (*layout.grid, layout.channels)
    return result.values


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(20, 20), (7, 31), (64, 16)])
def test_identity(channels: int, size: tuple[int, int]) -> None:
    raw = noise(*size, channels)
    assert (prepare(raw, size=size, eval_crop=1.0) == raw).all()
    if size == (20, 20):
        assert (prepare(raw, 0, size=size, **PLAIN) == raw).all()


def test_evaluation_has_no_randomness() -> None:
    raw = noise(40, 50)
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    python_state = random.getstate()
    assert (prepare(raw, size=24) == prepare(raw, size=24)).all()
    prepare(raw, 0, size=24, randaugment_layers=4)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index, union-attr]
    assert random.getstate() == python_state


@pytest.mark.parametrize("layers", [0, 4])
def test_seed_decides_augmentation(layers: int) -> None:
    raw = noise(40, 50)
    same = [prepare(raw, 7, size=24, randaugment_layers=layers) for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert len({prepare(raw, seed, size=24, randaugment_layers=layers).tobytes() for seed in range(8)}) == 8


def test_evaluation_takes_the_centre() -> None:
    raw = np.zeros((30, 60, 3), np.uint8)
    raw[:, 15:45] = 200  # the largest square
    assert (prepare(raw, size=10, eval_crop=0.8) == 200).all()
    raw = np.zeros((40, 40, 1), np.uint8)
    raw[10:30] = 200  # the largest box of 2:1
    assert (prepare(raw, size=(8, 16), eval_crop=0.9) == 200).all()
    ramp = np.repeat(np.arange(0, 224, 8, dtype=np.uint8)[None, :, None], 28, axis=0)
    half = prepare(ramp, size=28, eval_crop=0.875)  # 24.5 pixels wide, of which 24 whole ones
    assert half[14, 0] + half[14, -1] == pytest.approx(27 * 8, abs=1)


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (1, 400), (300, 3), (17, 90)])
@pytest.mark.parametrize("size", [(28, 28), (8, 64)])
def test_crop_box_is_inside(shape: tuple[int, int], size: tuple[int, int]) -> None:
    raw = np.zeros((*shape, 1), np.uint8)
    spec = ImageSpec(size=size)
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = pixels.random_box(raw, spec, size, rng)
        assert 0 <= left < right <= shape[1]
        assert 0 <= top < bottom <= shape[0]
    for crop in (0.1, 0.875, 1.0):
        spec = ImageSpec(size=size, eval_crop=crop)
        left, top, right, bottom = pixels.center_box(raw, spec, size)
        assert 0 <= left < right <= shape[1]
        assert 0 <= top < bottom <= shape[0]
        width, height = min(shape[1], shape[0] * size[1] / size[0]), min(shape[0], shape[1] * size[0] / size[1])
        assert right - left == max(1, int(crop * width))  # the target's aspect ratio, to the pixel below
        assert bottom - top == max(1, int(crop * height))
        prepare(raw, size=size, eval_crop=crop)


def test_inception_crop_statistics() -> None:
    raw = np.zeros((200, 200, 1), np.uint8)
    rng = np.random.default_rng(0)
    boxes = np.array([pixels.random_box(raw, ImageSpec(), (224, 224), rng) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height / 40_000, np.log(width / height)
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.9
    assert area.mean() == pytest.approx(0.5, abs=0.05)  # 0.54 less what did not fit
    assert np.abs(aspect).max() <= np.log(4 / 3) + 0.03
    assert aspect.mean() == pytest.approx(0, abs=0.02)
    assert ((boxes[:, 0] == 0).mean(), (boxes[:, 2] == 200).mean()) < (0.2, 0.2)
    # Never fits: the whole of what the aspect ratio allows, centred.
    wide = np.zeros((10, 100, 1), np.uint8)
    spec = ImageSpec(crop_area=(1.0, 1.0))
    assert pixels.random_box(wide, spec, (224, 224), rng) == (43, 0, 56, 10)


def test_flip() -> None:
    raw = noise(12, 12)
    assert (prepare(raw, 0, size=12, **{**PLAIN, "flip": 1.0}) == raw[:, ::-1]).all()
    flipped = [(prepare(raw, seed, size=12, **{**PLAIN, "flip": 0.5}) != raw).any() for seed in range(200)]
    assert 70 < sum(flipped) < 130


def test_resize_agrees_with_pillow() -> None:
    """Evaluation crops to whole pixels, then resizes what is left (as transformers does: tests/test_pretrained.py)."""
    raw = np.asarray(photo(90, 121)).copy()
    crop = Image.fromarray(raw[6:84, 21:99])  # int(0.875 * 90) = 78 pixels, (121 - 78) // 2 = 21 from the left
    assert (prepare(raw, size=32) == np.asarray(crop.resize((32, 32), Image.Resampling.BICUBIC))).all()


def test_patch_channel_order() -> None:
    raw = noise(8, 12)
    values = prepare(raw, size=(8, 12), patch=(2, 3), eval_crop=1.0)
    assert values.shape == (4, 4, 18)
    assert values[1, 2].tolist() == raw[2:4, 6:9].ravel().tolist()  # rows, then columns, then colours
    odd = prepare(noise(9, 9), size=9, patch=2, eval_crop=1.0)
    assert odd.shape == (4, 4, 12)


def test_prepare_needs_a_size() -> None:
    with pytest.raises(UsageError, match="auto"):
        MODALITY.prepare(noise(8, 8), ImageSpec(size="auto"), None)


def test_prepare_is_quick() -> None:
    # 10 times what it takes on a slow core, so that only a change of kind fails.
    raw, rng, spec = noise(28, 28, 1), np.random.default_rng(0), ImageSpec(size=28, color="grey")
    start = time.perf_counter()
    for _ in range(500):
        MODALITY.prepare(raw, spec, rng)
    assert (time.perf_counter() - start) / 500 < 1e-3


# ---------------------------------------------------------------- RandAugment


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", RANDAUGMENT)
def test_randaugment_operations(name: str, channels: int) -> None:
    raw = np.asarray(photo(56, 64))[..., :channels] // 2 + 20
    for level in (0.0, 0.1, 0.5, 0.9, 1.0):
        before = raw.copy()
        image = to_image(raw)
        results = [RANDAUGMENT[name](image, level, np.random.default_rng(3)) for _ in range(2)]
        values = pixels.to_array(results[0])
        assert values.shape == raw.shape
        assert values.dtype == np.uint8
        assert (values == pixels.to_array(results[1])).all()
        assert (raw == before).all()  # the image may share its memory with a cached array
        if level == 0.5 and name in ("Color", "Contrast", "Brightness", "Sharpness"):
            assert (values == raw).all()  # their factor is 1 just there, as in the official code
        elif level == 0.5 or (level == 0.9 and (name, channels) != ("Color", 1) and name != "Solarize"):
            assert (values != raw).any()


def test_randaugment_values() -> None:
    raw = np.array([[[0], [100], [128], [250]]], np.uint8)

    def apply(name: str, level: float) -> list[int]:
        result = RANDAUGMENT[name](to_image(raw), level, np.random.default_rng(0))
        return pixels.to_array(result).ravel().tolist()

    assert apply("Invert", 0.5) == [255, 155, 127, 5]
    assert apply("Solarize", 0.5) == [0, 100, 127, 5]  # threshold 128
    assert apply("SolarizeAdd", 0.5) == [55, 155, 128, 250]
    assert apply("Posterize", 0.5) == [0, 64, 128, 192]  # 2 bits
    assert apply("Posterize", 0.1) == [0, 0, 128, 128]  # never 0 bits
    assert apply("Brightness", 0.5) == pytest.approx([0, 100, 128, 250], abs=1)  # factor 1
    assert apply("Brightness", 0.0) == pytest.approx([0, 10, 13, 25], abs=1)  # factor 0.1
    assert apply("AutoContrast", 0.5) == pytest.approx([0, 102, 130, 255], abs=1)
    raw = np.full((224, 224, 1), 10, np.uint8)
    full = np.asarray(RANDAUGMENT["TranslateX"](to_image(raw), 0.5, np.random.default_rng(0)))
    assert (full == 128).sum() == 50 * 224
    cut = np.asarray(RANDAUGMENT["Cutout"](to_image(raw), 0.5, np.random.default_rng(1)))
    assert set(np.unique(cut)) == {10, 128}
    assert (cut == 128).sum() <= 40 * 40


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_in_prepare(channels: int) -> None:
    raw = noise(28, 28, channels)
    plain = prepare(raw, 0, size=28, **PLAIN)
    changed = [(prepare(raw, seed, size=28, randaugment_layers=2, **PLAIN) != plain).any() for seed in range(40)]
    assert 15 < sum(changed) < 40  # each layer acts about half the time
    assert (raw == noise(28, 28, channels)).all()
    assert len(RANDAUGMENT) == 16


# ---------------------------------------------------------------- small files that claim much


def png_of(width: int, height: int) -> bytes:
    """Return a grey PNG of zeros, compressed as far as it goes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes((width + 1) * height))) + chunk(b"IEND", b"")
    )


GIF_OF_43_BYTES = (
    b"GIF89a"
    + struct.pack("<HH", 9000, 9000)
    + bytes.fromhex("800000 000000ffffff 21f90401000000 00 2c00000000 01000100 00 02024401 003b")
)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (png_of(1, 70_000), "1 x 70000 pixels, expected sides <= 65535"),
        (png_of(70_000, 1), "70000 x 1 pixels, expected sides <= 65535"),
        (GIF_OF_43_BYTES, "declared 9000 x 9000 pixels, found 43 bytes"),
        (b"P5 9000 9000 255\n\0", "declared 9000 x 9000 pixels, found 18 bytes"),
        (
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 9000, 9000, 1, 24, 0, 0, 0, 0, 0, 0),
            "found 54 bytes",
        ),
    ],
)
def test_a_small_file_that_claims_much_takes_no_memory(data: bytes, fault: str) -> None:
    """The first took 2.8 GB and 7 s at 89,478,485 pixels, the third 1.5 GB."""
    with pytest.raises(DataError, match=fault):
        decode(Source("x", data), ImageSpec(), Limits())


def test_a_jpeg_without_data_is_damaged() -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64), 200).save(file, "JPEG")
    data = file.getvalue()
    scan = data.index(b"\xff\xda")
    head = data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")]
    decode(Source("x", data), ImageSpec(), Limits())
    for ending in (b"", b"\xff", b"\xff\xd9"):
        with pytest.raises(DataError):
            decode(Source("x", head + ending), ImageSpec(), Limits())
