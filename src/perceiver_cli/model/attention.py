"""The two attention blocks: cross-attend (latents read the byte array) and self-attend (latents among themselves).

Axes: B batch, M inputs, N latents, C input channels (c of them values), D latent channels, H heads, W width of Q, K
and V, n = H N queries, T tiles, m inputs of a tile.

Both blocks are pre-LayerNorm residual: `x = x + attention(norm(x), ...)`, then `x = x + dense(norm(x))` (App. C).

Where it costs less, the cross-attend is computed without the byte array, in three exact steps that
docs/how-it-works.md derives: 1. fold the projections into queries u, so that keys = values = xhat (the rows after
LayerNorm without its scale and offset); 2. separate u . xhat by the axes of a grid; 3. tile the grid, so that keys are
short (`tiles.py`). Point sets, whose rows exist, take step 1 only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial
from math import exp, log, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.model import kernels
from perceiver_cli.model.cost import MIN_TILED_INPUTS
from perceiver_cli.model.encoding import ModalityInputs
from perceiver_cli.model.linear import linears, unchanged
from perceiver_cli.model.tiles import EPS, GridTiles, RowTiles, Tiles

WEIGHT_BYTES = 64 << 20  # of an attention's weights (B, H, N or n, M) that a training step may keep


class Memory:
    """The inputs of one forward; each cross-attend reads them in its cheapest form.

    inputs: of each modality that is present, all with the same B.
    tileable: cut grids into tiles where that costs less; else make all rows, which can be traced.
    """

    def __init__(self, inputs: Iterable[ModalityInputs], *, tileable: bool = True) -> None:
        self.inputs, self.tileable = tuple(inputs), tileable
        self.batch = self.inputs[0].values.shape[0]
        self.num_channels = self.inputs[0].num_channels
        self._projected: dict[CrossAttend, tuple[Tensor, Tensor]] = {}

    @cached_property
    def rows(self) -> Tensor:
        """xhat (B, M, C) float32 of all modalities: the byte array after LayerNorm without scale and offset."""
        rows = [F.layer_norm(inputs.rows().float(), (self.num_channels,), eps=EPS) for inputs in self.inputs]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    @cached_property
    def mask(self) -> Tensor | None:
        """(B, 1, 1, M) bool of all modalities, or None if every row is an input."""
        if all(inputs.mask is None for inputs in self.inputs):
            return None
        true = self.inputs[0].values.new_ones((), dtype=torch.bool)
        masks = [(true if x.mask is None else x.mask).expand(self.batch, prod(x.grid)) for x in self.inputs]
        return torch.cat(masks, dim=1)[:, None, None]

    @cached_property
    def tiles(self) -> list[Tiles]:
        """The inputs of each modality, cut into tiles."""
        return [GridTiles(inputs) if inputs.tables else RowTiles(inputs) for inputs in self.inputs]

    def tiled_width(self) -> float:
        """Return the mean number of multiply-adds per score of tiles, or C if tiles do not pay."""
        counts = [prod(inputs.grid) for inputs in self.inputs]
        on_grids = sum(count for count, inputs in zip(counts, self.inputs, strict=True) if inputs.tables)
        if not self.tileable or on_grids < MIN_TILED_INPUTS:
            return self.num_channels
        widths = [GridTiles.width(inputs) if inputs.tables else inputs.num_channels for inputs in self.inputs]
        mean = sum(count * width for count, width in zip(counts, widths, strict=True)) / sum(counts)
        return min(mean, self.num_channels)

    def projected(self, block: CrossAttend) -> tuple[Tensor, Tensor]:
        """Return K and V (B, H, M, W / H) of a cross-attend, made once per weight set."""
        if block not in self._projected:
            rows = self.rows * block.input_norm.weight + block.input_norm.bias
            keys, values = linears(rows, unchanged, [block.key, block.value])
            self._projected[block] = split_heads(keys, block.heads), split_heads(values, block.heads)
        return self._projected[block]

    def kernel(self, device: torch.device, dtype: torch.dtype) -> kernels.Kernel:
        """Return the fastest kernel that is right for the width of these tiles: CUDA kernels refuse some widths."""
        widest = max(tiles.key_width for tiles in self.tiles)
        return kernels.choose(device, dtype, widest) if device.type == "cuda" else kernels.choose(device, dtype)

    def average(self, u: Tensor, *, tiled: bool) -> Tensor:
        """Return the mean (B, n, C) of xhat under softmax(u . xhat), for folded queries u (B or 1, n, C)."""
        if not tiled:
            if self.mask is None and _keeps_weights(u, self.batch * u.shape[1] * self.rows.shape[1]):
                with torch.autocast("cpu", enabled=False):  # positions are float32 in every precision
                    return _Average.apply(u.float(), self.rows)  # type: ignore[no-any-return, no-untyped-call]
            keys = self.rows.unsqueeze(1)  # all heads share them
            return attend(u.unsqueeze(1).expand(self.batch, -1, -1, -1), keys, keys, 1.0, self.mask)[:, 0]
        dtype = torch.get_autocast_dtype(u.device.type) if torch.is_autocast_enabled(u.device.type) else u.dtype
        kernel = self.kernel(u.device, dtype)
        with torch.autocast(u.device.type, enabled=False):
            means, normalisers = zip(*(tiles.average(u.float(), kernel) for tiles in self.tiles), strict=True)
            if len(means) == 1:
                return means[0]  # type: ignore[no-any-return]
            shares = torch.stack(normalisers).softmax(dim=0).unsqueeze(-1)
            return (shares * torch.stack(means)).sum(dim=0)


class _Average(torch.autograd.Function):
    """The mean (B, n, C) of rows (B, M, C) under softmax(u . row), for u (B or 1, n, C). Rows are keys and values.

    PyTorch's fused attention makes one gradient of keys and another of values, even where none is needed.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, rows: Tensor) -> Tensor:
        weights = (u @ rows.mT).softmax(dim=-1)
        mean = weights @ rows
        ctx.save_for_backward(u, rows, weights, mean)
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        u, rows, weights, mean = ctx.saved_tensors
        slopes = (grad @ rows.mT).sub_((grad * mean).sum(dim=-1, keepdim=True)).mul_(weights)
        grad_u = (slopes @ rows).sum_to_size(u.shape)
        if not ctx.needs_input_grad[1]:
            return grad_u, None
        return grad_u, torch.baddbmm(weights.mT @ grad, slopes.mT, u.expand(len(rows), -1, -1))


class Dense(nn.Module):
    """LayerNorm, linear, GELU, linear: the block after every attention. The paper's widening is 1 (no bottleneck)."""

    def __init__(self, channels: int, widening: int, gelu: str = "tanh") -> None:
        super().__init__()
        self.gelu = partial(F.gelu, approximate="tanh" if gelu == "tanh" else "none")
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.widen = nn.Linear(channels, channels * widening)
        self.project = nn.Linear(channels * widening, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update (B, N, D) of latents x (B, N, D)."""
        (wide,) = linears(x, self.norm, [self.widen])
        (out,) = linears(wide, self.gelu, [self.project])
        return out


class CrossAttend(nn.Module):
    """Latents (B, N, D) attend to a byte array (B, M, C) (paper 3.1, App. C).

    A key bias shifts all scores of a latent equally and so changes nothing: the folded forms leave it out, and its
    gradient in the projected form is zero up to rounding.

    residual: add the attention's output to the latents, or replace them by it.
    """

    def __init__(
        self,
        latent_channels: int,
        input_channels: int,
        width: int,
        heads: int,
        widening: int,
        gelu: str = "tanh",
        *,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.latent_norm = nn.LayerNorm(latent_channels, eps=EPS)
        self.input_norm = nn.LayerNorm(input_channels, eps=EPS)
        self.query = nn.Linear(latent_channels, width)
        self.key = nn.Linear(input_channels, width)
        self.value = nn.Linear(input_channels, width)
        self.output = nn.Linear(width, latent_channels)
        self.dense = Dense(latent_channels, widening, gelu)

    def form(self, num_latents: int, tiled_width: float) -> str:
        """Return the form with the fewest multiply-adds per input: "tiled", "folded" or "projected".

        Tiled and folded: scores and sums of H N queries, as wide as a tile's keys or as C. Projected: K and V, then
        scores and sums of N queries, W wide over all heads.
        """
        width, channels = self.key.weight.shape
        costs = {  # of equal costs the first wins: no tiles where their keys are as wide as C
            "folded": 2 * self.heads * num_latents * channels,
            "tiled": 2 * self.heads * num_latents * tiled_width,
            "projected": 2 * channels * width + 2 * num_latents * width,
        }
        return min(costs, key=lambda form: costs[form])

    def queries(self, latents: Tensor) -> Tensor:
        """Return the queries (B, H, N, W / H) of latents (B, N, D)."""
        (queries,) = linears(latents, self.latent_norm, [self.query])
        return split_heads(queries, self.heads)

    def fold(self, queries: Tensor) -> Tensor:
        """Return the folded queries u (B, H N, C) of queries (B, H, N, W / H): a score is u . xhat."""
        # (W, C) -> (H, W / H, C): the rows of each head
        key_rows = self.key.weight.view(self.heads, -1, self.key.in_features)
        u: Tensor = (queries @ key_rows) * (self.input_norm.weight * queries.shape[-1] ** -0.5)
        return u.flatten(1, 2)

    def read(self, latents: Tensor, memory: Memory, folded: Tensor | None = None) -> Tensor:
        """Return softmax(Q K^T / sqrt(W / H)) V of all heads (B, N, W), before the output's linear layer.

        folded: the folded queries of these latents, if they are already known.
        """
        form = self.form(latents.shape[1], memory.tiled_width())
        if form == "projected":
            queries = self.queries(latents).expand(memory.batch, -1, -1, -1)
            keys, values = memory.projected(self)
            return merge_heads(attend(queries, keys, values, queries.shape[-1] ** -0.5, memory.mask))
        u = self.fold(self.queries(latents)) if folded is None else folded
        mean = memory.average(u, tiled=form == "tiled").view(memory.batch, self.heads, -1, u.shape[-1])
        mean = mean * self.input_norm.weight + self.input_norm.bias
        value_rows = self.value.weight.view(self.heads, -1, u.shape[-1])
        return merge_heads(mean @ value_rows.mT) + self.value.bias

    def forward(self, latents: Tensor, memory: Memory, folded: Tensor | None = None) -> Tensor:
        """Return the new latents (B, N, D) from latents (B or 1, N, D): 1 if all examples share them."""
        (attended,) = linears(self.read(latents, memory, folded), unchanged, [self.output])
        latents = add(latents, attended) if self.residual else attended
        return add(latents, self.dense(latents))


class SelfAttend(nn.Module):
    """One block of the latent Transformer on latents (B, N, D): a GPT-2 block without a mask (paper 3.1, App. C)."""

    def __init__(self, channels: int, heads: int, widening: int, gelu: str = "tanh") -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.dense = Dense(channels, widening, gelu)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the new latents (B, N, D)."""
        projected = linears(latents, self.norm, [self.query, self.key, self.value])
        if _is_for_products(projected[0], self.heads):
            read: Tensor = _HeadSoftmax.apply(self.heads, *projected)  # type: ignore[no-untyped-call]
        else:
            query, key, value = (split_heads(x, self.heads) for x in projected)
            read = merge_heads(attend(query, key, value, query.shape[-1] ** -0.5))
        (attended,) = linears(read, unchanged, [self.output])
        latents = add(latents, attended)
        return add(latents, self.dense(latents))


def _is_for_products(x: Tensor, heads: int) -> bool:
    """Return whether `_HeadSoftmax` is the faster self-attention for latents (B, N, D)."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return kernels.choose(x.device, x.dtype).shifts(x.shape[1] ** 2 * x.shape[2] // heads)


class _HeadSoftmax(torch.autograd.Function):
    """Attention of latents among themselves: the merged heads (B, N, D) of Q, K and V (B, N, D).

    One more column of the queries subtracts from each score its level, and in backward its normaliser. A column of ones
    in the values sums the weights.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (F.pad(split_heads(x, heads), (0, 1), value=1.0).flatten(0, 1) for x in (query, key, value))
        q *= (q.shape[-1] - 1) ** -0.5
        level = _level(q[..., :-1], k[..., :-1])
        q[..., -1] = -level
        each = zip(q.unbind(), k.unbind(), v.mT.unbind(), strict=True)  # (N, W + 1) of a head, or its transpose
        sums = torch.stack([kernels.product(kernels.exponentials(a, b), c) for a, b, c in each])
        out = merge_heads((sums[..., :-1] / sums[..., -1:]).view(len(query), heads, *q.shape[1:-1], -1))
        q[..., -1] = -kernels.FAR - level - sums[..., -1].log()
        ctx.heads = heads
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        delta = split_heads(grad * out, ctx.heads).sum(dim=-1, keepdim=True)
        grad_out = torch.cat([split_heads(grad, ctx.heads), -delta], dim=-1).flatten(0, 1)
        by_head: list[list[Tensor]] = [[], [], []]  # of Q, K and V
        for a, b, c, d in zip(q.unbind(), k.unbind(), v.unbind(), grad_out.unbind(), strict=True):
            weights = kernels.exponentials(a, b)
            slopes = kernels.product(d, c).mul_(weights)
            by_head[0].append(kernels.product(slopes, b.mT))
            # A large, transposed first matrix triples oneDNN's time.
            by_head[1].append(kernels.product(a.mT, slopes.mT).mT)
            by_head[2].append(kernels.product(d.mT, weights.mT).mT)
        shape = len(grad), ctx.heads, *q.shape[1:]
        grads = [merge_heads(torch.stack(heads).view(shape)[..., :-1]) for heads in by_head]
        unshift = exp(kernels.FAR)
        return None, grads[0].mul_(unshift * (q.shape[-1] - 1) ** -0.5), *(x.mul_(unshift) for x in grads[1:])


def _level(q: Tensor, k: Tensor) -> Tensor:
    """Return a level (H, N) at least `kernels.FAR` above every score q . k, for q and k (H, N, W)."""
    # The norms of q and k bound the scores; where that bound is too far above the normaliser, the scores are computed.
    above: Tensor = q.norm(dim=-1) * k.norm(dim=-1).amax(dim=-1, keepdim=True) + kernels.FAR
    below = (q @ k.mean(dim=-2).unsqueeze(-1)).squeeze(-1) + log(k.shape[-2])
    if (above - below).max() > kernels.SPAN:
        each = zip(q.unbind(), k.unbind(), strict=True)
        above = torch.stack([kernels.product(a, b).amax(dim=-1) for a, b in each]) + kernels.FAR
    return above


def add(latents: Tensor, update: Tensor) -> Tensor:
    """Return latents + update, in the update's memory unless autocast gave it another type."""
    return update.add_(latents) if update.dtype == latents.dtype else latents + update


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return x (B, N, W) as (B, H, N, W / H)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Return x (B, H, N, W / H) as (B, N, W)."""
    return x.transpose(1, 2).flatten(2)


def _keeps_weights(x: Tensor, weights: int) -> bool:
    """Return whether a training step keeps its attention weights for backward: on a CPU, if they fit in WEIGHT_BYTES.

    On a CPU the backward pass of PyTorch's fused attention, which keeps none, is slower than products of kept weights:
    eight times for 32 latents in bf16. weights: their number.
    """
    is_step = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_step and x.device.type == "cpu" and x.element_size() * weights <= WEIGHT_BYTES


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return softmax(scale * Q K^T) V over (B, H, N or M, W) by PyTorch's fused attention, or by products."""
    width = query.shape[-1]
    pad = -width % 8 if query.is_cuda else 0
    if pad:
        # CUDA's fused kernels refuse a width like the paper's 261, and PyTorch then silently builds all N x M scores;
        # zero columns change no score.
        query, key, value = (F.pad(x, (0, pad)) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)[..., :width]
    if mask is None and query.dtype == torch.bfloat16 and _keeps_weights(query, query[..., 0].numel() * key.shape[-2]):
        return (query * scale @ key.mT).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
