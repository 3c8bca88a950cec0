"""Colours, crops and sizes of images and video frames."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from perceiver_cli.errors import UsageError
from perceiver_cli.preprocess.base import Array, Rng

CROP_TRIES = 10
MAX_CHANNELS = 1 << 20  # of a patch


class ColorSpec(Protocol):
    """The options that images and videos share."""

    @property
    def modality(self) -> str: ...

    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float
    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]


def flatten(image: Image.Image) -> Image.Image:
    """Return an image of any mode in mode L or RGB: 8 bits a colour, transparent pixels on white.

    16 bits are divided by 257. The range of 32-bit integers and floats is the first of 0..1, 0..255 and 0..65535 that
    holds all values, else the image's own minimum..maximum.
    """
    mode, clear = image.mode, image.info.get("transparency")
    if mode[0] in "IF":
        values = np.asarray(image)
        # PNG and PPM have at most 16 bits, even if Pillow opens them in mode I.
        sixteen = mode.startswith("I;16") or image.format in ("PNG", "PPM")
        grey = _to_8_bits(values, 65535 if sixteen else None)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey)
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


def _to_8_bits(values: Array, top: int | None) -> Array:
    """Return uint8 from numbers in 0..top; without `top`, in the range that `flatten` describes."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels that are not finite numbers")
    top = top or next((t for t in (1, 255, 65535) if low >= 0 and high <= t), None)
    start, span = (0.0, float(top)) if top is not None else (low, high - low or 1.0)
    return np.rint((values.astype(np.float64) - start) * (255 / span)).clip(0, 255).astype(np.uint8)


def color_statistics(spec: ColorSpec, colors: int, patch_area: int) -> dict[str, tuple[float, ...]]:
    """Return a Layout's mean and std for each channel of a patch, in uint8 units. Raises UsageError for bad options."""
    for key, (low, high), top in (("crop_area", spec.crop_area, 1.0), ("crop_aspect", spec.crop_aspect, math.inf)):
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
    low, high = spec.crop_aspect[0] * target, spec.crop_aspect[1] * target
    for _ in range(CROP_TRIES):
        at_area, at_aspect, at_x, at_y = rng.random(4).tolist()
        area = height * width * (spec.crop_area[0] + at_area * (spec.crop_area[1] - spec.crop_area[0]))
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


def to_image(values: Array) -> Image.Image:
    """Return (H, W, c) uint8 as an image in mode L (c = 1) or RGB."""
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def to_array(image: Image.Image) -> Array:
    """Return an image as writable (H, W, c) values."""
    return np.array(image).reshape(image.height, image.width, -1)
