"""The optimisers, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from perceiver_cli.config import TrainConfig, duration_steps


class Lamb(Optimizer):
    """LAMB (You et al., ICLR 2020): Adam's direction, decayed, then rescaled per tensor by ||weights|| / ||update||.

    As in the official Perceiver code the trust ratio is computed after weight decay and is 1 where either norm is 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.004,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "LAMB here takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients, states = [p.grad for p in parameters], [self.state[p] for p in parameters]
            for p, state in zip(parameters, states, strict=True):
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
            first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
            counts = [float(state["step"]) for state in states]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
            updates = torch._foreach_div(first, [1 - beta1**n for n in counts])
            denominators = torch._foreach_div(second, [1 - beta2**n for n in counts])
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_div_(updates, denominators)
            if group["weight_decay"]:
                torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            norms = zip(torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
            ratios = [torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)) for w, u in norms]
            torch._foreach_mul_(updates, ratios)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return a model's optimiser. Biases and LayerNorms have no weight decay, as in the official code."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.optimizer == "lamb":
        return Lamb(groups, config.lr, config.betas, config.eps)
    return AdamW(groups, config.lr, config.betas, config.eps, fused=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimiser step `step` (from 0): warm-up, then the schedule of the configuration."""
    warmup = duration_steps(config.warmup, total_steps, steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        start = warmup + duration_steps(config.flat, total_steps, steps_per_epoch)
        progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
        return config.lr * 0.5 * (1 + cos(pi * progress))
    if config.schedule == "step":
        passed = sum(step >= duration_steps(at, total_steps, steps_per_epoch) for at in config.decay_at)
        return config.lr * config.decay_factor**passed
    return config.lr


class Average(AveragedModel):
    """An exponential moving average of a model's weights, whose decay rises from 0.1 to `decay`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Add the weights of a step. The parent's method copies the count to the GPU and back, and waits for it."""
        n = float(self.n_averaged)
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if n:
            torch._foreach_lerp_(mine, theirs, 1 - min(self.decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(mine, theirs)
        for buffer, new in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(new)
        self.n_averaged += 1
