"""The paper's claims on data at hand, one command each, at equal compute and over seeds.

python -m benchmarks.claims permutation DATA --seconds 60 --seeds 3

| claim | what is compared |
|---|---|
| permutation | pixels in order and in one random order, for the Perceiver (no stem) and for a CNN, which falls (4.1) |
| sharing | weights shared over the rounds, or each round with its own: parameters, and train beside split (3.1) |
| rounds | 1, 2, 4 and 8 cross-attends with the same number of latent layers (App. A) |
| depth | 6, 12, 24 and 48 latent layers (4.1) |
| positions | Fourier features and learned positions (4.1) |
| fusion | all modalities together, and each alone (4.2) |
| stem | no stem and the recipe's (the paper's discussion: no spatial inductive bias) |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

from benchmarks import learning
from benchmarks.command import Seconds, Seeds, Steps, report, start
from benchmarks.learning import Budget, Contender, perceiver
from benchmarks.rivals import PLAIN, GridNet
from perceiver_cli.cli.options import Changes, Device, Json, Preset, recipe_of
from perceiver_cli.errors import UsageError
from perceiver_cli.model.encoding import Segment
from perceiver_cli.preprocess.base import Layout
from perceiver_cli.training.plan import Plan
from perceiver_cli.training.trainer import Trainer

Claim = Literal["permutation", "sharing", "rounds", "depth", "positions", "fusion", "stem"]
LAYERS = 8  # latent layers of every model of the claim "rounds"
ORDER_SEED = 0  # of the permutation


class Permuted(nn.Module):
    """A network of a grid that gets the grid's places in one random order, the same for every input."""

    def __init__(self, name: str, layout: Layout, classes: int) -> None:
        super().__init__()
        self.name, self.network = name, GridNet(name, layout, classes)
        self.order = nn.Buffer(torch.randperm(layout.num_inputs, generator=torch.Generator().manual_seed(ORDER_SEED)))

    def forward(self, segments: Mapping[str, Segment]) -> Tensor:
        """Return logits (B, classes)."""
        values = segments[self.name].values
        mixed = values.flatten(1, -2)[:, self.order].view(values.shape)
        logits: Tensor = self.network({self.name: Segment(mixed)})
        return logits


def _network(kind: type[nn.Module], name: str, layouts: Mapping[str, Layout], classes: int) -> nn.Module:
    return kind(name, layouts[name], classes)


def contenders(claim: Claim, plan: Plan, seed: int) -> list[Contender]:
    """Return the models that a claim compares. Raises UsageError for data that it does not fit."""
    make, name = partial(perceiver, plan, seed), next(iter(plan.config.inputs))
    bare = {name: {"stem": "none"}} if hasattr(plan.config.inputs[name], "stem") else {}
    match claim:
        case "permutation":
            if name != "image" or len(plan.config.inputs) > 1:
                raise UsageError(f"permutation needs pictures, this data is {'+'.join(plan.config.inputs)}")
            mixed = {name: {**bare[name], "permutation": ORDER_SEED}}
            return [
                Contender("Perceiver", make(), bare), Contender("Perceiver, permuted", make(), mixed),
                Contender("CNN", partial(_network, GridNet, name), {name: PLAIN[name]}),
                Contender("CNN, permuted", partial(_network, Permuted, name), {name: PLAIN[name]}),
            ]  # fmt: skip
        case "sharing":
            own = " ".join(f"c{k} t{k}" for k in range(8))
            return [
                Contender("shared", make(schedule="c0 t0 (c1 t0)x7"), {}),
                Contender("each round its own", make(schedule=own), {}),
            ]
        case "rounds":
            return [
                Contender(f"{n} cross-attends", make(schedule=_rounds(n), self_attends_per_block=LAYERS // n), {})
                for n in (1, 2, 4, 8)
            ]
        case "depth":
            return [
                Contender(f"{6 * n} layers", make(schedule=_rounds(n), self_attends_per_block=6), {})
                for n in (1, 2, 4, 8)
            ]
        case "positions":
            learned = {name: {"positions": "learned", "learned_std": 0.02}}
            return [Contender("Fourier", make(), {}), Contender("learned", make(), learned)]
        case "stem":
            return [Contender("no stem", make(), bare), Contender("the recipe's stem", make(), {})]
    if len(plan.config.inputs) < 2:
        raise UsageError(f"fusion needs several modalities, this data is {name}")
    return [Contender("all", make(), {})]


def _rounds(count: int) -> str:
    return "c0 t0" if count == 1 else f"c0 t0 (c1 t0)x{count - 1}"


def rows(claim: Claim, plans: Mapping[str, Plan], budget: Budget, seeds: int, split: str) -> Iterator[dict[str, Any]]:
    """Return a row for each model and seed, then the means. plans: by name, "" for those that need none."""

    def each(seed: int) -> Iterator[tuple[Plan, Contender]]:
        for label, plan in plans.items():
            alone = [Contender(f"{label} alone", perceiver(plan, seed), {})]
            yield from ((plan, own) for own in (alone if label else contenders(claim, plan, seed)))

    return learning.rows(each, budget, seeds, split)


def main(
    claim: Annotated[Claim, typer.Argument(help="Claim to try.")],
    data: Annotated[str, typer.Argument(help="Labelled data, as for `perceiver train`.")],
    preset: Preset = None,
    changes: Changes = None,
    seconds: Seconds = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    split: Annotated[str, typer.Option(help="Split to score.")] = "val",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train the models that a claim of the paper compares, at equal compute, and score them."""
    budget = Budget.of(seconds, steps)
    overrides = [*(changes or []), f"train.device={device}"]
    plan = Trainer(data, None, recipe_of(preset, None), overrides=overrides).plan
    plans = {"": plan}
    if claim == "fusion":
        inputs = plan.config.inputs
        plans |= {
            name: replace(plan, config=plan.config.model_copy(update={"inputs": {name: inputs[name]}}))
            for name in inputs
        }
    report(rows(claim, plans, budget, seeds, split), plan.compute, json)


if __name__ == "__main__":
    start(main)
