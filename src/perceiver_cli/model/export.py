"""A trained model as one file for other programs: ONNX, or torch.export's .pt2, checked against the model itself.

The graph takes prepared values and positions, without Fourier features, and returns logits and probabilities. Inputs (B
batch, M inputs, c value channels, d position axes):

| name | shape | when |
|---|---|---|
| NAME | (batch, *grid, c) float32: pixels 0..255, samples, log-mel values, in patches | the modality has values |
| NAME_positions | (batch, M, d) float32 in [-1, 1] | point sets |
| NAME_present | (batch,) bool: the example has this modality | models of several modalities |

The cross-attend takes the folded or projected form of `attention.py`: tiles need calls that cannot be traced.
The batch is dynamic, and so are the sides of a grid with Fourier features, because the graph computes these.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_cli.errors import IntegrityError, UsageError
from perceiver_cli.files import atomic_write, check_suffix, show_path
from perceiver_cli.model.attention import Memory
from perceiver_cli.model.checkpoint import DEFAULT_THRESHOLD, Calibration, ModelInfo, load_model
from perceiver_cli.model.encoding import Segment, axis_features
from perceiver_cli.model.ensemble import Model, joined, parts_of
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.run_folder import find_model

TOLERANCE = 1e-4  # for the largest difference, relative to the largest logit if that is above 1
MAX_ONNX_BYTES = (1 << 31) - (1 << 24)  # protobuf's limit of 2 GiB, less room for the graph
FORMATS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
OUTPUTS = ("logits", "probabilities")
Run = Callable[[Mapping[str, Any]], Sequence[Any]]  # runs the written file: arrays by input name to OUTPUTS
TRACED_BATCH = 2  # tracing makes a batch of 1 a constant
CHECKED = ((1, 0), (3, 1))  # examples, and how many places the sides of dynamic grids have more than the layout
BATCH = torch.export.Dim("batch")
PATCHES = "(*grid, c): row-major within a patch, channels last; c is the channels of a patch"


@dataclass(frozen=True)
class Exported:
    """A written file; `inputs` of the graph, by name, as in its metadata; `difference`, the largest of the check."""

    path: str
    bytes: int
    format: str
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    difference: float
    examples_checked: int


class Graph(nn.Module):
    """A model as a traceable function of tensors alone."""

    def __init__(self, model: Model, calibration: Calibration, *, multi_label: bool) -> None:
        super().__init__()
        self.model, self.temperature, self.multi_label = model, calibration.temperature, multi_label
        self.names = list(input_names(model.encoding.layouts))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities (B, classes) of the inputs, in the order of `names`."""
        layouts = self.model.encoding.layouts
        segments = segments_of(layouts, dict(zip(self.names, tensors, strict=True)))
        tables = {
            name: axis_features(layouts[name], [_places(side) for side in segment.values.shape[1:-1]])
            for name, segment in segments.items()
            if is_dynamic(layouts[name])
        }
        logits = []
        for member in parts_of(self.model):
            inputs = [member.encoding.modality_inputs(name, s, tables.get(name)) for name, s in segments.items()]
            logits.append(member.classify(member.read(Memory(inputs, tileable=False))))
        return self.with_probabilities(joined(logits, multi_label=self.multi_label))

    def with_probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and their calibrated probabilities."""
        calibrated = logits / self.temperature
        return logits, calibrated.sigmoid() if self.multi_label else calibrated.softmax(dim=-1)


def export_model(model: str | os.PathLike[str] | None, output: str | os.PathLike[str]) -> Exported:
    """Write a run's or file's model as FILE.onnx or FILE.pt2, whole or not at all, after checking it.

    Raises UsageError for another suffix, a missing package or more weights than ONNX holds in one file, IntegrityError
    if the file differs from the model by more than TOLERANCE, ResourceError if it cannot be written.
    """
    suffix = check_output(output)
    perceiver, info = load_model(find_model(None if model is None else os.fspath(model)))
    size = 4 * sum(parameter.numel() for parameter in perceiver.parameters())
    if suffix == ".onnx" and size > MAX_ONNX_BYTES:
        problem = f"{size:,} bytes of weights, ONNX holds {MAX_ONNX_BYTES:,} in one file"
        raise UsageError(f"{show_path(output)}: {problem}", "export to .pt2 instead")
    data, metadata, difference = exported(perceiver, info, suffix)
    with atomic_write(output) as file:
        file.write(data)
    checked = sum(count for count, _ in CHECKED)
    return Exported(os.fspath(output), len(data), suffix[1:], metadata["inputs"], OUTPUTS, difference, checked)


def exported(model: Model, info: ModelInfo, suffix: str) -> tuple[bytes, dict[str, Any], float]:
    """Return the bytes of a file, its metadata, and the largest difference from the model. Raises as `traced`."""
    metadata = metadata_of(model, info)
    graph = Graph(model, info.calibration or Calibration(), multi_label=info.config.multi_label)
    data, _, difference = traced(graph, metadata, suffix)
    return data, metadata, difference


def traced(graph: Graph, metadata: Mapping[str, Any], suffix: str) -> tuple[bytes, Run, float]:
    """Return the bytes of a file, a function that runs it, and the largest difference from the model.

    Raises IntegrityError if that is more than TOLERANCE.
    """
    model = graph.eval().model
    layouts, rng = model.encoding.layouts, np.random.default_rng(0)
    example = made_up(layouts, TRACED_BATCH, 0, rng)
    with torch.no_grad(), _quiet():
        model(segments_of(layouts, example))  # makes the tables of positions: constants if sides are fixed
        shapes = tuple(dynamic_axes(layouts, name, example[name].ndim) for name in graph.names)
        tensors = tuple(torch.from_numpy(example[name]) for name in graph.names)
        program = torch.export.export(graph, tensors, dynamic_shapes={"tensors": shapes})
        program.example_inputs = None  # random numbers
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it holds paths of this machine
        data, run = _WRITERS[suffix](program, graph.names, metadata)
        # NumPy's maximum passes NaN on, which no tolerance admits.
        difference = float(np.max([_difference(graph, run, made_up(layouts, *sizes, rng)) for sizes in CHECKED]))
    if not difference <= TOLERANCE:
        raise IntegrityError(
            f"the exported model differs from the original by {difference:.2g}, more than {TOLERANCE:g}",
            "nothing was written; please report this with the output of perceiver doctor",
        )
    return data, run, difference


def check_output(output: str | os.PathLike[str]) -> str:
    """Return the suffix of an output. Raises UsageError if its format cannot be written here."""
    suffix = check_suffix(output, tuple(FORMATS), "-o", "not a format of exported models")
    if missing := missing_packages(suffix):
        raise UsageError(f"{suffix} needs {', '.join(missing)}", "pip install 'perceiver-cli[onnx]', or export to .pt2")
    return suffix


def missing_packages(suffix: str) -> list[str]:
    """Return the packages that a format needs and this machine lacks."""
    return [package for package in FORMATS[suffix] if find_spec(package) is None]


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
    """Return whether an input may be a grid of other sides than its layout's: its positions are not learned."""
    return layout.is_grid and not layout.learned_channels and layout.stem in ("none", "linear")


def dynamic_axes(layouts: Mapping[str, Layout], name: str, ndim: int) -> dict[int, Any]:
    """Return the dynamic axes of an input, by number: the batch, and the sides of a dynamic grid."""
    axes = {0: BATCH}
    if name in layouts and is_dynamic(layouts[name]):
        axes |= {axis: torch.export.Dim(f"{name}_side_{axis}", min=2) for axis in range(1, ndim - 1)}
    return axes


def _places(side: int) -> Tensor:
    """Return positions (side, 1) along an axis like `grid_positions`, whose linspace refuses a symbolic length."""
    index = torch.arange(side).float()
    last = index[-1]
    step = 2.0 / last
    # Counted from the nearer end, as by linspace, so that the positions are symmetric to the bit.
    return torch.where(2 * index < last, index * step - 1, 1 - (last - index) * step).unsqueeze(-1)


def made_up(layouts: Mapping[str, Layout], count: int, more: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return random inputs, arrays by name, of `count` examples; each side of a dynamic grid has `more` places.

    Values are within two std of their mean, as real ones mostly are. With several modalities, the last example
    has only the first.
    """
    arrays: dict[str, Any] = {}
    for place, (name, layout) in enumerate(layouts.items()):
        *sides, channels = layout.prepared_shape
        if is_dynamic(layout):
            sides = [side + more for side in sides]
        if layout.channels:
            values = rng.uniform(-2, 2, (count, *sides, channels)) * layout.std + layout.mean
            if layout.codes:
                values[..., : -layout.presence] = rng.integers(layout.codes, size=(count, *sides, layout.presence))
            arrays[name] = values.astype(np.float32)
        if not layout.is_grid:
            arrays[f"{name}_positions"] = rng.uniform(-1, 1, (count, *sides, layout.dims)).astype(np.float32)
        if len(layouts) > 1:
            arrays[f"{name}_present"] = np.arange(count) < (count if place == 0 else max(1, count - 1))
    return arrays


def segments_of(layouts: Mapping[str, Layout], inputs: Mapping[str, Any]) -> dict[str, Segment]:
    """Return the model's segments from the graph's inputs, tensors or arrays by name."""
    tensors = {name: x if isinstance(x, Tensor) else torch.from_numpy(x) for name, x in inputs.items()}
    segments = {}
    for name in layouts:
        positions, present = tensors.get(f"{name}_positions"), tensors.get(f"{name}_present")
        values = tensors[name] if name in tensors else positions[..., :0]  # type: ignore[index]
        segments[name] = Segment(values, positions, None if present is None else present.unsqueeze(1))
    return segments


def _onnx(program: Any, names: Sequence[str], metadata: Mapping[str, Any]) -> tuple[bytes, Run]:
    import onnxruntime

    written = torch.onnx.export(
        program, dynamo=True, input_names=list(names), output_names=list(OUTPUTS), verbose=False
    )
    assert written is not None
    proto = written.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # the exporter's notes, a quarter of a small file
    del proto.graph.value_info[:]
    symbols = {  # our names of dynamic axes, by the exporter's
        dim.dim_param: side
        for value in proto.graph.input
        for dim, side in zip(value.type.tensor_type.shape.dim, metadata["inputs"][value.name]["shape"], strict=True)
        if isinstance(side, str)
    }
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = symbols[dim.dim_param]
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda inputs: session.run(list(OUTPUTS), dict(inputs))


def _pt2(program: Any, names: Sequence[str], metadata: Mapping[str, Any]) -> tuple[bytes, Run]:
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(metadata)})
    data = stream.getvalue()
    module = torch.export.load(io.BytesIO(data)).module()
    return data, lambda inputs: [out.numpy() for out in module(*(torch.from_numpy(inputs[name]) for name in names))]


_WRITERS = {".onnx": _onnx, ".pt2": _pt2}


def _difference(graph: Graph, run: Run, inputs: Mapping[str, Any]) -> float:
    """Return the largest difference of logits (relative to the largest one above 1) and of probabilities.

    The reference is the model or, for sizes that only the graph takes, the graph before its export.
    """
    layouts = graph.model.encoding.layouts
    if all(inputs[name].shape[1:] == layout.prepared_shape for name, layout in layouts.items() if name in inputs):
        logits, probabilities = graph.with_probabilities(graph.model(segments_of(layouts, inputs)))
    else:
        logits, probabilities = graph(*(torch.from_numpy(inputs[name]) for name in graph.names))
    run_logits, run_probabilities = (torch.from_numpy(np.asarray(out)) for out in run(inputs))
    relative = float((run_logits - logits).abs().max()) / max(1.0, float(logits.abs().max()))
    return float(np.max([relative, float((run_probabilities - probabilities).abs().max())]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' messages on steps, deprecations and missing packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def describe_inputs(layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """Return the modality, shape and type of each input of the graph, by name."""
    example = made_up(layouts, 1, 0, np.random.default_rng(0))
    inputs = {}
    for name in input_names(layouts):
        owner = name if name in layouts else name.rpartition("_")[0]
        axes = dynamic_axes(layouts, name, example[name].ndim)
        shape = [axes[i].__name__ if i in axes else side for i, side in enumerate(example[name].shape)]
        inputs[name] = {"modality": owner, "shape": shape, "dtype": str(example[name].dtype)}
        if name in layouts:
            inputs[name] |= {"trained_shape": list(layouts[name].prepared_shape), "values": PATCHES}
    return inputs


def metadata_of(model: Model, info: ModelInfo) -> dict[str, Any]:
    """Return the metadata of an exported model: all that another program needs for its use."""
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
