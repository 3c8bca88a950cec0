"""The training state on disk: checksummed, committed as a whole, with the previous state kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_cli.errors import IntegrityError, PerceiverError, UsageError, counted
from perceiver_cli.files import cannot_read, open_file, show_path, write_text
from perceiver_cli.model.checkpoint import FORMAT, load_model, read_tensors, write_tensors
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.run_folder import MANIFEST, STATE_FOLDER, STATE_PATTERN, find_model

MAX_MANIFEST_BYTES = 1 << 20


def transfer_weights(model: Perceiver, classes: Sequence[str], source: str | os.PathLike[str]) -> str:
    """Copy the weights of a trained model that fit by name and shape into `model`; return a note with their number.

    Rows of the head are matched by class name. Raises UsageError if there is no model or no weight fits.
    """
    donor, info = load_model(find_model(os.fspath(source)))
    theirs, ours = donor.state_dict(), model.state_dict()
    taken = [name for name in ours if name in theirs and theirs[name].shape == ours[name].shape and "head." not in name]
    if not taken:
        raise UsageError(f"--init-from {show_path(source)}: no weight of {info.config.name} fits this model")
    rows = [(i, info.classes.index(name)) for i, name in enumerate(classes) if name in info.classes]
    with torch.no_grad():
        for name in taken:
            ours[name].copy_(theirs[name])
        if ours["head.weight"].shape[1] == theirs["head.weight"].shape[1]:
            for mine, other in rows:
                ours["head.weight"][mine] = theirs["head.weight"][other]
                ours["head.bias"][mine] = theirs["head.bias"][other]
    fresh = sum(name not in taken and "head." not in name for name in ours)
    return (
        f"started from {show_path(source)}: {counted(len(taken), 'tensor')} taken, {fresh} fresh, "
        f"{len(rows)} of {counted(len(classes), 'class')} known to it"
    )


class TrainingState(NamedTuple):
    """A saved state of a run. damaged: the error of each newer state that could not be loaded."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    damaged: list[str]


def save_state(run: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Path:
    """Commit a training state to `run`/last, keep the previous one and delete older ones; return its file.

    `fields` must be JSON and have "step". The rename of the manifest is the commit, so a crash at any moment leaves the
    previous state.
    """
    folder = run / STATE_FOLDER
    file = folder / f"step-{fields['step']:08d}.safetensors"
    write_tensors(file, tensors, {"kind": "training state", "format": FORMAT, **fields})
    previous = [entry for entry in _committed(folder) if entry["file"] != file.name][:1]
    states = [{"file": file.name, "step": fields["step"]}, *previous]
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "states": states}, indent=1) + "\n")
    for old in folder.glob(STATE_PATTERN):
        if old.name not in {state["file"] for state in states}:
            with suppress(OSError):  # no state counts that the manifest does not name
                old.unlink()
    return file


def load_state(run: Path) -> TrainingState:
    """Return a run's newest intact state; raise UsageError if there is none, IntegrityError if all are damaged."""
    folder = run / STATE_FOLDER
    damaged: list[str] = []
    for entry in _committed(folder):
        try:
            fields, tensors = read_tensors(folder / entry["file"])
            return TrainingState(tensors, fields, damaged)
        except PerceiverError as error:
            damaged.append(str(error))
    if damaged:
        raise IntegrityError(f"{show_path(run)}: no intact training state: {'; '.join(damaged)}")
    raise UsageError(f"{show_path(run)}: no training state to resume", "start it without --resume")


def _committed(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's entries, newest first, or none without a manifest."""
    path = folder / MANIFEST
    try:
        with open_file(path) as file:
            states = json.loads(file.read(MAX_MANIFEST_BYTES))["states"]
        if not all(Path(state["file"]).name == state["file"] for state in states):
            raise ValueError("a state in another folder")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{show_path(path)}: damaged manifest: {error}") from error
    return list(states)
