"""A grid of inputs as tiles, and softmax attention over them (docs/how-it-works.md, sections 2 to 4).

Axes: B batch, M inputs, C input channels (c of them values), n queries, T tiles, m inputs of a tile, w width of its
keys, s width of the columns of a query that all tiles share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, log, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli.model import kernels
from perceiver_cli.model.encoding import ModalityInputs
from perceiver_cli.model.kernels import NEVER

EPS = 1e-5  # LayerNorm's, as in Haiku
TILE_SIDES = {1: 64, 2: 16, 3: 8}  # largest side of a tile, by the number of axes
SLAB_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}  # limit of tile queries at once: on a CPU, they stay in its cache
MOST_TILES = 65_535  # limit of tiles of a slab: CUDA's for two of the three sizes of a grid of blocks
STATISTICS_BYTES = 4 << 20  # limit of float64 copies of values at once
PRODUCT_BYTES = 32 << 20  # limit of a block of `Tiles.products`
ROW_TILE = 512  # rows of a tile of `RowTiles`


class Tiles:
    """The inputs of one modality, cut into tiles of one shape: keys (B, T, m, w), made for a slab of tiles at a time.

    A query is its scores along each axis of the tile, then the columns that all tiles share (B, n, s), the last 0.

    batch: B. counts: number of tiles along each axis. sides: of a tile, along each axis that has scores. size: m.
    key_width: w. masked: the first shared column is the mask's. reach: the largest norm of the keys' shared columns
    (without mask and ones), and the largest number in their one-hot columns. differentiable: keys have a gradient, from
    a learned stem, position or modality encoding.
    """

    batch: int
    counts: tuple[int, ...]
    sides: tuple[int, ...]
    size: int
    key_width: int
    masked: bool
    reach: tuple[Tensor, Tensor]
    differentiable: bool

    def average(self, u: Tensor, kernel: kernels.Kernel) -> tuple[Tensor, Tensor]:
        """Return the mean of xhat (B, n, C) and the log of the normaliser (B, n) for queries u (B or 1, n, C)."""
        raise NotImplementedError

    def queries(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shared columns and the scores along each axis of queries u (B or 1, n, C): see `spread`."""
        raise NotImplementedError

    def untiled(self, x: Tensor) -> Tensor:
        """Return x (B, T, m, ...) as (B, M, ...), in the order of the byte array's rows."""
        raise NotImplementedError

    def softmax(self, u: Tensor, kernel: kernels.Kernel) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of `_TileSoftmax`; it gets keys as a tensor only if they need gradients."""
        keys = self.keys(0, self.counts[0]) if self.differentiable and torch.is_grad_enabled() else None
        outputs: tuple[Tensor, Tensor, Tensor] = _TileSoftmax.apply(self, kernel, keys, *self.queries(u))  # type: ignore[no-untyped-call]
        return outputs

    def shift(self, shared: Tensor, along: Tensor) -> Tensor | None:
        """Return a level (B, n) `kernels.FAR` above every score, or None if it may be far above the normaliser."""
        above = shared[..., self.masked : -1].norm(dim=-1) * self.reach[0]
        for scores in self._by_tile(along):
            above += scores.abs().amax(dim=(-2, -1)) * self.reach[1]
        # The log of a mean of exponentials is at least the mean of their logs.
        keys = self.keys(0, 1).mean(dim=-2, keepdim=True)
        means = (self.spread(shared, along, 0, 1).view(*keys.shape[:2], -1, self.key_width) * keys).sum(dim=-1)
        shift, below = above + kernels.FAR, means.amax(dim=1) + log(self.size)
        return shift if (shift - below).max() <= kernels.SPAN else None

    def products(self, u: Tensor) -> Iterator[Tensor]:
        """Yield u . xhat (B, T, n, m) for u (B or 1, n, C), a block of tiles at a time, in their order.

        All of them would be (B, n, M): callers sum each block over n, or pass few u.
        """
        shared, along = self.queries(u)
        step = max(1, PRODUCT_BYTES // (4 * self.batch * prod(self.counts[1:]) * u.shape[1] * self.size))
        for first in range(0, self.counts[0], step):
            last = min(first + step, self.counts[0])
            scores = self.spread(shared, along, first, last) @ self.keys(first, last).flatten(0, 1).mT  # (B T, n, m)
            yield scores.view(self.batch, -1, *scores.shape[1:])

    def keys(self, first: int, last: int) -> Tensor:
        """Return the keys (B, T, m, w) of the tiles from `first` to `last` - 1 along the first axis."""
        raise NotImplementedError

    def slabs(self, queries: Tensor) -> Iterator[tuple[slice, int, int]]:
        """Yield slabs (examples, first and last tile along the first axis) whose tile queries fit in SLAB_BYTES."""
        tile_bytes = 4 * queries.shape[1] * self.key_width
        most, rest = min(MOST_TILES, SLAB_BYTES.get(queries.device.type, 2 << 20) // tile_bytes), prod(self.counts[1:])
        rows = min(self.counts[0], max(1, most // rest))
        examples = max(1, most // (rest * rows))
        for start in range(0, self.batch, examples):
            for first in range(0, self.counts[0], rows):
                yield slice(start, start + examples), first, min(first + rows, self.counts[0])

    def spread(self, shared: Tensor, along: Tensor, first: int, last: int) -> Tensor:
        """Return the tile queries (B T, n, w) of a slab: the scores along a tile's own sides, and the shared columns.

        shared (B, n, s); along (B, n, sum of counts * sides), axis after axis.
        """
        counts = (last - first, *self.counts[1:])
        dims, (batch, queries) = len(counts), shared.shape[:2]
        columns = []
        for axis, scores in enumerate(self._by_tile(along, first, last)):
            places = [1] * dims
            places[axis] = counts[axis]
            columns.append(scores.transpose(1, 2).reshape(batch, *places, queries, -1).expand(-1, *counts, -1, -1))
        columns.append(shared.view(batch, *[1] * dims, queries, -1).expand(-1, *counts, -1, -1))
        return torch.cat(columns, dim=-1).flatten(0, dims)

    def gather(self, spread: Tensor, shared: Tensor, along: Tensor, first: int, last: int) -> None:
        """Add tile queries (B T, n, w), or sums of this shape, to `shared` and `along`: the transpose of `spread`."""
        counts = (last - first, *self.counts[1:])
        spread = spread.view(len(shared), *counts, *spread.shape[1:])
        fewest = spread.flatten(1, len(counts))
        start = 0
        for axis, scores in enumerate(self._by_tile(along, first, last)):
            others = [other for other in range(1, len(counts) + 1) if other != axis + 1 and spread.shape[other] > 1]
            # All columns are summed: to sum those of one axis is no faster.
            own = (spread.sum(dim=others, keepdim=True) if others else spread).flatten(1, len(counts))
            scores += own[..., start : start + self.sides[axis]].transpose(1, 2)
            start += self.sides[axis]
            fewest = min(fewest, own, key=lambda sums: sums.shape[1])
        shared += fewest[..., start:].sum(dim=1)

    def _by_tile(self, along: Tensor, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield a view (B, n, count, side) for each axis that has scores; first, last: tiles along the first axis."""
        start = 0
        for axis, (count, side) in enumerate(zip(self.counts, self.sides, strict=False)):
            scores = along[..., start : start + count * side].view(*along.shape[:2], count, side)
            yield scores[:, :, first:last] if axis == 0 else scores
            start += count * side


class GridTiles(Tiles):
    """A grid, whose keys hold one-hot places instead of position features."""

    def __init__(self, inputs: ModalityInputs) -> None:
        values, self.grid, dims = inputs.values, inputs.grid, len(inputs.grid)
        self.batch, self.channels = len(values), values.shape[-1]
        self.counts, self.sides = counts, sides = self._cut(self.grid)
        spare = [count * side - length for count, side, length in zip(counts, sides, self.grid, strict=True)]
        self.tables = torch.cat([F.pad(x, (0, 0, 0, more)) for x, more in zip(inputs.tables, spare, strict=True)])
        # Statistics are float64, so they take a slice of the grid at a time.
        step = max(1, STATISTICS_BYTES // (8 * self.batch * prod(values.shape[2:])))
        first, *rest = inputs.tables
        rows = [slice(start, start + step) for start in range(0, self.grid[0], step)]
        columns = torch.cat([_normalised(values[:, r], [first[r], *rest]) for r in rows], dim=1)
        self.reach = columns.detach()[..., :-1].norm(dim=-1).max(), columns.detach()[..., -1].max()
        self.masked = inputs.mask is not None or any(spare)
        self.size, self.key_width = prod(sides), self.channels + 2 + self.masked + sum(sides)
        if self.masked:
            bias = columns.new_zeros(*columns.shape[:-1], 1)
            if inputs.mask is not None:
                bias.masked_fill_(~inputs.mask.view(self.batch, *self.grid, 1), NEVER)
            ends = [0, 0, *(end for more in reversed(spare) for end in (0, more))]
            columns = torch.cat([F.pad(bias, ends, value=NEVER), F.pad(columns, ends)], dim=-1)
        # (B, count, side, count, side, ..., width) -> (B, counts, sides, width)
        split = [size for pair in zip(counts, sides, strict=True) for size in pair]
        order = (0, *range(1, 2 * dims + 1, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
        columns = columns.view(self.batch, *split, -1).permute(order)
        # (B, T, m, [mask,] values, -r mu, r)
        self.columns = columns.reshape(self.batch, prod(counts), self.size, -1)
        self.differentiable = self.columns.requires_grad
        places = torch.cartesian_prod(*(torch.arange(side, device=values.device) for side in sides)).view(-1, dims)
        one_hot = [F.one_hot(place, side) for place, side in zip(places.unbind(-1), sides, strict=True)]
        self.one_hot = torch.cat(one_hot, dim=-1).to(columns.dtype)  # (m, sum of sides)

    @staticmethod
    def _cut(grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the number of tiles along each axis and their sides, all equal, with the least padding."""
        counts = tuple(ceil(side / TILE_SIDES.get(len(grid), 1)) for side in grid)
        return counts, tuple(ceil(side / count) for side, count in zip(grid, counts, strict=True))

    @staticmethod
    def width(inputs: ModalityInputs) -> int:
        """Return the width of a tile's keys."""
        return inputs.values.shape[-1] + 2 + sum(GridTiles._cut(inputs.grid)[1])

    def keys(self, first: int, last: int) -> Tensor:
        rest = prod(self.counts[1:])
        columns = self.columns[:, first * rest : last * rest]
        ones = columns.new_ones(1).expand(*columns.shape[:-1], 1)
        return torch.cat([columns[..., -1:] * self.one_hot, columns[..., :-1], ones], dim=-1)

    def queries(self, u: Tensor) -> tuple[Tensor, Tensor]:
        on_values, on_features = torch.split(u, [self.channels, u.shape[-1] - self.channels], dim=-1)
        shared = F.pad(torch.cat([on_values, on_features.sum(dim=-1, keepdim=True)], dim=-1), (0, 1))
        if self.masked:
            shared = F.pad(shared, (1, 0), value=1.0)
        along = on_features @ self.tables.T
        return shared.expand(self.batch, -1, -1), along.expand(self.batch, -1, -1)

    def untiled(self, x: Tensor) -> Tensor:
        dims, rest = len(self.grid), x.shape[3:]
        x = x.view(self.batch, *self.counts, *self.sides, *rest)
        pairs = [place for axis in range(1, dims + 1) for place in (axis, dims + axis)]
        x = x.permute(0, *pairs, *range(2 * dims + 1, x.dim()))
        x = x.reshape(self.batch, *(c * side for c, side in zip(self.counts, self.sides, strict=True)), *rest)
        inside = (slice(None), *(slice(side) for side in self.grid))
        return x[inside].flatten(1, dims)

    def average(self, u: Tensor, kernel: kernels.Kernel) -> tuple[Tensor, Tensor]:
        shared, along, normaliser = self.softmax(u, kernel)
        values, means, _ = torch.split(shared[..., self.masked :], [self.channels, 1, 1], dim=-1)
        return torch.cat([values, along @ self.tables + means], dim=-1), normaliser


class RowTiles(Tiles):
    """Rows without a grid (point sets, learned positions), beside a modality with one. Tiles only bound the memory."""

    def __init__(self, inputs: ModalityInputs) -> None:
        self.batch, self.count, channels = inputs.values.shape
        tiles = ceil(self.count / ROW_TILE)
        self.counts, self.sides, self.masked = (tiles,), (), True
        self.size, self.key_width = ceil(self.count / tiles), channels + 2
        rows = F.layer_norm(inputs.values.float(), (channels,), eps=EPS)
        self.reach = rows.detach().norm(dim=-1).max(), rows.new_zeros(())
        bias = rows.new_zeros(self.batch, self.count, 1)
        if inputs.mask is not None:
            bias.masked_fill_(~inputs.mask.unsqueeze(-1), NEVER)
        ends = (0, 0, 0, tiles * self.size - self.count)
        bias, rows = F.pad(bias, ends, value=NEVER), F.pad(rows, ends)
        self._keys = torch.cat([bias, rows, torch.ones_like(bias)], dim=-1).view(self.batch, tiles, self.size, -1)
        self.differentiable = rows.requires_grad

    def keys(self, first: int, last: int) -> Tensor:
        return self._keys[:, first:last]

    def queries(self, u: Tensor) -> tuple[Tensor, Tensor]:
        shared = F.pad(F.pad(u, (1, 0), value=1.0), (0, 1)).expand(self.batch, -1, -1)
        return shared, shared[..., :0]

    def untiled(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, : self.count]

    def average(self, u: Tensor, kernel: kernels.Kernel) -> tuple[Tensor, Tensor]:
        shared, _, normaliser = self.softmax(u, kernel)
        return shared[..., 1:-1], normaliser


def _normalised(values: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Return columns (B, *grid, c + 2) float32: xhat of the values, -r mu and r of LayerNorm over whole rows.

    tables: those of `ModalityInputs`, for the places of the values.
    """
    wide = _wide(values)
    sums = squares = wide.new_zeros(())
    for table in map(_wide, tables):
        sums = sums.unsqueeze(-1) + table.sum(dim=-1)  # (side_0 .. side_i)
        squares = squares.unsqueeze(-1) + table.square().sum(dim=-1)
    features = tables[0].shape[-1]
    total = values.shape[-1] + features
    mean = (wide.sum(dim=-1) + sums) / total
    centred = wide - mean.unsqueeze(-1)
    spread = squares - 2 * mean * sums + features * mean.square()
    rate = ((centred.square().sum(dim=-1) + spread) / total + EPS).rsqrt()
    statistics = torch.stack([-mean * rate, rate], dim=-1)
    return torch.cat([centred * rate.unsqueeze(-1), statistics], dim=-1).float()


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


class _TileSoftmax(torch.autograd.Function):
    """One softmax over all keys of all tiles, without any (n, M) tensor.

    forward: takes queries as `shared` (B, n, s) and `along` (B, n, sum of counts * sides); returns weighted sums of
    keys in the same two shapes (for the one-hot columns, sums of weights by place along an axis) and the log of the
    normaliser (B, n).
    backward: recomputes weights tile by tile from the total normaliser, as ring attention does across devices. With p
    the weights, dp = grad . key and delta the sum of p dp, the gradient of a score is p (dp - delta + d normaliser).
    """

    @staticmethod
    def forward(
        ctx: Any, tiles: Tiles, kernel: kernels.Kernel, keys: Tensor | None, shared: Tensor, along: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shared_sum, along_sum = shared.new_zeros(shared.shape), along.new_zeros(along.shape)
        shifts = kernel.shifts(shared.shape[1] * tiles.size * tiles.key_width)
        shift = tiles.shift(shared, along) if shifts else None
        top = shared.new_full(shared.shape[:2], -torch.inf) if shift is None else shift
        for some, first, last in tiles.slabs(shared):
            q = tiles.spread(shared[some], along[some], first, last).to(kernel.dtype)
            k, before = _narrow(tiles.keys(first, last)[some], kernel.dtype), top[some]
            each = len(k) // len(before)
            sums, level = kernel.forward(q, k, None if shift is None else before.repeat_interleave(each, dim=0))
            merged = shared_sum[some], along_sum[some]
            if shift is None:  # else all tiles have one level
                level = level.float().view(len(before), each, -1)  # (B, T, n)
                after = torch.maximum(before, level.amax(dim=1))
                sums = sums.float()
                sums[..., -1] = 1  # in half precision it is only close to 1
                sums *= (level - after.unsqueeze(1)).exp().view(-1, level.shape[-1], 1)
                for x in merged:
                    x *= (before - after).exp().unsqueeze(-1)
                top[some] = after
            tiles.gather(sums, *merged, first, last)
        # Avoid NaN when every input is masked.
        weights = shared_sum[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
        total = (shared_sum[..., -1].log() + top).clamp_(min=NEVER)
        shared_sum, along_sum = shared_sum / weights, along_sum / weights
        ctx.tiles, ctx.kernel = tiles, kernel
        ctx.save_for_backward(keys, shared, along, shared_sum, along_sum, total)
        return shared_sum, along_sum, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_shared: Tensor, grad_along: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        tiles, kernel = ctx.tiles, ctx.kernel
        keys, shared, along, shared_sum, along_sum, total = ctx.saved_tensors
        delta = (grad_shared * shared_sum).sum(-1) + (grad_along * along_sum).sum(-1) - grad_total
        q_shared, q_along = torch.zeros_like(shared_sum), torch.zeros_like(along_sum)
        grad_keys = None if keys is None else torch.empty_like(keys)
        with torch.autocast(shared.device.type, enabled=False):
            for some, first, last in tiles.slabs(shared):
                q = tiles.spread(shared[some], along[some], first, last).to(kernel.dtype)
                grad = tiles.spread(grad_shared[some], grad_along[some], first, last).to(kernel.dtype)
                k = _narrow(tiles.keys(first, last)[some], kernel.dtype)
                each = len(k) // len(total[some])
                lse, less = (x[some].repeat_interleave(each, dim=0) for x in (total, delta))
                grad_q, grad_k = kernel.backward(q, k, grad, lse, less, grad_keys is not None)
                tiles.gather(grad_q.float(), q_shared[some], q_along[some], first, last)
                if grad_keys is not None and grad_k is not None:
                    rest = prod(tiles.counts[1:])
                    grad_keys[some, first * rest : last * rest] = grad_k.view(-1, each, *grad_k.shape[1:])
        return None, None, grad_keys, q_shared, q_along


def _narrow(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return keys (B, T, m, w) as (B T, m, w) in a kernel's precision; fp16 cannot hold NEVER."""
    keys = keys.flatten(0, 1)
    return keys.clamp(min=torch.finfo(dtype).min / 2).to(dtype) if dtype == torch.float16 else keys.to(dtype)
