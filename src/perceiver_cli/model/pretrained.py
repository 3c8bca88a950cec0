"""From the image classifiers of transformers (`deepmind/vision-perceiver-*`) to a model file of this program.

There is no second model class: their configuration becomes a `Config`, their tensors take our names (pretrained.toml).
Nothing is trusted: `config.json` is parsed defensively, sizes are counted before a model is built, and the names
and shapes of all tensors must match.

Source: modeling_perceiver.py of transformers; where it differs from the official JAX code, `variant` chooses.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from perceiver_cli.config import MAX_SCHEDULE_STEPS, Config
from perceiver_cli.errors import IntegrityError, UsageError
from perceiver_cli.files import show_path
from perceiver_cli.model.checkpoint import ModelInfo, load_tensors, read_table, save_model
from perceiver_cli.model.cost import MAX_PARAMETERS, estimate
from perceiver_cli.model.hub import ON_HUB, download
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality
from perceiver_cli.run_folder import MODEL_FILE

MAX_JSON_BYTES = 4 << 20
MAX_INPUTS = 1 << 24
CONFIG_FILE, PROCESSOR_FILE = "config.json", "preprocessor_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
Variant = Literal["dm", "hf"]

TABLES: dict[str, dict[str, Any]] = tomllib.loads((files("perceiver_cli.model") / "pretrained.toml").read_text("utf-8"))
FOURIER, LEARNED, CONV = TABLES["architectures"]
FIXED_MODEL = TABLES["fixed_model"] | {"qk_channels": None, "v_channels": None}  # TOML has no null
TABLE, STEM = "encoding.learned_positions.image", "encoding.stems.image.weight"
PROJECTION = "perceiver.input_preprocessor.positions_projection."  # of the table; folded into it
CLASSES = "perceiver.decoder.decoder.final_layer.weight"


def import_model(source: str, output: Path, variant: Variant = "dm") -> ModelInfo:
    """Write the model of `source` to `output` as a model file of this program, and return its header.

    Raises UsageError if `output` is the file to read, ResourceError if it cannot be written, or as `read_pretrained`.
    """
    weights_file = os.path.join(source, MODEL_FILE) if os.path.isdir(source) else source
    if os.path.isfile(weights_file) and output.exists() and output.samefile(weights_file):
        raise UsageError(f"-o {show_path(output)}: is the file to import", "choose another output")
    weights, info = read_pretrained(source, variant)
    save_model(output, weights, info)
    return info


def read_pretrained(source: str, variant: Variant = "dm") -> tuple[dict[str, Tensor], ModelInfo]:
    """Return the weights of a transformers Perceiver under our names, and the header of its model file.

    source: a folder with model.safetensors and config.json; a .safetensors file, with or without config.json beside it;
    or a name on the Hugging Face hub, which downloads the files.
    variant: "dm" computes as the official code, which trained the weights, "hf" as transformers. They differ for
    learned positions (the official readout has no residual) and for the convolution (56 x 56 places, 55 x 55 with the
    padding of transformers). GELU is exact in both; JAX's default, its tanh form, is less than 0.0005 apart.

    Raises UsageError if there is no such source or this program cannot express its configuration, IntegrityError if a
    file is damaged or tensors do not match the configuration.
    """
    fetch = _files(source)
    theirs = _read_json(fetch(CONFIG_FILE))
    if theirs is not None:
        _architecture(theirs, None)  # refuses before the weights are fetched
    processor = _read_json(fetch(PROCESSOR_FILE))
    path = fetch(MODEL_FILE)
    assert path is not None
    shapes, metadata = read_table(path)
    if "perceiver" in metadata:
        raise UsageError(f"{show_path(path)}: already a model of this program", "pass it to -m or --init-from")
    architecture = _architecture(theirs, shapes)
    facts = {**TABLES["defaults"], **theirs} if theirs is not None else _derived(shapes, show_path(path))
    classes = _classes(theirs or {}, _integer(show_path(path), CLASSES, next(iter(shapes.get(CLASSES, ())), None)))
    config = _config(architecture, facts, processor, len(classes), variant)

    layouts = {"image": modality("image").layout(config.inputs["image"])}
    cost = estimate(config.model, layouts, len(classes))
    if cost.parameters > MAX_PARAMETERS or cost.num_inputs > MAX_INPUTS:
        sizes = f"{cost.parameters:,} parameters and {cost.num_inputs:,} inputs"
        raise UsageError(f"{CONFIG_FILE}: asks for {sizes}", f"at most {MAX_PARAMETERS:,} and {MAX_INPUTS:,} are built")
    heads = config.model.num_cross_heads
    if cost.input_channels % heads:
        raise UsageError(f"{CONFIG_FILE}: num_cross_attention_heads {heads} does not divide {cost.input_channels}")
    with torch.device("meta"):
        expected = Perceiver(config.model, layouts, len(classes)).state_dict()
    _check_shapes(path, shapes, expected)
    weights = _converted(path, expected)
    metrics = {"imported_from": source, "variant": variant}
    if theirs is None:
        metrics["assumed"] = ", ".join(f"{key} {value}" for key, value in TABLES["published"].items())
    return weights, ModelInfo(config, classes, 0, metrics)


def _files(source: str) -> Callable[[str], Path | None]:
    """Return a function that maps a file name to its path, or None if it is missing."""
    shown, path = show_path(source), Path(source)
    convert = "load it with transformers and call save_pretrained(FOLDER), which writes safetensors"
    if path.suffix.lower() in PICKLES:
        raise UsageError(f"{shown}: a pickle can run programs, so only safetensors files are opened here", convert)
    folder = os.path.isdir(path)  # unlike Path.is_dir, no error for a name that is too long to be one
    if folder or os.path.isfile(path):
        paths = {name: (path if folder else path.parent) / name for name in (CONFIG_FILE, PROCESSOR_FILE)}
        paths[MODEL_FILE] = path / MODEL_FILE if folder else path
        if not paths[MODEL_FILE].is_file():
            raise UsageError(f"{shown}: no {MODEL_FILE} in it", convert)
        return lambda name: paths[name] if paths[name].is_file() else None
    if ON_HUB.fullmatch(source) and path.suffix != ".safetensors":
        return lambda name: download(source, name, absent=PROCESSOR_FILE)
    raise UsageError(f"{shown}: no such folder or file", "expected a folder, a .safetensors file or a hub's ORG/NAME")


def _read_json(path: Path | None) -> dict[str, Any] | None:
    """Return the JSON object in a small file, or None if `path` is None."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise UsageError(f"{show_path(path)}: larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(data)
    except OSError as error:
        raise UsageError(f"{show_path(path)}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{show_path(path)}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{show_path(path)}: expected a JSON object, found {_shown(value)}")
    return value


def _architecture(theirs: Mapping[str, Any] | None, shapes: Mapping[str, Any] | None) -> str:
    """Return the architecture of config.json; with `shapes`, that of the tensor names, which must agree with it."""
    named = None if theirs is None else theirs.get("architectures")
    claimed = named[0] if isinstance(named, list) and named else None
    if named is not None and claimed not in (FOURIER, LEARNED, CONV):
        known = ", ".join((FOURIER, LEARNED, CONV))
        raise UsageError(f"{CONFIG_FILE}: architecture {_shown(claimed or named)} is not read here", f"known: {known}")
    if shapes is None:
        return str(claimed)
    layers = {name.split(".")[2] for name in shapes if name.startswith("perceiver.input_preprocessor.")}
    actual = LEARNED if "convnet_1x1" in layers else CONV if "convnet" in layers else FOURIER
    if claimed not in (None, actual):
        raise IntegrityError(f"{CONFIG_FILE} says {claimed}, but the tensors are those of {actual}")
    return actual


def _derived(shapes: Mapping[str, tuple[int, ...]], shown: str) -> dict[str, Any]:
    """Return the fields of config.json from the tensors' shapes, and the published values of all others."""
    try:
        num_latents, channels = shapes["perceiver.embeddings.latents"]
        widening = shapes["perceiver.encoder.cross_attention.mlp.dense1.weight"][0] // channels
        places = shapes.get("perceiver.input_preprocessor.position_embeddings.position_embeddings", (224**2,))[0]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"{shown}: not the tensors of a Perceiver classifier of transformers") from error
    layers = len({name.split(".")[3] for name in shapes if name.startswith("perceiver.encoder.self_attends.")})
    sizes = {"num_latents": num_latents, "d_latents": channels, "num_self_attends_per_block": layers}
    widenings = {f"{kind}_attention_widening_factor": widening for kind in ("self", "cross")}
    return {**TABLES["defaults"], **TABLES["published"], **sizes, **widenings, "image_size": math.isqrt(places)}


def _config(
    architecture: str, facts: Mapping[str, Any], processor: Mapping[str, Any] | None, num_classes: int, variant: Variant
) -> Config:
    """Return our configuration of a model of transformers. Raises UsageError if it cannot be expressed."""
    _refuse_others(CONFIG_FILE, facts, FIXED_MODEL)
    count = {key: _integer(CONFIG_FILE, key, facts[key]) for key in TABLES["defaults"] if key != "image_size"}
    if count["self_attention_widening_factor"] != count["cross_attention_widening_factor"]:
        raise UsageError(f"{CONFIG_FILE}: two widening factors, of self- and cross-attention, expected one for both")
    if count["num_blocks"] >= MAX_SCHEDULE_STEPS:
        raise UsageError(f"{CONFIG_FILE}: num_blocks {count['num_blocks']}, expected fewer than {MAX_SCHEDULE_STEPS}")
    image = {**TABLES["architectures"][architecture], **_processing(processor or {})}
    if architecture == LEARNED:
        side = _integer(CONFIG_FILE, "image_size", facts["image_size"])
        if processor is not None and image["size"] != [side, side]:
            size = " x ".join(map(str, image["size"]))
            raise UsageError(f"{PROCESSOR_FILE}: images of {size}, but positions are learned for {side} x {side}")
        image["size"] = [side, side]
    elif architecture == CONV:
        image["stem"] = "conv-same" if variant == "dm" else "conv-valid"
    model = {ours: count[theirs] for ours, theirs in TABLES["sizes"].items()} | {
        "schedule": f"c0 (t0)x{count['num_blocks']}", "cross_channels": "input", "gelu": "erf", "head": "query",
        "query_residual": not (architecture == LEARNED and variant == "dm"),
    }  # fmt: skip
    name = {FOURIER: "imported-fourier", LEARNED: "imported-learned", CONV: "imported-conv"}[architecture]
    inputs = {"image": {**image, "crop_area": (0.35, 1.0), "flip": 0.5}}
    train = TABLES["fine_tuning"]
    config = {"name": name, "num_classes": num_classes, "model": model, "inputs": inputs, "train": train}
    return Config.parse(config, "as imported")


def _processing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return preprocessor_config.json as fields of ImageSpec, with the defaults of PerceiverImageProcessor."""
    _refuse_others(PROCESSOR_FILE, processor, TABLES["fixed_processing"])
    sides: dict[str, list[int]] = {}
    for key, default in (("size", 224), ("crop_size", 256)):
        size = processor.get(key, default)
        pair = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
        sides[key] = [_integer(PROCESSOR_FILE, key, side) for side in pair]
    (height, width), (crop_height, crop_width) = sides["size"], sides["crop_size"]
    if height != width or crop_height != crop_width or height > crop_height:
        raise UsageError(f"{PROCESSOR_FILE}: size and crop_size must be squares, the first inside the second")
    image = {"size": sides["size"], "eval_crop": height / crop_height}
    image |= {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    return {key: value for key, value in image.items() if value is not None}


def _classes(theirs: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return the class names in order, or numbers if there are none; a repeated name gets its number appended."""
    labels = theirs.get("id2label")
    if labels is None:
        return tuple(map(str, range(count)))
    if not isinstance(labels, dict) or not all(isinstance(name, str) and name for name in labels.values()):
        raise UsageError(f"{CONFIG_FILE}: id2label must be a table of names")
    if set(labels) != set(map(str, range(count))):
        raise UsageError(f"{CONFIG_FILE}: id2label has {len(labels)} names, expected one for each of 0 to {count - 1}")
    names: dict[str, None] = {}
    for index in range(count):  # ImageNet has two classes named "crane"
        name = labels[str(index)]
        names[f"{name} ({index})" if name in names else name] = None
    if len(names) != count or len(json.dumps(list(names))) > MAX_JSON_BYTES:
        raise UsageError(f"{CONFIG_FILE}: id2label has repeated names, or names of more than {MAX_JSON_BYTES} bytes")
    return tuple(names)


def _refuse_others(origin: str, table: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, wanted in fixed.items():
        value = table.get(key)
        if value not in (None, wanted):
            raise UsageError(f"{origin}: {key} {_shown(value)} cannot be expressed here, {wanted!r} can")


def _integer(origin: str, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
        raise UsageError(f"{origin}: {key} must be a whole number from 1 to {1 << 20}, found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Return a short printable form of an untrusted value."""
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _their_name(ours: str) -> str:
    """Return transformers' name of one of our tensors."""
    for piece, theirs in TABLES["names"].items():
        ours = ours.replace(piece, theirs)
    return f"perceiver.{ours}"


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor]) -> None:
    """Raise IntegrityError with the first tensors that are missing, not expected or of another shape."""
    wanted = {_their_name(name): tuple(tensor.shape) for name, tensor in expected.items()}
    if STEM in expected:
        wanted[_their_name(STEM)] += (1, 1)  # a 1 x 1 convolution is a linear layer
    if TABLE in expected:
        channels = expected[TABLE].shape[1]
        wanted |= {f"{PROJECTION}weight": (channels, channels), f"{PROJECTION}bias": (channels,)}
    wrong = [f"missing {name}" for name in wanted if name not in shapes]
    wrong += [f"not expected {show_path(name)}" for name in shapes if name not in wanted]
    both = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    wrong += [f"{name}: expected {wanted[name]}, found {shapes[name]}" for name in both]
    if wrong:
        raise IntegrityError(f"{show_path(path)}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:3])}")


def _converted(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensors under our names, in the shapes and types of `expected`."""
    tensors = load_tensors(path)
    weights = {}
    for ours, like in expected.items():
        tensor = tensors[_their_name(ours)]
        same_kind = tensor.is_floating_point() == like.is_floating_point()
        if ours == TABLE:
            # Their projection of the table is the same for every image, so table W^T + b is a table again.
            weight, bias = (tensors[PROJECTION + name].double() for name in ("weight", "bias"))
            tensor = tensor.double() @ weight.T + bias
        weights[ours] = tensor.reshape(like.shape).to(like.dtype).contiguous()
        if not same_kind or not weights[ours].isfinite().all():
            raise IntegrityError(f"{show_path(path)}: {_their_name(ours)}: expected finite numbers of {like.dtype}")
    return weights
