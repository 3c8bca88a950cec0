"""One example in slices on several processes, for inputs that one device cannot hold. Exact.

Axes: B batch, M inputs, n queries of all heads, C input channels.

Each process attends to its own slice; softmaxes are merged by their normalisers. For each cross-attend they send
(B, n, C + 2) numbers, whatever M is. All else (latents, weights, logits, loss) is the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from perceiver_cli.errors import UsageError, counted
from perceiver_cli.model.attention import Memory
from perceiver_cli.model.encoding import ModalityInputs, Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.ranks import Ranks
from perceiver_cli.preprocess.base import Layout


class SlicedMemory(Memory):
    """The slice of the inputs that this process holds. inputs: that slice of every modality that is present."""

    def __init__(self, inputs: Iterable[ModalityInputs], ranks: Ranks) -> None:
        super().__init__(inputs)
        self.ranks = ranks

    def tiled_width(self) -> float:
        """Return 0: tiles are the only form whose normaliser is known."""
        return 0.0

    def average(self, u: Tensor, *, tiled: bool) -> Tensor:
        """Return the mean (B, n, C) of xhat over the inputs of all processes under softmax(u . xhat)."""
        u = _Spread.apply(u, self.ranks)  # type: ignore[no-untyped-call]
        kernel = self.kernel(u.device, u.dtype)
        with torch.autocast(u.device.type, enabled=False):
            means, normalisers = zip(*(tiles.average(u.float(), kernel) for tiles in self.tiles), strict=True)
            normaliser = torch.stack(normalisers).logsumexp(dim=0)
            shares = (torch.stack(normalisers) - normaliser).exp().unsqueeze(-1)
            mean = (shares * torch.stack(means)).sum(dim=0)
        merged: Tensor = _Merge.apply(mean, normaliser, self.ranks)  # type: ignore[no-untyped-call]
        return merged


POINTWISE = ("none", "embed", "linear")  # stems that see one input at a time


def check_slices(layouts: Mapping[str, Layout], num_slices: int) -> None:
    """Raise UsageError if inputs of these layouts cannot lie in slices."""
    for name, layout in layouts.items():
        if layout.stem not in POINTWISE:
            found = f"{name} inputs with the stem {layout.stem!r} cannot lie in slices: it mixes neighbours"
            raise UsageError(found, f"pass --set inputs.{name}.stem=none")
        if layout.learned_channels:
            raise UsageError(f"{name} inputs with learned positions cannot lie in slices", "use Fourier features")
        if layout.prepared_shape[0] < num_slices:
            side = counted(layout.prepared_shape[0], "row")
            raise UsageError(f"{name} inputs have {side}, too few for {num_slices} slices", "pass fewer")


def slices_of(segments: Mapping[str, Segment], ranks: Ranks) -> tuple[dict[str, Segment], dict[str, range]]:
    """Return this process's slice of whole segments along the first axis of each grid, or of its points; its places."""
    sides = {name: ranks.share(segment.values.shape[1]) for name, segment in segments.items()}
    parts = {}
    for name, segment in segments.items():
        values, mask, side = segment.values, segment.mask, sides[name]
        if mask is not None and mask.shape[1] > 1:
            row = prod(values.shape[2:-1])  # inputs of one place along the first axis
            mask = mask[:, side.start * row : side.stop * row]
        positions = None if segment.positions is None else segment.positions[:, side.start : side.stop]
        parts[name] = Segment(values[:, side.start : side.stop], positions, mask)
    return parts, sides


def slice_logits(model: Perceiver, segments: dict[str, Segment], sides: dict[str, range], ranks: Ranks) -> Tensor:
    """Return the logits (B, classes) of examples of which each process has a slice along the first axis of each grid.

    segments: the slice of this process; sides: its places along that axis of the whole grid. After a backward pass
    every process has the gradients of the whole example; for parameters of the encoding call `share_encoding` before.
    """
    parts = []
    for name, segment in segments.items():
        tables = None
        if segment.positions is None:
            first, *rest = model.encoding.axis_tables(name, segment.values.device)
            tables = (first[sides[name].start : sides[name].stop], *rest)
        parts.append(model.encoding.modality_inputs(name, segment, tables))
    return model.classify(model.read(SlicedMemory(parts, ranks)))


def share_encoding(model: Perceiver, ranks: Ranks) -> None:
    """Let every later backward pass sum the gradients of the encoding's parameters over all slices."""

    for parameter in model.encoding.parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(_total, ranks=ranks))  # type: ignore[no-untyped-call]


def _total(grad: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of a gradient over all slices."""
    grad = grad.contiguous().clone()
    with ranks.talking():
        dist.all_reduce(grad, group=ranks.group)
    return grad


class _Spread(torch.autograd.Function):
    """The same queries for all processes: their gradient is the sum over all slices."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _total(grad, ctx.ranks), None


class _Merge(torch.autograd.Function):
    """The mean (B, n, C) over all slices, from this slice's mean and the log of its normaliser (B, n)."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, level: Tensor, ranks: Ranks) -> Tensor:
        top = level.clone()
        with ranks.talking():
            dist.all_reduce(top, dist.ReduceOp.MAX, ranks.group)
            weight = (level - top).exp().unsqueeze(-1)
            sums = torch.cat([weight * mean, weight], dim=-1)
            dist.all_reduce(sums, group=ranks.group)
        total, share = sums[..., :-1] / sums[..., -1:], weight / sums[..., -1:]
        ctx.save_for_backward(mean, total, share)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, total, share = ctx.saved_tensors
        return share * grad, (share * (grad * (mean - total)).sum(dim=-1, keepdim=True)).squeeze(-1), None
