"""The three forms of the cross-attend against the paper's formula, written out in float64 on the whole byte array."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import FORMS, Case, errors, random_block, random_segment
from perceiver_cli.model import attention, kernels, tiles
from perceiver_cli.model.attention import CrossAttend, Memory, SelfAttend
from perceiver_cli.model.encoding import ByteArrayEncoding, ModalityInputs, Segment
from perceiver_cli.preprocess.base import Layout


def check(
    block: CrossAttend, latents: Tensor, encoding: ByteArrayEncoding, segments: dict[str, Segment], tolerance: float
) -> None:
    """Compare outputs, and the gradients of every parameter, with float64 on the byte array."""
    for name, error in errors(block, latents, encoding, segments).items():
        assert error <= tolerance, name


@pytest.mark.parametrize("seed", range(80))
def test_every_form_is_the_papers_formula(seed: int) -> None:
    rng = random.Random(seed)
    case = Case.draw(rng)
    slab_bytes = rng.choice([1, 1 << 25])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.SLAB_BYTES, "cpu", slab_bytes)
        patch.setattr(tiles, "STATISTICS_BYTES", slab_bytes)
        patch.setattr(tiles, "ROW_TILE", 16)
        patch.setattr(kernels, "ONEDNN_FROM", rng.choice([1, 1 << 30]))
        patch.setattr(attention, "WEIGHT_BYTES", rng.choice([0, 64 << 20]))
        for name, error in case.errors().items():
            assert error <= 1e-5, (name, case)


@pytest.mark.parametrize("stem", ["linear", "conv-same"])
def test_a_learned_stem_gets_its_gradient_through_tiles(stem: str) -> None:
    torch.manual_seed(0)
    layout = Layout((9, 17), 3, 2, 4, (9.0, 17.0), stem=stem, stem_channels=5, values_grid=(36, 68))
    if stem == "linear":
        layout = replace(layout, values_grid=None)
    encoding = ByteArrayEncoding({"image": layout}, 4)
    if stem != "linear":
        encoding.eval()
    block = random_block(encoding.num_channels, 8, 2, "tiled")
    check(block, torch.randn(2, 5, 24), encoding, {"image": Segment(torch.randn(2, *layout.prepared_shape))}, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_modality_masked_as_a_whole_is_a_modality_left_out(form: str) -> None:
    torch.manual_seed(0)
    encoding = ByteArrayEncoding(
        {"a": Layout((6, 5), 2, 2, 3, (6.0, 5.0)), "b": Layout((40,), 1, 1, 3, (40.0,)),
         "c": Layout((7,), 1, 3, 2, (4.0,) * 3, is_grid=False)}, 4
    )  # fmt: skip
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter)
    segments = {name: random_segment(layout, 2, False, 0.0, 1.0) for name, layout in encoding.layouts.items()}
    block = random_block(encoding.num_channels, 8, 2, form)
    latents = torch.randn(2, 5, 24)
    for name in segments:
        masked = {**segments, name: replace(segments[name], mask=torch.zeros(2, 1, dtype=torch.bool))}
        rest = {other: segment for other, segment in segments.items() if other != name}
        with_mask, without = (block(latents, Memory(encoding.inputs(s).values())) for s in (masked, rest))
        torch.testing.assert_close(with_mask, without, rtol=0, atol=2e-6)
        assert (without - block(latents, Memory(encoding.inputs(segments).values()))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("latents", "channels", "width", "heads", "tiled_width", "form"),
    [
        (512, 261, 261, 1, 36, "tiled"),
        (512, 261, 261, 8, 36, "tiled"),  # 8 heads of 36 against all heads of 261
        (512, 261, 261, 1, 261, "folded"),
        (64, 67, 67, 1, 67, "folded"),
        (512, 261, 128, 1, 261, "projected"),
        (512, 261, 256, 8, 261, "projected"),
    ],
)
def test_the_cheapest_form_is_chosen(
    latents: int, channels: int, width: int, heads: int, tiled_width: float, form: str
) -> None:
    with torch.device("meta"):
        assert CrossAttend(1024, channels, width, heads, 1).form(latents, tiled_width) == form


def test_width_of_tiles() -> None:
    image = ModalityInputs(torch.empty(1, 224, 224, 3, device="meta"), (torch.empty(224, 258), torch.empty(224, 258)))
    assert Memory([image]).tiled_width() == 16 + 16 + 3 + 2
    assert Memory([ModalityInputs(torch.empty(1, 50_176, 261, device="meta"))]).tiled_width() == 261
    small = ModalityInputs(torch.empty(1, 8, 8, 3, device="meta"), (torch.empty(8, 258), torch.empty(8, 258)))
    assert Memory([small]).tiled_width() == 261


def test_nothing_of_the_size_of_the_scores_or_of_the_byte_array_is_kept() -> None:
    """What autograd keeps of a tiled cross-attend grows with the values, not with N M or M C."""
    layout = Layout((64, 64), 3, 2, 64, (64.0, 64.0))
    block = random_block(layout.num_channels, 8, 1, "tiled")
    memory = Memory(
        list(ByteArrayEncoding({"image": layout}, 4).inputs({"image": Segment(torch.randn(1, 64, 64, 3))}).values())
    )
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(torch.randn(1, 300, 24), memory)
    assert max(kept.values()) < 4096 * 261 * 4 / 2
    assert max(kept.values()) < 4096 * 300 * 4 / 2
    assert "rows" not in vars(memory)


# ---------------------------------------------------------------- kernels


def stock_backward(
    q: Tensor, k: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, need_keys: bool
) -> tuple[Tensor, Tensor | None]:
    """The way the CUDA kernels are called, through the CPU's stock backward."""
    width = q.shape[-1]
    q, k, grad, out = kernels._for_stock_backward(q, k, grad, delta)
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, k, out, lse.unsqueeze(1), 0.0, False, scale=1.0
    )
    return grad_q.squeeze(1)[..., :width], (grad_k + grad_v).squeeze(1)[..., :width] if need_keys else None


def test_a_stock_backward_takes_delta_from_the_last_column() -> None:
    kernel = kernels.Kernel("stock", torch.float32, kernels._flash_cpu_forward, stock_backward)
    assert kernels._is_right(kernel, torch.device("cpu"))


def test_a_kernel_that_is_missing_or_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        sums, level = kernels._plain_forward(q, k, shift)
        return sums, level * 1.01

    def missing(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        raise AttributeError("no such operator")

    def chosen() -> kernels.Kernel:
        kernels.choose.cache_clear()
        return kernels.choose(torch.device("cpu"), torch.float32)

    assert chosen() is kernels.ONEDNN
    for forward in (wrong, missing):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "ONEDNN", replace(kernels.ONEDNN, forward=forward))
            assert chosen() is kernels.FLASH_CPU
            patch.setattr(kernels, "FLASH_CPU", replace(kernels.FLASH_CPU, forward=forward))
            assert chosen() is kernels.PLAIN
    kernels.choose.cache_clear()


def test_a_kernel_that_refuses_wide_keys_is_not_chosen_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Video patches of 2 x 8 x 8 make keys of 411 columns; flash on CUDA takes 256."""

    def narrow(q: Tensor, k: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        if q.shape[-1] > 256:
            raise RuntimeError("head dimension at most 256")
        return kernels._plain_forward(q, k, shift)

    refusing = replace(kernels.PLAIN, name="narrow", forward=narrow)
    monkeypatch.setattr(kernels, "candidates", lambda *_: [refusing, kernels.FLASH_CPU])
    kernels.choose.cache_clear()
    cpu = torch.device("cpu")
    assert kernels.choose(cpu, torch.float32) is refusing
    assert kernels.choose(cpu, torch.float32, 411) is kernels.FLASH_CPU
    kernels.choose.cache_clear()

    monkeypatch.setattr(kernels, "choose", lambda *asked: asked)
    video = ModalityInputs(torch.randn(1, 9, 8, 16, 384), (torch.randn(9, 9), torch.randn(8, 9), torch.randn(16, 9)))
    cuda = torch.device("cuda")
    assert Memory([video]).kernel(cuda, torch.bfloat16) == (cuda, torch.bfloat16, 384 + 3 + 5 + 8 + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_kernels_fit_the_operators_that_they_call(dtype: torch.dtype) -> None:
    """Arguments and shapes, on tensors without data; whether numbers are right needs a GPU."""
    q, k, grad = (torch.empty(3, rows, 37, dtype=dtype, device="meta") for rows in (45, 70, 45))
    delta = torch.empty(3, 45, device="meta")
    for kernel in kernels.candidates(torch.device("cuda"), dtype):
        sums, level = kernel.forward(q, k, None)
        assert (sums.shape, level.shape, level.dtype) == (q.shape, delta.shape, torch.float32)
        grad_q, grad_k = kernel.backward(q, k, grad, level, delta, True)
        assert grad_k is not None
        assert (grad_q.shape, grad_k.shape) == (q.shape, k.shape)


@pytest.mark.parametrize(("size", "shifted"), [(0.1, True), (0.4, True), (30.0, False)])
def test_the_maximum_is_left_out_only_where_scores_are_small(size: float, shifted: bool) -> None:
    """Of a masked grid, so that whole tiles are masked, and large enough for oneDNN."""
    torch.manual_seed(0)
    layout = Layout((48, 48), 3, 2, 8, (48.0, 48.0))
    encoding = ByteArrayEncoding({"image": layout}, 4)
    mask = torch.zeros(1, 48, 48, dtype=torch.bool)
    mask[:, :20, :16] = True
    (inputs,) = encoding.inputs({"image": Segment(torch.randn(1, 48, 48, 3), None, mask.flatten(1))}).values()
    grid = tiles.GridTiles(inputs)
    u = size * torch.randn(1, 40, encoding.num_channels)
    shared, along = grid.queries(u)
    shift = grid.shift(shared, along)
    rows = F.layer_norm(inputs.rows().double(), (encoding.num_channels,), eps=attention.EPS)
    scores = (u.double() @ rows.mT).masked_fill(~mask.flatten(1)[:, None], -torch.inf)
    assert (shift is not None) == shifted
    if shift is not None:
        assert (shift.unsqueeze(-1) - scores).min() >= kernels.FAR - 1e-3
        assert (shift - scores.logsumexp(dim=-1)).max() <= kernels.SPAN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ONEDNN_FROM", 1)
        mean, normaliser = grid.average(u, kernels.ONEDNN)
    torch.testing.assert_close(normaliser.double(), scores.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)
    expected = scores.softmax(dim=-1) @ rows
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_has_a_fused_kernel_that_is_right(dtype: torch.dtype) -> None:
    name = kernels.choose(torch.device("cuda"), dtype).name
    assert name == ("memory-efficient" if dtype == torch.float32 else "flash")


# ---------------------------------------------------------------- self-attention


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


@pytest.mark.parametrize("size", [0.3, 30.0])
@pytest.mark.parametrize(("latents", "heads"), [(1, 1), (7, 4), (70, 2)])
def test_heads_by_products_are_fused_attention(
    monkeypatch: pytest.MonkeyPatch, size: float, latents: int, heads: int
) -> None:
    """Outputs and gradients against float64, with scores that their lengths bound well enough and with larger ones."""
    torch.manual_seed(0)
    block = SelfAttend(24, heads, 1)
    with torch.no_grad():
        block.query.weight *= size
    exact = copy.deepcopy(block).double()
    x = torch.randn(3, latents, 24)
    called = []
    level = attention._level
    monkeypatch.setattr(attention, "_level", lambda q, k: called.append(level(q, k)) or called[-1])
    monkeypatch.setattr(kernels, "ONEDNN_FROM", 1)
    found, expected = block(x), exact(x.double())
    assert len(called) == 1
    target = torch.randn_like(x)
    (found * target).sum().backward()
    (expected * target.double()).sum().backward()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None)
    for ours, theirs in zip(block.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("weight_bytes", [0, 64 << 20])
def test_half_precision_on_a_cpu_is_near_the_whole(monkeypatch: pytest.MonkeyPatch, weight_bytes: int) -> None:
    """Products take the place of PyTorch's fused attention, whose backward pass is slow there."""
    monkeypatch.setattr(attention, "WEIGHT_BYTES", weight_bytes)
    torch.manual_seed(0)
    block, grads = SelfAttend(32, 4, 1), []
    latents = torch.randn(3, 16, 32, requires_grad=True)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = block(latents)
        grads.append(torch.autograd.grad(out.float().square().sum(), [latents, *block.parameters()]))
    for whole, half_ in zip(*grads, strict=True):
        assert (whole - half_).norm() <= 0.03 * whole.norm() + 0.05  # that of a key bias is 0


def test_a_slab_has_no_more_tiles_than_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.SLAB_BYTES, "cpu", 256 << 20)
    with torch.device("meta"):
        tables = torch.empty(512, 8), torch.empty(1024, 8)
        grid = tiles.GridTiles(ModalityInputs(torch.empty(40, 512, 1024, 3), tables))
    slabs = list(grid.slabs(torch.empty(40, 8, 5)))
    sizes = [len(range(40)[examples]) * (last - first) * grid.counts[1] for examples, first, last in slabs]
    assert sum(sizes) == 40 * 32 * 64
    assert 2048 < max(sizes) <= tiles.MOST_TILES


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_a_level_is_above_every_score_and_near_the_normaliser(size: float) -> None:
    torch.manual_seed(0)
    q, k = size * torch.randn(3, 50, 16), torch.randn(3, 80, 16)
    scores = q.double() @ k.double().mT
    level = attention._level(q, k)
    assert (level.unsqueeze(-1) - scores).min() >= kernels.FAR - 1e-4
    assert (level - scores.logsumexp(dim=-1)).max() <= kernels.SPAN
