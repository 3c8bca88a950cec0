"""MixUp and CutMix: batches mixed with themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from perceiver_cli.config import TrainConfig
from perceiver_cli.data.loader import Batch
from perceiver_cli.model.encoding import Segment


@dataclass(frozen=True)
class MixedBatch:
    """A batch of pairs of mixed examples. share: weight of `labels`, 0..1; `other_labels` have the rest."""

    segments: Mapping[str, Segment]
    labels: Tensor
    other_labels: Tensor
    share: float


def mix(batch: Batch, mixup: float, cutmix: float, rng: np.random.Generator) -> MixedBatch:
    """Return a batch mixed with itself in reverse order: MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    `mixup` and `cutmix` are parameters of the Beta distribution of the share; 0 turns one off. If both are set, one is
    drawn for the batch. CutMix pastes a box along the first two axes of a grid.
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup))
    centers, side = (rng.random(), rng.random()), (1 - share) ** 0.5  # the box, in shares of each axis
    segments = {}
    for name, segment in batch.segments.items():
        values, other = segment.values, segment.values.flip(0)
        if cut:
            edges = [
                [round(length * min(1.0, max(0.0, center + half * side))) for half in (-0.5, 0.5)]
                for center, length in zip(centers, values.shape[1:-1], strict=False)
            ]
            box = (slice(None), *(slice(*pair) for pair in edges))
            values = values.clone()
            values[box] = other[box]
            share = 1 - values[box][0, ..., 0].numel() / values[0, ..., 0].numel()  # borders may cut the box
        else:
            values = share * values.float() + (1 - share) * other.float()
        segments[name] = Segment(values, segment.positions)
    return MixedBatch(segments, batch.labels, batch.labels.flip(0), share)


def mixed(
    batch: Batch, train: TrainConfig, seeds: Sequence[int]
) -> tuple[Mapping[str, Segment], list[tuple[Tensor, float]]]:
    """Return the inputs of a batch, mixed as the recipe says, and its labels, each with its weight in the loss.

    seeds: the seed of the run and the place in it, so that a resumed run mixes the same examples.
    """
    assert train.mixup != "auto", "settled with the plan"
    assert train.cutmix != "auto", "settled with the plan"
    if not (train.mixup or train.cutmix):
        return batch.segments, [(batch.labels, 1.0)]
    pairs = mix(batch, train.mixup, train.cutmix, np.random.default_rng(seeds))
    return pairs.segments, [(pairs.labels, pairs.share), (pairs.other_labels, 1 - pairs.share)]
