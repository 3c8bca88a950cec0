"""The Perceiver beside small networks that know the grid, on any data, at equal compute.

python -m benchmarks.rivals DATA --seconds 60 --seeds 3

Each rival reads the same files, varied alike, with the same optimiser, schedule, averaging and budget: a CNN for
pictures, the same on the log-mel spectrogram for sound, a PointNet for clouds, a 3-D CNN for films.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks import learning
from benchmarks.command import Seconds, Seeds, Steps, report, start
from benchmarks.learning import Budget, Contender, perceiver
from perceiver_cli.cli.options import Changes, Device, Json, Precision, Preset, recipe_of
from perceiver_cli.errors import UsageError
from perceiver_cli.model.encoding import Segment
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.training.plan import Plan
from perceiver_cli.training.trainer import Trainer

WIDTHS = (32, 64, 128, 256)  # channels of the stages of a CNN; each halves the sides
SMALLEST_SIDE = 4  # of a stage's grid
# By modality: the changes with which a rival gets single pixels, bins and points.
PLAIN: Mapping[str, Mapping[str, Any]] = {
    "image": {"patch": (1, 1), "stem": "none"},
    "audio": {"patch": (1, 1), "stem": "none"},
    "points": {"stem": "none"},
    "video": {"patch": (1, 1, 1)},
}


class GridNet(nn.Module):
    """A CNN over a grid of 2 or 3 axes: two convolutions a stage, batch norm, ReLU, and the mean over the last grid."""

    def __init__(self, name: str, layout: Layout, classes: int) -> None:
        super().__init__()
        self.name = name
        self.mean, self.std = (nn.Buffer(torch.tensor(x)) for x in (layout.mean, layout.std))
        film = len(layout.grid) == 3
        convolution, norm = (nn.Conv3d, nn.BatchNorm3d) if film else (nn.Conv2d, nn.BatchNorm2d)
        layers: list[nn.Module] = []
        channels, sides = layout.channels, layout.grid
        for width in WIDTHS:
            halves = min(sides) >= 2 * SMALLEST_SIDE
            for place in range(2):
                stride = 2 if halves and place == 0 else 1
                layers += [convolution(channels, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(inplace=True)]
                channels = width
            sides = tuple(-(-side // 2) for side in sides) if halves else sides
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(channels, classes)

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return logits (B, classes)."""
        values = (segments[self.name].values.float() - self.mean) / self.std
        logits: Tensor = self.head(self.layers(values.movedim(-1, 1)).flatten(2).mean(dim=2))
        return logits


class PointNet(nn.Module):
    """PointNet without its transforms (Qi et al. 2017): layers on each point, the largest of each channel, layers."""

    def __init__(self, name: str, layout: Layout, classes: int) -> None:
        super().__init__()
        self.name = name
        layers: list[nn.Module] = []
        channels = layout.dims + layout.channels
        for width in (64, 128, 256):
            layers += [nn.Conv1d(channels, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            channels = width
        self.each = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(channels, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes))

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return logits (B, classes)."""
        segment = segments[self.name]
        assert segment.positions is not None
        rows = torch.cat([segment.positions, segment.values.float()], dim=-1)
        logits: Tensor = self.head(self.each(rows.mT).amax(dim=2))
        return logits


def contenders(plan: Plan, seed: int) -> list[Contender]:
    """Return the plan's Perceiver and the rival of its modality. Raises UsageError for several modalities."""
    if len(plan.config.inputs) != 1:
        raise UsageError(f"{'+'.join(plan.config.inputs)}: rivals read one modality", "pass --preset")
    (name,) = plan.config.inputs
    kind = PointNet if name == "points" else GridNet
    title = {"image": "CNN", "audio": "log-mel CNN", "points": "PointNet", "video": "3-D CNN"}[name]

    def rival(layouts: Mapping[str, Layout], classes: int) -> nn.Module:
        return kind(name, layouts[name], classes)

    return [Contender("Perceiver", perceiver(plan, seed), {}), Contender(title, rival, {name: PLAIN[name]})]


def rows(plan: Plan, budget: Budget, seeds: int, split: str) -> Iterator[dict[str, Any]]:
    """Return a row for each contender and seed, then the means."""
    return learning.rows(lambda seed: [(plan, own) for own in contenders(plan, seed)], budget, seeds, split)


def main(
    data: Annotated[str, typer.Argument(help="Labelled data, as for `perceiver train`.")],
    preset: Preset = None,
    changes: Changes = None,
    seconds: Seconds = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    split: Annotated[str, typer.Option(help="Split to score: val to choose by, test once.")] = "val",
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Train the recipe's Perceiver and its rival at equal compute and score both."""
    budget = Budget.of(seconds, steps)
    overrides = [*(changes or []), f"train.device={device}", f"train.precision={precision}"]
    plan = Trainer(data, None, recipe_of(preset, None), overrides=overrides).plan
    if split not in plan.catalog.splits:
        raise UsageError(f"no {split} split in {data}", f"there are {', '.join(sorted(plan.catalog.splits))}")
    report(rows(plan, budget, seeds, split), plan.compute, json)


if __name__ == "__main__":
    start(main)
