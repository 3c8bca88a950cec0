"""The cost of a model in closed form: parameters, FLOPs, memory. No torch; no model is built.

Axes: M inputs, N latents, C input channels, D latent channels, W width of Q, K and V in the cross-attend.
As in the paper's tables, FLOPs are those of matrix products, a multiply-add counts as 2, and every cross-attend
projects K and V (the exact reformulation that runs here needs fewer FLOPs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from perceiver_cli.config import ModelConfig
from perceiver_cli.preprocess.base import Layout

MIN_TILED_INPUTS = 1024  # the byte array of a smaller grid is built
TILE_KEY = 40  # typical width of a tile's keys, without the values
CONV_STEM_LAYERS = 3
MAX_PARAMETERS = 2_000_000_000  # a larger model is refused


@dataclass(frozen=True)
class Cost:
    """The cost of one model; bytes are approximate, in float32, for one example.

    flops: one forward. activation_bytes: kept for the backward pass. recomputed_bytes: the same with `recompute`, with
    the recomputed activations. forward_bytes: the peak of a forward alone.
    """

    parameters: int
    flops: int
    num_inputs: int
    input_channels: int
    activation_bytes: int
    recomputed_bytes: int
    forward_bytes: int

    def training_bytes(self, batch_size: int, *, averaged: bool, recompute: bool = False) -> int:
        """Return the bytes of a training step: weights, gradients, two moments, the average if any, activations."""
        activations = self.recomputed_bytes if recompute else self.activation_bytes
        return 4 * self.parameters * (5 if averaged else 4) + batch_size * activations


def input_channels(layouts: Mapping[str, Layout], modality_channels: int) -> int:
    """Return C: the widest modality's channels, plus `modality_channels` if there are several modalities."""
    widest = max(layout.num_channels for layout in layouts.values())
    return widest + (modality_channels if len(layouts) > 1 else 0)


def cross_width(config: ModelConfig, input_channels: int) -> int:
    """Return the width of Q, K and V in the cross-attends: min(C, D) in the paper, C in the official code."""
    return min(input_channels, config.latent_channels) if config.cross_channels == "min" else input_channels


def latent_flops(config: ModelConfig) -> int:
    """Return the FLOPs of all latent Transformers in the forward of one example."""
    n, d = config.num_latents, config.latent_channels
    block = 2 * (4 * n * d * d + 2 * n * n * d) + 2 * n * 2 * d * d * config.widening_factor
    return sum(kind == "t" for kind, _ in config.steps) * config.self_attends_per_block * block


def estimate(config: ModelConfig, layouts: Mapping[str, Layout], num_classes: int) -> Cost:
    """Return the cost of `Perceiver(config, layouts, num_classes)` without building it."""
    n, d, widening = config.num_latents, config.latent_channels, config.widening_factor
    c = input_channels(layouts, config.modality_channels)
    m = sum(layout.num_inputs for layout in layouts.values())
    w = cross_width(config, c)
    num_cross = sum(kind == "c" for kind, _ in config.steps)
    rounds, blocks = len(config.steps) - num_cross, config.self_attends_per_block

    dense = 2 * d + _linear(d, d * widening) + _linear(d * widening, d)
    cross = 2 * d + 2 * c + _linear(d, w) + 2 * _linear(c, w) + _linear(w, d) + dense
    self_block = 2 * d + 4 * _linear(d, d) + dense
    encodings = sum(c - layout.num_channels for layout in layouts.values())  # 0 for one modality
    readout = d + 4 * d + 4 * _linear(d, d) + 2 * d + 2 * _linear(d, d) if config.head == "query" else 0
    fronts = [_front(layout) for layout in layouts.values()]
    parameters = n * d + encodings + sum(count for count, _ in fronts) + readout + _linear(d, num_classes)
    parameters += config.num_cross_sets * cross + config.num_latent_sets * blocks * self_block

    dense_flops = 2 * n * 2 * d * d * widening
    cross_flops = 2 * (2 * n * d * w + 2 * m * c * w + 2 * n * m * w) + dense_flops
    readout_flops = 2 * (2 * d * d + 2 * n * d * d + 2 * n * d) + 4 * d * d if config.head == "query" else 0
    flops = num_cross * cross_flops + latent_flops(config) + readout_flops + 2 * d * num_classes
    flops += sum(count for _, count in fronts)

    # Counts of numbers. For the backward pass a block keeps the inputs of norms and GELU, Q, K, V and the attention's
    # output. `recompute` keeps the latents between latent Transformers, and the activations of one of these at a time.
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
    """Return how many numbers hold a modality's inputs: rows and their normalised form, or keys of tiles."""
    if layout.is_grid and not layout.learned_channels and layout.num_inputs >= MIN_TILED_INPUTS:
        return layout.num_inputs * min(2 * c, 3 * layout.channels + TILE_KEY)
    return 2 * layout.num_inputs * c


def _front(layout: Layout) -> tuple[int, int]:
    """Return the parameters of learned positions and stem, and the stem's FLOPs."""
    positions = layout.num_inputs * layout.learned_channels
    weights = layout.channels * layout.stem_channels
    if layout.stem == "none":
        return positions, 0
    if layout.stem == "embed":
        return positions + layout.codes * layout.stem_channels, layout.num_inputs * weights
    if layout.stem == "linear":
        return positions + weights + layout.stem_channels, 2 * layout.num_inputs * weights
    if layout.stem == "neighbours":
        first, second = _linear(layout.dims + layout.channels, out := layout.stem_channels), _linear(out, out)
        places, (points, _) = layout.num_inputs, layout.prepared_shape
        search, offsets = places * points * layout.dims, places * layout.dims * out
        return positions + first + second, 2 * (points * (first - out) + search + offsets + places * (second - out))
    if layout.stem == "conv":
        count, flops, sides = positions, 0, layout.prepared_shape[:-1]
        for channels, out, kernel, stride in conv_stem_layers(layout):
            sides = tuple(-(-side // step) for side, step in zip(sides, stride, strict=True))
            count += prod(kernel) * channels * out + 2 * out
            flops += 2 * prod(sides) * prod(kernel) * channels * out
        return count, flops
    height, width, _ = layout.prepared_shape  # 7 x 7 convolution of stride 2, then batch norm
    return positions + 49 * weights + 2 * layout.stem_channels, 2 * -(-height // 2) * -(-width // 2) * 49 * weights


def conv_stem_layers(layout: Layout) -> list[tuple[int, int, tuple[int, int], tuple[int, int]]]:
    """Return (channels, output channels, kernel, stride) of each convolution of the stem "conv".

    The first ones halve a side until the stride of its patch is reached; the last takes what remains.
    """
    assert layout.stem_stride is not None
    left, channels, layers = list(layout.stem_stride), layout.channels, []
    for place in range(CONV_STEM_LAYERS):
        is_last = place == CONV_STEM_LAYERS - 1
        stride = tuple(side if is_last else min(2, side) for side in left)
        left = [side // step for side, step in zip(left, stride, strict=True)]
        out = layout.stem_channels if place else max(1, layout.stem_channels // 2)
        least = 1 if is_last and max(stride) == 1 else 3  # the last one mixes channels alone (Xiao et al. 2021)
        kernel = tuple(max(least, 2 * (step // 2) + 1) for step in stride)
        layers.append((channels, out, (kernel[0], kernel[1]), (stride[0], stride[1])))
        channels = out
    return layers


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
