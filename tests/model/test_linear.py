"""Linear layers that make their argument again: the same results and gradients as written plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perceiver_cli.model import kernels
from perceiver_cli.model.kernels import product
from perceiver_cli.model.linear import linears


def parts(layers: int) -> tuple[Tensor, nn.LayerNorm, list[nn.Linear]]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    linear = [nn.Linear(6, 4, dtype=torch.float64) for _ in range(layers)]
    return torch.randn(2, 5, 6, dtype=torch.float64), norm, linear


def gradients(outs: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, ...]:
    # Different weights on every output, so that no two gradients can be mixed up.
    weights = [torch.arange(out.numel(), dtype=out.dtype).cos().view(out.shape) + i for i, out in enumerate(outs)]
    return torch.autograd.grad(sum((w * out).sum() for w, out in zip(weights, outs, strict=True)), wanted)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_those_of_the_layers_written_plainly(layers: int, recompute: bool) -> None:
    x, norm, linear = parts(layers)
    x.requires_grad_()
    wanted = [x, *norm.parameters(), *(p for layer in linear for p in layer.parameters())]
    plain = [layer(norm(x)) for layer in linear]
    ours = checkpoint(linears, x, norm, linear, use_reentrant=False) if recompute else linears(x, norm, linear)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(ours, wanted), gradients(plain, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_a_function_without_parameters() -> None:
    x, _, linear = parts(1)
    x.requires_grad_()
    wanted = [x, *linear[0].parameters()]
    found = gradients(linears(x, F.gelu, linear), wanted)
    for a, b in zip(found, gradients([linear[0](F.gelu(x))], wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["input", "norm", "weight", "layers"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    x, norm, linear = parts(2)
    x.requires_grad_()
    everything = {
        "input": [x],
        "norm": list(norm.parameters()),
        "weight": [linear[0].weight],
        "layers": [p for layer in linear for p in layer.parameters()],
    }
    for p in everything[frozen]:
        p.requires_grad_(False)
    wanted = [p for p in [x, *norm.parameters(), *everything["layers"]] if p.requires_grad]
    found = gradients(linears(x, norm, linear), wanted)
    for a, b in zip(found, gradients([layer(norm(x)) for layer in linear], wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_argument_is_kept() -> None:
    x, norm, linear = parts(3)
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        linears(x, norm, linear)
    known = {p.data_ptr() for p in [x, *norm.parameters(), *(p for layer in linear for p in layer.parameters())]}
    assert {t.data_ptr() for t in kept} <= known


def test_under_autocast_products_are_narrow_and_gradients_wide() -> None:
    x, norm, linear = parts(2)
    x, norm, linear = x.float().requires_grad_(), norm.float(), [layer.float() for layer in linear]
    with torch.autocast("cpu", torch.bfloat16):
        outs = linears(x, norm, linear)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    assert all(g.dtype == torch.float32 for g in gradients(outs, [x, linear[0].weight]))


@pytest.mark.parametrize(("rows", "columns", "width"), [(70, 300, 129), (512, 64, 64), (3, 5, 7)])
def test_products_in_any_layout(rows: int, columns: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, width, generator=generator) for size in (rows, columns))
    bias = torch.randn(columns, generator=generator)
    wide = a.double() @ b.double().mT
    for x in (a, a.T.contiguous().T):
        for y in (b, b.T.contiguous().T):
            torch.testing.assert_close(product(x, y, bias), (wide + bias).float(), atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(product(x, y), wide.float(), atol=1e-4, rtol=1e-5)
    same = a[:1].expand(rows, -1)
    torch.testing.assert_close(product(same, b), (same.double() @ b.double().mT).float(), atol=1e-4, rtol=1e-5)


def test_without_onednn_products_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: object) -> Tensor:
        raise RuntimeError("not here")

    a, b = torch.randn(256, 128), torch.randn(128, 128)
    monkeypatch.setattr(kernels, "_onednn", refuses)
    kernels._has_onednn.cache_clear()
    try:
        torch.testing.assert_close(product(a, b), a @ b.mT, rtol=0, atol=0)
    finally:
        kernels._has_onednn.cache_clear()
