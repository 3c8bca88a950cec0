"""flex_attention, PyTorch's public attention with a normaliser, in place of our CUDA kernels.

On a CPU it runs uncompiled, forward only. Axes: T tiles, n queries, m keys, w width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from perceiver_cli.model.kernels import Gradients, Kernel

LEAST_WIDTH = 16  # of queries and keys in Triton's products, which take powers of two
Attention = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # sums and log normaliser of q and keys = values


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention, dynamic=False)


def _call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Return what flex_attention returns, for any width: columns of zeros change no score."""
    wide = max(LEAST_WIDTH, 1 << (query.shape[-1] - 1).bit_length())
    call: Any = _compiled() if query.is_cuda else flex.flex_attention
    return call(*(F.pad(x, (0, wide - x.shape[-1])) for x in (query, key, value)), **options)


def with_normaliser(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums (T, n, w) of keys and the log of the normaliser (T, n) of q (T, n, w) and keys k (T, m, w)."""
    asked: dict[str, Any] = {"return_lse": True}  # until PyTorch 2.9
    if hasattr(flex, "AuxRequest"):
        asked = {"return_aux": flex.AuxRequest(lse=True)}
    out, more = _call(q.unsqueeze(1), k.unsqueeze(1), k.unsqueeze(1), scale=1.0, **asked)
    lse: Tensor = getattr(more, "lse", more)
    return out.squeeze(1)[..., : q.shape[-1]], lse.squeeze(1)


def flex_kernel(dtype: torch.dtype, attention: Attention = with_normaliser) -> Kernel:
    """Return a kernel for tiles that stays on PyTorch's public interface.

    A backward pass of its own normaliser is all that autograd has, so the forward pass runs again: gradients of its
    sums and of its normaliser are set so that together they are those of a softmax over more keys.
    """

    def forward(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        return attention(q, k)

    def backward(q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool) -> Gradients:
        with torch.enable_grad():
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_(need_keys)
            out, own = attention(q, k)
        share = (own.detach() - lse).exp()  # of all weights, those of these keys
        grad_out = (grad * share.unsqueeze(-1)).to(out.dtype)
        grad_own = (grad_out.float() * out.detach().float()).sum(dim=-1) - share * delta
        grads = torch.autograd.grad((out, own), [q, k] if need_keys else [q], (grad_out, grad_own.to(own.dtype)))
        return grads[0], grads[1] if need_keys else None

    return Kernel("flex_attention", dtype, forward, backward)
