"""Sums over the batches of a step in one order, so that any number of processes gives the same bytes.

Batch k of a step is a leaf of a binary tree: leaves 2i and 2i + 1 are added first, then these sums in the same way.
Each process adds the batches of its own share; the sums of shares are added after an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perceiver_cli.model.ranks import Ranks

BUCKET_BYTES = 64 << 20  # of gradients sent at a time


class Node(NamedTuple):
    """The sum of leaves place * 2^level to (place + 1) * 2^level - 1, tensor by tensor."""

    level: int
    place: int
    tensors: list[Tensor]


class TreeSum:
    """Adds the leaves of a tree from left to right; `nodes` holds the sums that no leaf so far completes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, node: Node) -> None:
        """Add a node, whose tensors must not be used afterwards, and each sum that it completes."""
        while self.nodes and node.place % 2 and self.nodes[-1][:2] == (node.level, node.place - 1):
            left = self.nodes.pop()
            _add(left.tensors, node.tensors)
            node = Node(node.level + 1, node.place // 2, left.tensors)
        self.nodes.append(node)

    def total(self) -> list[Tensor]:
        """Return the sum of all leaves: of the nodes of a tree without a full right side, the right ones first."""
        total = self.nodes.pop().tensors
        while self.nodes:
            left = self.nodes.pop().tensors
            _add(left, total)
            total = left
        return total


def _add(these: Sequence[Tensor], those: Sequence[Tensor]) -> None:
    if these:  # `nodes_of` adds none
        torch._foreach_add_(list(these), list(those))


def nodes_of(leaves: range) -> list[tuple[int, int]]:
    """Return level and index of the nodes to which neighbouring leaves add up."""
    tree = TreeSum()
    for leaf in leaves:
        tree.add(Node(0, leaf, []))
    return [(node.level, node.place) for node in tree.nodes]


def tree_total(tree: TreeSum, like: Sequence[Tensor], count: int, ranks: Ranks) -> list[Tensor]:
    """Return the sum of `count` leaves, of which each process has added its share to its own tree; like: its shapes.

    It sends as much as an all-reduce: each process gets its slice of every sum, adds, and sends the result to all.
    """
    if ranks.size == 1:
        return tree.total()
    totals = [torch.empty_like(tensor) for tensor in like]
    # All of a team have the same sums: the first of them gives them.
    nodes = [nodes_of(ranks.share(count, rank)) if ranks.leads(rank) else [] for rank in range(ranks.size)]
    for bucket in _buckets(like):
        rows = [torch.cat([t.flatten() for t in node.tensors[bucket]]) for node in tree.nodes]
        total = _meeting(rows, nodes, sum(t.numel() for t in totals[bucket]), ranks, like[bucket.start])
        _unflatten(total, totals[bucket])
    return totals


def _meeting(
    rows: Sequence[Tensor], nodes: Sequence[Sequence[tuple[int, int]]], length: int, ranks: Ranks, like: Tensor
) -> Tensor:
    """Return the sum (length,) of the rows of all processes; nodes: level and index of each process's rows."""
    slice_length = -(-length // ranks.size)
    mine = like.new_zeros(len(rows), ranks.size, slice_length)
    for row, place in zip(rows, mine, strict=True):
        place.view(-1)[:length] = row
    counts = [len(each) * slice_length for each in nodes]
    theirs = like.new_empty(sum(counts))
    with ranks.talking():
        dist.all_to_all_single(
            theirs, mine.transpose(0, 1).reshape(-1), counts, [len(rows) * slice_length] * ranks.size
        )
        tree = TreeSum()
        for (level, index), row in zip((n for each in nodes for n in each), theirs.view(-1, slice_length), strict=True):
            tree.add(Node(level, index, [row]))
        (own,) = tree.total()
        total = like.new_empty(ranks.size, slice_length)
        dist.all_gather(list(total), own.contiguous())
    return total.view(-1)[:length]


def flat_total(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace tensors by their sums over all processes, in whatever order the network adds."""
    if ranks.size == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in tensors[bucket]])
        with ranks.talking():
            dist.all_reduce(flat)
        _unflatten(flat, tensors[bucket])


def _buckets(tensors: Sequence[Tensor]) -> list[slice]:
    """Return slices of tensors of about BUCKET_BYTES, of one type each."""
    slices, start, size = [], 0, 0
    for index, tensor in enumerate(tensors):
        if index > start and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != tensors[start].dtype):
            slices.append(slice(start, index))
            start, size = index, 0
        size += tensor.nbytes
    return [*slices, slice(start, len(tensors))]


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split_with_sizes(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


class BatchStatistics:
    """The running statistics of batch norms over a step's batches in order, whichever process computed a batch.

    torch averages them as batches come; here each batch's own statistics are kept, and averaged when all are known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.momentum = [norm.momentum or 0.0 for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 1.0  # the buffers then hold the statistics of the last batch
        self.counts = [norm.num_batches_tracked for norm in self.norms if norm.num_batches_tracked is not None]
        self.before: list[Tensor] = []
        self.size = sum(buffer.numel() for buffer in self._buffers())

    def _buffers(self) -> list[Tensor]:
        return [b for norm in self.norms for b in (norm.running_mean, norm.running_var) if b is not None]

    def begin(self) -> None:
        """Remember the averages before a step."""
        self.before = [buffer.clone() for buffer in [*self._buffers(), *self.counts]]

    def of_batch(self) -> Tensor:
        """Return the statistics (size,) of the batch just seen."""
        return torch.cat([buffer.flatten() for buffer in self._buffers()]) if self.norms else torch.empty(0)

    def replay(self, batches: Tensor, seen: Tensor) -> None:
        """Set the averages after a step. batches: (count, size) statistics; seen: (count,) 0 for an empty batch."""
        if not self.norms:
            return
        buffers, rates = self._buffers(), [rate for rate in self.momentum for _ in range(2)]
        columns = torch.split_with_sizes(batches, [buffer.numel() for buffer in buffers], 1)
        for buffer, before, rate, statistics in zip(buffers, self.before, rates, columns, strict=False):
            buffer.copy_(before)
            for row, share in zip(statistics, rate * seen, strict=True):
                buffer.lerp_(row, share)
        for count, before in zip(self.counts, self.before[len(buffers) :], strict=True):
            count.copy_(before + seen.sum())
