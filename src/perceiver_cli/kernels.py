"""Matrix products, and softmax attention that also gives its normaliser: all calls below PyTorch's public interface.

Axes: T tiles, n queries, m keys, w width. In every kernel of tiles values = keys and the scale is 1.

`product` and `choose` try each candidate once on a small problem and fall back to plain PyTorch where it is missing,
refuses, or is wrong, so that a change inside PyTorch costs speed and never an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

ONEDNN_FROM = 1 << 21  # multiply-adds of a product; below, the call costs more than it saves
SCORE_BYTES = 4 << 20  # of one block of scores in the plain kernels: it should stay in a core's cache


@dataclass(frozen=True)
class Kernel:
    """forward(q, k): out (T, n, w) and lse (T, n) of q (T, n, w), k (T, m, w).

    backward(q, k, grad, lse, delta, need_keys): gradients of q and, where needed, of k. `lse` is that of a softmax over
    more keys than these; `delta` (T, n) is what is taken from every grad . k before it is weighted: the sum over all
    keys of weight times grad . k, less the gradient of lse itself.
    """

    name: str
    dtype: torch.dtype
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


# ---------------------------------------------------------------- products


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias (n, m) of a (n, k) and b (m, k) in any layout, bias (m) contiguous; it has no gradient.

    PyTorch leaves float32 products on a CPU to MKL, which on AMD's does half of what the cores can (512 x 1024 x 1024
    on two of Zen 5: 5.7 ms); oneDNN, which PyTorch brings as well, does all of it (2.6 ms).
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and len(a) * b.numel() >= ONEDNN_FROM and _has_onednn():
        return _onednn(_dense(a), _dense(b), bias)
    return F.linear(a, b, bias)


def _dense(x: Tensor) -> Tensor:
    """Return a matrix whose rows or columns follow each other: oneDNN is a thousand times slower on others."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return found


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Return whether oneDNN's product is there and right, in both layouts."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 45, generator=generator) for rows in (70, 37))
    bias = torch.randn(37, generator=generator)
    layouts = [
        (a, b),
        (a.T.contiguous().T, b.T.contiguous().T),
        (a[:1].expand(70, -1), b),
        (a[:, :1].expand(-1, 45), b),
    ]
    with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        try:
            return all(torch.allclose(_onednn(x, y, bias), F.linear(x, y, bias), atol=1e-4) for x, y in layouts)
        except (RuntimeError, AttributeError, TypeError):  # not in this version, or not for this processor
            return False


# ---------------------------------------------------------------- plain


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Return slices of the tiles whose scores fit in SCORE_BYTES."""
    size = max(1, SCORE_BYTES // (q.shape[1] * k.shape[1] * q.element_size()))
    return [slice(first, first + size) for first in range(0, len(q), size)]


def _plain_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for tiles in _blocks(q, k):
        scores = q[tiles] @ k[tiles].mT
        lse[tiles] = scores.logsumexp(-1)
        out[tiles] = scores.sub_(lse[tiles].unsqueeze(-1)).exp_() @ k[tiles]
    return out, lse


def _plain_backward(
    q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool
) -> tuple[Tensor, Tensor | None]:
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k) if need_keys else None
    lse, delta = lse.unsqueeze(-1), delta.unsqueeze(-1)
    for tiles in _blocks(q, k):
        transposed = k[tiles].mT
        weights = torch.baddbmm(lse[tiles], q[tiles], transposed, beta=-1).exp_()
        slopes = torch.baddbmm(delta[tiles], grad[tiles], transposed, beta=-1).mul_(weights)
        torch.bmm(slopes, k[tiles], out=grad_q[tiles])
        if grad_k is not None:
            grad_k[tiles] = torch.baddbmm(weights.mT @ grad[tiles], slopes.mT, q[tiles])
    return grad_q, grad_k


PLAIN = Kernel("plain", torch.float32, _plain_forward, _plain_backward)


# ---------------------------------------------------------------- CPU


def _cpu_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q, k = q.unsqueeze(1), k.unsqueeze(1)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, False, scale=1.0)
    return out.squeeze(1), lse.squeeze(1)


# The flash backward of the CPU makes gradients of keys and values that are thrown away: the plain one is faster.
CPU = Kernel("flash for CPU", torch.float32, _cpu_forward, _plain_backward)


# ---------------------------------------------------------------- CUDA


def _with_delta(q: Tensor, k: Tensor, grad: Tensor, delta: Tensor, multiple: int) -> tuple[Tensor, ...]:
    """Return q, k, grad and out, so that a stock backward takes `delta` from the scores' gradients.

    It computes rowsum(grad * out) for that, over what it thinks is the whole softmax. One more column does it: zero
    in q and k, one in grad, delta in an out that is zero elsewhere. Further zero columns make the width a multiple.
    """
    width = q.shape[-1]
    spare = (-(width + 1)) % multiple
    q, k = (F.pad(x, (0, 1 + spare)) for x in (q, k))
    grad = F.pad(F.pad(grad, (0, 1), value=1.0), (0, spare))
    out = torch.zeros_like(grad)
    out[..., width] = delta
    return q, k, grad, out


def _pad(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % multiple))


def _flash_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k = (_pad(x, 8).unsqueeze(1) for x in (q, k))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, k, 0.0, False, False, scale=1.0)
    return out.squeeze(1)[..., :width], lse.squeeze(1)


def _flash_backward(
    q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool
) -> tuple[Tensor, Tensor | None]:
    width, queries, keys = q.shape[-1], q.shape[1], k.shape[1]
    q, k, grad, out = (x.unsqueeze(1) for x in _with_delta(q, k, grad, delta, 8))
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    none = torch.empty(0, device=q.device)
    grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, k, out, lse.unsqueeze(1).contiguous(),
        none, none, queries, keys, 0.0, False, random, none, scale=1.0,
    )  # fmt: skip
    return grad_q.squeeze(1)[..., :width], (grad_k + grad_v).squeeze(1)[..., :width] if need_keys else None


def _efficient_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k = (_pad(x, 8).unsqueeze(1) for x in (q, k))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, k, None, True, 0.0, False, scale=1.0)
    return out.squeeze(1)[..., :width], lse.squeeze(1)[..., : q.shape[2]]  # its rows are padded


def _efficient_backward(
    q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool
) -> tuple[Tensor, Tensor | None]:
    width = q.shape[-1]
    q, k, grad, out = (x.unsqueeze(1) for x in _with_delta(q, k, grad, delta, 8))
    padded = _pad(lse, 32).unsqueeze(1).contiguous()
    random = torch.zeros((), dtype=torch.long)
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, k, None, out, padded, random, random, 0.0, [True, True, True, False], False, scale=1.0
    )
    return grad_q.squeeze(1)[..., :width], (grad_k + grad_v).squeeze(1)[..., :width] if need_keys else None


# ---------------------------------------------------------------- choice


def _is_right(kernel: Kernel, device: torch.device) -> bool:
    """Return whether a kernel gives what the plain one gives, both ways, on a problem of odd sizes."""
    generator = torch.Generator().manual_seed(0)
    q, k, grad = (torch.randn(3, rows, 37, generator=generator).to(device) * 0.5 for rows in (45, 70, 45))
    delta = torch.randn(3, 45, generator=generator).to(device)
    tolerance = 1e-4 if kernel.dtype == torch.float32 else 3e-2
    try:
        found = _both_ways(kernel, q, k, grad, delta)
    except (RuntimeError, AttributeError, TypeError, ValueError):  # not in this version, or not for this device
        return False
    return all(
        float((a.float() - b).abs().max()) <= tolerance * float(b.abs().max())
        for a, b in zip(found, _both_ways(PLAIN, q, k, grad, delta), strict=True)
    )


def _both_ways(kernel: Kernel, q: Tensor, k: Tensor, grad: Tensor, delta: Tensor) -> list[Tensor]:
    q, k, grad = (x.to(kernel.dtype) for x in (q, k, grad))
    out, lse = kernel.forward(q, k)
    # A softmax over more keys than these has a larger normaliser.
    grad_q, grad_k = kernel.backward(q, k, grad, lse + 0.5, delta, True)
    assert grad_k is not None
    return [out, lse, grad_q, grad_k]


@lru_cache(maxsize=32)
def choose(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the fastest kernel that is right on `device`; half precision only where `dtype` (of autocast) is half."""
    candidates = []
    if device.type == "cpu":
        candidates = [CPU]
    elif device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        candidates = [Kernel("flash", dtype, _flash_forward, _flash_backward)]
    if device.type == "cuda":
        candidates += [Kernel("memory-efficient", torch.float32, _efficient_forward, _efficient_backward)]
    with torch.no_grad(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return next((kernel for kernel in candidates if _is_right(kernel, device)), PLAIN)
