"""Linear layers after a cheap function (LayerNorm, GELU), which keep its input for backward, not its output.

PyTorch saves both. Here backward runs the cheap function again: less than 1 % of a training step, a third less memory.

Axes: R rows, C input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_cli.model.kernels import product


def unchanged(x: Tensor) -> Tensor:
    """Identity, for inputs that are already saved for backward."""
    return x


def linears(x: Tensor, cheap: Callable[[Tensor], Tensor], layers: Sequence[nn.Linear]) -> list[Tensor]:
    """Return layer(cheap(x)) for each layer; x is (..., C), every layer has a bias.

    cheap: a function of rows; if it is a module, its parameters get gradients.
    Autocast and torch.compile save tensors by themselves, so with them the layers run as usual.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        y = cheap(x)
        return [layer(y) for layer in layers]
    if not torch.is_grad_enabled():
        y = cheap(x.flatten(0, -2))
        return [product(y, layer.weight, layer.bias).view(*x.shape[:-1], -1) for layer in layers]
    own = list(cheap.parameters()) if isinstance(cheap, nn.Module) else []
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    outs = _Linears.apply(cheap, len(own), x.flatten(0, -2), *own, *parameters)  # type: ignore[no-untyped-call]
    return [out.view(*x.shape[:-1], -1) for out in outs]


class _Linears(torch.autograd.Function):
    """`linears` of rows (R, C); parameters: `count` of `cheap`, then weight and bias of each layer."""

    @staticmethod
    def forward(ctx: Any, cheap: Callable[[Tensor], Tensor], count: int, x: Tensor, *parameters: Tensor) -> Any:
        ctx.cheap, ctx.count = cheap, count
        ctx.save_for_backward(x, *parameters)
        y = cheap(x)
        return tuple(product(y, weight, bias) for weight, bias in _pairs(parameters[count:]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needs_cheap, needs_layers = ctx.needs_input_grad[2 : 3 + ctx.count], ctx.needs_input_grad[3 + ctx.count :]
        with torch.enable_grad():
            x = x.detach().requires_grad_(needs_cheap[0])
            y = ctx.cheap(x)
        rows = y.detach()
        layer_grads = [
            (product(grad.mT, rows.mT) if needs_weight else None, grad.sum(dim=0) if needs_bias else None)
            for grad, (needs_weight, needs_bias) in zip(grads, _pairs(needs_layers), strict=True)
        ]
        cheap_grads: list[Tensor | None] = [None] * len(needs_cheap)
        if any(needs_cheap):
            first, *others = zip(grads, parameters[ctx.count :: 2], strict=True)
            grad_y = product(first[0], first[1].mT)
            for grad, weight in others:
                grad_y += product(grad, weight.mT)
            inputs = [p for p, needed in zip([x, *parameters[: ctx.count]], needs_cheap, strict=True) if needed]
            gradients = iter(torch.autograd.grad(y, inputs, grad_y))
            cheap_grads = [next(gradients) if needed else None for needed in needs_cheap]
        return None, None, *cheap_grads, *(gradient for pair in layer_grads for gradient in pair)


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
