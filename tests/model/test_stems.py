"""Stems: shapes, cost, and what an input sees through one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perceiver_cli.config import ModelConfig
from perceiver_cli.errors import UsageError
from perceiver_cli.model.cost import estimate
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.stems import NeighbourStem, make_stem, nearest_points
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.points import PointsSpec

SMALL = ModelConfig.model_validate(
    {"num_latents": 4, "latent_channels": 16, "schedule": "c0 t0", "self_attends_per_block": 1, "num_self_heads": 2}
)


def layout_of(spec: ImageSpec | AudioSpec | PointsSpec) -> Layout:
    layout: Layout = modality(spec.modality).layout(spec)
    return layout


@pytest.mark.parametrize(
    ("spec", "grid"),
    [
        (ImageSpec(size=(28, 30), patch=(2, 4), stem="conv", stem_channels=8, bands=2), (14, 8)),
        (ImageSpec(size=(64, 64), patch=(16, 16), stem="conv", stem_channels=8, bands=2, color="grey"), (4, 4)),
        (
            AudioSpec(
                features="mel", rate_hz=8000, clip_s=0.5, num_mels=16, patch=(4, 8), bands=2,
                stem="conv", stem_channels=8,
            ),
            (12, 2),
        ),
        (
            PointsSpec(
                num_points=40, stem="neighbours", stem_points=10, stem_neighbours=5, stem_channels=8, bands=2
            ),
            (10,),
        ),
    ],
)  # fmt: skip
def test_a_stem_makes_the_grid_that_its_layout_says_at_the_cost_that_is_told(
    spec: ImageSpec | AudioSpec | PointsSpec, grid: tuple[int, ...]
) -> None:
    layout = layout_of(spec)
    assert layout.grid == grid
    model, cost = Perceiver(SMALL, {spec.modality: layout}, 3), estimate(SMALL, {spec.modality: layout}, 3)
    assert sum(p.numel() for p in model.parameters()) == cost.parameters
    values = torch.rand(2, *layout.prepared_shape)
    positions = None if layout.is_grid else torch.rand(2, *layout.prepared_shape[:-1], 3) * 2 - 1
    assert model({spec.modality: Segment(values, positions)}).shape == (2, 3)
    stem = make_stem(layout)
    assert stem is not None
    with FlopCounterMode(display=False) as counter:
        out = stem(values) if positions is None else stem(values, positions)
    assert tuple(out.shape) == (2, *grid, 8)
    without = estimate(SMALL, {"x": Layout(grid, 8, 3, 2, layout.max_resolution, layout.is_grid)}, 3)
    assert layout.is_grid is False or counter.get_total_flops() > 0
    if not layout.is_grid:
        assert counter.get_total_flops() == 2 * (cost.flops - without.flops)


def test_a_patch_that_convolutions_of_stride_2_cannot_make_is_refused() -> None:
    with pytest.raises(UsageError, match="the stem conv halves sides"):
        layout_of(ImageSpec(size=(30, 30), patch=(3, 3), stem="conv"))


def test_nearest_points_are_the_nearest_in_every_precision() -> None:
    points = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = torch.cdist(points[:, :7], points).topk(5, largest=False).indices.sort().values
    assert torch.equal(nearest_points(points[:, :7], points, 5)[1].sort().values, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_points(points[:, :7], points, 5)[1].sort().values, expected)


def test_what_a_point_sees_depends_on_its_neighbours_alone_and_not_on_place_or_size() -> None:
    spec = PointsSpec(num_points=30, stem="neighbours", stem_points=8, stem_neighbours=4, stem_channels=8)
    stem = make_stem(layout_of(spec))
    assert isinstance(stem, NeighbourStem)
    points = torch.rand(1, 30, 3, generator=torch.Generator().manual_seed(1))
    seen = stem(points.new_zeros(1, 30, 0), points)
    moved = stem(points.new_zeros(1, 30, 0), points * 0.5 - 0.3)
    assert torch.allclose(seen, moved, atol=1e-4)
    far = points.clone()
    far[:, 29] += 100  # the centres see it only if it is a neighbour
    untouched = [i for i in range(8) if 29 not in nearest_points(points[:, :8], points, 4)[1][0, i]]
    assert untouched
