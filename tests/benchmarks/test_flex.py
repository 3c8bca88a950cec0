"""The contender by flex_attention: its mathematics, which a CPU can check, and the call that it makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.flex import flex_kernel, with_normaliser
from perceiver_cli.model import kernels

CPU = torch.device("cpu")


def written_out(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return scores.softmax(dim=-1) @ k, scores.logsumexp(dim=-1)


def test_gradients_of_sums_and_normaliser_are_those_of_a_softmax_over_more_keys() -> None:
    kernel = flex_kernel(torch.float32, written_out)
    assert kernels.self_test(kernel, CPU) <= kernel.tolerance


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("width", [5, 37])
def test_flex_attention_gives_the_normaliser(width: int) -> None:
    q, k = torch.randn(3, 20, width), torch.randn(3, 30, width)
    with torch.no_grad():
        for ours, theirs in zip(with_normaliser(q, k), written_out(q, k), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
