"""Where a model looked and what it found there for a class: attention rolled out, evidence, heat, and score maps.

Axes: M inputs, N latents, H heads, n = H N queries, C input channels.

From one input and one class:

- Score maps, the paper's Figure 3: q . k before the softmax of one latent, in the first, second and last cross-attend.
- Attention: how much of each input reaches the class if every attention only mixes what it reads (rollout: Abnar and
  Zuidema 2020). It is carried from the class to the latents of each cross-attend as N weights, and from there to the
  inputs a block of tiles at a time, so nothing of size N x M exists. It does not know which class is asked for.
- Evidence: integrated gradients (Sundararajan et al. 2017) of the class's log-odds, on the way from a blank input to
  this one. Blank is the input's own mean in all places; of a cloud, all points in its centre. What is gained at an
  input is summed over its channels, averaged with its neighbours' within a few percent of the side of a grid, so that
  noise cancels, and what remains above zero is kept.
- Heat: evidence times the square root of attention. Where the answer is known, neither factor alone finds it in
  pictures, sound and clouds alike (CHANGELOG.md has what was compared).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.data.decoder import Decoded, Row
from perceiver_cli.data.examples import Example
from perceiver_cli.data.inputs import Named, Part, Pipe, source_of
from perceiver_cli.data.listing import looked_at
from perceiver_cli.data.loader import Reader, collate
from perceiver_cli.data.pairing import assemble, sources_of
from perceiver_cli.errors import UsageError
from perceiver_cli.files import show_path
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model import kernels
from perceiver_cli.model.attention import CrossAttend, Memory, SelfAttend, split_heads
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec

Heat = NDArray[np.float32]

PATH_STEPS = 4  # of the integral; 4, 8 and 16 gave the same heat within 0.01
NEIGHBOURHOOD = 0.03  # of a grid's side: one standard deviation of the average over neighbours
SMALL_SIDE = 8  # inputs along an axis that has no neighbours to speak of
MAPS = 6  # latents whose scores are shown
COARSE = 8  # numbers along each axis of a grid in JSON, at most
COARSE_TIME = 32


@dataclass(frozen=True)
class ScoreMap:
    """Scores before the softmax of one latent and head, both counted from 1, in a cross-attend, counted as they run.

    scores: by modality, in the shape of its inputs.
    """

    cross_attend: int
    latent: int
    head: int
    scores: Mapping[str, Heat]


@dataclass(frozen=True)
class Shown:
    """What was explained of one modality: the decoded array or clip that the model saw, where it began, and the heat.

    heat, attention: one number for each input, in the shape of the grid or (points,); those of all modalities together
    sum to 1, unless all are 0. A sound or film that was repeated to fill a clip has them summed over its repetitions.
    """

    raw: Array
    spec: InputSpec
    heat: Heat
    attention: Heat
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Why a model gave `label` the probability `prob` for an input whose most probable class is `predicted`."""

    path: str
    label: str
    prob: float
    predicted: str
    predicted_prob: float
    shown: Mapping[str, Shown]
    maps: tuple[ScoreMap, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: each modality's shares, and its heat and attention on a coarse grid or by point."""
        return {
            "path": self.path,
            "label": self.predicted,
            "prob": self.predicted_prob,
            "class": self.label,
            "class_prob": self.prob,
            "notes": list(self.notes),
            "inputs": {name: _numbers(shown) for name, shown in self.shown.items()},
        }


# ---------------------------------------------------------------- from an input to an explanation


def explain(predictor: Predictor, given: Named | Sequence[Part], label: str | None = None) -> Explanation:
    """Return the Explanation of one input for a class, the most probable one unless it is given.

    Several files are the parts of one input, each of another modality, told by their content.

    Of several windows in which the model looks at a file, it is of the one that speaks most for the class.

    Raises:
        UsageError: no such class, or not one input. DataError: an input that cannot be read.
    """
    if not isinstance(given, str | bytes | os.PathLike | Source | Mapping | Pipe | Example):
        given = given[0] if len(given) == 1 else _together(given, predictor)
    examples = list(islice(predictor.examples(given), 2))
    if len(examples) != 1:
        found = "several inputs" if examples else "no inputs"
        raise UsageError(f"{show_path(str(given))}: {found}", "explain one file at a time, or one of each modality")
    (example,) = examples
    reader, model = predictor.reader, predictor.model
    decoded = reader.decode(example)
    views = reader.views(decoded)
    (prediction,) = predictor.predict([example])
    label = prediction.label if label is None else label
    if label not in predictor.classes:
        known = ", ".join(show_path(name) for name in predictor.classes[:20])
        raise UsageError(f"no class {show_path(label)} in {show_path(predictor.path)}", f"there are {known}")
    target = predictor.classes.index(label)
    several = reader.multi_label_classes > 0
    device = predictor.compute.device
    with torch.no_grad():
        odds = torch.cat([log_odds(model(_segments(row, device)), target, several) for row in views])
    best = int(odds.argmax())
    segments = _segments(views[best], device)
    attention, maps = look(model, segments)
    heat = weighed(evidence(model, segments, target, several), attention)
    notes = []
    if len(views) > 1:
        notes.append(f"of {len(views)} windows, the one that speaks most for {show_path(label)}")
    if not any(part.any() for part in heat.values()):
        notes.append(f"nothing in this input speaks for {show_path(label)} more than a blank one does")
    missing = sorted(reader.specs.keys() - segments.keys())
    if missing:
        notes.append(f"{', '.join(missing)}: missing in this input")
    start_s = reader.starts(decoded)[best]
    return Explanation(
        path=example.id,
        label=label,
        prob=prediction.probs[target],
        predicted=prediction.label,
        predicted_prob=prediction.prob,
        shown={name: _shown(name, reader, decoded, start_s, heat[name], attention[name]) for name in segments},
        maps=tuple(maps),
        notes=tuple(notes),
    )


def _together(given: Sequence[Part], predictor: Predictor) -> dict[str, Source]:
    """Return the source of each modality that several files bring together."""
    sources = [source_of(part) for part in given]
    files = [looked_at(source) for source in sources]
    for file in files:
        if file.error is not None:
            raise file.error
    parts, _ = assemble(files, predictor.modalities)
    if len(parts) < len(files):
        spare = next(file for file in files if not any(file is part for part in parts.values()))
        kinds = "+".join(predictor.modalities)
        raise UsageError(f"{spare.source.shown}: one too many, an input is one file of each of {kinds}")
    return sources_of(parts, predictor.modalities)


def _segments(row: Row, device: torch.device) -> dict[str, Segment]:
    return {name: segment.to(device) for name, segment in collate([row]).items()}


def log_odds(logits: Tensor, target: int, several: bool) -> Tensor:
    """Return (B,) log p / (1 - p) of a class, which goes on rising where the probability is already 1."""
    if several:
        return logits[:, target]
    others = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1)
    return logits[:, target] - others.logsumexp(dim=1)


def _shown(name: str, reader: Reader, decoded: Decoded, start_s: float | None, heat: Heat, attention: Heat) -> Shown:
    spec = reader.specs[name]
    if name not in reader.timed:
        raw = decoded.arrays[name]
        if name == "points":  # of few points each is given to the model several times
            count = min(len(raw), len(heat))
            return Shown(raw[:count], spec, _folded(heat, count), _folded(attention, count))
        return Shown(raw, spec, heat, attention)
    raw, start_s = reader.clip(name, decoded, start_s)
    seconds, clip_s = decoded.seconds[name], reader.timed[name].clip_s(spec)
    own = max(1, min(len(heat), round(len(heat) * (seconds - start_s) / clip_s)))
    end_s = start_s + min(clip_s, seconds)
    return Shown(raw, spec, _folded(heat, own), _folded(attention, own), start_s, end_s)


def _folded(heat: Heat, count: int) -> Heat:
    """Return (count, ...): what lies beyond `count` along the first axis is added to where the repetition came from."""
    folded = np.zeros((count, *heat.shape[1:]), heat.dtype)
    np.add.at(folded, np.arange(len(heat)) % count, heat)
    return folded


# ---------------------------------------------------------------- evidence


def evidence(model: Perceiver, segments: Mapping[str, Segment], target: int, several: bool) -> dict[str, Heat]:
    """Return by modality (*grid) or (M,) of one example: what speaks for a class, together 1, or 0 if nothing does.

    Memory is that of a step of training on the example with activations made again.
    """
    full = {name: (segment.values.float(), segment.positions) for name, segment in segments.items()}
    gained = {name: values.new_zeros(values.shape[:-1]) for name, (values, _) in full.items()}
    with _lean(model), torch.enable_grad():
        for step in range(PATH_STEPS):
            share = (step + 0.5) / PATH_STEPS
            partial, moved = {}, []
            for name, (values, positions) in full.items():
                values = _between(values, share)
                positions = None if positions is None else _between(positions, share)
                partial[name] = Segment(values, positions)
                moved += [(name, 0, values)] if values.numel() else []
                moved += [(name, 1, positions)] if positions is not None else []
            odds = log_odds(model(partial), target, several).sum()
            slopes = torch.autograd.grad(odds, [tensor for _, _, tensor in moved])
            for (name, which, _), slope in zip(moved, slopes, strict=True):
                whole = full[name][which]
                assert whole is not None
                gained[name] += (slope * (whole - _mean(whole))).sum(dim=-1) / PATH_STEPS
    spoken = {}
    for name, sums in gained.items():
        each = sums[0].double().cpu()
        spoken[name] = (_with_neighbours(each) if full[name][1] is None else each).clamp(min=0)
    return _normalised(spoken)


def weighed(spoken: Mapping[str, Heat], attention: Mapping[str, Heat]) -> dict[str, Heat]:
    """Return the heat: evidence times the square root of attention, which together sums to 1, or is 0."""
    heat = {}
    for name, part in spoken.items():
        looked = attention[name]
        for axis, side in enumerate(part.shape):  # a stem leaves fewer inputs than there are values
            looked = looked.take(np.arange(side) * looked.shape[axis] // side, axis=axis)
        heat[name] = torch.from_numpy(part * np.sqrt(looked)).double()
    return _normalised(heat)


@contextmanager
def _lean(model: Perceiver) -> Iterator[None]:
    """Let a model keep as little as it can for a gradient of its inputs: no weights' gradients, nothing kept twice."""
    recompute, learned = model.recompute, [weight for weight in model.parameters() if weight.requires_grad]
    model.recompute = True
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.recompute = recompute
        for weight in learned:
            weight.requires_grad_(True)


def _mean(values: Tensor) -> Tensor:
    """Return (1, 1.., c): the mean over all places."""
    return values.mean(dim=tuple(range(1, values.dim() - 1)), keepdim=True)


def _between(values: Tensor, share: float) -> Tensor:
    mean = _mean(values)
    return (mean + share * (values - mean)).requires_grad_()


def _with_neighbours(grid: Tensor) -> Tensor:
    """Return the grid after a Gaussian mean along each axis."""
    for axis, side in enumerate(grid.shape):
        if side < SMALL_SIDE:
            continue
        width = NEIGHBOURHOOD * side
        reach = min(side - 1, max(1, round(4 * width)))
        weights = torch.exp(-(torch.arange(-reach, reach + 1).double() / width).square() / 2)
        lines = grid.movedim(axis, -1)
        flat = lines.reshape(-1, 1, side)
        mean = F.conv1d(flat, weights.view(1, 1, -1), padding=reach)
        mean = mean / F.conv1d(torch.ones_like(flat[:1]), weights.view(1, 1, -1), padding=reach)
        grid = mean.view(lines.shape).movedim(-1, axis)
    return grid


def _normalised(heat: Mapping[str, Tensor]) -> dict[str, Heat]:
    total = float(sum(part.sum() for part in heat.values())) or 1.0
    return {name: (part / total).float().numpy() for name, part in heat.items()}


# ---------------------------------------------------------------- attention and score maps


@contextmanager
def _watched(model: Perceiver) -> Iterator[list[tuple[CrossAttend | SelfAttend, tuple[Any, ...]]]]:
    """Yield a list into which every attention of a forward is written as it begins, with what it is given."""
    seen: list[tuple[CrossAttend | SelfAttend, tuple[Any, ...]]] = []

    def note(block: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(block, CrossAttend | SelfAttend)
        seen.append((block, given))

    blocks = [block for block in model.modules() if isinstance(block, CrossAttend | SelfAttend)]
    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def look(model: Perceiver, segments: Mapping[str, Segment]) -> tuple[dict[str, Heat], list[ScoreMap]]:
    """Return by modality the attention (*grid) or (M,) of one example, which together sums to 1, and score maps.

    The maps are of the latents that the class heard most of, from the first, the second and the last cross-attend.
    """
    with _watched(model) as seen:
        model(segments)
    weights = torch.full((model.config.num_latents,), 1 / model.config.num_latents, device=model.latents.device)
    if model.readout is not None:
        block, (query, latents, *_) = seen.pop()
        weights = _read_from(block, query, latents, weights.new_ones(1))[0]
    total: list[Tensor] = []
    heard: list[tuple[CrossAttend, Tensor, Memory, Tensor]] = []
    for block, given in reversed(seen):
        if isinstance(block, SelfAttend):
            weights = (weights + weights @ _mixing(block, given[0])) / 2
            continue
        latents, memory = given[:2]
        heard.append((block, latents, memory, weights))
        looked = _read_from(block, latents, memory, weights)
        total = [a + b for a, b in zip(total, looked, strict=True)] if total else looked
        weights = weights / 2 if block.residual else torch.zeros_like(weights)
    heard.reverse()
    layouts = {name: model.encoding.layouts[name] for name in model.encoding.layouts if name in segments}
    shaped = {
        name: part.double().cpu().view(layout.grid) for (name, layout), part in zip(layouts.items(), total, strict=True)
    }
    maps = []
    for place in dict.fromkeys((0, min(1, len(heard) - 1), len(heard) - 1)):
        block, latents, memory, weights = heard[place]
        chosen = weights.topk(min(MAPS, len(weights))).indices
        u = block.fold(block.queries(latents))
        for k, latent in enumerate(chosen.tolist()):
            head = k % block.heads
            parts = [_scores(tiles, u[:, [head * len(weights) + latent]]) for tiles in memory.tiles]
            scores = {
                name: part.cpu().view(layout.grid).numpy()
                for (name, layout), part in zip(layouts.items(), parts, strict=True)
            }
            maps.append(ScoreMap(place + 1, latent + 1, head + 1, scores))
    return _normalised(shaped), maps


def _mixing(block: SelfAttend, latents: Tensor) -> Tensor:
    """Return (N, N), the mean over heads of a self-attend's weights."""
    normalised = block.norm(latents)
    query, key = (split_heads(f(normalised), block.heads) for f in (block.query, block.key))
    weights: Tensor = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)[0].mean(dim=0)
    return weights


def _read_from(block: CrossAttend | SelfAttend, latents: Tensor, memory: Memory, weights: Tensor) -> list[Tensor]:
    """Return for each part of the memory (M,): sum over latents of weight (N,) times the mean weight of its heads."""
    assert isinstance(block, CrossAttend)
    u = block.fold(block.queries(latents))
    kernel = kernels.choose(u.device, u.dtype)
    normaliser = torch.stack([tiles.average(u, kernel)[1][0] for tiles in memory.tiles]).logsumexp(dim=0)[:, None]
    each = (weights / block.heads).repeat(block.heads)
    looked = []
    for tiles in memory.tiles:
        blocks = [each @ scores.sub_(normaliser).exp_() for scores in tiles.products(u)]
        looked.append(tiles.untiled(torch.cat(blocks, dim=1))[0])
    return looked


def _scores(tiles: Any, u: Tensor) -> Tensor:
    """Return (M,) of one folded query (1, 1, C)."""
    scores: Tensor = tiles.untiled(torch.cat([block[:, :, 0] for block in tiles.products(u)], dim=1))[0]
    return scores


# ---------------------------------------------------------------- numbers


def _numbers(shown: Shown) -> dict[str, Any]:
    facts: dict[str, Any] = {"share": float(shown.heat.sum()), "attention_share": float(shown.attention.sum())}
    if shown.spec.modality == "points":
        rows = np.column_stack([shown.raw.astype(np.float64), shown.heat, shown.attention])
        return facts | {"columns": ["x", "y", "z", "heat", "attention"], "points": rows.tolist()}
    if shown.start_s is not None:
        facts |= {"start_s": shown.start_s, "end_s": shown.end_s}
    if shown.spec.modality == "audio":
        over_time = (part.reshape(len(part), -1).sum(axis=1) for part in (shown.heat, shown.attention))
        heat, attention = (coarse(part, COARSE_TIME) for part in over_time)
    else:
        heat, attention = (coarse(part, COARSE) for part in (shown.heat, shown.attention))
    return facts | {"heat": heat.tolist(), "attention": attention.tolist()}


def coarse(heat: Array, most: int) -> Array:
    """Return sums of heat over boxes of its grid, at most `most` along each axis."""
    heat = heat.astype(np.float64)
    for axis, side in enumerate(heat.shape):
        count = min(side, most)
        heat = np.add.reduceat(heat, np.arange(count) * side // count, axis=axis)
    return heat
