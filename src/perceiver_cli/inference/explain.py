"""Attention, evidence, heat and score maps: which inputs a model reads, and which ones speak for a class.

Axes: M inputs, N latents, H heads, n = H N queries, C input channels.

From one input and one class:

- Score maps, the paper's Figure 3: q . k before the softmax of one latent, in the first, second and last cross-attend.
- Attention: the share of each input in the output if every attention only mixes its inputs (rollout: Abnar and Zuidema
  2020). It goes back from the output to the latents of each cross-attend as N weights, and from there to the inputs a
  block of tiles at a time, so nothing of size N x M exists. It is the same for every class.
- Evidence: integrated gradients (Sundararajan et al. 2017) of the class's log-odds, from a blank input to this one. A
  blank input has its mean in all places; a blank cloud has all points in its centre; blank words, cells and series are
  0. An input's gain is the sum over its channels, or over those of each channel of a series. It is averaged with
  neighbours within a few percent of a grid's side against noise, but not of words and cells; only positive gains count.
- Heat: evidence times the square root of attention. In tests with known evidence, neither factor alone locates it in
  all of pictures, sound and clouds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_cli.data.decoder import Decoded
from perceiver_cli.data.examples import Example
from perceiver_cli.data.inputs import Named, Part, Pipe, source_of
from perceiver_cli.data.loader import Reader, collate
from perceiver_cli.data.pairing import assemble, sources_of
from perceiver_cli.errors import UsageError
from perceiver_cli.files import show_path
from perceiver_cli.inference.predictor import Predictor
from perceiver_cli.model.attention import CrossAttend, Memory, SelfAttend, split_heads
from perceiver_cli.model.encoding import Segment
from perceiver_cli.model.kernels import NEVER
from perceiver_cli.model.perceiver import Perceiver
from perceiver_cli.model.stems import nearest_points
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Array, Layout
from perceiver_cli.preprocess.detection import looked_at
from perceiver_cli.preprocess.points import PointsSpec, picked_points
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec

Heat = NDArray[np.float32]

PATH_STEPS = 4  # steps of the integral; 4, 8 and 16 gave the same heat within 0.01
NEIGHBOURHOOD = 0.03  # standard deviation of the average over neighbours, as a share of a grid's side
SMALL_SIDE = 8  # inputs along an axis; a shorter axis is not averaged over neighbours
MAPS = 6  # latents whose scores are shown
COARSE, COARSE_TIME = 8, 32  # largest side of a grid in JSON, and of the time axis of sound


@dataclass(frozen=True)
class ScoreMap:
    """Scores before the softmax of one latent and head in one cross-attend, all three counted from 1."""

    cross_attend: int  # in the order of execution
    latent: int
    head: int
    scores: Mapping[str, Heat]  # by modality, in the shape of its inputs


@dataclass(frozen=True)
class ExplainedInput:
    """One modality of an explained example.

    Heat and attention sum to 1 over all modalities, or are 0. If a sound or video was repeated to fill a clip, they are
    summed over its repetitions.
    """

    raw: Array  # the decoded array or clip that the model read
    spec: InputSpec
    heat: Heat  # by input, in the shape of the grid or (points,); of a series (inputs, channels)
    attention: Heat  # by input
    start_s: float | None = None  # of the clip in its file
    end_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: the modality's shares of heat and attention, then both by point or by coarse box."""
        fields: dict[str, Any] = {"share": float(self.heat.sum()), "attention_share": float(self.attention.sum())}
        if (parts := modality(self.spec.modality).parts(self.raw, self.spec)) is not None:
            each = zip(parts.names, parts.shares(self.heat), parts.shares(self.attention), strict=True)
            return fields | {"parts": [{"name": n, "heat": float(h), "attention": float(a)} for n, h, a in each]}
        if self.spec.modality == "points":
            rows = np.column_stack([self.raw.astype(np.float64), self.heat, self.attention])
            named = getattr(self.spec, "columns", ())
            return fields | {"columns": ["x", "y", "z", *named, "heat", "attention"], "points": rows.tolist()}
        if self.start_s is not None:
            fields |= {"start_s": self.start_s, "end_s": self.end_s}
        if self.heat.ndim > self.attention.ndim:
            names = getattr(self.spec, "channels", ())
            fields["channels"] = dict(zip(names, self.heat.sum(axis=0).tolist(), strict=True))
        for name, heat in (("heat", self.heat), ("attention", self.attention)):
            is_1d = self.spec.modality in ("audio", "series")  # over time only
            grid = coarse(heat.reshape(len(heat), -1).sum(axis=1), COARSE_TIME) if is_1d else coarse(heat, COARSE)
            fields[name] = grid.tolist()
        return fields


@dataclass(frozen=True)
class Explanation:
    """Why a model gives class `label` the probability `prob` for an input whose most probable class is `predicted`."""

    path: str
    label: str
    prob: float
    predicted: str
    predicted_prob: float
    shown: Mapping[str, ExplainedInput]
    maps: tuple[ScoreMap, ...]
    notes: tuple[str, ...] = ()
    names: Mapping[str, Any] = field(default_factory=dict)  # as of an Example

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `explain --json`."""
        return {
            "path": self.path,
            **self.names,
            "label": self.predicted,
            "prob": self.predicted_prob,
            "class": self.label,
            "class_prob": self.prob,
            "notes": list(self.notes),
            "inputs": {name: explained.to_dict() for name, explained in self.shown.items()},
        }


def explain(predictor: Predictor, named: Named | Sequence[Part], label: str | None = None) -> Explanation:
    """Return the Explanation of one input for a class, by default the most probable one.

    Several files make one input, one for each modality. If the model reads an input in several windows, the window that
    speaks most for the class is explained. Raises UsageError for an unknown class or not exactly one input, DataError
    if the input cannot be read.
    """
    if not isinstance(named, str | bytes | os.PathLike | Source | Mapping | Pipe | Example):
        named = named[0] if len(named) == 1 else _together(named, predictor)
    examples = list(islice(predictor.examples(named), 2))
    if len(examples) != 1:
        count = "several inputs" if examples else "no inputs"
        of_cells = any(modality(name).cells for example in examples for name in example.sources)
        one = (
            "one row: --row KEY=VALUE, or a line of JSON on stdin" if of_cells else "one file, or one of each modality"
        )
        raise UsageError(f"{show_path(str(named))}: {count}", f"explain {one}")
    (example,) = examples
    reader, model = predictor.reader, predictor.model
    if not isinstance(model, Perceiver):
        shown = f"{show_path(predictor.path)}: {predictor.info.members} models, expected one to explain"
        raise UsageError(shown, "pass the run of one with -m")
    decoded = reader.decode(example)
    views = reader.views(decoded)
    (prediction,) = predictor.predict([example])
    if prediction.error is not None:
        raise predictor.broken(example.path)
    label = prediction.label if label is None else label
    if label not in predictor.classes:
        known = ", ".join(show_path(name) for name in predictor.classes[:20])
        raise UsageError(f"no class {show_path(label)} in {show_path(predictor.path)}", f"there are {known}")
    target = predictor.classes.index(label)
    several = reader.multi_label_classes > 0
    windows = [{name: s.to(predictor.compute.device) for name, s in collate([row]).items()} for row in views]
    with torch.no_grad():
        best = int(torch.cat([log_odds(model(segments), target, several) for segments in windows]).argmax())
    segments = windows[best]
    attention, maps = look(model, segments)
    heat = weighed(evidence(model, segments, target, several), attention)
    notes = list(decoded.notes)
    if len(views) > 1:
        notes.append(f"this window of {len(views)} speaks most for {show_path(label)}")
    if not any(grid.any() for grid in heat.values()):
        notes.append(f"nothing in this input speaks for {show_path(label)} more than a blank input does")
    missing = sorted(reader.specs.keys() - segments.keys())
    if missing:
        notes.append(f"{', '.join(missing)}: missing in this input")
    start_s = reader.starts(decoded)[best]
    return Explanation(
        path=example.path,
        label=label,
        prob=prediction.probs[target],
        predicted=prediction.label,
        predicted_prob=prediction.prob,
        shown={name: _explained(name, reader, decoded, start_s, heat[name], attention[name]) for name in segments},
        maps=tuple(maps),
        notes=tuple(notes),
        names=example.names,
    )


def _together(paths: Sequence[Part], predictor: Predictor) -> dict[str, Source]:
    """Return the source of each modality from the files of one input; raise UsageError if a modality has two."""
    files = [looked_at(source_of(path)) for path in paths]
    for file in files:
        if file.error is not None:
            raise file.error
    by_kind, _ = assemble(files, predictor.modalities)
    if len(by_kind) < len(files):
        spare = next(file for file in files if not any(file is used for used in by_kind.values()))
        kinds = "+".join(predictor.modalities)
        raise UsageError(f"{spare.source.shown}: one file too many: an input is one file of each of {kinds}")
    return sources_of(by_kind, predictor.modalities)


def log_odds(logits: Tensor, target: int, several: bool) -> Tensor:
    """Return log(p / (1 - p)) of a class (B,), which differs even where probabilities round to 1."""
    if several:
        return logits[:, target]
    others = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1)
    return logits[:, target] - others.logsumexp(dim=1)


def _explained(
    name: str, reader: Reader, decoded: Decoded, start_s: float | None, heat: Heat, attention: Heat
) -> ExplainedInput:
    """Return one modality with its heat; `start_s` is the start of its clip."""
    spec = reader.specs[name]
    if name not in reader.timed:
        raw = decoded.arrays[name]
        if name == "points":  # the model reads each of too few points several times
            assert isinstance(spec, PointsSpec)
            picked = picked_points(spec, len(raw))[: min(len(raw), len(heat))]
            count = len(picked)
            return ExplainedInput(raw[picked], spec, _folded(heat, count), _folded(attention, count))
        return ExplainedInput(raw, spec, heat, attention)
    raw, start_s = reader.clip(name, decoded, start_s)
    seconds, clip_s = decoded.seconds[name], reader.timed[name].clip_s(spec)
    own = max(1, min(len(heat), round(len(heat) * (seconds - start_s) / clip_s)))
    end_s = start_s + min(clip_s, seconds)
    if getattr(spec, "short", "loop") == "pad":  # silence follows, and is not shown
        return ExplainedInput(raw, spec, heat[:own], attention[:own], start_s, end_s)
    return ExplainedInput(raw, spec, _folded(heat, own), _folded(attention, own), start_s, end_s)


def _folded(heat: Heat, count: int) -> Heat:
    """Return heat (count, ...) summed over the repetitions of an input along the first axis."""
    folded = np.zeros((count, *heat.shape[1:]), heat.dtype)
    np.add.at(folded, np.arange(len(heat)) % count, heat)
    return folded


def evidence(model: Perceiver, segments: Mapping[str, Segment], target: int, several: bool) -> dict[str, Heat]:
    """Return one example's evidence for a class by modality, (*grid) or (M,), with sum 1, or all 0 without evidence.

    It needs the memory of a training step on the example with recomputed activations.
    """
    full = {name: [x for x in (s.values.float(), s.positions) if x is not None] for name, s in segments.items()}
    layouts = model.encoding.layouts
    pairs = {n: [(x, _blank(x, layouts[n])) for x in full[n]] for n in full}
    gained = {name: _summed(values * 0, layouts[name]) for name, (values, *_) in full.items()}
    with _lean(model), torch.enable_grad():
        for step in range(PATH_STEPS):
            share = (step + 0.5) / PATH_STEPS
            partial = {n: [(mean + share * (x - mean)).requires_grad_() for x, mean in pairs[n]] for n in pairs}
            logits = model({name: Segment(*tensors) for name, tensors in partial.items()})
            odds = log_odds(logits, target, several).sum()
            slopes = iter(torch.autograd.grad(odds, [x for tensors in partial.values() for x in tensors]))
            for name, both in pairs.items():
                for x, mean in both:
                    gained[name] += _summed(next(slopes) * (x - mean), layouts[name]) / PATH_STEPS
    gains = {name: sums[0].double().cpu() for name, sums in gained.items()}
    smooth = {name for name in gains if len(full[name]) == 1 and layouts[name].stem != "embed"}
    gains = {name: _smoothed(x, layouts[name]) if name in smooth else x for name, x in gains.items()}
    return _normalised({name: x.clamp(min=0) for name, x in gains.items()})


def _summed(gains: Tensor, layout: Layout) -> Tensor:
    """Return gains (..., C) summed over all channels (...), or over each group of channels (..., groups)."""
    if not layout.groups:
        return gains.sum(dim=-1)
    return gains[..., : -layout.presence].reshape(*gains.shape[:-1], layout.groups, -1).sum(dim=-1)


def _blank(x: Tensor, layout: Layout) -> Tensor:
    """Return the blank input: values or positions (1, *grid, C) with their mean over all places; codes without weight.

    Codes are blank with all weights 0, which makes their embedding 0. Other values that may be missing become 0
    if they are present.
    """
    if layout.presence:
        values, weights = x[..., : -layout.presence], x[..., -layout.presence :]
        return torch.cat([values, weights * 0] if layout.stem == "embed" else [values * 0, weights], dim=-1)
    return x.mean(tuple(range(1, x.dim() - 1)), keepdim=True)


def weighed(gains: Mapping[str, Heat], attention: Mapping[str, Heat]) -> dict[str, Heat]:
    """Return the heat: evidence times the square root of attention, with sum 1 over all modalities, or 0."""
    heat = {}
    for name, grid in gains.items():
        looked = attention[name].reshape(*attention[name].shape, *(1,) * (grid.ndim - attention[name].ndim))
        for axis, side in enumerate(grid.shape):  # with a stem there are fewer inputs than values
            looked = looked.take(np.arange(side) * looked.shape[axis] // side, axis=axis)
        heat[name] = torch.from_numpy(grid * np.sqrt(looked)).double()
    return _normalised(heat)


@contextmanager
def _lean(model: Perceiver) -> Iterator[None]:
    """Make gradients of the inputs cheap in memory: recompute activations, keep no gradients of weights."""
    recompute, learned = model.recompute, [weight for weight in model.parameters() if weight.requires_grad]
    model.recompute = True
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.recompute = recompute
        for weight in learned:
            weight.requires_grad_(True)


def _smoothed(gains: Tensor, layout: Layout) -> Tensor:
    """Return gains (*grid) averaged with neighbours, or those of each group (*grid, groups)."""
    if not layout.groups:
        return _with_neighbours(gains)
    return torch.stack([_with_neighbours(own) for own in gains.unbind(-1)], dim=-1)


def _with_neighbours(grid: Tensor) -> Tensor:
    """Return the grid after a Gaussian average along each axis."""
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
    total = float(sum(grid.sum() for grid in heat.values())) or 1.0
    return {name: (grid / total).float().numpy() for name, grid in heat.items()}


@contextmanager
def _watched(model: Perceiver) -> Iterator[list[tuple[CrossAttend | SelfAttend, tuple[Any, ...]]]]:
    """Yield a list that receives every attention block of a forward with its arguments, in order."""
    seen: list[tuple[CrossAttend | SelfAttend, tuple[Any, ...]]] = []

    def note(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(block, CrossAttend | SelfAttend)
        seen.append((block, arguments))

    with ExitStack() as stack:
        for block in model.modules():
            if isinstance(block, CrossAttend | SelfAttend):
                stack.enter_context(block.register_forward_pre_hook(note))
        yield seen


@torch.no_grad()
def look(model: Perceiver, segments: Mapping[str, Segment]) -> tuple[dict[str, Heat], list[ScoreMap]]:
    """Return one example's attention by modality, (*grid) or (M,) with sum 1, and its score maps.

    The maps show the latents with the largest weight in the output, in the first, second and last cross-attend.
    """
    with _watched(model) as seen:
        model(segments)
    weights = torch.full((model.config.num_latents,), 1 / model.config.num_latents, device=model.latents.device)
    if model.readout is not None:
        block, (query, latents, *_) = seen.pop()
        weights = _read_from(block, query, latents, weights.new_ones(1))[0]
    total: list[Tensor] = []
    reads: list[tuple[CrossAttend, Tensor, Memory, Tensor]] = []
    for block, (latents, *others) in reversed(seen):
        if isinstance(block, SelfAttend):
            weights = (weights + weights @ _mixing(block, latents)) / 2
            continue
        memory = others[0]
        reads.append((block, latents, memory, weights))
        looked = _read_from(block, latents, memory, weights)
        total = [a + b for a, b in zip(total, looked, strict=True)] if total else looked
        weights = weights / 2 if block.residual else torch.zeros_like(weights)
    reads.reverse()
    grids = {name: layout.grid for name, layout in model.encoding.layouts.items() if name in segments}

    nearest = {name: _nearest_input(segments[name], grid) for name, grid in grids.items()}

    def shaped(rows: Iterable[Tensor]) -> dict[str, Tensor]:
        named = {name: x.cpu().view(grid) for (name, grid), x in zip(grids.items(), rows, strict=True)}
        return {name: x if (at := nearest[name]) is None else x[at] for name, x in named.items()}

    maps = []
    for place in dict.fromkeys((0, min(1, len(reads) - 1), len(reads) - 1)):
        block, latents, memory, weights = reads[place]
        chosen = weights.topk(min(MAPS, len(weights))).indices
        u = block.fold(block.queries(latents))
        for k, latent in enumerate(chosen.tolist()):
            head = k % block.heads
            query = u[:, [head * len(weights) + latent]]  # (1, 1, C)
            blocks = ([scores[:, :, 0] for scores in tiles.products(query)] for tiles in memory.tiles)
            products = (torch.cat(each, dim=1) for each in blocks)
            scores = shaped(tiles.untiled(x)[0] for tiles, x in zip(memory.tiles, products, strict=True))
            each = {name: _without_hidden(x.numpy()) for name, x in scores.items()}
            maps.append(ScoreMap(place + 1, latent + 1, head + 1, each))
    return _normalised({name: x.double() for name, x in shaped(total).items()}), maps


def _without_hidden(scores: Heat) -> Heat:
    """Return scores with the lowest score for inputs that are hidden from attention."""
    shown = scores > NEVER / 2
    return np.where(shown, scores, scores[shown].min(initial=0.0) if shown.any() else 0.0)


def _nearest_input(segment: Segment, grid: tuple[int, ...]) -> Tensor | None:
    """Return the input (M,) that stands for each point where a stem makes fewer inputs than points, else None."""
    positions = segment.positions
    if positions is None or positions.shape[1] == grid[0]:
        return None
    return nearest_points(positions, positions[:, : grid[0]], 1)[1][0, :, 0].cpu()


def _mixing(block: SelfAttend, latents: Tensor) -> Tensor:
    """Return the mean over heads of a self-attend's weights (N, N)."""
    normalised = block.norm(latents)
    query, key = (split_heads(f(normalised), block.heads) for f in (block.query, block.key))
    weights: Tensor = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)[0].mean(dim=0)
    return weights


def _read_from(block: CrossAttend | SelfAttend, latents: Tensor, memory: Memory, weights: Tensor) -> list[Tensor]:
    """Return for each modality (M,) the attention of the latents, mean over heads, summed with weights (N,)."""
    assert isinstance(block, CrossAttend)
    u = block.fold(block.queries(latents))
    kernel = memory.kernel(u.device, u.dtype)
    normaliser = torch.stack([tiles.average(u, kernel)[1][0] for tiles in memory.tiles]).logsumexp(dim=0)[:, None]
    each = (weights / block.heads).repeat(block.heads)
    looked = []
    for tiles in memory.tiles:
        blocks = [each @ scores.sub_(normaliser).exp_() for scores in tiles.products(u)]
        looked.append(tiles.untiled(torch.cat(blocks, dim=1))[0])
    return looked


def coarse(heat: Array, most: int) -> Array:
    """Return heat summed over the boxes of a coarse grid, with at most `most` boxes along each axis."""
    heat = heat.astype(np.float64)
    for axis, side in enumerate(heat.shape):
        count = min(side, most)
        heat = np.add.reduceat(heat, np.arange(count) * side // count, axis=axis)
    return heat
