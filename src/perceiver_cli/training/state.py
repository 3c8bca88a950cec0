"""The training state on disk: checksummed, committed as a whole, with the previous state kept."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_cli.errors import IntegrityError, PerceiverError, UsageError, counted
from perceiver_cli.files import cannot_read, open_file, show_path, write_text
from perceiver_cli.model.checkpoint import FORMAT, load_model, not_finite, read_tensors, write_tensors
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.run_folder import MANIFEST, MODEL_FILE, STATE_FOLDER, STATE_PATTERN, find_model

STATE_NAME = r"step-\d{8,}\.safetensors"

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
        f"it knows {len(rows)} of {counted(len(classes), 'class')}"
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
    previous = [name for name in _committed(folder) if name != file.name][:1]
    states = [
        {"file": name, "step": int(name.removeprefix("step-").partition(".")[0])} for name in (file.name, *previous)
    ]
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "states": states}, indent=1) + "\n")
    for old in folder.glob(STATE_PATTERN):
        if old.name not in {state["file"] for state in states}:
            with suppress(OSError):  # the manifest does not name it
                old.unlink()
    return file


def load_state(run: Path) -> TrainingState:
    """Return a run's newest intact state; raise UsageError if there is none, IntegrityError if all are damaged."""
    folder = run / STATE_FOLDER
    damaged: list[str] = []
    for name in dict.fromkeys([*_committed(folder), *_present(folder)]):
        try:
            fields, tensors = read_tensors(folder / name)
            if broken := not_finite(tensors):
                raise IntegrityError(f"{show_path(folder / name)}: {broken[0]} is not finite")
            return TrainingState(tensors, fields, damaged)
        except PerceiverError as error:
            damaged.append(str(error))
    if damaged:
        raise IntegrityError(f"{show_path(run)}: no intact training state: {'; '.join(damaged)}")
    again = "pass --replace to start over" if (run / MODEL_FILE).exists() else "start it without --resume"
    raise UsageError(f"{show_path(run)}: no training state to resume", again)


def _committed(folder: Path) -> list[str]:
    """Return the files that the manifest names, newest first; none if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        with open_file(path) as file:
            names = [str(state["file"]) for state in json.loads(file.read(MAX_MANIFEST_BYTES))["states"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    # A damaged name must not make an older state the newest.
    return names if all(re.fullmatch(STATE_NAME, name) for name in names) else []


def _present(folder: Path) -> list[str]:
    """Return the states in a folder that has a manifest, newest first; `begin_run` removes the manifest first.

    Each state is whole and has its own checksum, so a damaged manifest loses none.
    """
    names = [path.name for path in folder.glob(STATE_PATTERN)] if (folder / MANIFEST).exists() else []
    return sorted(filter(re.compile(STATE_NAME).fullmatch, names), reverse=True)
