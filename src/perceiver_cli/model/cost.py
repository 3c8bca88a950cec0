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

MIN_TILED_INPUTS = 1024  # of a grid; below, its byte array is built, which is small then
TILE_KEY = 40  # about the width of a tile's keys, beside the values


MAX_PARAMETERS = 2_000_000_000  # of a model that is built here


@dataclass(frozen=True)
class Cost:
    """What one model costs. Bytes are about, in float32, for one example.

    parameters: count; flops: of a forward; activation_bytes: kept for the backward pass, or with `recompute` kept and
    made again; forward_bytes: at the peak of a forward alone.
    """

    parameters: int
    flops: int
    num_inputs: int
    input_channels: int
    activation_bytes: int
    recomputed_bytes: int
    forward_bytes: int

    def training_bytes(self, batch_size: int, *, averaged: bool, recompute: bool = False) -> int:
        """Return about what a training step takes: weights, gradients, two moments, an average, activations."""
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

    dense = 2 * d + _linear(d, d * widening) + _linear(d * widening, d)
    cross = 2 * d + 2 * c + _linear(d, w) + 2 * _linear(c, w) + _linear(w, d) + dense
    self_block = 2 * d + 4 * _linear(d, d) + dense
    encodings = sum(c - layout.num_channels for layout in layouts.values()) if len(layouts) > 1 else 0
    readout = d + 4 * d + 4 * _linear(d, d) + 2 * d + 2 * _linear(d, d) if config.head == "query" else 0
    parameters = (
        n * d
        + encodings
        + readout
        + sum(_front_parameters(layout) for layout in layouts.values())
        + config.num_cross_sets * cross
        + config.num_latent_sets * config.self_attends_per_block * self_block
        + _linear(d, num_classes)
    )

    dense_flops = 2 * n * 2 * d * d * widening
    cross_flops = 2 * (2 * n * d * w + 2 * m * c * w + 2 * n * m * w) + dense_flops
    num_cross = sum(kind == "c" for kind, _ in config.steps)
    num_self = (len(config.steps) - num_cross) * config.self_attends_per_block
    readout_flops = 2 * (2 * d * d + 2 * n * d * d + 2 * n * d) + 4 * d * d if config.head == "query" else 0
    flops = num_cross * cross_flops + latent_flops(config) + readout_flops + 2 * d * num_classes
    flops += sum(_front_flops(layout) for layout in layouts.values())

    # In numbers. Kept per block is what the backward reads: the arguments of norms, Q, K, V, attention output, the
    # argument of GELU; made again, the latents between latent Transformers, and one of these at a time.
    inputs = sum(_input_numbers(layout, c) for layout in layouts.values())
    cross_kept, self_kept = n * (3 * d + 4 * c + d * widening), n * d * (6 + widening)
    kept = inputs + num_cross * cross_kept
    rounds, blocks = len(config.steps) - num_cross, config.self_attends_per_block
    return Cost(
        parameters, flops, m, c,
        activation_bytes=4 * (kept + num_self * self_kept),
        recomputed_bytes=4 * (kept + rounds * n * d + min(1, rounds) * blocks * self_kept),
        forward_bytes=4 * (inputs + max(cross_kept, self_kept)),
    )  # fmt: skip


def _input_numbers(layout: Layout, c: int) -> int:
    """Return how many numbers stand for a modality's inputs: rows and their normalised form, or keys of tiles."""
    if layout.is_grid and not layout.learned_channels and layout.num_inputs >= MIN_TILED_INPUTS:
        return layout.num_inputs * min(2 * c, 3 * layout.channels + TILE_KEY)
    return 2 * layout.num_inputs * c


def _front_parameters(layout: Layout) -> int:
    """Parameters of learned positions and of the stem."""
    positions = layout.num_inputs * layout.learned_channels
    if layout.stem == "none":
        return positions
    if layout.stem == "linear":
        return positions + _linear(layout.channels, layout.stem_channels)
    return positions + 49 * layout.channels * layout.stem_channels + 2 * layout.stem_channels


def _front_flops(layout: Layout) -> int:
    if layout.stem == "none":
        return 0
    if layout.stem == "linear":
        return 2 * layout.num_inputs * layout.channels * layout.stem_channels
    height, width, _ = layout.prepared_shape
    return 2 * -(-height // 2) * -(-width // 2) * 49 * layout.channels * layout.stem_channels


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
