"""Facts about the model of a preset, a configuration, a run or a model file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from perceiver_cli.config import load_config, load_preset
from perceiver_cli.errors import UsageError
from perceiver_cli.files import show_path, status_of
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.model.cost import estimate
from perceiver_cli.model.machines import training_estimate
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.presets import preset_names
from perceiver_cli.run_folder import find_model

DEFAULT_CLASSES = 10  # for recipes that take the classes from the data


def is_model(name: str) -> bool:
    """Return False for a file of data, else True: for a preset, a TOML file, a run, a model file, or nothing."""
    if name in preset_names() or name.endswith((".toml", ".safetensors")):
        return True
    return not os.path.isfile(name)


def describe(name: str, on: str | None = None) -> dict[str, Any]:
    """Return parameters, FLOPs and shapes of a preset, a TOML file, a run folder or a model file.

    on: a machine, adds what training costs there. Raises UsageError if nothing has that name.
    """
    facts: dict[str, Any] = {}
    members = 1
    if name in preset_names() or name.endswith(".toml"):
        config = load_preset(name) if name in preset_names() else load_config(Path(name))
        num_classes = config.num_classes or DEFAULT_CLASSES
    elif status_of(name) is not None:
        info = read_info(find_model(name))
        config, num_classes, members = info.config, len(info.classes), info.members
        facts = {"class_names": list(info.classes), "step": info.step, "metrics": dict(info.metrics)}
    else:
        raise UsageError(f"{show_path(name)}: no such preset or file", f"presets are {', '.join(preset_names())}")
    layouts = {key: modality(spec.modality).layout(settled(spec)) for key, spec in config.inputs.items()}
    cost = estimate(config.model, layouts, num_classes)
    inputs = {
        key: {"modality": key, "grid": list(layout.grid), "count": layout.num_inputs, "channels": layout.num_channels}
        for key, layout in layouts.items()
    }
    if on is not None:
        facts["training"] = training_estimate(on, config, cost, layouts)
    return {
        "name": config.name,
        "parameters": cost.parameters * members,
        "flops": cost.flops * members,
        "inputs": inputs,
        "latents": {"count": config.model.num_latents, "channels": config.model.latent_channels},
        "classes": num_classes,
        "schedule": config.model.schedule,
        "self_attends_per_block": config.model.self_attends_per_block,
        "training_bytes_per_example": cost.activation_bytes,
        **facts,
        **({"members": members} if members > 1 else {}),
    }
