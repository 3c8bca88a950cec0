"""LAMB against NumPy, schedules as formulas, the average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from perceiver_cli.config import TrainConfig
from perceiver_cli.training.optimizer import Average, Lamb, learning_rate, make_optimizer


def lamb_in_numpy(weights: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float) -> np.ndarray:
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for n, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        update = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-6) + decay * weights
        norms = np.linalg.norm(weights), np.linalg.norm(update)
        weights = weights - lr * (norms[0] / norms[1] if norms[0] > 0 and norms[1] > 0 else 1.0) * update
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_is_the_reference_step_by_step(decay: float) -> None:
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(4, 3)), np.zeros(5), rng.normal(size=7)]
    gradients = [[rng.normal(size=w.shape) for w in start] for _ in range(10)]
    parameters = [nn.Parameter(torch.tensor(w)) for w in start]
    optimizer = Lamb(parameters, lr=0.02, weight_decay=decay)
    for n in range(10):
        for parameter, gradient in zip(parameters, gradients[n], strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for i, parameter in enumerate(parameters):
            expected = lamb_in_numpy(start[i], [g[i] for g in gradients[: n + 1]], 0.02, decay)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_lamb_moves_each_tensor_by_lr_times_its_norm() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(6, 6) * scale) for scale in (1e-3, 1.0, 1e3)]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p) * 50
    Lamb(parameters, lr=0.01).step()
    for old, new in zip(before, parameters, strict=True):
        assert float((new.detach() - old).norm() / old.norm()) == pytest.approx(0.01, rel=1e-4)


def test_weight_decay_spares_biases_and_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    for name in ("adamw", "lamb"):
        decayed, spared = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.5)).param_groups  # type: ignore[arg-type]
        assert decayed["weight_decay"] == 0.5
        assert spared["weight_decay"] == 0
        assert [p.ndim for p in decayed["params"]] == [2]
        assert len(spared["params"]) == 3


def test_papers_step_schedule() -> None:
    config = TrainConfig(lr=0.004, schedule="step", decay_at=("84 epochs", "102 epochs", "114 epochs"))
    rates = [learning_rate(config, epoch * 10, 1200, 10) for epoch in (0, 83, 84, 101, 102, 113, 114, 119)]
    np.testing.assert_allclose(rates, [4e-3, 4e-3, 4e-4, 4e-4, 4e-5, 4e-5, 4e-6, 4e-6])


def test_warmup_and_cosine() -> None:
    config = TrainConfig(lr=1.0, schedule="cosine", warmup="10%")
    rates = [learning_rate(config, step, 100, 7) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_flat_then_cosine() -> None:
    config = TrainConfig(lr=1.0, schedule="cosine", flat="50%")
    assert [learning_rate(config, step, 100, 7) for step in (0, 25, 49, 50)] == [1.0] * 4
    assert learning_rate(config, 75, 100, 7) == pytest.approx(0.5)


def test_average_starts_at_the_model_and_follows_it() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = Average(model, 0.9)
    values = []
    for n in range(50):
        with torch.no_grad():
            model.weight.fill_(float(n))
        average.update_parameters(model)
        values.append(float(average.module.weight.detach()))
    assert values[0] == 0.0
    expected = 0.0
    for n in range(1, 50):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert values[-1] == pytest.approx(expected, rel=1e-5)


def test_the_average_waits_for_no_gpu() -> None:
    """On tensors without data: to read a number from them would be an error, as on a GPU it would be a wait."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    for _ in range(3):
        average.update_parameters(model)
    assert average.n_averaged == 3
