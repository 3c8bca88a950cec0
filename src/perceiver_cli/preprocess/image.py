"""Images as a grid of pixels: decoded by Pillow to uint8, then cropped, resized and augmented (paper 4.1).

`pixels` crops and resizes, `randaugment` augments. Values stay uint8; the model subtracts the mean. Colour profiles
are ignored, as in the paper's ImageNet pipeline.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from pydantic import Field

from perceiver_cli.errors import DataError, PerceiverError, UsageError, counted
from perceiver_cli.preprocess import register
from perceiver_cli.preprocess.base import (
    Array,
    ByteArray,
    Layout,
    Modality,
    Rng,
    TrainingSet,
    check_contract,
    patchify,
    share_in_words,
    stem_in_words,
    varied_in_words,
)
from perceiver_cli.preprocess.foreign import is_camera_raw
from perceiver_cli.preprocess.pixels import (
    center_box,
    color_statistics,
    crop_area,
    opaque,
    padded,
    random_box,
    recoloring,
    resize,
    to_array,
    to_image,
    upright,
)
from perceiver_cli.preprocess.randaugment import randaugment
from perceiver_cli.preprocess.source import HEAD_BYTES, Source, as_data_errors, probed
from perceiver_cli.preprocess.spec import Auto, Fraction, InputSpec, Limits, Pair, Positive, Range, Size


class ImageSpec(InputSpec):
    """Pixels as a grid, height x width (paper 4.1). Values stay uint8 until the model."""

    newer = ("fit", "color_jitter")
    modality: Literal["image"] = "image"
    # "auto": the median size of the training images, at most max_auto_size on the longer side.
    size: Pair | Literal["auto"] = (224, 224)
    max_auto_size: Size = 64  # see size
    # A picture of another aspect than size: crop keeps its centre; pad keeps it whole, with borders like its edges.
    fit: Literal["crop", "pad"] = "crop"
    # "auto": grey if no probed training image has a colour; until that is known, images are read as rgb.
    color: Literal["rgb", "grey", "auto"] = "rgb"
    # "auto": the smallest square patch that gives at most max_auto_inputs inputs; 1 is the paper's single pixels.
    patch: Pair | Literal["auto"] = (1, 1)  # type: ignore[assignment]
    max_auto_inputs: Size = 256  # see patch
    # Learned layers before positions are attached: none (the paper), one linear layer, three small convolutions whose
    # stride is the patch (conv), or Perceiver IO's convolution and pooling to a quarter of each side, with the padding
    # of the official code (conv-same) or of transformers (conv-valid).
    stem: Literal["none", "linear", "conv", "conv-same", "conv-valid"] = "none"
    stem_channels: Size = 64  # channels after the stem
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # mean of values in 0..1, per channel
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)  # divisor of the values after mean
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875  # share of the shorter side that evaluation keeps
    # Training: the Inception crop, a mirror, a change of colours, RandAugment. "auto": by the number of training files
    # and, for the mirror, the names of the classes.
    crop_area: Range | Auto = (0.08, 1.0)
    crop_aspect: Range = (3 / 4, 4 / 3)  # range of width / height of the crop
    flip: Fraction | Auto = 0.5  # probability of a mirror image
    color_jitter: Fraction | Auto = 0.0  # strength of random brightness, contrast and saturation
    randaugment_layers: Annotated[int, Field(ge=0, le=16)] = 0  # operations on each picture
    randaugment_magnitude: Annotated[int, Field(ge=0, le=10)] = 5  # strength of these operations


# By the names of Pillow's plugins: the signature, a regular expression, and the name in messages. A new format is one
# entry here; no other plugin of Pillow is ever called.
FORMATS = {
    "PNG": (rb"\x89PNG\r\n\x1a\n", "PNG"),
    "JPEG": (rb"\xff\xd8\xff", "JPEG"),
    "WEBP": (rb"RIFF....WEBP", "WebP"),
    "GIF": (rb"GIF8[79]a", "GIF (first frame)"),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", "TIFF (first page)"),
    # A text may begin with BM: a known header size must follow.
    "BMP": (rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    "PPM": (rb"P[1-6f]\s(?:\s|#[^\n]*\n)*\d", "PPM, PGM and PFM"),
    "AVIF": (rb"....ftyp(?:avi[fs]|(?:mif1|msf1).{0,64}?avi[fs])", "AVIF"),
    "HEIF": (rb"....ftyp(?:he[iv][cxms]|mif1|msf1)", "HEIC and HEIF"),
    "JPEG2000": (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
}
# Pillow keeps eight bytes for each row and allocates small blocks of rows: 1 x 89,478,485 pixels take 2.8 GB.
MAX_SIDE = 65_535
# Pixels that a byte of a file can stand for at most: a GIF of 43 bytes claims 81 million. (JPEG, WebP and TIFF have no
# useful bound.)
PIXELS_PER_BYTE = {"PNG": 8 * 1032, "GIF": 4096, "BMP": 1 << 14, "PPM": 8}
PIXEL_BYTES = 4  # memory of a pixel in Pillow, in every 8-bit mode
WIDE_PIXEL_BYTES = 12  # the same for integers and floats, with the copy whose range is measured
# Decoders that hold whole pictures of their own, measured at 9 to 36 million pixels, with the array that is returned.
DECODER_BYTES = {"WEBP": 19, "JPEG2000": 24, "AVIF": 12, "HEIF": 12}
JPEG_SCAN, JPEG_END = 0xDA, b"\xff\xd9"
JPEG_HEAD_BYTES = 1 << 20  # before the first scan: a longer head is not searched
# By the tag SampleFormat of a TIFF.
TIFF_NUMBERS = {1: "unsigned integer", 2: "signed integer", 3: "float", 5: "complex integer", 6: "complex float"}
TIFF_HINT = "convert it: gdal_translate -b 1 -b 2 -b 3 -ot Byte -scale IN OUT.tif"
SKETCH = 16  # pixels along a side
VIEW_CROP = (0.75, 1.0)
MILD_CROP = (0.7, 1.0)
MILD: dict[str, Any] = {"crop_area": MILD_CROP, "flip": 0.0, "color_jitter": 0.0}  # for an unknown training set
WORD = 3  # letters of a name that is a word, not a sign
SIGNS = frozenset(
    re.findall(
        r"\w+",
        "zero one two three four five six seven eight nine ten alpha beta gamma delta epsilon zeta eta theta iota "
        "kappa lambda omicron rho sigma tau upsilon phi chi psi omega",
    )
)  # whose mirror images are no signs
SIDES = re.compile(r"left|right|east|west|clockwise|mirror", re.IGNORECASE)
COLOR_PROBES = 20  # images decoded to choose color = "auto"

# Without a handler, Python prints Pillow's log records to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_pillow_globals = threading.Lock()


def format_of(head: bytes) -> str | None:
    """Return Pillow's name of the format of a picture that begins with `head`, or None if it begins none."""
    return next((name for name, (each, _) in FORMATS.items() if re.match(each, head, re.DOTALL)), None)


def _register_heif() -> None:
    """Register HEIF with Pillow. Raises UsageError without pillow-heif."""
    try:
        import pillow_heif
    except ImportError as error:
        raise UsageError("pillow-heif, which reads HEIC, is missing", "pip install 'perceiver-cli[heif]'") from error
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.register_heif_opener()


def _check_tiff(source: Source, tags: Any, is_read: bool) -> None:
    """Raise DataError with the bands and numbers of a TIFF that Pillow does not read, or reads wrong."""
    bits, bands = tags.get(TiffImagePlugin.BITSPERSAMPLE), int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    if not bits:
        return
    number = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
    is_apart = bands > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    # Pillow takes signed bytes for unsigned ones, and the bytes of wide numbers in separate bands for pixels.
    if not is_read or (bits[0] == 8 and number == 2) or (bits[0] > 8 and is_apart):
        numbers = f"{counted(bands, 'band')} of {bits[0]}-bit {TIFF_NUMBERS.get(number, 'number')}s"
        apart = ", stored one after another" if is_apart else ""
        raise DataError(f"{source.shown}: a TIFF of {numbers}{apart}, which are not read", TIFF_HINT)


@contextmanager
def open_image(source: Source, limits: Limits) -> Iterator[Image.Image]:
    """Yield the image with its size checked by its header; no pixel is decoded yet.

    Every exception of Pillow, here or in the body of the `with`, becomes a DataError.
    """
    with source.open(limits) as file, warnings.catch_warnings(), as_data_errors(source, "image"):
        warnings.simplefilter("ignore")
        kind = format_of(file.read(HEAD_BYTES))
        if kind == "HEIF":
            _register_heif()
        pixel_bytes = DECODER_BYTES.get(kind or "", PIXEL_BYTES)
        try:
            # Some plugins allocate a frame while they read the header. Only Pillow's own check comes before that: a
            # global that refuses images above twice its value.
            with _pillow_globals:
                saved = Image.MAX_IMAGE_PIXELS, AvifImagePlugin.DEFAULT_MAX_THREADS
                allowed = min(limits.image_pixels, limits.decoded_bytes // pixel_bytes)
                Image.MAX_IMAGE_PIXELS = (allowed + 1) // 2
                AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several files are decoded at once, one on each core
                try:
                    image = Image.open(file, formats=(kind,) if kind else ())
                finally:
                    Image.MAX_IMAGE_PIXELS, AvifImagePlugin.DEFAULT_MAX_THREADS = saved
            pixel_bytes = WIDE_PIXEL_BYTES if image.mode[0] in "IF" else pixel_bytes
            _check_size(source, image.width * image.height, pixel_bytes, limits)
            _check_claim(source, image, file)
            yield image
        except UnidentifiedImageError as error:  # its own message is the address of a file object
            if kind == "TIFF":
                file.seek(0)
                head = file.read(8)
                head += file.read(8) if 43 in head[2:4] else b""  # BigTIFF
                tags = TiffImagePlugin.ImageFileDirectory_v2(head)
                file.seek(tags.next)
                tags.load(file)
                _check_tiff(source, tags, is_read=False)
            raise DataError(f"{source.shown}: damaged or unsupported image: cannot be identified") from error
        except Image.DecompressionBombError as error:
            if pixels := re.search(r"\d+", str(error)):  # "Image size (N pixels) exceeds limit of ..."
                _check_size(source, int(pixels[0]), pixel_bytes, limits)
            raise


def _check_size(source: Source, pixels: int, pixel_bytes: int, limits: Limits) -> None:
    source.check_limit(pixels, "pixels", "image_pixels", limits)
    source.check_decoded(pixels, pixel_bytes, limits)


def _check_claim(source: Source, image: Image.Image, file: BinaryIO) -> None:
    """Raise DataError for extreme sides, or more pixels than the bytes of the file can stand for."""
    size, num_bytes = f"{image.width} x {image.height} pixels", file.seek(0, os.SEEK_END)
    if max(image.size) > MAX_SIDE:
        raise DataError(f"{source.shown}: {size}, expected sides <= {MAX_SIDE}", "cut the picture into several")
    if image.width * image.height > num_bytes * PIXELS_PER_BYTE.get(image.format or "", MAX_SIDE**2):
        raise DataError(f"{source.shown}: declared {size}, found {num_bytes} bytes")
    if image.format == "TIFF":
        _check_tiff(source, image.tag_v2, is_read=True)  # type: ignore[attr-defined]
    file.seek(0)
    if image.format == "JPEG" and _is_without_scan(file.read(JPEG_HEAD_BYTES)):
        raise DataError(f"{source.shown}: no pixels in the file")


def _is_without_scan(data: bytes) -> bool:
    """Return whether a JPEG ends where its first scan should begin: the decoder would return grey pixels."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == JPEG_SCAN:
            return data[end : end + 2] in (b"", b"\xff", JPEG_END)
        at = end
    return False


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if EXIF is missing or damaged: the pixels can still be read."""
    with suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _decoded(image: Image.Image, spec: ImageSpec, mode: Literal["L", "RGB"] | None = None) -> Array:
    """Return the first frame (H, W, c), upright and opaque, in a mode, by default the nearer of the file's own."""
    if spec.size != "auto":
        side = 2 * max(spec.size)  # a JPEG decodes at 1/2, 1/4 or 1/8 of its size if both sides keep at least this
        image.draft(None, (side, side))
    image.load()
    return upright(opaque(image, mode), _orientation(image))  # after load: in a PNG, EXIF may follow the pixels


class ImageModality(Modality[ImageSpec]):
    """Image files to (height, width, colours) uint8, then to a grid of patches (paper 4.1)."""

    name = "image"
    precedence = 2
    formats = ", ".join(shown for _, shown in FORMATS.values())
    suffixes = frozenset({
        ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
        ".pbm", ".pnm", ".pfm", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".mpo", ".apng",
    })  # fmt: skip
    decides = ("size", "color")
    surveyed = 256
    paper_preset = "imagenet"
    can_mix = True
    preparation = (
        "decode to RGB (or grey) uint8, turned as EXIF says; crop the centre: eval_crop of the largest box of the "
        "aspect of size, rounded down; resize to size (height, width), bicubic with antialias; keep 0..255: mean and "
        "std are applied in the graph; cut into patches"
    )

    def sniff(self, head: bytes, name: str) -> bool:
        return format_of(head) is not None and not is_camera_raw(head, name)

    def load(self, source: Source, spec: ImageSpec, limits: Limits) -> Array:
        """Return (H, W, c) uint8, upright, transparent pixels on white; c is 1 for grey and 3 for RGB.

        A JPEG far larger than `spec.size` is decoded at half, a quarter or an eighth of its size.
        """
        with open_image(source, limits) as image:
            values = _decoded(image, spec, "L" if spec.color == "grey" else "RGB")
        return check_contract(source, values, "pixels")

    def loaded(self, spec: ImageSpec) -> tuple[str, tuple[int | None, ...]]:
        return "uint8", (None, None, 1 if spec.color == "grey" else 3)

    def layout(self, spec: ImageSpec) -> Layout:
        """Return a (height, width) grid of patches; the defaults give 224 x 224 with C = 3 + 2 (2 64 + 1) = 261."""
        (height, width), patch = _settled(spec)
        values_grid = (height // patch[0], width // patch[1])
        if 0 in values_grid:
            raise UsageError(f"inputs.image.patch {list(patch)} is larger than the image, {[height, width]}")
        stem: dict[str, Any] = {"stem": spec.stem, "stem_channels": spec.stem_channels, "values_grid": values_grid}
        colors, area = 1 if spec.color == "grey" else 3, math.prod(patch)
        if spec.stem == "conv":
            settled = spec.model_copy(update={"patch": patch})
            return Layout.of_conv_stem(settled, (height, width), colors, **color_statistics(spec, colors, 1))
        grid = _stem_grid(spec.stem, values_grid)
        return Layout.of_grid(spec, grid, colors * area, **stem, **color_statistics(spec, colors, area))

    def prepare(self, raw: Array, spec: ImageSpec, rng: Rng | None) -> ByteArray:
        """Return a ByteArray of (*size // patch, c * patch area) uint8 from (H, W, c); may share memory with `raw`.

        With `rng`: Inception crop, mirror, colours, RandAugment. Without: the centre crop of `eval_crop`. Positions
        count within the crop: positions within the whole image overfit (paper 4.1, Figure 4).
        """
        size, patch = _settled(spec)
        patch = (1, 1) if spec.stem == "conv" else patch
        raw = padded(raw, size) if spec.fit == "pad" else raw
        if rng is None:
            return ByteArray(patchify(resize(raw, center_box(raw, spec, size), size), patch))
        values = resize(raw, random_box(raw, spec, size, rng), size, reducing_gap=3.0)
        if rng.random() < varied(spec, "flip"):
            values = np.ascontiguousarray(values[:, ::-1])
        if strength := varied(spec, "color_jitter"):
            values = to_array(recoloring(values[None], strength, rng)(to_image(values)))
        if spec.randaugment_layers:
            values = randaugment(values, spec.randaugment_layers, spec.randaugment_magnitude, rng)
        return ByteArray(patchify(values, patch))

    def in_words(self, spec: ImageSpec) -> str:
        size, patch = _settled(spec)
        inputs = "single pixels" if patch == (1, 1) else f"{patch[0]} x {patch[1]} patches"
        inputs += stem_in_words(spec.stem)
        whole = ", whole" if spec.fit == "pad" else ""
        smallest = crop_area(spec)[0]
        changes = {"mirror": varied(spec, "flip"), "colours": varied(spec, "color_jitter")}
        changes |= {f"crops from {smallest:.0%} on": 1 - smallest, "RandAugment": spec.randaugment_layers}
        varied_by = varied_in_words(name for name, strength in changes.items() if strength)
        return f"{size[0]} x {size[1]} {'grey' if spec.color == 'grey' else 'colour'}{whole}, {inputs}{varied_by}"

    def declared(self, source: Source, limits: Limits) -> dict[str, Any]:
        with open_image(source, limits) as image:
            turned = {"orientation": _orientation(image)}
            return {"format": image.format, "width": image.width, "height": image.height, "mode": image.mode, **turned}

    def survey(self, spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> list[str]:
        """Return the size of the files if they share one, else the shares of larger and of smaller files."""
        sizes = []
        for source in sources:
            with suppress(PerceiverError):
                sizes.append(_upright_size(source, limits))
        height, width = _settled(spec)[0]
        if not sizes or set(sizes) == {(height, width)}:
            return []
        if len(set(sizes)) == 1:
            return [f"all {counted(len(sizes), 'file')} are {sizes[0][0]} x {sizes[0][1]}"]
        larger = sum(h > height and w > width for h, w in sizes)
        smaller = sum(h < height or w < width for h, w in sizes)
        most, least = max(sizes, key=math.prod), min(sizes, key=math.prod)
        facts = [(larger, "larger, up to", most), (smaller, "smaller, down to", least)]
        return [
            f"{share_in_words(count, len(sizes))} of {counted(len(sizes), 'file')} are {words} {h} x {w}"
            for count, words, (h, w) in facts if count
        ]  # fmt: skip

    def adapt(self, spec: ImageSpec, training_set: TrainingSet) -> ImageSpec:
        """Return `spec` with its "auto" variations: strong ones for few pictures, which are seen hundreds of times."""
        small = training_set.is_small
        chosen = {
            "crop_area": (0.35, 1.0) if small else MILD_CROP,
            "flip": 0.5 if may_mirror(training_set.classes) else 0.0,
            "color_jitter": 0.4 if small else 0.0,
        }
        return spec.filled(chosen)

    def sketch(self, raw: Array, spec: ImageSpec) -> Array:
        """Return the picture at SKETCH x SKETCH pixels, less its mean: brightness and size must not matter."""
        height, width = raw.shape[:2]
        small = resize(raw, (0, 0, width, height), (SKETCH, SKETCH)).astype(np.float32)
        return np.asarray(small - small.mean()).reshape(-1)

    def viewed(self, spec: ImageSpec) -> ImageSpec:
        """Return `spec` with only mild crops, and a mirror if training has one."""
        calm = {"crop_area": VIEW_CROP, "color_jitter": 0.0, "randaugment_layers": 0}
        return spec.model_copy(update=calm | {"flip": 0.5 if varied(spec, "flip") else 0.0})

    def resolve(self, spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> ImageSpec:
        """Return `spec` with values for size, patch and color; grey gets one mean and one deviation.

        Size is the median height and width in the headers, scaled down to `max_auto_size` on the longer side, in whole
        patches. Color is grey if no probe has a colour. Without sources, images become squares of `max_auto_size` in
        RGB. Unreadable sources are skipped. Raises DataError if no source can be read.
        """
        if not sources:
            spec = spec.filled({"size": (spec.max_auto_size, spec.max_auto_size), "color": "rgb"})
        size = _auto_size(spec, sources, limits) if spec.size == "auto" else spec.size
        side = min(math.ceil(math.sqrt(size[0] * size[1] / spec.max_auto_inputs)), *size)
        side = 1 << (side - 1).bit_length() if spec.stem == "conv" else side  # the next power of 2
        patch = (side, side) if spec.patch == "auto" else spec.patch
        if spec.size == "auto":  # whole patches, the nearest size that is not above max_auto_size
            most = spec.max_auto_size
            height, width = (max(1, min(round(s / p), most // p)) * p for s, p in zip(size, patch, strict=True))
            size = height, width
        spec = spec.model_copy(update={"size": size, "patch": patch})
        if spec.color == "auto":
            spec = spec.model_copy(update={"color": _auto_color(spec, sources, limits)})
        if spec.color == "grey":
            spec = spec.model_copy(update={key: (float(np.mean(getattr(spec, key))),) for key in ("mean", "std")})
        return spec.filled(MILD)


MODALITY = ImageModality()
register(MODALITY)


def may_mirror(classes: Sequence[str]) -> bool:
    """Return whether a mirror image keeps its class: no name of a class is a sign or a number, or says left or right.

    A mirrored digit or letter is another one, or none. A name with a digit is often that of a sign with a number.
    """
    words = [re.sub(r"[^a-z]", "", name.lower()) for name in classes]
    signs = any(len(word) < WORD or word in SIGNS for word in words)
    return not signs and not any(SIDES.search(name) or re.search(r"\d", name) for name in classes)


def varied(spec: ImageSpec, option: str) -> float:
    """Return the strength of a variation; while it is "auto", that for an unknown training set."""
    value = getattr(spec, option)
    return float(MILD[option] if value == "auto" else value)


def _settled(spec: ImageSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return size and patch. Raises UsageError if one is "auto"."""
    if spec.size == "auto":
        raise UsageError('inputs.image.size is still "auto"', "training data settles it; or give a size")
    if spec.patch == "auto":
        raise UsageError('inputs.image.patch is still "auto"', "the size settles it; or give a patch")
    return spec.size, spec.patch


def _stem_grid(stem: str, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the grid after the stem: a convolution of 7 and a pooling of 3 halve each side twice."""
    if not stem.startswith("conv"):
        return grid
    # "same" rounds each halving up; "valid" pads the convolution by 3 and the pooling by nothing.
    convolved = [-(-side // 2) for side in grid]
    height, width = (-(-side // 2) if stem == "conv-same" else (side - 3) // 2 + 1 for side in convolved)
    if min(height, width) < 1:
        raise UsageError(f"inputs.image.size: a grid of {list(grid)} is too small for stem {stem}")
    return height, width


def _upright_size(source: Source, limits: Limits) -> tuple[int, int]:
    """Return height and width of a picture as it is shown, from its header."""
    with open_image(source, limits) as image:
        is_turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow rotates TIFF files by itself
        return image.size if is_turned else image.size[::-1]


def _auto_size(spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> tuple[int, int]:
    sides = np.median(list(probed(sources, partial(_upright_size, limits=limits), "inputs.image.size")), axis=0)
    height, width = (sides * min(1.0, spec.max_auto_size / sides.max())).round().astype(int).tolist()
    return max(1, height), max(1, width)


def _auto_color(spec: ImageSpec, sources: Sequence[Source], limits: Limits) -> str:
    def has_color(source: Source) -> bool:
        with open_image(source, limits) as image:
            values = _decoded(image, spec)
        return bool((values[..., :1] != values[..., 1:]).any())

    # Probes are spread over the sources, which may be sorted by class; further sources replace unreadable ones.
    step = max(1, len(sources) // COLOR_PROBES)
    spread = (source for start in range(step) for source in sources[start::step])
    probes = islice(probed(spread, has_color, "inputs.image.color"), COLOR_PROBES)
    return "rgb" if any(probes) else "grey"
