"""Random cross-attends, and their errors beside the paper's formula in float64 on the CPU: for tests and for GPUs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_cli.model.attention import CrossAttend, Memory
from perceiver_cli.model.encoding import ByteArrayEncoding, Segment
from perceiver_cli.preprocess.base import Layout

FORMS = ("tiled", "folded", "projected")
MOST_SIDE = {1: 150, 2: 37, 3: 11}  # of a random grid, by the number of axes
LATENT_CHANNELS = 24
CPU = torch.device("cpu")


def reference(block: CrossAttend, latents: Tensor, byte_array: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the cross-attend of App. C as it is written there: project, score, softmax, sum."""
    rows = block.input_norm(byte_array)
    query, key, value = block.query(block.latent_norm(latents)), block.key(rows), block.value(rows)
    heads = []
    for q, k, v in zip(*(x.chunk(block.heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = torch.einsum("bnc,bmc->bnm", q, k) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v)
    latents = latents + block.output(torch.cat(heads, dim=-1))
    dense = block.dense
    hidden = F.gelu(dense.widen(dense.norm(latents)), approximate="tanh")
    out: Tensor = latents + dense.project(hidden)
    return out


def random_block(channels: int, width: int, heads: int, form: str) -> CrossAttend:
    """Return a cross-attend with random weights that always takes `form`."""
    block = CrossAttend(LATENT_CHANNELS, channels, width, heads, 1)
    block.form = lambda *sizes: form  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def random_segment(layout: Layout, batch: int, masked: bool, offset: float, spread: float) -> Segment:
    """Return a random batch of one modality, of which each example has at least one input."""
    values = offset + spread * torch.randn(batch, *layout.prepared_shape)
    positions = None if layout.is_grid else torch.rand(batch, layout.num_inputs, layout.dims) * 2 - 1
    mask = torch.rand(batch, layout.num_inputs) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    return Segment(values, positions, mask)


def errors(
    block: CrossAttend, latents: Tensor, encoding: ByteArrayEncoding, segments: Mapping[str, Segment],
    device: torch.device = CPU,
) -> dict[str, float]:  # fmt: skip
    """Return the largest error of the output and of each gradient on `device`, as shares of the largest number.

    The right numbers are made on the CPU in float64 from the whole byte array. Everything passed here is on the CPU.
    """
    exact, ours = copy.deepcopy(block).double(), copy.deepcopy(block).to(device)
    theirs_encoding, our_encoding = copy.deepcopy(encoding), copy.deepcopy(encoding).to(device)
    # Features are float32 in the model: positions are part of its definition, so both sides get the same ones.
    by_name = {
        name: replace(inputs, values=inputs.values.double(), tables=tuple(table.double() for table in inputs.tables))
        for name, inputs in theirs_encoding.inputs(segments).items()
    }
    rows = [inputs.rows() for inputs in by_name.values()]
    masks = [
        torch.ones(x.shape[:2], dtype=torch.bool) if inputs.mask is None else inputs.mask
        for x, inputs in zip(rows, by_name.values(), strict=True)
    ]
    expected = reference(exact, latents.double(), torch.cat(rows, dim=1), torch.cat(masks, dim=1))
    on_device = {name: segment.to(device) for name, segment in segments.items()}
    result = ours(latents.to(device), Memory(our_encoding.inputs(on_device).values()))
    worst = {"output": float((result.cpu() - expected).detach().abs().max() / expected.detach().abs().max())}
    target = torch.randn_like(expected)
    (expected * target).sum().backward()  # type: ignore[no-untyped-call]
    (result * target.float().to(device)).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None)
    for (name, mine), theirs in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert theirs.grad is not None, name
        if mine.grad is None:
            assert name == "key.bias", name  # shifts all scores of a latent: no effect, no gradient
            assert theirs.grad.abs().max() < 1e-12 * largest
            continue
        worst[name] = float((mine.grad.cpu() - theirs.grad).abs().max()) / largest
    for (name, mine), theirs in zip(our_encoding.named_parameters(), theirs_encoding.parameters(), strict=True):
        if theirs.grad is not None:
            assert mine.grad is not None, name
            scale = max(float(theirs.grad.abs().max()), largest)
            worst[name] = float((mine.grad.cpu() - theirs.grad).abs().max()) / scale
    return worst


def random_layout(rng: Random) -> Layout:
    """Return a grid of one to three axes with odd sides, or a point set."""
    dims = rng.randint(1, 3)
    grid = tuple(rng.randint(1, MOST_SIDE[dims]) for _ in range(dims))
    channels, bands = rng.randint(1, 5), rng.randint(1, 6)
    resolution = tuple(float(max(2, side)) for side in grid)
    if rng.randint(0, 4) == 0:
        return Layout((grid[0],), channels, dims, bands, resolution, is_grid=False)
    return Layout(grid, channels, dims, bands, resolution)


@dataclass(frozen=True)
class Case:
    """A random cross-attend: one to three modalities, masks, heads, latents, values far from zero or all alike."""

    layouts: tuple[Layout, ...]
    form: str
    batch: int
    heads: int
    latents: int
    same_latents: bool
    masked: bool
    offset: float
    spread: float
    seed: int

    @staticmethod
    def draw(rng: Random) -> Case:
        """Return a case that depends on nothing but `rng`."""
        return Case(
            layouts=tuple(random_layout(rng) for _ in range(rng.randint(1, 3))),
            form=rng.choice(("tiled", *FORMS)),
            batch=rng.randint(1, 3),
            heads=rng.choice((1, 2, 4, 8)),
            latents=rng.randint(1, 9),
            same_latents=rng.choice((False, True)),
            masked=rng.choice((False, True)),
            offset=rng.choice((0.0, 0.0, 1e4)),
            spread=rng.choice((1.0, 0.0, 1e3)),
            seed=rng.randint(0, 1000),
        )

    def errors(self, device: torch.device = CPU) -> dict[str, float]:
        """Return the errors of this case on `device`, as `errors` does."""
        torch.manual_seed(self.seed)
        encoding = ByteArrayEncoding({str(i): layout for i, layout in enumerate(self.layouts)}, 4)
        with torch.no_grad():
            for parameter in encoding.parameters():
                parameter.normal_()
        segments = {
            str(i): random_segment(layout, self.batch, self.masked and layout.num_inputs > 1, self.offset, self.spread)
            for i, layout in enumerate(self.layouts)
        }
        block = random_block(encoding.num_channels, 8, self.heads, self.form)
        query = torch.randn(1 if self.same_latents else self.batch, self.latents, LATENT_CHANNELS)
        return errors(block, query, encoding, segments, device)
