"""Weights on disk: safetensors only, self-contained, checksummed and never half written.

A model file's header holds all that its use needs: format number, configuration (with preprocessing), class names, step
and metrics, and one sha256 of these and of the tensors. A training state has the same format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perceiver_cli.config import Config
from perceiver_cli.errors import IntegrityError, ResourceError, UsageError, counted
from perceiver_cli.files import atomic_write, cause, open_file, show_path, show_text
from perceiver_cli.hardware import memory_bytes
from perceiver_cli.model.cost import Cost, estimate
from perceiver_cli.preprocess import modality
from perceiver_cli.run_folder import is_run, locked

if TYPE_CHECKING:
    from torch import Tensor

    from perceiver_cli.model.ensemble import Model

FORMAT = 1
MAX_HEADER_BYTES = 8 << 20
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
DEFAULT_THRESHOLD = 0.5
MAX_MEMBERS = 1000  # models in one file
MAX_EXTRA = 10_000  # parameters by which a small model may exceed its file


@dataclass(frozen=True)
class Calibration:
    """How logits become answers: `temperature` divides them; `thresholds`, by class, are empty for single labels."""

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()

    @classmethod
    def parse(cls, fields: Mapping[str, Any], num_classes: int) -> Calibration:
        """Return the calibration in a model file's header. Raises ValueError if its numbers are out of range."""
        temperature, thresholds = float(fields["temperature"]), tuple(map(float, fields["thresholds"]))
        if not (isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature {temperature}, expected a number above 0")
        if len(thresholds) not in (0, num_classes) or not all(0 <= t <= 1 for t in thresholds):
            raise ValueError(f"{len(thresholds)} thresholds, expected one in 0..1 for each of {num_classes} classes")
        return cls(temperature, thresholds)


@dataclass(frozen=True)
class ModelInfo:
    """The header of a model file: everything except the weights."""

    config: Config
    classes: tuple[str, ...]
    step: int
    metrics: Mapping[str, Any]
    data_fingerprint: str = ""
    calibration: Calibration | None = None
    members: int = 1  # models whose mean answers: the folds or seeds of an ensemble


def save_model(path: Path, weights: Mapping[str, Tensor], info: ModelInfo) -> None:
    """Write a self-contained model file, whole or not at all. Raises ResourceError if it cannot be written."""
    header = {"kind": "model", "format": FORMAT, **vars(info), "config": info.config.to_dict()}
    if (calibration := header.pop("calibration")) is not None:
        header["calibration"] = asdict(calibration)
    if header["members"] == 1:
        del header["members"]  # the same bytes as before there were ensembles
    write_tensors(path, weights, header)


def store_calibration(path: Path, calibration: Calibration, info: ModelInfo) -> None:
    """Replace the calibration in a model file; after an error the file is unchanged.

    info: the header of the model that was calibrated. Raises IntegrityError if the file is damaged, ResourceError if it
    cannot be written, a training writes into its run folder, or it holds another model by now.
    """
    with locked(path.parent) if is_run(path.parent) else nullcontext():
        fields, tensors = read_tensors(path)
        if (now := _info(fields, path)) != info:
            raise ResourceError(f"{show_path(path)}: holds another model than the calibrated one, of step {info.step}",
                                "calibrate again")  # fmt: skip
        save_model(path, tensors, replace(now, calibration=calibration))


def read_info(path: Path) -> ModelInfo:
    """Return the header of a model file, without weights and torch. Raises as `read_header`."""
    return _info(read_header(path), path)


def _info(header: Mapping[str, Any], path: Path) -> ModelInfo:
    if header.get("kind") != "model":
        raise IntegrityError(f"{show_path(path)}: holds a {header.get('kind')}, expected a model")
    try:
        config = Config.parse(header["config"], show_path(path))
        classes = tuple(map(str, header["classes"]))
        if not classes:
            raise ValueError("no classes")
        fingerprint, fitted = str(header.get("data_fingerprint", "")), header.get("calibration")
        calibration = None if fitted is None else Calibration.parse(fitted, len(classes))
        step, members = int(header["step"]), int(header.get("members", 1))
        if not 1 <= members <= MAX_MEMBERS:
            raise ValueError(f"{members} members, expected 1 to {MAX_MEMBERS}")
        return ModelInfo(config, classes, step, dict(header["metrics"]), fingerprint, calibration, members)
    except UsageError as error:  # names the path
        raise IntegrityError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{show_path(path)}: incomplete header: {error}") from error


def load_model(path: Path) -> tuple[Model, ModelInfo]:
    """Return the model in a file, on the CPU and in evaluation mode, and its header.

    Raises IntegrityError if the tensors do not fit its configuration, ResourceError if an example does not fit into
    memory, or as `read_info` and `read_tensors`.
    """
    from perceiver_cli.model.ensemble import Ensemble
    from perceiver_cli.model.perceiver import Perceiver

    fields, tensors = read_tensors(path)
    info = _info(fields, path)
    layouts = {name: modality(name).layout(spec) for name, spec in info.config.inputs.items()}
    _check_size(path, estimate(info.config.model, layouts, len(info.classes)), tensors, info.members)
    models = [Perceiver(info.config.model, layouts, len(info.classes)) for _ in range(info.members)]
    model = models[0] if info.members == 1 else Ensemble(models, multi_label=info.config.multi_label)
    expected, stored = ({n: tuple(t.shape) for n, t in table.items()} for table in (model.state_dict(), tensors))
    if expected != stored:
        differing = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
        shown = "; ".join(f"{n}: expected {expected.get(n)}, found {stored.get(n)}" for n in differing[:3])
        raise IntegrityError(f"{show_path(path)}: {len(differing)} tensors do not fit the configuration: {shown}")
    if broken := not_finite(tensors):
        found = f"{counted(len(broken), 'tensor')} not finite, such as {show_text(broken[0])}"
        raise IntegrityError(f"{show_path(path)}: {found}")
    model.load_state_dict(tensors)
    return model.eval(), info


def _check_size(path: Path, cost: Cost, tensors: Mapping[str, Tensor], members: int) -> None:
    """Raise IntegrityError if a configuration needs more weights than its file holds, before the model takes memory.

    Raises ResourceError if one example is too large for this machine: weights do not grow with a picture's size.
    """
    stored = sum(tensor.numel() for tensor in tensors.values())
    expected = cost.parameters * members
    if expected > 2 * stored + MAX_EXTRA:  # for fewer, the model is built: that message names tensors
        found = f"{stored:,} numbers do not fit the configuration, which has {expected:,} parameters"
        raise IntegrityError(f"{show_path(path)}: {found}")
    memory = memory_bytes()
    if memory is not None and cost.forward_bytes > memory:
        needed = f"one example needs about {cost.forward_bytes / 2**30:,.0f} GiB"
        raise ResourceError(f"{show_path(path)}: {needed}, this machine has {memory / 2**30:.0f}")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity."""
    import torch

    floats = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return []
    largest = torch._foreach_norm(list(floats.values()), torch.inf)  # without a copy; NaN if any element is
    finite = torch.stack([each.float().cpu() for each in largest]).isfinite()
    return [name for name, fine in zip(floats, finite.tolist(), strict=True) if not fine]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Write tensors and JSON fields with one checksum, whole or not at all."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = _checksum(json.dumps(fields, allow_nan=False), whole)
    with atomic_write(path) as file:
        # One entry, because the library writes several in no fixed order and the same run must give the same bytes.
        file.write(save(whole, {"perceiver": json.dumps({"sha256": checksum, **fields})}))


def read_table(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shape of each tensor of any safetensors file, and its metadata, without weights and torch.

    Raises as `_opened`.
    """
    with _opened(path) as contents:
        shapes = {name: tuple(contents.get_slice(name).get_shape()) for name in contents.keys()}  # noqa: SIM118
        return shapes, contents.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield an open safetensors file. It is opened once, because another file may take its name at any moment.

    The library checks that names, types, shapes, offsets and the size of the file agree. Raises UsageError if the file
    cannot be read, IntegrityError if it is cut short or damaged, or has other types than `DTYPES`.
    """
    from safetensors import SafetensorError, safe_open

    shown = show_path(path)
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:  # the library would take 100 MB
            raise IntegrityError(f"{shown}: not a model file (safetensors), or a damaged one")
        # For "pt" the library would open the file a second time, by its name.
        with safe_open(path, "numpy") as contents:
            others = {contents.get_slice(name).get_dtype() for name in contents.keys()} - DTYPES  # noqa: SIM118
            if others:
                expected = ", ".join(sorted(DTYPES))
                raise IntegrityError(f"{shown}: holds {', '.join(sorted(others))}, expected {expected}")
            yield contents
    except OSError as error:
        raise UsageError(f"{shown}: cannot read: {cause(error)}") from error
    except SafetensorError as error:
        raise _damage(path, error) from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON fields in a header of this program; "sha256" is the checksum of the other fields and the tensors.

    Raises UsageError if another program wrote it, IntegrityError if it is damaged or has another format version.
    """
    return _fields(read_table(path)[1].get("perceiver"), show_path(path))


def _fields(text: str | None, shown: str) -> dict[str, Any]:
    if text is None:
        raise UsageError(f"{shown}: a safetensors file, but not a model of this program")
    try:
        fields = dict(json.loads(text))
        # Writing it again reveals a repeated key, and refuses NaN and infinity.
        if json.dumps(fields, allow_nan=False) != text:
            raise ValueError("not in the form in which this program writes it")
        version, _ = fields["format"], fields["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{shown}: damaged header: {error}") from error
    if version != FORMAT:
        raise IntegrityError(f"{shown}: format {version}, this program reads {FORMAT}", "upgrade perceiver-cli")
    return fields


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON fields and the tensors of a file of this program.

    Raises IntegrityError if the checksum differs, or as `read_header`.
    """
    import torch

    with _opened(path) as contents:
        fields = _fields((contents.metadata() or {}).get("perceiver"), show_path(path))
        names = list(contents.keys())
        if any(contents.get_slice(name).get_dtype() == "BF16" for name in names):  # NumPy has no such type
            raise IntegrityError(f"{show_path(path)}: holds BF16, which this program does not write")
        tensors = {name: torch.from_numpy(contents.get_tensor(name)) for name in names}
    stated, actual = str(fields.pop("sha256")), _checksum(json.dumps(fields), tensors)
    if actual != stated:
        found = f"content sha256 {actual[:12]}, the header says {show_path(stated[:12])}"
        raise IntegrityError(f"{show_path(path)}: {found}")
    return fields, tensors


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any safetensors file. Raises IntegrityError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise _damage(path, error) from error


def _damage(path: Path, error: Exception) -> IntegrityError:
    """Return the library's error as one of ours; its text may quote the file."""
    return IntegrityError(f"{show_path(path)}: damaged: {show_text(str(error))}")


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a header's text and of names, types, shapes and bytes of tensors."""
    import torch

    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
