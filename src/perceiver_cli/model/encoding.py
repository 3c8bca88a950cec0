"""Positions become Fourier features, and values with features the byte array that latents attend to.

Axes: B batch, M inputs, C input channels, c value channels, d position axes, K bands per axis.
Positions and features are float32 whatever the precision of the run: in bfloat16 the high bands are noise.
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

from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import ByteArray, Layout
from perceiver_cli.preprocess.spec import InputSpec


@dataclass(frozen=True)
class Segment:
    """A batch of one modality's byte arrays before Fourier features.

    values: (B, *grid, c) in any dtype; positions: (B, M, d) float32 for point sets, None for grids.
    mask: (B, M) bool, False where there is padding instead of an input; (B, 1) for examples that have the modality or
    have it not; None where every input is one.
    """

    values: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Segment:
        """Return the segment on `device`; the copy overlaps with computation where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Segment:
        """Return the segment in page-locked memory (called by the data loader when training on a GPU)."""
        return self._each(Tensor.pin_memory)

    def clone(self) -> Segment:
        """Return the segment in memory of its own.

        NumPy's: what torch frees, glibc's memalign finds too small for the next of its size (a thousand fresh pages a
        clip), and NumPy asks for huge pages besides.
        """
        return self._each(lambda x: torch.from_numpy(x.numpy().copy()))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Segment:
        return Segment(*(None if x is None else change(x) for x in (self.values, self.positions, self.mask)))  # type: ignore[arg-type]


def fourier_features(positions: Tensor, bands: int, max_resolution: tuple[float, ...]) -> Tensor:
    """Return (..., d (2 K + 1)) features of positions (..., d) in [-1, 1] (paper 3.2).

    For axis i, band k: sin and cos of f_k pi x_i with f_k spaced linearly from 1 to max_resolution[i] / 2.
    Channel order as in the official code: [x_1 .. x_d, sin of axis 1 .. d, cos of axis 1 .. d].
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
    """Return (M, d) positions of a regular grid, row-major; each axis runs from -1 to 1, ends included."""
    axes = [torch.linspace(-1.0, 1.0, side, device=device) for side in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))


def axis_features(layout: Layout, places: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return per axis (side, d (2 K + 1)): the features of places along it, in the columns of this axis.

    places: per axis (side, 1), positions in [-1, 1].
    """
    tables = []
    for axis, along in enumerate(places):
        device = along.device
        one = fourier_features(along, layout.bands, layout.max_resolution[axis : axis + 1])
        # One axis alone: position, K sines, K cosines. All: d positions, d K sines, d K cosines.
        columns = torch.arange(2 * layout.bands + 1, device=device) - 1
        block = columns // max(1, layout.bands)  # 0 sines, 1 cosines
        columns = layout.dims + (block * layout.dims + axis) * layout.bands + columns % max(1, layout.bands)
        columns[0] = axis
        tables.append(one.new_zeros(along.shape[0], layout.position_channels).index_copy(1, columns, one))
    return tuple(tables)


@dataclass(frozen=True)
class Part:
    """What a cross-attend reads of one modality: the paper's byte array, or a grid that stands for it.

    values: (B, M, C) the rows themselves where `tables` is empty, else (B, *grid, c), the first c columns of each row.
    tables: per axis of the grid (side, C - c): what a place along this axis adds to the other columns. Each position
    feature belongs to one axis and is zero in the tables of the others; a modality encoding is in the first.
    mask: (B, M) bool, False where there is no input; None where every row is one.
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
        """Return (B, M, C), whatever that takes."""
        if not self.tables:
            return self.values
        features = self.tables[0]
        for table in self.tables[1:]:
            features = features.unsqueeze(-2) + table  # (side_0 .. side_i, C - c)
        features = features.expand(self.values.shape[0], *features.shape)
        return torch.cat([self.values, features], dim=-1).flatten(1, -2)


class ByteArrayEncoding(nn.Module):
    """Gives the paper's byte array (B, M, C) of all modalities from their segments, or the parts it is made of.

    One modality: C = c + d (2 K + 1). Several (paper 4.2): each row ends in a learned vector of its modality, wide
    enough that all rows have C = the widest + `modality_channels`, and the rows follow each other in sorted order.
    A modality may be missing: its rows then are.
    """

    def __init__(self, layouts: Mapping[str, Layout], modality_channels: int) -> None:
        super().__init__()
        self.layouts = dict(sorted(layouts.items()))
        widest = max(layout.num_channels for layout in self.layouts.values())
        self.num_channels = widest + (modality_channels if len(self.layouts) > 1 else 0)
        self.modality_encodings = nn.ParameterDict()
        if len(self.layouts) > 1:
            for name, layout in self.layouts.items():
                self.modality_encodings[name] = nn.Parameter(torch.empty(self.num_channels - layout.num_channels))
        self.learned_positions = nn.ParameterDict()
        self.stems = nn.ModuleDict()
        for name, layout in self.layouts.items():
            if layout.learned_channels:
                self.learned_positions[name] = nn.Parameter(torch.empty(layout.num_inputs, layout.learned_channels))
            if layout.stem == "linear":
                self.stems[name] = nn.Linear(layout.channels, layout.stem_channels)
            elif layout.stem != "none":
                self.stems[name] = ConvStem(layout.channels, layout.stem_channels, same=layout.stem == "conv-same")
            self.register_buffer(f"mean_{name}", torch.tensor(layout.mean), persistent=False)
            self.register_buffer(f"std_{name}", torch.tensor(layout.std), persistent=False)
        self._axis_features: dict[tuple[str, torch.device], tuple[Tensor, ...]] = {}  # made once per device, not saved

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return the byte array (B, M, C) float32, M summed over the modalities."""
        rows = []
        for name, part in self.parts(segments).items():
            order = self._order(name, part.values.device)
            rows.append(part.rows() if order is None else part.rows()[:, order])
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def parts(self, segments: Mapping[str, Segment]) -> dict[str, Part]:
        """Return the part of each modality. A permutation is left out: attention does not see the order of rows.

        Raises:
            ValueError: no segments, one of an unknown modality, or of another shape than its layout's; names both.
        """
        if not segments or not segments.keys() <= self.layouts.keys():
            raise ValueError(f"segments of {sorted(segments) or 'nothing'}, expected {sorted(self.layouts)}")
        parts = {}
        for name in self.layouts:
            if name in segments:
                self._check(name, segments[name])
                parts[name] = self.part(name, segments[name])
        return parts

    def _check(self, name: str, segment: Segment) -> None:
        layout, values, positions = self.layouts[name], segment.values, segment.positions
        if tuple(values.shape[1:]) != layout.prepared_shape:
            expected = ", ".join(map(str, layout.prepared_shape))
            raise ValueError(f"{name} values of shape {tuple(values.shape)}, expected (B, {expected})")
        points = (len(values), layout.num_inputs, layout.dims)
        if not layout.is_grid and (positions is None or tuple(positions.shape) != points):
            found = None if positions is None else tuple(positions.shape)
            raise ValueError(f"{name} positions of shape {found}, expected {points}")

    def part(self, name: str, segment: Segment, tables: Sequence[Tensor] | None = None) -> Part:
        """Return the part of one modality. Nothing here depends on the grid of its layout, where `tables` are given.

        tables: as `axis_features` gives them, of another grid than the layout's.
        """
        layout, values, positions, mask = self.layouts[name], segment.values, segment.positions, segment.mask
        values = (values.float() - self.get_buffer(f"mean_{name}")) / self.get_buffer(f"std_{name}")
        if name in self.stems:
            values = self.stems[name](values)
        batch, grid = values.shape[0], values.shape[1:-1]  # sizes, not len(): they may be symbols
        if mask is not None:
            mask = mask.expand(batch, prod(grid))
        encoding = self.modality_encodings.get(name, None)
        if layout.is_grid and name not in self.learned_positions:
            first, *rest = self._tables(name, layout, values.device) if tables is None else tables
            if encoding is not None:
                first = torch.cat([first, encoding.expand(first.shape[0], -1)], dim=-1)
                rest = [F.pad(table, (0, len(encoding))) for table in rest]
            return Part(values, (first, *rest), mask)
        values = values.reshape(batch, prod(grid), values.shape[-1])
        if name in self.learned_positions:
            features = self.learned_positions[name].expand(batch, -1, -1)
        else:
            assert positions is not None
            features = fourier_features(positions, layout.bands, layout.max_resolution)
        ending = [] if encoding is None else [encoding.expand(*values.shape[:2], -1)]
        return Part(torch.cat([values, features, *ending], dim=-1), mask=mask)

    def _tables(self, name: str, layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
        key = (name, device)
        if key not in self._axis_features:
            self._axis_features[key] = axis_features(layout, [grid_positions((side,), device) for side in layout.grid])
        return self._axis_features[key]

    def _order(self, name: str, device: torch.device) -> Tensor | None:
        layout = self.layouts[name]
        if layout.permutation is None:
            return None
        generator = torch.Generator().manual_seed(layout.permutation)
        return torch.randperm(layout.num_inputs, generator=generator).to(device)


class ConvStem(nn.Module):
    """Convolution of 7, batch norm, ReLU, max pooling of 3, each halving the sides (Perceiver IO's conv variant).

    same: pads as TensorFlow's SAME does, the larger half at the end; else 3 on every side and none for the pooling.
    """

    def __init__(self, channels: int, out_channels: int, *, same: bool) -> None:
        super().__init__()
        self.same = same
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=7, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, H / 4, W / 4, out_channels) of values (B, H, W, channels)."""
        x = values.movedim(-1, 1)
        x = F.pad(x, _same_padding(x, 7) if self.same else (3, 3, 3, 3))
        x = F.relu(self.norm(self.conv(x)))
        if self.same:
            x = F.pad(x, _same_padding(x, 3), value=-torch.inf)
        return F.max_pool2d(x, kernel_size=3, stride=2).movedim(1, -1)


def _same_padding(x: Tensor, kernel: int) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) so that a stride of 2 gives half of each side, rounded up."""
    height, width = (max(0, (-(-side // 2) - 1) * 2 + kernel - side) for side in x.shape[-2:])
    return width // 2, width - width // 2, height // 2, height - height // 2


def with_features(prepared: ByteArray, spec: InputSpec) -> NDArray[np.float32]:
    """Return (M, C): the values of a byte array, brought to mean 0 and deviation 1, and its Fourier features."""
    positions = None if prepared.positions is None else torch.from_numpy(prepared.positions[None].copy())
    segment = Segment(torch.from_numpy(prepared.values[None].copy()), positions)
    layout = modality(spec.modality).layout(spec)
    rows: Tensor = ByteArrayEncoding({spec.modality: layout}, 0)({spec.modality: segment})
    return rows[0].numpy()
