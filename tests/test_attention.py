"""The two forms of the cross-attend against the paper's formula, written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli.attention import CrossAttend, SelfAttend, normalise


def reference(block: CrossAttend, latents: Tensor, byte_array: Tensor) -> Tensor:
    """Return the cross-attend of App. C as it is written there: project, score, softmax, sum."""
    rows = block.input_norm(byte_array)
    query, key, value = block.query(block.latent_norm(latents)), block.key(rows), block.value(rows)
    parts = []
    for q, k, v in zip(*(x.chunk(block.heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = torch.einsum("bnc,bmc->bnm", q, k) / q.shape[-1] ** 0.5
        parts.append(scores.softmax(dim=-1) @ v)
    latents = latents + block.output(torch.cat(parts, dim=-1))
    dense = block.dense
    hidden = F.gelu(dense.widen(dense.norm(latents)), approximate="tanh")
    return latents + dense.project(hidden)


def random_block(channels: int, width: int, heads: int, seed: int) -> CrossAttend:
    generator = torch.Generator().manual_seed(seed)
    block = CrossAttend(24, channels, width, heads, 1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return block


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    inputs=st.integers(1, 70),
    channels=st.integers(2, 40),
    heads=st.sampled_from([1, 2, 4]),
    latents=st.integers(1, 9),
    folded=st.booleans(),
    offset=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_both_forms_are_the_papers_formula(
    inputs: int, channels: int, heads: int, latents: int, folded: bool, offset: float, seed: int
) -> None:
    torch.manual_seed(seed)
    block = random_block(channels, 8, heads, seed)
    block.folds = lambda num_latents: folded  # type: ignore[assignment,method-assign]
    query, byte_array = torch.randn(2, latents, 24), torch.randn(2, inputs, channels) + offset
    exact = copy.deepcopy(block).double()
    expected = reference(exact, query.double(), byte_array.double())
    found = block(query, *block.keys_values(normalise(byte_array), latents))
    scale = expected.abs().max()
    # LayerNorm of values at 100 loses three digits of float32 before attention begins.
    assert (found - expected).abs().max() / scale < (1e-5 if offset == 0 else 1e-3)

    target = torch.randn_like(expected)
    (expected * target).sum().backward()
    (found * target.float()).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert theirs.grad is not None
        if ours.grad is None:
            assert (name, folded) == ("key.bias", True)  # shifts all scores of a latent: no effect, no gradient
            assert theirs.grad.abs().max() < 1e-12 * largest
            continue
        error = (ours.grad - theirs.grad).abs().max()
        assert error <= (1e-5 if offset == 0 else 1e-3) * largest, name


@pytest.mark.parametrize(
    ("latents", "channels", "width", "heads", "folded"),
    [(512, 261, 261, 1, True), (64, 67, 67, 1, True), (512, 261, 128, 1, False), (512, 261, 256, 8, False)],
)
def test_the_cheaper_form_is_chosen(latents: int, channels: int, width: int, heads: int, folded: bool) -> None:
    assert CrossAttend(1024, channels, width, heads, 1).folds(latents) is folded


def test_self_attend_is_a_pre_norm_block() -> None:
    torch.manual_seed(0)
    block = SelfAttend(24, 4, 1).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    normalised = block.norm(x)
    parts = []
    for q, k, v in zip(*(f(normalised).chunk(4, dim=-1) for f in (block.query, block.key, block.value)), strict=True):
        parts.append((q @ k.mT / 6**0.5).softmax(dim=-1) @ v)
    after = x + block.output(torch.cat(parts, dim=-1))
    torch.testing.assert_close(block(x), after + block.dense(after))
