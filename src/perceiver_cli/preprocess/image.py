"""Images as a grid of pixels: decoded by Pillow to uint8, then cropped, resized and augmented (paper 4.1).

Three parts: decoding, geometry with the `ImageModality` that uses it, and RandAugment. Values stay uint8; the
model subtracts the mean. Colour profiles are ignored, as in the paper's ImageNet pipeline.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling, Transform, Transpose

from perceiver_cli.config import ImageSpec, Limits, VideoSpec
from perceiver_cli.errors import DataError, LimitError, PerceiverError, UsageError
from perceiver_cli.preprocess.base import (
    Array,
    ByteArray,
    Layout,
    Modality,
    Source,
    check_contract,
    check_decoded,
    patchify,
    position_options,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")  # Pillow's other plugins are never reached
PIXEL_BYTES = 4  # of Pillow's own storage, whatever the mode
COLOR_PROBES = 20  # images decoded to settle color = "auto"
CROP_TRIES = 10
T = TypeVar("T")

_SIGNATURE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"  # BM alone could begin a text: ask for a known header size
    rb"|P[1-6]\s(?:\s|#[^\n]*\n)*\d",
    re.DOTALL,
)
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF tag

# Without a handler Python prints Pillow's log records to stderr; errors are ours to report.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# ---------------------------------------------------------------- decoding

_pillow_limit = threading.Lock()


@contextmanager
def opened(source: Source, limits: Limits) -> Iterator[Image.Image]:
    """Yield the image, its header read and its size within the limits; no pixel is decoded yet.

    Whatever Pillow raises, here or in the body, comes out as a DataError of one line.
    """
    with source.open(limits) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Some plugins allocate a frame while they read the header, and only Pillow's own check is early enough
            # for those. It is a global that refuses above twice its value: ours for the moment of opening.
            with _pillow_limit:
                saved = Image.MAX_IMAGE_PIXELS
                allowed = min(limits.image_pixels, limits.decoded_bytes // PIXEL_BYTES)
                Image.MAX_IMAGE_PIXELS = (allowed + 1) // 2
                try:
                    image = Image.open(file, formats=FORMATS)
                finally:
                    Image.MAX_IMAGE_PIXELS = saved
            # Integers and floats pass through float64 on their way to 8 bits.
            wide = image.mode[0] in "IF"
            _check_size(source, image.width * image.height, 8 if wide else PIXEL_BYTES, limits)
            yield image
        except PerceiverError:
            raise
        except Image.DecompressionBombError as error:
            found = re.search(r"\d+", str(error))  # "Image size (N pixels) exceeds limit of ..."
            if found:
                _check_size(source, int(found[0]), PIXEL_BYTES, limits)
            raise DataError(f"{source.shown}: too large an image: {_reason(error)}") from error
        except Exception as error:  # Pillow raises a dozen types, from SyntaxError to struct.error
            raise DataError(f"{source.shown}: damaged or unsupported image: {_reason(error)}") from error


def _check_size(source: Source, pixels: int, itemsize: int, limits: Limits) -> None:
    if pixels > limits.image_pixels:
        raise LimitError(source.shown, pixels, "pixels", "image_pixels", limits.image_pixels)
    check_decoded(source, pixels, itemsize, limits)


def _reason(error: Exception) -> str:
    """Return what Pillow said as one short printable line; its text may quote the file."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot be identified"  # Pillow's own text is the address of a file object
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text)[:160]


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none or its block is damaged: the pixels still count."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (height, width) after EXIF orientation, from the header alone."""
    swapped = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFF files by itself
    return (image.width, image.height) if swapped else (image.height, image.width)


def _decoded(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Return the decoded first frame, upright and opaque, in mode L if it is grey by its mode, else RGB."""
    if spec.size != "auto":
        # A large JPEG decodes at 1/2, 1/4 or 1/8 where that leaves twice the target on the shorter side.
        side = 2 * max(spec.size)
        image.draft(None, (side, side))
    image.load()
    turn = _UPRIGHT.get(_orientation(image))  # after load: PNG may keep EXIF behind the pixels
    flat = flatten(image)
    return flat if turn is None else flat.transpose(turn)


def flatten(image: Image.Image) -> Image.Image:
    """Return the image in mode L or RGB: any mode of Pillow brought to 8 bits, and laid on white.

    16 bits are divided by 257. 32-bit integers and floats say nothing of their range: it is taken as 0..1, 0..255 or
    0..65535, the first that holds all values, else as the image's own minimum..maximum.
    """
    mode, clear = image.mode, image.info.get("transparency")
    if mode[0] in "IF":
        values = np.asarray(image)
        # PNG and PPM have no more than 16 bits, even where Pillow gives them mode I.
        sixteen = mode.startswith("I;16") or image.format in ("PNG", "PPM")
        grey = _to_8_bits(values, 65535 if sixteen else None)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey)
    if clear is not None and mode in ("1", "L", "RGB"):
        image = image.convert("RGBA" if mode == "RGB" else "LA")
    elif mode in ("P", "PA", "RGBa"):
        image = image.convert("RGBA")
    elif mode == "La":
        image = image.convert("LA")
    flat = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.mode not in ("LA", "RGBA"):
        return image.convert(flat)
    white = Image.new(flat, image.size, "white")
    white.paste(image.convert(flat), mask=image.getchannel("A"))
    return white


def _to_8_bits(values: Array, top: int | None) -> Array:
    """Return uint8 from numbers in 0..top; without `top`, from a range guessed as `flatten` says."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels that are not finite numbers")
    if top is None:
        top = next((t for t in (1, 255, 65535) if low >= 0 and high <= t), None)
    start, span = (0.0, float(top)) if top is not None else (low, high - low or 1.0)
    return np.rint((values.astype(np.float64) - start) * (255 / span)).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- the modality


class ImageModality(Modality[ImageSpec]):
    """Files of pixels to (height, width, colours) uint8, and on to a grid of patches (paper 4.1)."""

    name = "image"
    formats = "PNG, JPEG, WebP, GIF (first frame), TIFF (first page), BMP, PPM and PGM"
    decides = ("size", "color")

    def sniff(self, head: bytes, name: str) -> bool:
        """Return whether the bytes begin like one of `formats`; the name plays no part."""
        return _SIGNATURE.match(head) is not None

    def load(self, source: Source, spec: ImageSpec, limits: Limits) -> Array:
        """Return (H, W, c) uint8, c = 1 for grey and 3 for RGB, upright, transparent parts on white.

        A JPEG far larger than `spec.size` comes at half, a quarter or an eighth of its size.

        Raises:
            LimitError: more pixels or bytes than `limits`, by the header, before any is decoded.
            DataError: unreadable, truncated, damaged, of an unknown format, or not finite.
        """
        with opened(source, limits) as image:
            values = to_array(_decoded(image, spec).convert("L" if spec.color == "grey" else "RGB"))
        return check_contract(source, values, "pixels")

    def loaded(self, spec: ImageSpec) -> tuple[str, tuple[int | None, ...]]:
        """Return uint8, (H, W, c)."""
        return "uint8", (None, None, 1 if spec.color == "grey" else 3)

    def layout(self, spec: ImageSpec) -> Layout:
        """Return a (height, width) grid of patches; the defaults give 224 x 224 with C = 3 + 2 (2 64 + 1) = 261.

        Mean and deviation are in units of the uint8 values, one per channel of a patch.

        Raises:
            UsageError: size still "auto", or a size, patch, max_resolution, mean or crop that contradicts the rest.
        """
        (height, width), patch = _size(spec), _patch(spec)
        if patch[0] > height or patch[1] > width:
            raise UsageError(f"image patch {list(patch)} is larger than image size {[height, width]}")
        values_grid = (height // patch[0], width // patch[1])
        grid = _stem_grid(spec.stem, values_grid)
        resolution = spec.max_resolution or tuple(map(float, grid))
        if len(resolution) != 2:
            raise UsageError(f"image max_resolution needs 2 numbers, found {len(resolution)}")
        check_crops(spec)
        colors = 1 if spec.color == "grey" else 3
        area = patch[0] * patch[1]
        return Layout(
            grid=grid,
            channels=colors * area,
            dims=2,
            bands=spec.bands,
            max_resolution=resolution,
            mean=per_channel(spec, "mean", colors) * area,
            std=per_channel(spec, "std", colors) * area,
            stem=spec.stem,
            stem_channels=spec.stem_channels,
            values_grid=values_grid,
            **position_options(spec),
        )

    def prepare(self, raw: Array, spec: ImageSpec, rng: np.random.Generator | None) -> ByteArray:
        """Return a ByteArray of (*size // patch, c * patch area) uint8 from (H, W, c); may share memory with `raw`.

        With `rng`: Inception crop, mirror, RandAugment. Without: the centre, `eval_crop` of what fits. Positions
        belong to the crop, not to the whole image, which overfits (paper 4.1, Figure 4).
        """
        size, patch = _size(spec), _patch(spec)
        if rng is None:
            return ByteArray(patchify(resize(raw, center_box(raw, spec, size), size), patch))
        values = resize(raw, random_box(raw, spec, size, rng), size, reducing_gap=3.0)
        if rng.random() < spec.flip:
            values = np.ascontiguousarray(values[:, ::-1])
        if spec.randaugment_layers:
            values = randaugment(values, spec.randaugment_layers, spec.randaugment_magnitude, rng)
        return ByteArray(patchify(values, patch))

    def resolve(self, spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> ImageSpec:
        """Return `spec` with size, patch and color settled, and with one mean and deviation where color is grey.

        Size: median height and width by the headers, scaled so that the longer side is at most `max_auto_size`, in
        whole patches. Color: grey if no probe shows a colour. What cannot be read is passed over. Without sources:
        a square of `max_auto_size` in RGB.

        Raises:
            DataError: something is "auto" and no source could be read.
        """
        if not sources:
            known = {"size": (spec.max_auto_size, spec.max_auto_size), "color": "rgb"}
            spec = spec.model_copy(update={key: value for key, value in known.items() if getattr(spec, key) == "auto"})
        size = _auto_size(spec, sources, limits) if spec.size == "auto" else spec.size
        if spec.patch == "auto":
            side = min(math.ceil(math.sqrt(size[0] * size[1] / spec.max_auto_inputs)), *size)
            spec = spec.model_copy(update={"patch": (side, side)})
        if spec.size == "auto":
            spec = spec.model_copy(update={"size": _whole_patches(size, _patch(spec), spec.max_auto_size)})
        if spec.color == "auto":
            spec = spec.model_copy(update={"color": _auto_color(spec, sources, limits)})
        if spec.color == "grey":
            means = {key: (float(np.mean(getattr(spec, key))),) for key in ("mean", "std")}
            spec = spec.model_copy(update=means)
        return spec


MODALITY = ImageModality()


def _size(spec: ImageSpec) -> tuple[int, int]:
    if spec.size == "auto":
        raise UsageError('image size is still "auto"', "it is settled from training data; or give a size")
    return spec.size


def _stem_grid(stem: str, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the grid that a stem leaves: convolution of 7 and pooling of 3, each with stride 2."""
    if not stem.startswith("conv"):
        return grid
    # "same" rounds each halving up; "valid" pads the convolution by 3 and the pooling by nothing.
    convolved = [-(-side // 2) for side in grid]
    height, width = (-(-side // 2) if stem == "conv-same" else (side - 3) // 2 + 1 for side in convolved)
    if min(height, width) < 1:
        raise UsageError(f"image size {list(grid)} is too small for stem {stem}")
    return height, width


def _patch(spec: ImageSpec) -> tuple[int, int]:
    if spec.patch == "auto":
        raise UsageError('image patch is still "auto"', "it is settled with the size; or give a patch")
    return spec.patch


def per_channel(spec: ImageSpec | VideoSpec, key: str, colors: int) -> tuple[float, ...]:
    """Return the spec's "mean" or "std", one number a colour, in units of the uint8 values. Raises UsageError."""
    numbers: tuple[float, ...] = getattr(spec, key)
    if colors == 1 and len(numbers) == 3:
        numbers = (sum(numbers) / 3,)
    if len(numbers) not in (1, colors):
        raise UsageError(f"{spec.modality} {key} needs 1 number or {colors}, found {len(numbers)}")
    return tuple(number * 255 for number in (numbers if len(numbers) == colors else numbers * colors))


def check_crops(spec: ImageSpec | VideoSpec) -> None:
    """Raise UsageError where a range of the Inception crop does not rise."""
    for key, (low, high), top in (("crop_area", spec.crop_area, 1.0), ("crop_aspect", spec.crop_aspect, math.inf)):
        if not 0 < low <= high <= top:
            raise UsageError(f"{spec.modality} {key} must rise within 0..{top:g}, found {[low, high]}")


def _probe(key: str, sources: Iterable[Source], limits: Limits, look: Callable[[Image.Image], T]) -> Iterator[T]:
    """Yield what `look` finds in each source that can be read. Raises DataError if there is none."""
    first, found = "there are no images", False
    for count, source in enumerate(sources):
        try:
            with opened(source, limits) as image:
                seen = look(image)
        except DataError as error:
            first = f"no image can be read, the first: {error.message}" if count == 0 else first
            continue
        found = True
        yield seen
    if not found:
        raise DataError(f'image {key} = "auto": {first}', f"give inputs.image.{key} instead")


def _auto_size(spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> tuple[int, int]:
    sides = np.median(list(_probe("size", sources, limits, _upright_size)), axis=0)
    height, width = (sides * min(1.0, spec.max_auto_size / sides.max())).round().astype(int).tolist()
    return max(1, height), max(1, width)


def _whole_patches(size: tuple[int, int], patch: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return the size in whole patches that is nearest to `size` and not above `longest`."""
    height, width = (
        max(1, min(round(side / step), longest // step)) * step for side, step in zip(size, patch, strict=True)
    )
    return height, width


def _auto_color(spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> str:
    def has_color(image: Image.Image) -> bool:
        values = np.asarray(_decoded(image, spec))
        return values.ndim == 3 and bool((values[..., :1] != values[..., 1:]).any())

    # Probes lie evenly over the sources, which may be sorted by class; the others stand in for unreadable ones.
    step = max(1, len(sources) // COLOR_PROBES)
    spread = (source for start in range(step) for source in sources[start::step])
    probes = islice(_probe("color", spread, limits, has_color), COLOR_PROBES)
    return "rgb" if any(probes) else "grey"


# ---------------------------------------------------------------- geometry

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def center_box(raw: Array, spec: ImageSpec | VideoSpec, size: tuple[int, int]) -> Box:
    """Return the centre `eval_crop` of the largest box that has the target's aspect ratio, in whole pixels.

    Rounded down as by transformers' image processor, so that published weights see the pixels that they were
    evaluated on.
    """
    height, width = raw.shape[:2]
    crop_width = max(1, int(spec.eval_crop * min(width, height * size[1] / size[0])))
    crop_height = max(1, int(spec.eval_crop * min(height, width * size[0] / size[1])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def random_box(raw: Array, spec: ImageSpec | VideoSpec, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Return the Inception crop, in whole pixels: a random area, aspect ratio (log-uniform) and place.

    `crop_aspect` is relative to the target's aspect ratio: of the crop itself where the target is square.
    """
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
    # Nothing fitted: the largest centred box of an allowed aspect ratio.
    crop_width, crop_height = min(width, round(height * high)), min(height, round(width / low))
    crop_width, crop_height = max(1, crop_width), max(1, crop_height)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resize(values: Array, box: Box, size: tuple[int, int], reducing_gap: float | None = None) -> Array:
    """Return the box of (H, W, c) values at `size` (height, width), bicubic; a view where nothing changes.

    Cropped first, so that no pixel beyond the box reaches the result. With `reducing_gap` large boxes are first
    averaged down to that many times `size`: faster, and near enough for training.
    """
    left, top, right, bottom = box
    part = values[top:bottom, left:right]
    if part.shape[:2] == size:
        return part
    return to_array(_to_image(part).resize((size[1], size[0]), Resampling.BICUBIC, reducing_gap=reducing_gap))


def _to_image(values: Array) -> Image.Image:
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def to_array(image: Image.Image) -> Array:
    return np.array(image).reshape(image.height, image.width, -1)  # a copy, so that it is writable


# ---------------------------------------------------------------- RandAugment

# The operations and constants of RandAugment (Cubuk et al. 2020) in the official Perceiver code. Each takes the image
# and a level in 0..1. Lengths there are pixels of an ImageNet crop; here they shrink with the shorter side.
TRANSLATE_PIXELS, CUTOUT_PIXELS, PER_SIDE = 100, 40, 224
Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def randaugment(values: Array, layers: int, magnitude: int, rng: np.random.Generator) -> Array:
    """Return (H, W, c) uint8 values after `layers` random operations of strength `magnitude` in 0..10."""
    image = _to_image(values)
    operations = tuple(RANDAUGMENT.values())
    for _ in range(layers):
        image = operations[rng.integers(len(operations))](image, magnitude / 10, rng)
    return to_array(image)


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _gray(image: Image.Image) -> Any:
    return 128 if image.mode == "L" else (128, 128, 128)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.NEAREST, fillcolor=_gray(image))


def _pixels(image: Image.Image, length: float) -> int:
    return round(length * min(image.size) / PER_SIDE)


def _cutout(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    half = _pixels(image, CUTOUT_PIXELS * level)
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(_gray(image), (x - half, y - half, x + half, y + half))
    return image


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    table = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda image, level, rng: kind(image).enhance(1.8 * level + 0.1)


def _translation(image: Image.Image, level: float, rng: np.random.Generator) -> int:
    return _sign(rng) * _pixels(image, TRANSLATE_PIXELS * level)


RANDAUGMENT: dict[str, Operation] = {
    "AutoContrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, rng: ImageOps.equalize(image),
    "Invert": lambda image, level, rng: ImageOps.invert(image),
    "Rotate": lambda image, level, rng: image.rotate(30 * level * _sign(rng), fillcolor=_gray(image)),
    # At least one bit: with none, which the official code gives below magnitude 3, the image would be black.
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
    "SolarizeAdd": lambda image, level, rng: _solarize_add(image, level),
}
