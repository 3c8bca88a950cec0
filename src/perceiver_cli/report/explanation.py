"""The page of an explanation as PNG, its points as PLY, its maps as NPZ."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_cli.errors import UsageError
from perceiver_cli.files import atomic_write, show_path, show_text
from perceiver_cli.inference.explain import MAPS, ExplainedInput, Explanation, Heat, ScoreMap
from perceiver_cli.preprocess import modality
from perceiver_cli.report import pictures
from perceiver_cli.report.charts import plain_text

GAP = 12
WIDTH = 3 * pictures.SIDE + 2 * GAP  # the page between its margins, in pixels
HEAD, LINE, KEY = 38, 25, 48  # heights of the first line, of other lines, of a colour bar

MEANING = (
    "Heat: the inputs that speak for this class. Attention: the inputs that were read, for any class; a model reads "
    "silence and empty ground too, to know that nothing is there."
)
Draw = Callable[[Any], None]
Row = tuple[int, Draw]  # its height, and a function that draws it on a figure


def to_ply(explanation: Explanation) -> bytes:
    """Return a cloud as a binary PLY, coloured by heat and with heat as a property; raise UsageError without points."""
    if "points" not in explanation.shown:
        kinds = "+".join(explanation.shown)
        raise UsageError(f"a PLY holds points, {show_path(explanation.path)} is {kinds}", "pass -o FILE.png")
    shown = explanation.shown["points"]
    names = [("float", axis) for axis in "xyz"] + [("uchar", color) for color in ("red", "green", "blue")]
    properties = "".join(f"property {kind} {name}\n" for kind, name in [*names, ("float", "heat")])
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(shown.raw)}\n{properties}end_header\n"
    tints = (255 * pictures.colours(pictures.scaled(shown.heat), pictures.HEAT)).round().astype(int)
    rows = zip(shown.raw[:, :3].tolist(), tints.tolist(), shown.heat.tolist(), strict=True)
    return header.encode() + b"".join(struct.pack("<3f3Bf", *point, *tint, heat) for point, tint, heat in rows)


def to_arrays(explanation: Explanation) -> dict[str, Any]:
    """Return the arrays of an NPZ: label, and for each modality what the model read and one number for each input.

    NAME is the decoded array or clip; NAME_heat and NAME_attention have the shape of its inputs; NAME_scores (maps,
    *inputs) are the score maps of single latents, whose cross_attend, latent and head (maps,) are counted from 1. The
    score maps of a short clip hold its repetitions, over which the others are summed.
    """
    arrays: dict[str, Any] = {"label": np.array(explanation.label)}
    for name, shown in explanation.shown.items():
        arrays |= {name: shown.raw, f"{name}_heat": shown.heat, f"{name}_attention": shown.attention}
        arrays[f"{name}_scores"] = np.stack([each.scores[name] for each in explanation.maps])
    for fact in ("cross_attend", "latent", "head"):
        arrays[fact] = np.array([getattr(each, fact) for each in explanation.maps])
    return arrays


def save(explanation: Explanation, path: Path) -> None:
    """Write the page as PNG, the coloured points if `path` ends in .ply, or all maps as arrays if it ends in .npz."""
    with atomic_write(path) as file:
        if path.suffix.lower() == ".ply":
            file.write(to_ply(explanation))
        elif path.suffix.lower() == ".npz":
            np.savez(file, **to_arrays(explanation))
        else:
            to_picture(explanation).save(file, format="PNG", optimize=True)


def to_picture(explanation: Explanation) -> pictures.Picture:
    """Return the page: each modality plain, with attention and with heat, sound last; then the score maps."""
    with plain_text():
        label = show_text(explanation.label)
        head = f"{label}: {explanation.prob:.3f}"
        if explanation.label != explanation.predicted:
            head += f" (predicted: {show_text(explanation.predicted)} {explanation.predicted_prob:.3f})"
        rows: list[Row] = [(HEAD, partial(_write, text=head, size=10.5))]
        rows += [(LINE, partial(_write, text=text)) for text in (show_text(explanation.path), *explanation.notes)]
        media = sorted(explanation.shown.items(), key=lambda item: item[0] == "audio")
        for name, shown in media:
            rows += _medium(name, shown, label, several=len(media) > 1)
        rows.append((KEY, partial(_key, name=pictures.HEAT, low="none", high="most")))
        rows.append((LINE, partial(_write, text=MEANING, size=6, color=pictures.FAINT)))
        for name, shown in media:
            rows += _score_maps(name, shown, explanation.maps)
        rows.append((KEY, partial(_key, name=pictures.SCORE, low="lowest", high="highest")))
        heights = [GAP, *(height for height, _ in rows), GAP]
        figure = pictures.new_figure(WIDTH + 2 * GAP, sum(heights))
        cells = figure.subfigures(len(heights), 3, height_ratios=heights, width_ratios=(GAP, WIDTH, GAP))
        for (_, draw), (_, cell, _) in zip(rows, cells[1:-1], strict=True):
            draw(cell)
        return pictures.rendered(figure)


def _write(figure: Any, text: str, size: float = 7.5, color: str = "black") -> None:
    """Write a line of text at the top of a figure, cut to its width."""
    line = figure.text(0, 1, text, size=size, color=color, va="top")
    while text and line.get_window_extent().width > figure.bbox.width:
        text = text[: -1 - len(text) // 40]
        line.set_text(f"{text}…")


def _panels(figure: Any, panels: Sequence[tuple[str, Draw]], color: str = "black") -> None:
    """Draw panels with their titles side by side."""
    width = (figure.bbox.width + GAP) / len(panels) - GAP
    widths, heights = ((width, GAP) * len(panels))[:-1], (LINE, figure.bbox.height - LINE - GAP, GAP)
    cells = figure.subfigures(3, len(widths), squeeze=False, height_ratios=heights, width_ratios=widths)
    for (title, draw), above, below in zip(panels, cells[0, ::2], cells[1, ::2], strict=True):
        _write(above, title, 7.5 if color == "black" else 6, color)
        draw(below)


def _medium(name: str, shown: ExplainedInput, label: str, *, several: bool) -> list[Row]:
    """Return the rows of a modality: attention and heat beside the medium, or below each other if it is wide."""
    attention_share, heat_share = (f": {share.sum():.0%}" if several else "" for share in (shown.attention, shown.heat))
    plain = ", read inside the frame" if pictures.is_cropped(shown.raw, shown.spec) else ""
    begin = shown.start_s or 0.0
    heats = {
        f"{name}{plain}": None,
        f"heat{heat_share}: speaks for {label}": shown.heat,
        f"attention{attention_share}: where it looked": shown.attention,
    }
    panels = [
        (title, partial(pictures.draw, raw=shown.raw, spec=shown.spec, heat=heat, start_s=begin, framed=True))
        for title, heat in heats.items()
    ]
    has_parts = modality(shown.spec.modality).parts(shown.raw, shown.spec) is not None
    wide = shown.start_s is not None or has_parts
    grid = shown.attention.shape  # heat may have an axis of channels too
    if wide and len(grid) > 1 and min(grid) < pictures.LEAST_CELLS:  # the title says why it is coarse
        panels[1:] = [(f"{title} ({' x '.join(map(str, grid))} inputs)", draw) for title, draw in panels[1:]]
    height = LINE + GAP + pictures.size_of(shown.raw, shown.spec, WIDTH // 2 if wide else pictures.SIDE)[1]
    rows = [[panel] for panel in panels[has_parts:]] if wide else [panels]  # so that names are legible under their heat
    return [(height, partial(_panels, panels=row)) for row in rows]


def _score_maps(name: str, shown: ExplainedInput, maps: Sequence[ScoreMap]) -> list[Row]:
    """Return the rows of a modality's score maps: one row per cross-attend, one column per latent."""
    rows: list[Row] = [(LINE, partial(_write, text=f"{name}: scores before the softmax, one latent each"))]
    heads = any(score.head > 1 for score in maps)
    height = (WIDTH - GAP * (MAPS - 1)) // MAPS // (3 if shown.start_s is not None else 1)  # a strip: sound, video
    for number in sorted({score.cross_attend for score in maps}):
        panels = []
        for score in (score for score in maps if score.cross_attend == number):
            title = f"cross-attend {number}, latent {score.latent}" + (f", head {score.head}" if heads else "")
            panels.append((title, partial(_score_map, scores=score.scores[name], shown=shown)))
        rows.append((LINE + height + GAP, partial(_panels, panels=panels, color=pictures.FAINT)))
    return rows


def _score_map(figure: Any, scores: Heat, shown: ExplainedInput) -> None:
    axes, values = pictures.bare_axes(figure), pictures.spanned(scores)
    if shown.spec.modality == "points":
        pictures.cloud(axes, shown.raw[:, :3], pictures.colours(values[: len(shown.raw)], pictures.SCORE))
    elif shown.spec.modality == "audio":
        pictures.grid(axes, values.reshape(len(values), -1).T[::-1], pictures.SCORE)  # time to the right, low below
    else:
        pictures.grid(axes, values, pictures.SCORE)
        if values.ndim == 2:
            axes.set_box_aspect(np.clip(values.shape[0] / values.shape[1], 1 / 3, 3))  # 200 x 4 must not be a line


def _key(figure: Any, name: str, low: str, high: str) -> None:
    """Draw a colour map as a bar between two words."""
    bar = figure.add_axes((0, 0.7, 0.25, 0.3))
    bar.set_axis_off()
    pictures.grid(bar, np.linspace(0, 1, 256), name)
    for x, word, side in ((0, low, "left"), (0.25, high, "right")):
        figure.text(x, 0.6, word, ha=side, va="top", size=6, color=pictures.FAINT)
