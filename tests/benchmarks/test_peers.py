"""A second opinion: perceiver-pytorch (lucidrains) with our weights gives our latents and our logits.

Where the two are the same function, and how the rest is made so:

| piece | perceiver-pytorch 0.11 | ours | here |
|---|---|---|---|
| Q, K, V | no bias; K and V in one matrix | biases | ours are zero; `to_kv` is both, K first |
| width of the cross-attend | heads x dim_head | the input's channels C | heads x dim_head = C |
| norms | of latents and of the input, before every attention | the same | copied |
| dense block | GEGLU, 4 times wide: a * gelu(b) | gelu(b) | a is 1 (no weight, bias 1), ours 4 times wide, erf |
| order of features | per axis [sin, cos, position] | [positions, sines, cosines] | ours are put in their order |
| bands | linspace(1, max_freq / 2) for every axis | linspace(1, mu / 2) per axis | mu = max_freq |
| sharing | tied: layer 1 alone, then one layer, its latent Transformer too, N times | a schedule | c0 t0 (c1 t1)xN |
| latents | normal, std 1 | std 0.02 | copied |
| before the head | mean, then LayerNorm | mean | their LayerNorm is left out |
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from perceiver_cli.config import ModelConfig
from perceiver_cli.model.attention import CrossAttend, Dense, Memory, SelfAttend
from perceiver_cli.model.encoding import ModalityInputs, Segment, fourier_features, grid_positions
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess.base import Layout

peer = pytest.importorskip(
    "perceiver_pytorch.perceiver_pytorch", reason="perceiver-pytorch is not installed: no second opinion"
)

TOLERANCE = 1e-5
BANDS, MAX_FREQ, GRID = 4, 10.0, (6, 5)
CHANNELS = 3 + 2 * (2 * BANDS + 1)  # 21


def their_order(values: int) -> Tensor:
    """Return the columns of our byte array in the order in which theirs come (two axes, after `values` channels)."""
    columns = list(range(values))
    for axis in range(2):
        sines = [values + 2 + axis * BANDS + band for band in range(BANDS)]
        columns += [*sines, *(column + 2 * BANDS for column in sines), values + axis]
    return torch.tensor(columns)


def fill(module: nn.Module, seed: int) -> None:
    """Give every parameter a random value: weights by fan-in, scales about 1; nothing stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


@torch.no_grad()
def attention_from(theirs: nn.Module, ours: CrossAttend | SelfAttend, order: Tensor | None = None) -> None:
    """Copy their PreNorm(Attention) into our block's attention; `order` puts our input's columns in theirs."""
    attention = theirs.fn
    norm = ours.latent_norm if isinstance(ours, CrossAttend) else ours.norm
    norm.load_state_dict(theirs.norm.state_dict())
    key, value = attention.to_kv.weight.chunk(2)
    if isinstance(ours, CrossAttend):
        assert order is not None
        back = order.argsort()
        ours.input_norm.weight.copy_(theirs.norm_context.weight[back])
        ours.input_norm.bias.copy_(theirs.norm_context.bias[back])
        key, value = key[:, back], value[:, back]
    ours.query.weight.copy_(attention.to_q.weight)
    ours.key.weight.copy_(key)
    ours.value.weight.copy_(value)
    for linear in (ours.query, ours.key, ours.value):
        linear.bias.zero_()
    ours.output.load_state_dict(attention.to_out.state_dict())


@torch.no_grad()
def dense_from(theirs: nn.Module, ours: Dense) -> None:
    """Make their PreNorm(FeedForward) a plain GELU block, by a GEGLU factor of 1, and copy it into ours."""
    widen, _, project, _ = theirs.fn.net
    half = widen.out_features // 2
    widen.weight[:half] = 0.0
    widen.bias[:half] = 1.0
    ours.norm.load_state_dict(theirs.norm.state_dict())
    ours.widen.weight.copy_(widen.weight[half:])
    ours.widen.bias.copy_(widen.bias[half:])
    ours.project.load_state_dict(project.state_dict())


def test_fourier_features_are_theirs_in_another_order() -> None:
    positions = grid_positions((7, 9))
    theirs = peer.fourier_encode(positions.double(), MAX_FREQ, BANDS).flatten(1)
    ours = fourier_features(positions, BANDS, (MAX_FREQ, MAX_FREQ))
    torch.testing.assert_close(ours[:, their_order(0)].double(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("form", ["tiled", "folded", "projected"])
def test_the_cross_attend_is_theirs(heads: int, form: str) -> None:
    """Attention, residual and dense block on random rows, in each of our forms."""
    block = peer.PerceiverBlock(
        dim=32, context_dim=CHANNELS, cross_heads=heads, cross_dim_head=CHANNELS // heads, self_per_cross_attn=0
    )
    fill(block, 1)
    ours = CrossAttend(32, CHANNELS, CHANNELS, heads, 4, "erf")
    attention_from(block.cross_attn, ours, torch.arange(CHANNELS))
    dense_from(block.cross_ff, ours.dense)
    ours.form = lambda *sizes: form  # type: ignore[method-assign]
    torch.manual_seed(0)
    latents, rows = torch.randn(2, 8, 32), 2 * torch.randn(2, 40, CHANNELS) + 1
    ours_out = ours(latents, Memory([ModalityInputs(rows)]))
    torch.testing.assert_close(ours_out, block(latents, context=rows), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("tied", "schedule"), [(True, "c0 t0 (c1 t1)x2"), (False, "c0 t0 c1 t1 c2 t2")])
@pytest.mark.parametrize("cross_heads", [1, 3])
def test_the_whole_model_is_theirs(tied: bool, schedule: str, cross_heads: int) -> None:
    theirs = peer.Perceiver(
        num_freq_bands=BANDS, depth=3, max_freq=MAX_FREQ, num_latents=8, latent_dim=32, cross_heads=cross_heads,
        cross_dim_head=CHANNELS // cross_heads, latent_heads=4, latent_dim_head=8, num_classes=5,
        weight_tie_layers=tied, self_per_cross_attn=2,
    ).eval()  # fmt: skip
    fill(theirs, 2)
    config = ModelConfig(
        num_latents=8, latent_channels=32, schedule=schedule, self_attends_per_block=2, num_self_heads=4,
        num_cross_heads=cross_heads, cross_channels="input", widening_factor=4, gelu="erf",
    )  # fmt: skip
    ours = Perceiver(config, {"image": Layout(GRID, 3, 2, BANDS, (MAX_FREQ, MAX_FREQ))}, 5).eval()
    assert len({id(layer) for layer in theirs.layers}) == config.num_cross_sets == config.num_latent_sets
    order = their_order(3)
    for (_, index), layer in zip(config.steps[::2], theirs.layers, strict=True):
        cross, blocks = ours.cross_attends[index], ours.latent_transformers[index]
        assert isinstance(cross, CrossAttend)
        assert isinstance(blocks, nn.Sequential)
        attention_from(layer.cross_attn, cross, order)
        dense_from(layer.cross_ff, cross.dense)
        for block, (attention, dense) in zip(blocks, layer.self_attns, strict=True):
            assert isinstance(block, SelfAttend)
            attention_from(attention, block)
            dense_from(dense, block.dense)
    theirs.to_logits[1] = nn.Identity()
    with torch.no_grad():
        ours.latents.copy_(theirs.latents)
        ours.head.load_state_dict(theirs.to_logits[2].state_dict())
        image = torch.randn(2, *GRID, 3, generator=torch.Generator().manual_seed(0))
        segments = {"image": Segment(image)}
        latents, logits = theirs(image, return_embeddings=True), theirs(image)
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        scale = float(latents.abs().max())
        torch.testing.assert_close(ours.encode(segments) / scale, latents / scale, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours(segments), logits, rtol=0, atol=TOLERANCE)
