"""Learned layers between the values of one modality and its byte array; the paper has none.

A stem mixes each input with its surroundings before latents attend to it: convolutions on a grid, nearest neighbours of
a point. `docs/training.md` says what each is for; "none" is the paper's own.

Axes: B batch, M values, m inputs after the stem, c value channels, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.model.cost import conv_stem_layers
from perceiver_cli.preprocess.base import Layout

SMALLEST_SCALE = 1e-6  # of offsets, where all points are at one place
NORM_GROUPS = 8  # of the channels of a convolution


def make_stem(layout: Layout) -> nn.Module | None:
    """Return the stem of a layout, or None for "none". Each maps values, and positions of points, to fewer of both."""
    match layout.stem:
        case "none":
            return None
        case "embed":
            return Embeddings(layout.codes, layout.stem_channels)
        case "linear":
            return nn.Linear(layout.channels, layout.stem_channels)
        case "conv":
            return PatchStem(layout)
        case "neighbours":
            return NeighbourStem(layout)
    return ConvStem(layout.channels, layout.stem_channels, same=layout.stem == "conv-same")


class Embeddings(nn.Module):
    """Learned vectors by code: an input is the sum of some of them, each with a weight."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(codes, channels))

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, *grid, channels) of values (B, *grid, 2 k): k codes, then their weights."""
        codes, weights = values.chunk(2, dim=-1)
        each = F.embedding(codes.long().clamp(0, len(self.vectors) - 1), self.vectors)  # (B, *grid, k, channels)
        return (weights.unsqueeze(-2) @ each).squeeze(-2)


class ConvStem(nn.Module):
    """Convolution of 7, batch norm, ReLU, max pooling of 3, each halving the sides (Perceiver IO's conv variant).

    same: pad as TensorFlow's SAME, the larger half at the end; else pad the convolution by 3 and the pooling by 0.
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
    """Return the padding (left, right, top, bottom) with which a stride of 2 halves each side, rounded up."""
    height, width = (max(0, (-(-side // 2) - 1) * 2 + kernel - side) for side in x.shape[-2:])
    return width // 2, width - width // 2, height // 2, height - height // 2


class PatchStem(nn.Module):
    """Three small convolutions in place of patches (Xiao et al. 2021): each input is a patch with its surroundings.

    Group norms, not batch norms: an example's inputs depend on no other example, in training and in evaluation.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out_channels, kernel, stride in conv_stem_layers(layout):
            padding = (kernel[0] // 2, kernel[1] // 2)
            layers += [nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)]
            layers += [nn.GroupNorm(min(NORM_GROUPS, out_channels), out_channels), nn.GELU(approximate="tanh")]
        self.layers = nn.Sequential(*layers)

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, *grid, stem_channels) of values (B, *values_grid, c)."""
        out: Tensor = self.layers(values.movedim(-1, 1))
        return out.movedim(1, -1)


class NeighbourStem(nn.Module):
    """Each of m points with its nearest neighbours among all M: an edge convolution (Wang et al. 2019) on a sample.

    The m points are the first ones, which `prepare` draws at random. A linear layer and ReLU of each neighbour's offset
    and values, the largest of each channel, and a linear layer that mixes these. As max relu(a - c) = relu(max a - c),
    the first layer runs once for each point, not for each pair, and in float32: offsets are small differences.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.count, self.neighbours, self.dims = layout.num_inputs, layout.stem_neighbours, layout.dims
        self.first = nn.Linear(layout.dims + layout.channels, layout.stem_channels)
        self.second = nn.Linear(layout.stem_channels, layout.stem_channels)

    def forward(self, values: Tensor, positions: Tensor) -> Tensor:
        """Return (B, m, stem_channels) of values (B, M, c) and positions (B, M, d)."""
        with torch.autocast(positions.device.type, enabled=False):
            positions, values = positions.float(), values.float()
            distances, nearest = nearest_points(positions[:, : self.count], positions, self.neighbours)
            # Offsets get a mean square of 1 along an axis, because their size depends on the number of points.
            scale = distances.mean(dim=(1, 2)).div(self.dims).sqrt().clamp_min(SMALLEST_SCALE)[:, None, None]
            positions = positions / scale
            each = self.first(torch.cat([positions, values], dim=-1))  # (B, M, stem_channels)
            batch, m, k = nearest.shape
            rows = nearest + each.shape[1] * torch.arange(batch, device=nearest.device)[:, None, None]
            largest = F.embedding_bag(rows.view(-1, k), each.flatten(0, 1), mode="max").view(batch, m, -1)
            center = F.linear(positions[:, : self.count], self.first.weight[:, : self.dims])
            seen = F.relu(largest - center)
        out: Tensor = self.second(seen)
        return out


@torch.no_grad()
def nearest_points(centers: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return squared distances and indices (B, m, k) of the points (B, M, d) nearest to each center (B, m, d)."""
    with torch.autocast(points.device.type, enabled=False):
        centers, points = centers.float(), points.float()
        # The square of each center, the same for all its neighbours, comes last.
        squares = torch.baddbmm(points.square().sum(dim=-1).unsqueeze(1), centers, points.mT, alpha=-2)
        nearest = squares.topk(min(count, points.shape[1]), dim=-1, largest=False, sorted=False)
        return (nearest.values + centers.square().sum(dim=-1, keepdim=True)).clamp_min(0), nearest.indices
