"""From a name (preset, configuration, run, model file) to facts about it, and one file to its byte array."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_cli.checkpoint import find_model, read_info
from perceiver_cli.config import Config, InputSpec, Limits, load_config, load_preset, preset_names
from perceiver_cli.cost import estimate
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import atomic_write, show_path
from perceiver_cli.preprocess import candidates, modality
from perceiver_cli.preprocess.base import Source
from perceiver_cli.stream import safetensors_rows

# The recipe of the paper for each modality: what `preprocess` follows unless told otherwise.
PAPER = {"image": "imagenet", "audio": "audioset-audio", "video": "audioset-video", "points": "modelnet40"}
DEFAULT_CLASSES = 10  # counted for recipes that leave the classes to the data


def settled(spec: InputSpec) -> InputSpec:
    """Return a spec whose every "auto" has the value that it takes without data to look at."""
    return modality(spec.modality).resolve(spec, [], Limits())  # type: ignore[no-any-return]


def describe(name: str) -> dict[str, Any]:
    """Return parameters, FLOPs and shapes of a preset, a TOML file, a run folder or a model file.

    Raises:
        UsageError: nothing of that name.
    """
    facts: dict[str, Any] = {}
    if name in preset_names():
        config = load_preset(name)
        num_classes = config.num_classes or DEFAULT_CLASSES
    elif name.endswith(".toml"):
        config = load_config(Path(name))
        num_classes = config.num_classes or DEFAULT_CLASSES
    elif Path(name).exists():
        info = read_info(find_model(name))
        config, num_classes = info.config, len(info.classes)
        facts = {"class_names": list(info.classes), "step": info.step, "metrics": dict(info.metrics)}
    else:
        raise UsageError(f"{show_path(name)}: no such preset or file", f"presets are {', '.join(preset_names())}")
    layouts = {key: modality(spec.modality).layout(settled(spec)) for key, spec in config.inputs.items()}
    cost = estimate(config.model, layouts, num_classes)
    inputs = {
        key: {"modality": config.inputs[key].modality, "grid": list(layout.grid), "count": layout.num_inputs,
              "channels": layout.num_channels}
        for key, layout in layouts.items()
    }  # fmt: skip
    return {
        "name": config.name,
        "parameters": cost.parameters,
        "flops": cost.flops,
        "inputs": inputs,
        "latents": {"count": config.model.num_latents, "channels": config.model.latent_channels},
        "classes": num_classes,
        "schedule": config.model.schedule,
        "self_attends_per_block": config.model.self_attends_per_block,
        "training_bytes_per_example": cost.activation_bytes,
        **facts,
    }


def input_recipe(
    source: Source, model: str | None, preset: str | None, raised: Mapping[str, float]
) -> tuple[InputSpec, Limits]:
    """Return how to prepare a file: as a model or a preset does, or as the paper does for its modality.

    Raises:
        UsageError: two recipes given. DataError: a file of another modality than the recipe reads.
    """
    if model is not None and preset is not None:
        raise UsageError("--model and --preset are two recipes", "pass one of them")
    kind, *others = candidates(source)
    config: Config
    if model is not None:
        config = read_info(find_model(model)).config
    elif preset is None and kind not in PAPER:
        raise UsageError(f"the paper has no recipe for {kind}", "pass --preset or --model")
    else:
        config = load_preset(preset or PAPER[kind])
    limits = Limits.model_validate({**vars(config.data.limits), **raised})
    for name in (kind, *others):  # a video may also be read for its sound
        if name in config.inputs:
            return settled(config.inputs[name]), limits
    reads = "+".join(sorted(config.inputs))
    raise DataError(f"{source.shown}: {kind} by its content, but {config.name} reads {reads}")


def write_byte_array(source: Source, spec: InputSpec, limits: Limits, output: str) -> tuple[int, int]:
    """Write a file's byte array (M, C) to FILE.npy or FILE.safetensors; return (M, C)."""
    from perceiver_cli.encoding import byte_array  # torch, after all that can be refused without it

    rows = np.ascontiguousarray(byte_array(source, spec, limits))
    if Path(output).suffix.lower() == ".safetensors":
        data = safetensors_rows(rows, spec.modality, spec)
    else:
        stream = io.BytesIO()
        np.save(stream, rows)
        data = stream.getvalue()
    with atomic_write(output) as file:
        file.write(data)
    return rows.shape[0], rows.shape[1]
