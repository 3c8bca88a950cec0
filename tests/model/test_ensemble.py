"""The mean of the probabilities of several models or views."""

from __future__ import annotations

import pytest
import torch

from perceiver_cli.model.ensemble import joined


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_sure_answers_is_finite(dtype: torch.dtype) -> None:
    """In float32 a mean of probabilities above 1 - 3e-8 was 1, and its logit infinite: no ensemble was that sure."""
    one, other = torch.tensor([[40.0, -90.0, 3.0]], dtype=dtype), torch.tensor([[50.0, -80.0, -1.0]], dtype=dtype)
    several = joined([one, other], multi_label=True)
    assert several.isfinite().all()
    assert several[0, 0] == pytest.approx(40.6931, abs=1e-4)  # misses are half as many as those of the less sure
    assert several[0, 1] == pytest.approx(-80.6931, abs=1e-4)
    mean = (one.double().sigmoid() + other.double().sigmoid()) / 2
    assert torch.allclose(several.double().sigmoid(), mean, atol=1e-7)


def test_one_label_an_example() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean = joined(list(logits), multi_label=False).softmax(dim=1)
    assert torch.allclose(mean, logits.softmax(dim=2).mean(dim=0), atol=1e-6)
    assert torch.equal(joined([logits[0]], multi_label=True), logits[0])
