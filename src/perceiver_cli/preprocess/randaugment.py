"""RandAugment (Cubuk et al. 2020), with the operations and constants of the official Perceiver code.

Each operation takes an image and a level in 0..1. Lengths are pixels of a 224 x 224 crop of ImageNet; they scale with
the shorter side of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform

from perceiver_cli.preprocess.base import Array, Rng
from perceiver_cli.preprocess.pixels import to_array, to_image

TRANSLATE_PIXELS, CUTOUT_PIXELS, PER_SIDE = 100, 40, 224
Operation = Callable[[Image.Image, float, Rng], Image.Image]


def randaugment(values: Array, layers: int, magnitude: int, rng: Rng) -> Array:
    """Return (H, W, c) uint8 values after `layers` random operations of strength `magnitude` in 0..10."""
    image = to_image(values)
    operations = tuple(RANDAUGMENT.values())
    for _ in range(layers):
        image = operations[rng.integers(len(operations))](image, magnitude / 10, rng)
    return to_array(image)


def _sign(rng: Rng) -> int:
    return 1 if rng.random() < 0.5 else -1


def _gray(image: Image.Image) -> Any:
    return 128 if image.mode == "L" else (128, 128, 128)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.NEAREST, fillcolor=_gray(image))


def _cutout(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    half = round(CUTOUT_PIXELS * level * min(image.size) / PER_SIDE)
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(_gray(image), (x - half, y - half, x + half, y + half))
    return image


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda image, level, rng: kind(image).enhance(1.8 * level + 0.1)


def _translation(image: Image.Image, level: float, rng: Rng) -> int:
    return _sign(rng) * round(TRANSLATE_PIXELS * level * min(image.size) / PER_SIDE)


RANDAUGMENT: dict[str, Operation] = {
    "AutoContrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, rng: ImageOps.equalize(image),
    "Invert": lambda image, level, rng: ImageOps.invert(image),
    "Rotate": lambda image, level, rng: image.rotate(30 * level * _sign(rng), fillcolor=_gray(image)),
    # At least one bit: the official code keeps none below magnitude 3, and the image turns black.
    "Posterize": lambda image, level, rng: ImageOps.posterize(image, max(1, int(4 * level))),
    "Solarize": lambda image, level, rng: ImageOps.solarize(image, int(256 * level)),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, rng: _affine(image, 1, 0.3 * level * _sign(rng), 0, 0, 1, 0),
    "ShearY": lambda image, level, rng: _affine(image, 1, 0, 0, 0.3 * level * _sign(rng), 1, 0),
    "TranslateX": lambda image, level, rng: _affine(image, 1, 0, _translation(image, level, rng), 0, 1, 0),
    "TranslateY": lambda image, level, rng: _affine(image, 1, 0, 0, 0, 1, _translation(image, level, rng)),
    "Cutout": _cutout,
    "SolarizeAdd": lambda image, level, rng: image.point(lambda v: min(255, v + int(110 * level)) if v < 128 else v),
}
