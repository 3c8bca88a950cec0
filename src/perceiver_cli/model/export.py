"""A trained model as one file for other programs: ONNX, or torch.export's .pt2, checked against the model itself.

The graph takes what preprocessing gives, before Fourier features, and gives logits and probabilities. Its inputs:

| name | shape | when |
|---|---|---|
| NAME | (batch, *grid, c) float32: pixels 0..255, samples, log-mel values, in patches | the modality has values |
| NAME_positions | (batch, M, d) float32 in [-1, 1] | point sets |
| NAME_present | (batch,) bool: whether the example has this modality | models of several modalities |

The cross-attend is that of `attention.py` in its folded or projected form; tiles need calls that cannot be traced.
Batch is dynamic, and so are the sides of a grid whose positions are Fourier features, which are made in the graph.
"""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_cli.errors import IntegrityError, UsageError
from perceiver_cli.files import atomic_write, show_path
from perceiver_cli.model.attention import Memory
from perceiver_cli.model.checkpoint import DEFAULT_THRESHOLD, Calibration, ModelInfo, load_model
from perceiver_cli.model.encoding import Segment, axis_features
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.run_folder import find_model

TOLERANCE = 1e-4  # of the largest difference, relative to the largest logit where that is above 1
MAX_ONNX_BYTES = (1 << 31) - (1 << 24)  # protobuf's limit of 2 GiB, less room for the graph
FORMATS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
OUTPUTS = ("logits", "probabilities")
Run = Callable[[Mapping[str, Any]], Sequence[Any]]  # of a file that was written: inputs by name to OUTPUTS
TRACED_BATCH = 2  # 1 would be taken for a constant
CHECKED = ((1, 0), (3, 1))  # examples, and by how much the sides of dynamic grids differ from the layout's


@dataclass(frozen=True)
class Exported:
    """path, bytes; inputs: of the graph, by name, as in its metadata; difference: the largest found by the check."""

    path: str
    bytes: int
    format: str
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    difference: float
    examples_checked: int


class Graph(nn.Module):
    """A Perceiver as a function of tensors alone, in a form that can be traced."""

    def __init__(self, model: Perceiver, calibration: Calibration, *, multi_label: bool) -> None:
        super().__init__()
        self.model, self.temperature, self.multi_label = model, calibration.temperature, multi_label
        layouts = model.encoding.layouts
        self.dynamic = {name: is_dynamic(layout) for name, layout in layouts.items()}
        self.names = list(input_names(layouts))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities (B, classes) of the inputs, in the order of `names`."""
        given = dict(zip(self.names, tensors, strict=True))
        parts = []
        for name, layout in self.model.encoding.layouts.items():
            positions, present = given.get(f"{name}_positions"), given.get(f"{name}_present")
            values = given[name] if name in given else positions[..., :0]  # type: ignore[index]
            tables = None
            if self.dynamic[name]:
                sides = values.shape[1:-1]
                tables = axis_features(layout, [_places(side) for side in sides])
            segment = Segment(values, positions, None if present is None else present.unsqueeze(1))
            parts.append(self.model.encoding.part(name, segment, tables))
        return self.decided(self.model.classify(self.model.read(Memory(parts, tileable=False))))

    def decided(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the probabilities that they stand for."""
        calibrated = logits / self.temperature
        return logits, calibrated.sigmoid() if self.multi_label else calibrated.softmax(dim=-1)


def export_model(model: str | os.PathLike[str] | None, output: str | os.PathLike[str]) -> Exported:
    """Write a run's or file's model as FILE.onnx or FILE.pt2, whole or not at all, after checking it.

    Raises:
        UsageError: another suffix, a package that is missing, or more weights than ONNX holds in one file.
        IntegrityError: what was exported differs from the model by more than TOLERANCE. ResourceError: cannot write.
    """
    suffix = check_output(output)
    perceiver, info = load_model(find_model(None if model is None else os.fspath(model)))
    size = 4 * sum(parameter.numel() for parameter in perceiver.parameters())
    if suffix == ".onnx" and size > MAX_ONNX_BYTES:
        raise UsageError(
            f"{show_path(output)}: {size:,} bytes of weights, ONNX holds {MAX_ONNX_BYTES:,} in one file",
            "export to .pt2 instead",
        )
    data, metadata, difference = exported(perceiver, info, suffix)
    with atomic_write(output) as file:
        file.write(data)
    checked = sum(count for count, _ in CHECKED)
    return Exported(os.fspath(output), len(data), suffix[1:], metadata["inputs"], OUTPUTS, difference, checked)


def exported(model: Perceiver, info: ModelInfo, suffix: str) -> tuple[bytes, dict[str, Any], float]:
    """Return the bytes of a file, its metadata, and the largest difference found by the check.

    Raises:
        IntegrityError: that is more than TOLERANCE.
    """
    metadata = describe(model, info)
    graph = Graph(model, info.calibration or Calibration(), multi_label=info.config.multi_label)
    data, _, difference = traced(graph, metadata, suffix)
    return data, metadata, difference


def traced(graph: Graph, metadata: Mapping[str, Any], suffix: str) -> tuple[bytes, Run, float]:
    """Return the bytes of a file, what runs it, and the largest difference found by the check.

    Raises:
        IntegrityError: that is more than TOLERANCE.
    """
    model = graph.eval().model
    rng = np.random.default_rng(0)
    example = made_up(model.encoding.layouts, TRACED_BATCH, 0, rng)
    with torch.no_grad(), _quiet():
        segments = segments_of(model.encoding.layouts, example)
        model(segments)  # makes the tables of positions, which are constants where sides are fixed
        shapes = tuple(dynamic_axes(model.encoding.layouts, name, example[name].ndim) for name in graph.names)
        tensors = tuple(torch.from_numpy(example[name]) for name in graph.names)
        program = torch.export.export(graph, tensors, dynamic_shapes={"tensors": shapes})
        program.example_inputs = None  # random numbers are of no use to anyone
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names folders of this machine
        data, run = _FORMATS[suffix](program, graph.names, metadata)
        difference = 0.0
        for count, more in CHECKED:
            given = made_up(model.encoding.layouts, count, more, rng)
            difference = max(difference, _difference(graph, run, given))
    if not difference <= TOLERANCE:
        raise IntegrityError(
            f"the exported model differs from the original by {difference:.2g}, more than {TOLERANCE:g}",
            "nothing was written; please report this with what perceiver doctor prints",
        )
    return data, run, difference


def check_output(output: str | os.PathLike[str]) -> str:
    """Return the suffix of an output, if it can be written here. Raises UsageError."""
    suffix = Path(output).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"-o {show_path(output)}: not a format written here", f"expected {' or '.join(FORMATS)}")
    missing = missing_packages(suffix)
    if missing:
        raise UsageError(f"{suffix} needs {', '.join(missing)}", "pip install 'perceiver-cli[onnx]', or export to .pt2")
    return suffix


def missing_packages(suffix: str) -> list[str]:
    """Return which packages that a format needs are not installed."""
    return [package for package in FORMATS[suffix] if find_spec(package) is None]


# ---------------------------------------------------------------- inputs


def input_names(layouts: Mapping[str, Layout]) -> Iterator[str]:
    """Yield the names of the graph's inputs."""
    for name, layout in layouts.items():
        if layout.channels:
            yield name
        if not layout.is_grid:
            yield f"{name}_positions"
        if len(layouts) > 1:
            yield f"{name}_present"


def is_dynamic(layout: Layout) -> bool:
    """Return whether a grid may have other sides than its layout's: positions are a formula, not learned."""
    return layout.is_grid and not layout.learned_channels and layout.stem in ("none", "linear")


def dynamic_axes(layouts: Mapping[str, Layout], name: str, ndim: int) -> dict[int, Any]:
    """Return the dynamic axes of an input, by number: the batch, and sides of a grid."""
    axes = {0: _BATCH}
    if name in layouts and is_dynamic(layouts[name]):
        axes |= {axis: torch.export.Dim(f"{name}_side_{axis}", min=2) for axis in range(1, ndim - 1)}
    return axes


_BATCH = torch.export.Dim("batch")


def _places(side: int) -> Tensor:
    """Return (side, 1) positions along an axis as `grid_positions` does, whose linspace cannot have a symbolic length.

    Like linspace it counts from the nearer end, so that the places are symmetric to the bit.
    """
    index = torch.arange(side).float()
    last = index[-1]
    step = 2.0 / last
    places = torch.where(2 * index < last, index * step - 1, 1 - (last - index) * step)
    return places.unsqueeze(-1)


def made_up(layouts: Mapping[str, Layout], count: int, more: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return random inputs of `count` examples; grids that are dynamic have `more` on each side.

    Values are about as large as real ones: two deviations about their mean. With several modalities the last example
    has but the first of them.
    """
    given: dict[str, Any] = {}
    for place, (name, layout) in enumerate(layouts.items()):
        *sides, channels = layout.prepared_shape
        if is_dynamic(layout):
            sides = [side + more for side in sides]
        if layout.channels:
            noise = rng.uniform(-2, 2, (count, *sides, channels)) * layout.std + layout.mean
            given[name] = noise.astype(np.float32)
        if not layout.is_grid:
            given[f"{name}_positions"] = rng.uniform(-1, 1, (count, *sides, layout.dims)).astype(np.float32)
        if len(layouts) > 1:
            given[f"{name}_present"] = np.arange(count) < (count if place == 0 else max(1, count - 1))
    return given


def segments_of(layouts: Mapping[str, Layout], given: Mapping[str, Any]) -> dict[str, Segment]:
    """Return inputs of the graph as the model takes them."""
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    segments = {}
    for name in layouts:
        positions, present = tensors.get(f"{name}_positions"), tensors.get(f"{name}_present")
        values = tensors[name] if name in tensors else positions[..., :0]  # type: ignore[index]
        segments[name] = Segment(values, positions, None if present is None else present.unsqueeze(1))
    return segments


# ---------------------------------------------------------------- formats


def _onnx(program: Any, names: Sequence[str], metadata: Mapping[str, Any]) -> tuple[bytes, Run]:
    import onnxruntime

    written = torch.onnx.export(
        program, dynamo=True, input_names=list(names), output_names=list(OUTPUTS), verbose=False
    )
    assert written is not None
    proto = written.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # the exporter's notes to itself, a quarter of a small file
    del proto.graph.value_info[:]
    symbols: dict[str, str] = {}  # the exporter's names of dynamic axes, and ours
    for value in proto.graph.input:
        for dim, side in zip(value.type.tensor_type.shape.dim, metadata["inputs"][value.name]["shape"], strict=True):
            if isinstance(side, str):
                symbols[dim.dim_param] = side
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda given: session.run(list(OUTPUTS), dict(given))


def _pt2(program: Any, names: Sequence[str], metadata: Mapping[str, Any]) -> tuple[bytes, Run]:
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(metadata)})
    data = stream.getvalue()
    module = torch.export.load(io.BytesIO(data)).module()
    return data, lambda given: [out.numpy() for out in module(*(torch.from_numpy(given[name]) for name in names))]


_FORMATS = {".onnx": _onnx, ".pt2": _pt2}


def _difference(graph: Graph, run: Run, given: Mapping[str, Any]) -> float:
    """Return the largest difference of logits (relative to the largest one above 1) and of probabilities.

    From the model itself, or for sizes that only the graph takes from the graph before it was exported.
    """
    layouts = graph.model.encoding.layouts
    if all(given[name].shape[1:] == layout.prepared_shape for name, layout in layouts.items() if name in given):
        logits, probabilities = graph.decided(graph.model(segments_of(layouts, given)))
    else:
        logits, probabilities = graph(*(torch.from_numpy(given[name]) for name in graph.names))
    found = [torch.from_numpy(np.asarray(out)) for out in run(given)]
    scale = max(1.0, float(logits.abs().max()))
    return max(float((found[0] - logits).abs().max()) / scale, float((found[1] - probabilities).abs().max()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters say of their own steps, deprecations and missing packages from stdout and stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------- description

PATCHES = "(*grid, c): row-major within a patch, channels last; c is the channels of a patch"


def describe_inputs(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """Return what the inputs of a graph are, by name."""
    example = made_up(layouts, 1, 0, np.random.default_rng(0))
    inputs = {}
    for name in input_names(layouts):
        of = name if name in layouts else name.rpartition("_")[0]
        axes = dynamic_axes(layouts, name, example[name].ndim)
        shape = [axes[i].__name__ if i in axes else side for i, side in enumerate(example[name].shape)]
        inputs[name] = {"modality": of, "shape": shape, "dtype": str(example[name].dtype)}
        if name in layouts:
            inputs[name] |= {"trained_shape": list(layouts[name].prepared_shape), "values": PATCHES}
    return inputs


def describe(model: Perceiver, info: ModelInfo) -> dict[str, Any]:
    """Return the metadata of an exported model: all that a program needs to use it without this one."""
    config = info.config
    calibration = info.calibration or Calibration()
    decision: dict[str, Any] = {"temperature": calibration.temperature}
    if config.multi_label:
        thresholds = calibration.thresholds or (DEFAULT_THRESHOLD,) * len(info.classes)
        decision["thresholds"] = dict(zip(info.classes, thresholds, strict=True))
    return {
        "producer": "perceiver-cli",
        "name": config.name,
        "classes": list(info.classes),
        "probabilities": "sigmoid" if config.multi_label else "softmax",
        "decision": decision,
        "inputs": describe_inputs(model.encoding.layouts),
        "preparation": {
            name: {"in_words": modality(name).preparation, "options": spec.model_dump(mode="json")}
            for name, spec in config.inputs.items()
        },
        "metrics": dict(info.metrics),
    }
