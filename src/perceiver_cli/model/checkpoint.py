"""Weights on disk: safetensors only, self-contained, checksummed, and never half written.

A model file's header holds everything that its use needs: format number, configuration (with preprocessing), class
names, step and metrics. A training state is such a file too, listed with its sha256 in `MANIFEST.json`, whose rename is
the moment of the commit; the one before it is kept until the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_cli.config import Config
from perceiver_cli.errors import IntegrityError, UsageError
from perceiver_cli.files import atomic_write, show_path
from perceiver_cli.preprocess import modality

if TYPE_CHECKING:
    from torch import Tensor

    from perceiver_cli.model.perceiver import Perceiver


DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Calibration:
    """temperature: divides the logits. thresholds: by class, with several labels an example; else empty."""

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()

    @classmethod
    def parse(cls, fields: Mapping[str, Any], num_classes: int) -> Calibration:
        """Return the calibration in a model file's header. Raises ValueError where it makes no sense."""
        found = cls(float(fields["temperature"]), tuple(map(float, fields["thresholds"])))
        if not (isfinite(found.temperature) and found.temperature > 0):
            raise ValueError(f"temperature {found.temperature}, expected more than 0")
        if len(found.thresholds) not in (0, num_classes) or not all(0 <= t <= 1 for t in found.thresholds):
            raise ValueError(
                f"{len(found.thresholds)} thresholds, expected one in 0..1 for each of {num_classes} classes"
            )
        return found


FORMAT = 1
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 100_000
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says of itself."""

    config: Config
    classes: tuple[str, ...]
    step: int
    metrics: Mapping[str, Any]
    data_fingerprint: str = ""
    calibration: Calibration | None = None


# ---------------------------------------------------------------- model files


def save_model(path: Path, weights: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Write a self-contained model file, whole or not at all. Raises ResourceError where it cannot be written."""
    header = {
        "kind": "model",
        "format": FORMAT,
        "config": info.config.to_dict(),
        "classes": list(info.classes),
        "step": info.step,
        "metrics": dict(info.metrics),
        "data_fingerprint": info.data_fingerprint,
    }
    if info.calibration is not None:
        header["calibration"] = asdict(info.calibration)
    write_tensors(path, weights, header)


def store_calibration(path: Path, calibration: Calibration) -> None:
    """Give a model file a calibration in place of any other; all else stays as it is, or the whole file does.

    Raises:
        IntegrityError: damaged. ResourceError: it cannot be written.
    """
    tensors = read_tensors(path, read_header(path))
    save_model(path, tensors, replace(read_info(path), calibration=calibration))


def read_info(path: Path) -> ModelInfo:
    """Return what a model file says of itself, from its header alone (no torch, no weights).

    Raises:
        IntegrityError: damaged, or of another format version. UsageError: not a model file of this program.
    """
    header = read_header(path).fields
    if header.get("kind") != "model":
        raise IntegrityError(f"{show_path(path)}: holds a {header.get('kind')}, expected a model")
    try:
        config = Config.parse(header["config"], show_path(path))
        classes = tuple(map(str, header["classes"]))
        fingerprint = str(header.get("data_fingerprint", ""))
        fitted = header.get("calibration")
        calibration = None if fitted is None else Calibration.parse(fitted, len(classes))
        return ModelInfo(config, classes, int(header["step"]), dict(header["metrics"]), fingerprint, calibration)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise IntegrityError(f"{show_path(path)}: incomplete header: {error}") from error


def load_model(path: Path) -> tuple[Perceiver, ModelInfo]:
    """Return the model of a file, on the CPU and in evaluation mode, and what the file says of it.

    Raises:
        IntegrityError: damaged (checksum), incomplete, or with tensors that do not fit its configuration.
    """
    from perceiver_cli.model.perceiver import Perceiver

    info = read_info(path)
    tensors = read_tensors(path, read_header(path))
    layouts = {name: modality(name).layout(spec) for name, spec in info.config.inputs.items()}
    model = Perceiver(info.config.model, layouts, len(info.classes))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shown = "; ".join(f"{n}: expected {expected.get(n)}, found {found.get(n)}" for n in differing[:3])
        raise IntegrityError(f"{show_path(path)}: {len(differing)} tensors do not fit its configuration: {shown}")
    model.load_state_dict(tensors)
    return model.eval(), info


# ---------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class _Header:
    """Our part of a safetensors header: its fields, the text they were read from, the checksum of text and tensors."""

    fields: dict[str, Any]
    text: str
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str:
    """Write tensors and JSON fields; return the sha256 of the file."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(fields, allow_nan=False)
    # One entry: the library writes several in an order of its own, and the same run should give the same bytes.
    data = save(whole, {"perceiver": json.dumps({"sha256": _checksum(text, whole), **fields})})
    with atomic_write(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def read_table(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the tensors that any safetensors file lists ({name: dtype, shape, ...}) and its metadata; no weights.

    Every claim that the format makes is checked by hand before the library sees the file: it accepts duplicate keys,
    and a header of 100 MB.

    Raises:
        UsageError: cannot be read. IntegrityError: cut short, damaged, or with a header that contradicts the file.
    """
    shown = show_path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise IntegrityError(
                    f"{shown}: not a safetensors file, or a damaged one ({size} bytes, header of {length})"
                )
            table_text = file.read(length)
    except OSError as error:
        raise UsageError(f"{shown}: cannot read: {error.strerror}") from error
    try:
        tables = json.loads(table_text, object_pairs_hook=_unique, parse_constant=_no_constant)
        metadata = tables.pop("__metadata__", {})
        spans = sorted((t["data_offsets"][0], t["data_offsets"][1], _tensor_bytes(t)) for t in tables.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise IntegrityError(f"{shown}: damaged safetensors header: {error}") from error
    end = 0
    for start, stop, expected in spans:
        if start != end or stop - start != expected:
            raise IntegrityError(f"{shown}: damaged safetensors header: tensors overlap or leave gaps")
        end = stop
    if len(tables) > MAX_TENSORS or 8 + length + end != size:
        raise IntegrityError(f"{shown}: {size} bytes, the header says {8 + length + end}: cut short or appended to")
    return tables, metadata if isinstance(metadata, dict) else {}


def read_header(path: Path) -> _Header:
    """Return our part of a safetensors header, after the checks of `read_table`."""
    shown = show_path(path)
    _, metadata = read_table(path)
    if "perceiver" not in metadata:
        raise UsageError(f"{shown}: a safetensors file, but not a model of this program")
    try:
        given = str(metadata["perceiver"])
        fields = dict(json.loads(given, object_pairs_hook=_unique, parse_constant=_no_constant))
        if json.dumps(fields) != given:
            raise ValueError("not as it was written")
        sha256, version = str(fields.pop("sha256")), fields["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{shown}: damaged header: {error}") from error
    if version != FORMAT:
        raise IntegrityError(f"{shown}: format {version}, this program reads {FORMAT}", "upgrade perceiver-cli")
    return _Header(fields, json.dumps(fields), sha256)


def read_tensors(path: Path, header: _Header) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{show_path(path)}: damaged: {error}") from error
    found = _checksum(header.text, tensors)
    if found != header.sha256:
        raise IntegrityError(
            f"{show_path(path)}: content sha256 {found[:12]}, the header says {show_path(header.sha256[:12])}"
        )
    return dict(tensors)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensor_bytes(table: Mapping[str, Any]) -> int:
    total = ITEM_BYTES[table["dtype"]]
    for side in table["shape"]:
        if not isinstance(side, int) or side < 0:
            raise ValueError(f"side {side!r} of a shape")
        total *= side
    return total


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("the same key twice")
    return table


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
