"""Colours, crops and sizes of images and video frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from perceiver_cli.errors import UsageError
from perceiver_cli.preprocess.base import Array, Rng

CROP_TRIES = 10
STRIP_PIXELS = 1 << 20  # converted at a time: a copy of each whole picture would double its memory
GDAL_NODATA = 42113  # the tag of a TIFF with the number of pixels without data
MAX_FILLERS = 4  # different numbers of one picture that may stand for missing pixels
FAR_ABOVE = 200.0
LEAST_OF_16 = 16_383  # numbers up to this have a range of their own: 14 bits in 0..65535 would look black
MAX_CHANNELS = 1 << 20  # of a patch
LUMA = np.array([0.299, 0.587, 0.114])  # Pillow's weights for grey
Change = Callable[[Image.Image], Image.Image]


class ColorSpec(Protocol):
    """The options that images and videos share."""

    @property
    def modality(self) -> str: ...

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop_area(self) -> tuple[float, float] | Literal["auto"]: ...

    eval_crop: float
    crop_aspect: tuple[float, float]


def flatten(image: Image.Image) -> Image.Image:
    """Return an image of any mode in mode L or RGB: 8 bits a colour, transparent pixels on white.

    16 bits are divided by 257. The range of 32-bit integers and floats is the first of 0..1, 0..255 and 0..65535 (above
    14 bits) that holds all values, else the image's own; see `_own_range`. Pixels of GDAL_NODATA count as transparent.
    """
    mode, clear = image.mode, image.info.get("transparency")
    if mode[0] in "IF":
        return Image.fromarray(_to_8_bits(image, clear if isinstance(clear, int) else None))
    if mode in ("P", "PA", "RGBa") or (clear is not None and mode == "RGB"):
        image = image.convert("RGBA")
    elif mode == "La" or (clear is not None and mode in ("1", "L")):
        image = image.convert("LA")
    flat = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.mode not in ("LA", "RGBA"):
        return image.convert(flat)
    white = Image.new(flat, image.size, "white")
    white.paste(image.convert(flat), mask=image.getchannel("A"))
    return white


def _to_8_bits(image: Image.Image, clear: int | None) -> Array:
    """Return an image of wide numbers as (H, W) uint8 in the range that `flatten` describes; `clear` pixels are 255."""
    values = np.asarray(image)
    blank = None if clear is None else values == clear
    # PNG and PNM have at most 16 bits, even if Pillow opens them in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        start, span = 0.0, 65535.0
    else:
        blank = _no_data(image, values) if blank is None else blank
        shown = None if blank is None else ~blank
        low, high = _own_range(values, shown)
        top = next((t for t in (1, 255, 65535) if low >= 0 and high <= t and (t < 65535 or high > LEAST_OF_16)), None)
        start, span = (0.0, float(top)) if top is not None else (low, high - low or 1.0)
    grey, rows = np.empty(values.shape, np.uint8), _strip_rows(image)
    for top in range(0, image.height, rows):
        with np.errstate(invalid="ignore", over="ignore"):  # of pixels without data
            scaled = np.rint((values[top : top + rows].astype(np.float64) - start) * (255 / span))
        grey[top : top + rows] = np.nan_to_num(scaled).clip(0, 255)
    if blank is not None:
        grey[blank] = 255
    return grey


def _no_data(image: Image.Image, values: Array) -> NDArray[np.bool_] | None:
    """Return where the pixels of a TIFF are the number that its tag GDAL_NODATA names, or None if none are."""
    text = getattr(image, "tag_v2", {}).get(GDAL_NODATA)
    try:
        number = float(str(text).strip("\0 "))
    except ValueError:
        return None
    if values.dtype.kind == "f":
        blank = np.isnan(values) if math.isnan(number) else values == values.dtype.type(number)
    else:
        blank = values == number
    return blank if blank.any() and not blank.all() else None


def _own_range(values: Array, shown: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Return the least and the greatest of `values`, but for numbers that stand for missing ones: -9999, 1e38.

    Such a number lies farther from all others than these lie from each other: by its own distance below, by FAR_ABOVE
    of it above, where a bright pixel may lie alone. Raises ValueError for values that are not finite.
    """
    where = True if shown is None else shown
    is_float = values.dtype.kind == "f"
    most, least = (math.inf, -math.inf) if is_float else (np.iinfo(values.dtype).max, np.iinfo(values.dtype).min)
    low, high = float(values.min(where=where, initial=most)), float(values.max(where=where, initial=least))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels that are not finite numbers, and no tag GDAL_NODATA that says so")
    for _ in range(MAX_FILLERS):
        second = float(values.min(where=where & (values > low), initial=most))
        below = float(values.max(where=where & (values < high), initial=least))
        if low < 0 and second < high and second - low > high - second:
            low = second
        elif below > low and high - below > FAR_ABOVE * (below - low):
            high = below
        else:
            break
    return low, high


def color_statistics(spec: ColorSpec, colors: int, patch_area: int) -> dict[str, tuple[float, ...]]:
    """Return a Layout's mean and std for each channel of a patch, in uint8 units. Raises UsageError for bad options."""
    for key, (low, high), top in (("crop_area", crop_area(spec), 1.0), ("crop_aspect", spec.crop_aspect, math.inf)):
        if not 0 < low <= high <= top:
            raise UsageError(f"inputs.{spec.modality}.{key} must rise within 0..{top:g}, found {[low, high]}")
    if colors * patch_area > MAX_CHANNELS:
        raise UsageError(
            f"inputs.{spec.modality}.patch has {patch_area:,} pixels", f"at most {MAX_CHANNELS // colors:,}"
        )
    statistics = {}
    for key, numbers in (("mean", spec.mean), ("std", spec.std)):
        if colors == 1 and len(numbers) == 3:
            numbers = (sum(numbers) / 3,)
        if len(numbers) not in (1, colors):
            raise UsageError(f"inputs.{spec.modality}.{key} needs 1 number or {colors}, found {len(numbers)}")
        statistics[key] = tuple(number * 255 for number in numbers) * (colors // len(numbers)) * patch_area
    return statistics


def opaque(image: Image.Image, mode: Literal["L", "RGB"] | None = None) -> Array:
    """Return a decoded image as (H, W, c) uint8 in a mode, by default that of `flatten`; c is 1 for L and 3 for RGB."""
    if image.mode[0] in "IF":
        image = flatten(image)  # whole: the range is that of all pixels
    rows, values = _strip_rows(image), None
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        flat = flatten(image if rows >= image.height else image.crop(box))
        strip = to_array(flat if mode in (None, flat.mode) else flat.convert(mode))
        if len(strip) == image.height:
            return strip
        if values is None:
            values = np.empty((image.height, *strip.shape[1:]), np.uint8)
        values[top : top + len(strip)] = strip
    assert values is not None
    return values


def _strip_rows(image: Image.Image) -> int:
    return max(1, STRIP_PIXELS // image.width)


def upright(values: Array, orientation: int) -> Array:
    """Return (H, W, c) values as they should be seen, by their EXIF orientation: 1 to 8."""
    if not 2 <= orientation <= 8:
        return values
    values = values.swapaxes(0, 1) if orientation >= 5 else values
    upside_down, mirrored = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(values[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


def crop_area(spec: ColorSpec) -> tuple[float, float]:
    """Return the range of the Inception crop's area; whole pictures as long as it is "auto"."""
    return (1.0, 1.0) if spec.crop_area == "auto" else spec.crop_area


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def center_box(raw: Array, spec: ColorSpec, size: tuple[int, int]) -> Box:
    """Return the centre crop of evaluation: `eval_crop` of the largest box with the target's aspect ratio."""
    height, width = raw.shape[:2]
    # Rounded down as in transformers' image processor, so that published weights see the same pixels.
    crop_width = max(1, int(spec.eval_crop * min(width, height * size[1] / size[0])))
    crop_height = max(1, int(spec.eval_crop * min(height, width * size[0] / size[1])))
    return _centred(width, height, crop_width, crop_height)


def random_box(raw: Array, spec: ColorSpec, size: tuple[int, int], rng: Rng) -> Box:
    """Return the Inception crop: a box of random area, place and log-uniform aspect ratio (relative to the target)."""
    height, width = raw.shape[:2]
    target = size[1] / size[0]
    smallest, largest = crop_area(spec)
    low, high = spec.crop_aspect[0] * target, spec.crop_aspect[1] * target
    for _ in range(CROP_TRIES):
        at_area, at_aspect, at_x, at_y = rng.random(4).tolist()
        area = height * width * (smallest + at_area * (largest - smallest))
        aspect = low * (high / low) ** at_aspect
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(at_x * (width - crop_width + 1)), int(at_y * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    # No try fitted: the largest centred box of an allowed aspect ratio.
    crop_width, crop_height = min(width, round(height * high)), min(height, round(width / low))
    return _centred(width, height, max(1, crop_width), max(1, crop_height))


def _centred(width: int, height: int, crop_width: int, crop_height: int) -> Box:
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resize(values: Array, box: Box, size: tuple[int, int], reducing_gap: float | None = None) -> Array:
    """Return a box of (H, W, c) values at `size` (height, width), bicubic; a view of `values` if sizes agree.

    No pixel outside the box changes the result. With `reducing_gap`, large boxes are first averaged to that many times
    `size`: faster, and accurate enough for training.
    """
    left, top, right, bottom = box
    crop = values[top:bottom, left:right]
    if crop.shape[:2] == size:
        return crop
    return to_array(to_image(crop).resize((size[1], size[0]), Resampling.BICUBIC, reducing_gap=reducing_gap))


def recoloring(frames: Array, share: float, rng: Rng) -> Change:
    """Return a random change of saturation, contrast and brightness, each by a factor within 1 +- `share`."""
    saturation, contrast, brightness = rng.uniform(1 - share, 1 + share, 3)
    colors = frames.shape[-1]
    some = frames[:, ::4, ::4].reshape(-1, colors)  # every fourth pixel is enough for a mean
    offset = some.mean(axis=0) @ (LUMA if colors == 3 else np.ones(1)) * brightness * (1 - contrast)
    table = np.clip(np.rint(np.arange(256) * contrast * brightness + offset), 0, 255).astype(int).tolist() * colors
    if colors == 1:
        return lambda picture: picture.point(table)
    return lambda picture: Image.blend(picture.convert("L").convert("RGB"), picture, saturation).point(table)


def padded(raw: Array, size: tuple[int, int]) -> Array:
    """Return (H, W, c) uint8 with borders, so that its shape is that of `size`; `raw` if it is to within a pixel.

    Borders have the median colour of the edge that they continue: white paper stays white.
    """
    height, width = raw.shape[:2]
    tall, wide = max(height, round(width * size[0] / size[1])), max(width, round(height * size[1] / size[0]))
    if (tall - height) * size[0] <= tall and (wide - width) * size[1] <= wide:  # less than a pixel of the result
        return raw
    top, left = (tall - height) // 2, (wide - width) // 2
    whole = np.empty((tall, wide, raw.shape[-1]), np.uint8)
    middle = whole[top : top + height, left : left + width]
    if tall > height:
        whole[: tall // 2], whole[tall // 2 :] = _edge_color(raw[0]), _edge_color(raw[-1])
    else:
        whole[:, : wide // 2], whole[:, wide // 2 :] = _edge_color(raw[:, 0]), _edge_color(raw[:, -1])
    middle[...] = raw
    return whole


def _edge_color(edge: Array) -> Array:
    return np.median(edge, axis=0).astype(np.uint8)


def to_image(values: Array) -> Image.Image:
    """Return (H, W, c) uint8 as an image in mode L (c = 1) or RGB."""
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def to_array(image: Image.Image) -> Array:
    """Return an image as writable (H, W, c) values."""
    return np.array(image).reshape(image.height, image.width, -1)
