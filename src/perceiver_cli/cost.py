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


@dataclass(frozen=True)
class Cost:
    """parameters: count; flops: of one input's forward; training_bytes: about, for one step of `batch_size`."""

    parameters: int
    flops: int
    num_inputs: int
    input_channels: int
    activation_bytes: int  # per example, kept for the backward pass

    def training_bytes(self, batch_size: int, *, averaged: bool) -> int:
        """Return about what a training step takes: weights, gradients, two moments, an average, activations."""
        return 4 * self.parameters * (5 if averaged else 4) + batch_size * self.activation_bytes


def input_channels(config: ModelConfig, layouts: Mapping[str, Layout]) -> int:
    """Return C: the widest modality's channels, plus room for modality encodings when there are several."""
    widest = max(layout.num_channels for layout in layouts.values())
    return widest + (config.modality_channels if len(layouts) > 1 else 0)


def estimate(config: ModelConfig, layouts: Mapping[str, Layout], num_classes: int) -> Cost:
    """Return the cost of the model that `Perceiver(config, layouts, num_classes)` would build."""
    n, d, widening = config.num_latents, config.latent_channels, config.widening_factor
    c = input_channels(config, layouts)
    m = sum(layout.num_inputs for layout in layouts.values())
    w = min(c, d) if config.cross_channels == "min" else c

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
    self_flops = 2 * (4 * n * d * d + 2 * n * n * d) + dense_flops
    num_cross = sum(kind == "c" for kind, _ in config.steps)
    num_self = (len(config.steps) - num_cross) * config.self_attends_per_block
    readout_flops = 2 * (2 * d * d + 2 * n * d * d + 2 * n * d) + 4 * d * d if config.head == "query" else 0
    flops = num_cross * cross_flops + num_self * self_flops + readout_flops + 2 * d * num_classes
    flops += sum(_front_flops(layout) for layout in layouts.values())

    # Kept per example: the byte array and its normalised form; per block what the backward reads (norms, Q, K, V,
    # attention output, the two halves of the dense block).
    kept = 2 * m * c + num_cross * n * (6 * d + 4 * c + 2 * d * widening) + num_self * n * d * (8 + 2 * widening)
    return Cost(parameters, flops, m, c, 4 * kept)


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
