"""Picture formats beside those of test_image.py, the range of wide numbers, and the memory of large pictures."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from perceiver_cli.errors import DataError, LimitError, UsageError
from perceiver_cli.preprocess.image import MODALITY, ImageSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from tests.conftest import at_least, detect, lack

LIMITS = Limits()
SMOOTH = np.add.outer(np.arange(32), np.arange(48))[..., None] * np.array([1, 2, 3]) % 200 + 20


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "HEIF":
        pillow_heif.register_heif_opener()
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def load(data: bytes, **spec: Any) -> np.ndarray:
    source = Source("x", data)
    assert detect(source) == "image"
    return MODALITY.load(source, ImageSpec.model_validate({"size": (64, 64), **spec}), LIMITS)


def grey(data: bytes) -> list[int]:
    values = load(data, color="grey")
    assert values.dtype == np.uint8
    return values.ravel().tolist()


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
        ("HEIF", {"quality": 100, "chroma": 444}, 6),
        ("JPEG2000", {}, 0),
        ("JPEG2000", {"no_jp2": True}, 0),
        ("JPEG2000", {"tile_size": (16, 16)}, 0),
        ("MPO", {"save_all": True, "quality": 100, "subsampling": 0}, 6),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_formats(kind: str, options: dict[str, Any], error: int, mode: str) -> None:
    if (kind, mode) == ("MPO", "RGBA"):
        return  # JPEG has no transparency
    image = Image.fromarray(SMOOTH.astype(np.uint8)).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(load(encoded(image, kind, **options)) - expected).max() <= error


def test_heic_brands_and_the_container_of_avif() -> None:
    image = Image.fromarray(SMOOTH.astype(np.uint8))
    heic, avif = encoded(image, "HEIF"), encoded(image, "AVIF")
    assert heic[4:12] == b"ftypheic"
    for brand in (b"mif1", b"heix", b"hevc"):
        assert load(heic[:8] + brand + heic[12:]).shape == SMOOTH.shape
    assert load(avif[:8] + b"mif1" + avif[12:]).shape == SMOOTH.shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_turned_once(orientation: int) -> None:
    upright = np.zeros((64, 128), np.uint8)
    upright[:32, :64], upright[:32, 64:], upright[32:, :64] = 80, 160, 240
    turn = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # what a camera did
    image = Image.fromarray(upright).convert("RGB")
    image = image if turn is None else image.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()  # written into EXIF and as the file's own rotation, as cameras do
    data = encoded(image, "HEIF", quality=100)
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    assert np.abs(load(data)[..., 0].astype(int) - upright).max() < 12
    assert MODALITY.resolve(ImageSpec(size="auto"), [Source("x", data)], LIMITS).size == (32, 64)


def test_a_missing_pillow_heif_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(SMOOTH.astype(np.uint8)), "HEIF")
    lack(monkeypatch, "pillow_heif")
    with pytest.raises(UsageError, match=r"pip install 'perceiver-cli\[heif\]'"):
        load(data)


def test_a_portable_float_map_is_upright() -> None:
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert grey(encoded(Image.fromarray(ramp), "PPM")) == np.rint(ramp * 255).ravel().astype(int).tolist()


# ---------------------------------------------------------------- TIFF


def tiff(
    values: np.ndarray, nodata: str | None = None, planar: int = 1, big: bool = False, extra: tuple[int, ...] = ()
) -> bytes:
    """Return (H, W, bands) as an uncompressed TIFF, as GDAL writes it."""
    height, width, bands = values.shape
    order = ">" if big else "<"
    values = values.astype(values.dtype.newbyteorder(order))
    data = (values if planar == 1 else values.transpose(2, 0, 1)).tobytes()
    parts = 1 if planar == 1 else bands
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[values.dtype.kind]
    size = values.dtype.itemsize * 8
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [size] * bands), 259: ("H", [1]),
        262: ("H", [2 if bands in (3, 4) else 1]), 273: ("I", []), 277: ("H", [bands]), 278: ("I", [height]),
        279: ("I", [len(data) // parts] * parts), 284: ("H", [planar]), 339: ("H", [kind] * bands),
    }  # fmt: skip
    if extra:
        tags[338] = ("H", list(extra))
    if nodata is not None:
        tags[42113] = ("s", list(nodata.encode() + b"\0"))
    at = 8 + 2 + 12 * len(tags) + 4
    tags[273] = ("I", [at + part * (len(data) // parts) for part in range(parts)])
    tail, entries = data, b""
    for tag, (letter, numbers) in sorted(tags.items()):
        packed = bytes(numbers) if letter == "s" else struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        place = packed.ljust(4, b"\0")
        if len(packed) > 4:
            place = struct.pack(f"{order}I", at + len(tail))
            tail += packed + b"\0" * (len(packed) % 2)
        entries += struct.pack(f"{order}HHI", tag, {"s": 2, "H": 3, "I": 4}[letter], len(numbers)) + place
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + tail


RAMP = np.linspace(0, 1000, 24, dtype=np.float32).reshape(4, 6, 1)
RAMP_8 = np.rint(RAMP * 255 / 1000).ravel().astype(int)


def with_filler(number: float, dtype: type = np.float32) -> np.ndarray:
    values = RAMP.astype(dtype)
    values[2, 2] = number
    return values


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("number", "text", "dtype"),
    [
        (-9999, "-9999", np.float32),
        (-9999, "-9999\0", np.float32),
        (-9999.0, " -9.999e3", np.float32),
        (np.nan, "nan", np.float32),
        (-np.inf, "-inf", np.float32),
        (-3.4028235e38, "-3.4028234663852886e+38", np.float32),
        (1e38, "1e38", np.float32),
        (-32768, "-32768", np.int16),
        (-2147483648, "-2147483648", np.int32),
        (-9999, "-9999", np.int32),
    ],
)
def test_pixels_without_data_are_white_and_leave_the_range_alone(
    number: float, text: str, dtype: type, big: bool
) -> None:
    found = np.array(grey(tiff(with_filler(number, dtype), text, big=big)))
    assert found[14] == 255
    others = np.arange(24) != 14
    assert np.abs(found - RAMP_8)[others].max() <= 1


@pytest.mark.parametrize("number", [-9999, -99999, -32768, -3.4028235e38, -1e20, 1e38, 3.4e38, 999999])
def test_a_filler_without_a_tag_is_out_of_the_range(number: float) -> None:
    found = np.array(grey(tiff(with_filler(number))))
    assert found[14] == (255 if number > 0 else 0)
    others = np.arange(24) != 14
    assert np.abs(found - RAMP_8)[others].max() <= 1


def test_two_fillers_and_values_that_are_none() -> None:
    both = with_filler(-9999)
    both[0, 1] = 1e38
    assert np.abs(np.array(grey(tiff(both))) - RAMP_8)[2:14].max() <= 1
    masked = np.concatenate([np.zeros((2, 6, 1)), np.linspace(500, 900, 12).reshape(2, 6, 1)]).astype(np.float32)
    found = grey(tiff(masked))  # a background of 0 is no filler
    assert found[0] == 0
    assert found[12] == round(500 / 900 * 255)
    below = np.linspace(-100, 100, 24).reshape(4, 6, 1).astype(np.float32)
    assert grey(tiff(below))[::23] == [0, 255]
    bright = RAMP.copy()
    bright[0, 0] = 5000  # a bright pixel
    assert grey(tiff(bright))[::23] == [255, round((1000 - RAMP[0, 1, 0]) / (5000 - RAMP[0, 1, 0]) * 255)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_unless_a_tag_names_them(bad: float) -> None:
    with pytest.raises(DataError, match="not finite numbers, and no tag GDAL_NODATA"):
        grey(tiff(with_filler(bad)))
    with pytest.raises(DataError, match="not finite"):
        grey(tiff(np.full((2, 2, 1), np.nan, np.float32), "nan"))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int16])
def test_twelve_bits_are_not_black(dtype: type) -> None:
    assert grey(tiff(RAMP.astype(dtype)))[::23] == [0, 255]


@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize(("bands", "extra"), [(3, ()), (4, (2,)), (4, (0,))])
def test_bands_together_or_apart(planar: int, dtype: type, top: int, bands: int, extra: tuple[int, ...]) -> None:
    values = np.full((4, 6, bands), top, dtype)
    values[..., 0], values[..., 1] = 0, np.arange(6) * (top // 5)
    data = tiff(values, planar=planar, extra=extra)
    if planar == 2 and (
        dtype is np.uint16 or extra == (0,)
    ):  # of wide numbers, Pillow would take each byte for a pixel
        early = dtype is np.uint8 and not at_least("pillow", "12.2")
        with pytest.raises(
            DataError, match="unknown raw mode" if early else "unsigned integers, stored one after another"
        ):
            load(data)
        return
    found = load(data)
    assert found[0, :, 1].tolist() == [0, 51, 102, 153, 204, 255]
    assert (found[..., 0] == 0).all()


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("bands", "dtype", "words"),
    [
        (5, np.uint8, "5 bands of 8-bit unsigned integers"),
        (13, np.uint16, "13 bands of 16-bit unsigned integers"),
        (3, np.float32, "3 bands of 32-bit floats"),
        (3, np.int16, "3 bands of 16-bit signed integers"),
        (1, np.float64, "1 band of 64-bit floats"),
        (1, np.int8, "1 band of 8-bit signed integers"),
        (1, np.complex64, "1 band of 64-bit complex floats"),
    ],
)
def test_a_tiff_that_is_no_picture_says_what_it_is(bands: int, dtype: type, words: str, big: bool) -> None:
    data = tiff(np.zeros((4, 6, bands), dtype), extra=(0,) * (bands - 1) if bands > 4 else (), big=big)
    with pytest.raises(DataError) as caught:
        load(data)
    assert words in str(caught.value)
    assert "gdal_translate" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from perceiver_cli.preprocess.image import MODALITY, ImageSpec
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
values = MODALITY.load(Source(sys.argv[1]), ImageSpec(), Limits())
print(values.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "per_pixel"), [("PNG", 8), ("TIFF", 8), ("WEBP", 20), ("JPEG2000", 24), ("AVIF", 12)])
def test_a_large_picture_takes_the_memory_that_is_counted(kind: str, per_pixel: int, tmp_path: Path) -> None:
    side = 3000
    picture = Image.linear_gradient("L").resize((side, side))
    path = tmp_path / "x"
    path.write_bytes(encoded(Image.merge("RGB", [picture] * 3), kind))
    words = [sys.executable, "-c", MEASURE, str(path)]
    size, kib = map(int, subprocess.run(words, capture_output=True, check=True).stdout.split())
    assert size == side * side * 3
    assert kib << 10 < per_pixel * side**2 + (24 << 20)


def test_a_picture_whose_decoder_takes_much_is_refused_before_it_is_decoded() -> None:
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = (9458 | 9458 << 14).to_bytes(4, "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LimitError, match="decoded_bytes"):
        load(bytes(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
