"""Matrix products, and softmax attention that also returns its normaliser: all calls below PyTorch's public interface.

Axes: T tiles, n queries, m keys, w width. In every kernel values = keys and the scale is 1. The last column of keys is
ones, that of queries and gradients zeros: a kernel may write a number there that it subtracts from each score of the
row. The last column of its sums is the sum of weights.

`product` and `choose` try each candidate once on a small problem and fall back to plain PyTorch where it is missing,
fails or is wrong, so that a change inside PyTorch costs speed and never correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli.malloc import check_room

aten = torch.ops.aten

ONEDNN_FROM = 1 << 20  # multiply-adds per thread; for a smaller product, the call costs more than it saves
FAR = 16.0  # sigmoid(x) is exp(x) to float32's precision for x <= -FAR
SPAN = 59.0  # a sum of exp(-SPAN) is right to 1e-6 without 2^20 numbers that are too small for a float32
NEVER = -1e30  # the score of a masked input: finite, so that a tile of masked inputs has no NaN
SCORE_BYTES = 4 << 20  # limit of a block of scores in the plain kernels, which should stay in a core's cache
TESTED_WIDTH = 37  # of keys: two sides of 16, three colours, rate and mean
Gradients = tuple[Tensor, Tensor | None]  # of q, and of k if needed


@dataclass(frozen=True)
class Kernel:
    """forward(q, k, shift): sums (T, n, w) of exp(score - level) times key, and level (T, n); q (T, n, w), k (T, m, w).

    A `shift` (T, n), at least FAR above every score and at most SPAN above the log of the whole normaliser, becomes the
    level; with None, that is the log of the tile's normaliser. Only a kernel that shifts(multiply-adds of a tile's
    scores) uses it.

    backward(q, k, grad, lse, delta, need_keys): gradients of q and, if needed, of k, except their last columns.
    `lse` is the log of the normaliser of a softmax over more keys than these. `delta` (T, n), the sum over all keys of
    weight times grad . k less the gradient of lse, is subtracted from every grad . k before that is weighted.

    Both may write into the last columns of q and grad.
    """

    name: str
    dtype: torch.dtype
    forward: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Gradients]
    shifts: Callable[[int], bool] = lambda multiply_adds: False

    @property
    def tolerance(self) -> float:
        """The error up to which `self_test` passes."""
        return 1e-4 if self.dtype == torch.float32 else 3e-2


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias (n, m) of a (n, k) and b (m, k) in any layout, bias (m) contiguous, without a gradient.

    PyTorch leaves float32 products on a CPU to MKL, which reaches half the speed of AMD's cores (512 x 1024 x 1024 on
    two of Zen 5: 5.7 ms). oneDNN, which PyTorch brings too, reaches all of it (2.6 ms).
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and _pays(len(a) * b.numel()) and _has_onednn():
        return _onednn(_dense(a), _dense(b), bias)
    return F.linear(a, b, bias)


def exponentials(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(a b^T) (n, m) of a (n, k) and b (m, k) if no element of a b^T is above -FAR; needs oneDNN."""
    # oneDNN can end a product with a sigmoid, not with an exp; far below zero they are equal. It takes 3 ms, a separate
    # pass over the scores 10 ms (224 x 224 inputs, 512 queries).
    return _onednn(a, b, then="sigmoid")


def _pays(multiply_adds: int) -> bool:
    return multiply_adds >= ONEDNN_FROM * torch.get_num_threads()


def _dense(x: Tensor) -> Tensor:
    """Return x with contiguous rows or columns: oneDNN is a thousand times slower on other layouts."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, then, [], "")
    return out


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Return whether oneDNN's product exists and is right in every layout."""
    check_room()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 45, generator=generator) for rows in (70, 37))
    bias = torch.randn(37, generator=generator)
    by_columns = (a.T.contiguous().T, b.T.contiguous().T)
    layouts = [(a, b), by_columns, (a[:1].expand(70, -1), b), (a[:, :1].expand(-1, 45), b)]
    with torch.no_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        try:
            return all(torch.allclose(_onednn(x, y, bias), F.linear(x, y, bias), atol=1e-4) for x, y in layouts)
        except (RuntimeError, AttributeError, TypeError):  # not in this version, or not for this processor
            return False


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Return slices of the tiles whose scores fit in SCORE_BYTES."""
    size = max(1, SCORE_BYTES // (q.shape[1] * k.shape[1] * q.element_size()))
    return [slice(first, first + size) for first in range(0, len(q), size)]


def _plain_forward(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for tiles in _blocks(q, k):
        scores = q[tiles] @ k[tiles].mT
        lse[tiles] = scores.logsumexp(-1)
        out[tiles] = scores.sub_(lse[tiles].unsqueeze(-1)).exp_() @ k[tiles]
    return out, lse


def _plain_backward(q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool) -> Gradients:
    q[..., -1], grad[..., -1] = -lse, -delta
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k) if need_keys else None
    for tiles in _blocks(q, k):
        weights = (q[tiles] @ k[tiles].mT).exp_()
        slopes = (grad[tiles] @ k[tiles].mT).mul_(weights)
        torch.bmm(slopes, k[tiles], out=grad_q[tiles])
        if grad_k is not None:
            grad_k[tiles] = torch.baddbmm(weights.mT @ grad[tiles], slopes.mT, q[tiles])
    return grad_q, grad_k


PLAIN = Kernel("plain", torch.float32, _plain_forward, _plain_backward)


def _flash_cpu_forward(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k = q.unsqueeze(1), k.unsqueeze(1)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, False, scale=1.0)
    return out.squeeze(1), lse.squeeze(1)


# The CPU's flash backward always makes gradients of keys and values: the plain one, without them, is faster.
FLASH_CPU = Kernel("flash for CPU", torch.float32, _flash_cpu_forward, _plain_backward)


def _onednn_forward(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax without its maximum, for scores below a known shift: exp ends the product that makes them."""
    if shift is None:
        return _flash_cpu_forward(q, k, None)
    q[..., -1] = -shift
    each = zip(q.unbind(), k.unbind(), k.mT.unbind(), strict=True)
    return torch.stack([_onednn(exponentials(a, b), c) for a, b, c in each]), shift


def _onednn_backward(q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool) -> Gradients:
    """The normaliser is known: a score minus it and minus FAR is at most -FAR."""
    if not _pays(prod(q.shape[1:]) * k.shape[1]):
        return _plain_backward(q, k, grad, lse, delta, need_keys)
    q[..., -1], grad[..., -1] = -FAR - lse, -delta
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k) if need_keys else None
    for tile, keys in enumerate(k):
        weights = exponentials(q[tile], keys)
        slopes = _onednn(grad[tile], keys).mul_(weights)
        grad_q[tile] = _onednn(slopes, keys.mT)
        if grad_k is not None:
            # A large, transposed first matrix triples oneDNN's time.
            grad_k[tile] = (_onednn(grad[tile].mT, weights.mT) + _onednn(q[tile].mT, slopes.mT)).mT
    unshift = exp(FAR)
    return grad_q.mul_(unshift), None if grad_k is None else grad_k.mul_(unshift)


ONEDNN = Kernel("oneDNN", torch.float32, _onednn_forward, _onednn_backward, shifts=_pays)


def _pad(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % multiple))


def _for_stock_backward(q: Tensor, k: Tensor, grad: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    """Return q, k, grad and out (T, 1, n or m, padded width): a stock backward then subtracts `delta` from grad . k.

    By itself it subtracts rowsum(grad * out), as if the tile were the whole softmax. An out of zeros leaves this to the
    last column.
    """
    grad[..., -1] = -delta
    q, k, grad = (_pad(x, 8).unsqueeze(1) for x in (q, k, grad))
    return q, k, grad, torch.zeros_like(grad)


def _flash_forward(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k = (_pad(x, 8).unsqueeze(1) for x in (q, k))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, k, 0.0, False, False, scale=1.0)
    return out.squeeze(1)[..., :width], lse.squeeze(1)


def _flash_backward(q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool) -> Gradients:
    width, queries, keys = q.shape[-1], q.shape[1], k.shape[1]
    q, k, grad, out = _for_stock_backward(q, k, grad, delta)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, k, out, lse.unsqueeze(1).contiguous(),
        None, None, queries, keys, 0.0, False, random, torch.empty(0, device=q.device), scale=1.0,
    )  # fmt: skip
    return grad_q.squeeze(1)[..., :width], (grad_k + grad_v).squeeze(1)[..., :width] if need_keys else None


def _efficient_forward(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k = (_pad(x, 8).unsqueeze(1) for x in (q, k))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, k, None, True, 0.0, False, scale=1.0)
    return out.squeeze(1)[..., :width], lse.squeeze(1)[..., : q.shape[2]]  # its rows are padded


def _efficient_backward(q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool) -> Gradients:
    width = q.shape[-1]
    q, k, grad, out = _for_stock_backward(q, k, grad, delta)
    padded = _pad(lse, 32).unsqueeze(1).contiguous()
    random = torch.zeros((), dtype=torch.long)
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, k, None, out, padded, random, random, 0.0, [True, True, True, False], False, scale=1.0
    )
    return grad_q.squeeze(1)[..., :width], (grad_k + grad_v).squeeze(1)[..., :width] if need_keys else None


def self_test(kernel: Kernel, device: torch.device, width: int = TESTED_WIDTH) -> float:
    """Return the largest error of a kernel beside the plain one, as a share of the largest number; NaN is an error too.

    Runs it forward and backward on problems of odd sizes, small and large, with keys of `width` columns. Raises the
    kernel's own error.
    """
    sizes = [(3, 45, 70), (2, 400, 150 * torch.get_num_threads() if device.type == "cpu" else 150)]
    with torch.no_grad(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        errors = [
            (a.float() - b).abs().max() / b.abs().max()
            for size in sizes
            for a, b in zip(*(_both_ways(each, *size, width, device) for each in (kernel, PLAIN)), strict=True)
        ]
    return float(torch.stack(errors).max())


def _is_right(kernel: Kernel, device: torch.device, width: int = TESTED_WIDTH) -> bool:
    try:
        return self_test(kernel, device, width) <= kernel.tolerance
    except (RuntimeError, AttributeError, TypeError, ValueError):  # not in this version, or not for this device
        return False


def _both_ways(kernel: Kernel, tiles: int, queries: int, keys: int, width: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 * (TESTED_WIDTH / width) ** 0.25  # scores of one size, whatever the width
    q, k, grad = (torch.randn(tiles, rows, width, generator=generator) * scale for rows in (queries, keys, queries))
    delta = torch.randn(tiles, queries, generator=generator).to(device)
    k[..., -1], q[..., -1], grad[..., -1] = 1, 0, 0
    q[..., 0], k[..., 0] = 1, 0
    k[:, 1, 0] = torch.finfo(torch.float16).min / 2 if kernel.dtype == torch.float16 else NEVER
    shift = (q @ k.mT).amax(dim=-1).add_(FAR).to(device) if kernel.shifts(queries * k[0].numel()) else None
    q, k, grad = (x.to(device, kernel.dtype) for x in (q, k, grad))
    sums, level = kernel.forward(q, k, shift)
    total = sums[..., -1].float()
    lse = total.log() + level
    # A softmax over more keys than these has a larger normaliser.
    grad_q, grad_k = kernel.backward(q, k, grad, lse + 0.5, delta, True)
    assert grad_k is not None
    return [sums[..., :-1] / total.unsqueeze(-1), lse, grad_q[..., :-1], grad_k[..., :-1]]


def candidates(device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    """Return the kernels for a device, the fastest first; half precision only where `dtype` (of autocast) is half."""
    if device.type == "cpu":
        return [ONEDNN, FLASH_CPU]
    if device.type != "cuda":
        return []
    half = dtype in (torch.float16, torch.bfloat16)
    flash = [Kernel("flash", dtype, _flash_forward, _flash_backward)] if half else []
    dtypes = [dtype, torch.float32] if half else [torch.float32]
    return [*flash, *(Kernel("memory-efficient", each, _efficient_forward, _efficient_backward) for each in dtypes)]


@lru_cache(maxsize=32)
def choose(device: torch.device, dtype: torch.dtype, width: int = TESTED_WIDTH) -> Kernel:
    """Return the fastest kernel that is right on `device` for keys of `width` columns; flash takes 256 at most."""
    check_room()
    return next((kernel for kernel in candidates(device, dtype) if _is_right(kernel, device, width)), PLAIN)
