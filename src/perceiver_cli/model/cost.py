"""What a model costs, in closed form: parameters, FLOPs, memory. No torch, nothing built.

Axes: M inputs, N latents, C input channels, D latent channels, W width of Q, K and V in the cross-attend.
FLOPs count multiply and add separately and matrix products only, as the paper's tables do, for the model as it is
published: K and V projected in every cross-attend (the exact reformulation that runs here needs fewer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from perceiver_cli.config import ModelConfig
from perceiver_cli.preprocess.base import Layout

MIN_TILED_INPUTS = 1024  # of a grid; below, its byte array is small and is built
TILE_KEY = 40  # about the width of a tile's keys, beside the values


MAX_PARAMETERS = 2_000_000_000  # of a model that is built here


@dataclass(frozen=True)
class Cost:
    """The cost of one model; bytes are approximate, in float32, for one example.

    flops: of a forward. activation_bytes: kept for the backward pass. recomputed_bytes: the same with `recompute`,
    those that are made again included. forward_bytes: at the peak of a forward alone.
    """

    parameters: int
    flops: int
    num_inputs: int
    input_channels: int
    activation_bytes: int
    recomputed_bytes: int
    forward_bytes: int

    def training_bytes(self, batch_size: int, *, averaged: bool, recompute: bool = False) -> int:
        """Return the memory of a training step: weights, gradients, two moments, an average, activations."""
        activations = self.recomputed_bytes if recompute else self.activation_bytes
        return 4 * self.parameters * (5 if averaged else 4) + batch_size * activations


def input_channels(config: ModelConfig, layouts: Mapping[str, Layout]) -> int:
    """Return C: the widest modality's channels, plus room for modality encodings when there are several."""
    widest = max(layout.num_channels for layout in layouts.values())
    return widest + (config.modality_channels if len(layouts) > 1 else 0)


def cross_width(config: ModelConfig, input_channels: int) -> int:
    """Return the width of Q, K and V in the cross-attends: min(C, D) by the paper, C in the official code."""
    return min(input_channels, config.latent_channels) if config.cross_channels == "min" else input_channels


def latent_flops(config: ModelConfig) -> int:
    """Return the FLOPs of all latent Transformers in one input's forward."""
    n, d = config.num_latents, config.latent_channels
    block = 2 * (4 * n * d * d + 2 * n * n * d) + 2 * n * 2 * d * d * config.widening_factor
    return sum(kind == "t" for kind, _ in config.steps) * config.self_attends_per_block * block


def estimate(config: ModelConfig, layouts: Mapping[str, Layout], num_classes: int) -> Cost:
    """Return the cost of the model that `Perceiver(config, layouts, num_classes)` would build."""
    n, d, widening = config.num_latents, config.latent_channels, config.widening_factor
    c = input_channels(config, layouts)
    m = sum(layout.num_inputs for layout in layouts.values())
    w = cross_width(config, c)

    num_cross = sum(kind == "c" for kind, _ in config.steps)
    rounds, blocks = len(config.steps) - num_cross, config.self_attends_per_block

    dense = 2 * d + _linear(d, d * widening) + _linear(d * widening, d)
    cross = 2 * d + 2 * c + _linear(d, w) + 2 * _linear(c, w) + _linear(w, d) + dense
    self_block = 2 * d + 4 * _linear(d, d) + dense
    encodings = sum(c - layout.num_channels for layout in layouts.values()) if len(layouts) > 1 else 0
    readout = d + 4 * d + 4 * _linear(d, d) + 2 * d + 2 * _linear(d, d) if config.head == "query" else 0
    fronts = [_front(layout) for layout in layouts.values()]
    parameters = n * d + encodings + sum(count for count, _ in fronts) + readout + _linear(d, num_classes)
    parameters += config.num_cross_sets * cross + config.num_latent_sets * blocks * self_block

    dense_flops = 2 * n * 2 * d * d * widening
    cross_flops = 2 * (2 * n * d * w + 2 * m * c * w + 2 * n * m * w) + dense_flops
    readout_flops = 2 * (2 * d * d + 2 * n * d * d + 2 * n * d) + 4 * d * d if config.head == "query" else 0
    flops = num_cross * cross_flops + latent_flops(config) + readout_flops + 2 * d * num_classes
    flops += sum(count for _, count in fronts)

    # In numbers. A block keeps for the backward pass the arguments of norms, Q, K, V, attention output, the argument of
    # GELU. With `recompute` the latents between latent Transformers are kept, and one Transformer at a time is whole.
    inputs = sum(_input_numbers(layout, c) for layout in layouts.values())
    cross_kept, self_kept = n * (3 * d + 4 * c + d * widening), n * d * (6 + widening)
    kept = inputs + num_cross * cross_kept
    return Cost(
        parameters, flops, m, c,
        activation_bytes=4 * (kept + rounds * blocks * self_kept),
        recomputed_bytes=4 * (kept + rounds * n * d + min(1, rounds) * blocks * self_kept),
        forward_bytes=4 * (inputs + max(cross_kept, self_kept)),
    )  # fmt: skip


def _input_numbers(layout: Layout, c: int) -> int:
    """Return the count of numbers that hold a modality's inputs: rows and their normalised form, or keys of tiles."""
    if layout.is_grid and not layout.learned_channels and layout.num_inputs >= MIN_TILED_INPUTS:
        return layout.num_inputs * min(2 * c, 3 * layout.channels + TILE_KEY)
    return 2 * layout.num_inputs * c


def _front(layout: Layout) -> tuple[int, int]:
    """Return the parameters of learned positions and of the stem, and the stem's FLOPs."""
    positions = layout.num_inputs * layout.learned_channels
    weights = layout.channels * layout.stem_channels
    if layout.stem == "none":
        return positions, 0
    if layout.stem == "linear":
        return positions + weights + layout.stem_channels, 2 * layout.num_inputs * weights
    height, width, _ = layout.prepared_shape  # 7 x 7 convolution of stride 2, scale and offset of the batch norm
    return positions + 49 * weights + 2 * layout.stem_channels, 2 * -(-height // 2) * -(-width // 2) * 49 * weights


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
