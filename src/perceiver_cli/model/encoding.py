"""The byte array that latents attend to: values with the Fourier features of their positions.

Axes: B batch, M inputs, C input channels, c value channels, d position axes, K bands per axis.
Positions and features are float32 in every precision of the run: in bfloat16 the high bands are noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.model.cost import input_channels
from perceiver_cli.model.stems import make_stem
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import ByteArray, Layout
from perceiver_cli.preprocess.spec import InputSpec


@dataclass(frozen=True)
class Segment:
    """A batch of one modality's byte arrays before Fourier features.

    values: `(B, *grid, c)` in any dtype; positions: (B, M, d) float32 for point sets, None for grids.
    mask: bool, False for padding: (B, M), or (B, 1) where whole examples lack the modality; None if nothing is padding.
    """

    values: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Segment:
        """Return the segment on `device`; from pinned memory, the copy overlaps with computation."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Segment:
        """Return the segment in page-locked memory; the data loader calls this when a GPU trains."""
        return self._each(Tensor.pin_memory)

    def clone(self) -> Segment:
        """Return a copy of the segment in memory that NumPy allocates."""
        # For torch, glibc's memalign takes a thousand fresh pages a clip, not freed ones; NumPy asks for huge pages.
        return self._each(lambda x: torch.from_numpy(x.numpy().copy()))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Segment:
        return Segment(*(None if x is None else change(x) for x in (self.values, self.positions, self.mask)))  # type: ignore[arg-type]


def fourier_features(positions: Tensor, bands: int, max_resolution: tuple[float, ...]) -> Tensor:
    """Return the features (..., d (2 K + 1)) of positions (..., d) in [-1, 1] (paper 3.2).

    For axis i and band k: sin and cos of f_k pi x_i, with f_k spaced linearly from 1 to max_resolution[i] / 2.
    Channels in the official code's order: [x_1 .. x_d, sin of axis 1 .. d, cos of axis 1 .. d].
    """
    positions = positions.float()
    if bands == 0:
        return positions
    exact = torch.float32 if positions.device.type == "mps" else torch.float64  # MPS has no float64
    angles = []
    for axis, resolution in enumerate(max_resolution):
        frequencies = torch.linspace(1.0, resolution / 2, bands, device=positions.device, dtype=exact)
        angles.append(positions[..., axis, None].to(exact) * (frequencies * torch.pi))
    angle = torch.cat(angles, dim=-1)
    return torch.cat([positions, angle.sin().float(), angle.cos().float()], dim=-1)


def grid_positions(grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Return the positions (M, d) of a regular grid, row-major; each axis runs from -1 to 1, ends included."""
    axes = [torch.linspace(-1.0, 1.0, side, device=device) for side in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))


def axis_features(layout: Layout, places: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a table (side, d (2 K + 1)) per axis: features of its places, zero in the other axes' columns.

    places: positions (side, 1) in [-1, 1], per axis.
    """
    tables = []
    for axis, positions in enumerate(places):
        features = fourier_features(positions, layout.bands, layout.max_resolution[axis : axis + 1])
        # Columns of one axis: position, K sines, K cosines. Of all: d positions, d K sines, d K cosines.
        sines = torch.arange(layout.bands, device=positions.device) + layout.dims + axis * layout.bands
        first = torch.arange(axis, axis + 1, device=positions.device)
        columns = torch.cat([first, sines, sines + layout.dims * layout.bands])
        zeros = features.new_zeros(positions.shape[0], layout.position_channels)
        tables.append(zeros.index_copy(1, columns, features))
    return tuple(tables)


@dataclass(frozen=True)
class ModalityInputs:
    """The inputs of one modality: rows of the paper's byte array, or a grid that stands for them.

    values: (B, M, C) rows if `tables` is empty, else (B, *grid, c), the first c columns of each row.
    tables: (side, C - c) per axis of the grid; the other columns of a row are the sum of its places' entries. Each
    position feature is nonzero in the table of one axis; a modality encoding is in the first table.
    mask: (B, M) bool, False for padding; None if every row is an input.
    """

    values: Tensor
    tables: tuple[Tensor, ...] = ()
    mask: Tensor | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of inputs along each axis; (M,) of rows."""
        return tuple(self.values.shape[1:-1])

    @property
    def num_channels(self) -> int:
        """C."""
        return self.values.shape[-1] + (self.tables[0].shape[-1] if self.tables else 0)

    def rows(self) -> Tensor:
        """Return the rows (B, M, C) of the byte array."""
        if not self.tables:
            return self.values
        features = self.tables[0]
        for table in self.tables[1:]:
            features = features.unsqueeze(-2) + table  # (side_0 .. side_i, C - c)
        features = features.expand(self.values.shape[0], *features.shape)
        return torch.cat([self.values, features], dim=-1).flatten(1, -2)


class ByteArrayEncoding(nn.Module):
    """Makes the paper's byte array (B, M, C) of all modalities, or the inputs of each, from their segments.

    One modality: C = c + d (2 K + 1). Several (paper 4.2): a learned vector of the modality fills each row up to C, the
    widest modality's channels + `modality_channels`. Modalities are sorted; one without a segment has no rows.
    """

    def __init__(self, layouts: Mapping[str, Layout], modality_channels: int) -> None:
        super().__init__()
        self.layouts = dict(sorted(layouts.items()))
        self.num_channels = input_channels(self.layouts, modality_channels)
        self.modality_encodings = nn.ParameterDict()
        self.learned_positions = nn.ParameterDict()
        self.stems = nn.ModuleDict()
        for name, layout in self.layouts.items():
            if len(self.layouts) > 1:
                self.modality_encodings[name] = nn.Parameter(torch.empty(self.num_channels - layout.num_channels))
            if layout.learned_channels:
                self.learned_positions[name] = nn.Parameter(torch.empty(layout.num_inputs, layout.learned_channels))
            if (stem := make_stem(layout)) is not None:
                self.stems[name] = stem
            self.register_buffer(f"mean_{name}", torch.tensor(layout.mean), persistent=False)
            self.register_buffer(f"std_{name}", torch.tensor(layout.std), persistent=False)
        self._axis_features: dict[tuple[str, torch.device], tuple[Tensor, ...]] = {}  # made once per device

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return the byte array (B, M, C) float32, with the rows of all modalities."""
        rows = []
        for name, inputs in self.inputs(segments).items():
            rows.append(inputs.rows())
            if (seed := self.layouts[name].permutation) is not None:
                order = torch.randperm(rows[-1].shape[1], generator=torch.Generator().manual_seed(seed))
                rows[-1] = rows[-1][:, order.to(rows[-1].device)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def inputs(self, segments: Mapping[str, Segment]) -> dict[str, ModalityInputs]:
        """Return the inputs of each modality, without its permutation: attention does not see the order of rows.

        Raises ValueError, which names both, if modalities or shapes are not those of the layouts.
        """
        if not segments or not segments.keys() <= self.layouts.keys():
            raise ValueError(f"segments of {sorted(segments) or 'nothing'}, expected {sorted(self.layouts)}")
        for name, segment in segments.items():
            layout, values, positions = self.layouts[name], segment.values, segment.positions
            if tuple(values.shape[1:]) != layout.prepared_shape:
                expected = ", ".join(map(str, layout.prepared_shape))
                raise ValueError(f"{name} values of shape {tuple(values.shape)}, expected (B, {expected})")
            shape = None if positions is None else tuple(positions.shape)
            if not layout.is_grid and shape != (points := (*values.shape[:-1], layout.dims)):
                raise ValueError(f"{name} positions of shape {shape}, expected {points}")
        return {name: self.modality_inputs(name, segments[name]) for name in self.layouts if name in segments}

    def modality_inputs(self, name: str, segment: Segment, tables: Sequence[Tensor] | None = None) -> ModalityInputs:
        """Return the inputs of one modality; its grid may have any sides if `tables` of `axis_features` are passed."""
        layout, values, positions, mask = self.layouts[name], segment.values, segment.positions, segment.mask
        values = (values.float() - self.get_buffer(f"mean_{name}")) / self.get_buffer(f"std_{name}")
        present = (values[..., -layout.presence :] != 0).any(dim=-1).flatten(1) if layout.presence else None
        if name in self.stems:
            values = self.stems[name](values) if positions is None else self.stems[name](values, positions)
            positions = None if positions is None else positions[:, : layout.num_inputs]
        batch, grid = values.shape[0], values.shape[1:-1]  # sizes, not len(): they may be symbols
        if mask is not None:
            mask = mask.expand(batch, prod(grid))
        if present is not None:
            mask = present if mask is None else mask & present
        encoding = self.modality_encodings.get(name, None)
        if layout.is_grid and name not in self.learned_positions:
            first, *rest = self.axis_tables(name, values.device) if tables is None else tables
            if encoding is not None:
                first = torch.cat([first, encoding.expand(first.shape[0], -1)], dim=-1)
                rest = [F.pad(table, (0, len(encoding))) for table in rest]
            return ModalityInputs(values, (first, *rest), mask)
        values = values.reshape(batch, prod(grid), values.shape[-1])
        if name in self.learned_positions:
            features = self.learned_positions[name].expand(batch, -1, -1)
        else:
            assert positions is not None
            features = fourier_features(positions, layout.bands, layout.max_resolution)
        encodings = [] if encoding is None else [encoding.expand(*values.shape[:2], -1)]
        return ModalityInputs(torch.cat([values, features, *encodings], dim=-1), mask=mask)

    def axis_tables(self, name: str, device: torch.device) -> tuple[Tensor, ...]:
        """Return the table of each axis of a modality's grid, see `axis_features`; made once per device."""
        if (name, device) not in self._axis_features:
            layout = self.layouts[name]
            places = [grid_positions((side,), device) for side in layout.grid]
            self._axis_features[name, device] = axis_features(layout, places)
        return self._axis_features[name, device]


def with_features(prepared: ByteArray, spec: InputSpec) -> NDArray[np.float32]:
    """Return (M, C) rows: the values of a byte array with mean 0 and std 1, then its Fourier features."""
    positions = None if prepared.positions is None else torch.from_numpy(prepared.positions[None].copy())
    segment = Segment(torch.from_numpy(prepared.values[None].copy()), positions)
    layout = modality(spec.modality).layout(spec)
    rows: Tensor = ByteArrayEncoding({spec.modality: layout}, 0)({spec.modality: segment})
    return rows[0].numpy()
